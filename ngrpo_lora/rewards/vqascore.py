"""VQAScore: how probable a vision-language model finds "yes" when asked whether the image shows the prompt, in [0, 1].

    P(yes) / (P(yes) + P(no)) of the first answer token

Source: "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (arXiv 2404.01291), whose question this
is. Departures: its CLIP-FlanT5-XXL takes P(yes) alone; here any model behind an OpenAI-compatible server answers, as
for the reward `judge`, so scores of different models do not compare. The licence and the memory are that model's.
"""

from __future__ import annotations

from PIL import Image

from ngrpo_lora.rewards._openai import ServerConfig as Config
from ngrpo_lora.rewards._openai import VisionServer

__all__ = ["Config", "Reward"]

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'


class Reward:
    """Asks a model whether one image shows its prompt: VQAScore, in [0, 1]."""

    def __init__(self, config: Config, device: str):
        self.server = VisionServer(config)

    async def __call__(self, image: Image.Image, prompt: str) -> float:
        """Probability of a yes, in [0, 1]; raises what `VisionServer.yes_probability` raises."""
        return await self.server.yes_probability([image], QUESTION.replace("{prompt}", prompt))
