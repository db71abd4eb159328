"""UnifiedReward, a vision-language model tuned to judge generated images, behind an OpenAI-compatible server.

    vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b

Source: "Unified Reward Model for Multimodal Understanding and Generation" (arXiv 2503.05236). The questions are those
of https://github.com/CodeGoat24/UnifiedReward (MIT): `inference_qwen/UnifiedReward-2.0-inference/
point_score_ACS_image_generation.py` for 2.0, `inference_qwen/image_generation/qwen_point_score_image_generation.py`
for 1.0. The model was trained on their exact words.

Scores are 1 to 5. Version 2.0 judges alignment, coherence and style apart, MixGRPO reports alignment; 1.0 gives one
final score. 2 to 32 billion parameters, at the server; for the licence of the weights see their model cards.
"""

from __future__ import annotations

from typing import Literal

from PIL import Image
from pydantic import Field

from ngrpo_lora.rewards._openai import ServerConfig, VisionServer, read_number

QUESTIONS = {
    "1.0": """\
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on \
two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of \
depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color \
accuracy, and overall aesthetic appeal.
Extract key elements from the provided text caption, evaluate their presence in the generated image using the format: \
'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a score from 1 to \
5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]""",
    "2.0": """\
You are presented with a generated image and its associated text caption. Your task is to analyze the image across \
multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]""",
}
NUMBER = r"\s*(-?\d+(?:\.\d+)?)"


class Config(ServerConfig, frozen=True):
    """Which UnifiedReward the server runs, and which of its scores counts."""

    version: Literal["1.0", "2.0"] = Field(default="2.0", description="Of the model: it decides on the question.")
    aspect: Literal["alignment", "coherence", "style"] = Field(
        default="alignment", description="The score of version 2.0 that counts; 1.0 has but one."
    )


class Reward:
    """Asks UnifiedReward for its score of one image, 1 to 5."""

    def __init__(self, config: Config, device: str):
        self.question = QUESTIONS[config.version]
        name = "Final Score" if config.version == "1.0" else rf"{config.aspect.title()} Score \(1-5\)"
        self.pattern = f"{name}:{NUMBER}"
        self.server = VisionServer(config)

    async def __call__(self, image: Image.Image, prompt: str) -> float:
        """Score one image with a number from 1 to 5.

        Raises:
            ValueError: the answer holds no score.
            openai.OpenAIError: the server failed, or took too long, at every attempt.
        """
        answer = await self.server.answer([image], self.question.replace("{prompt}", prompt))
        return read_number(answer, self.pattern, (1.0, 5.0))
