"""A vision-language model as the judge, with a question of your own, behind an OpenAI-compatible server.

    rewards.train: [{name: judge, base_url: http://gpu-host:8000/v1, model: Qwen/Qwen2.5-VL-7B-Instruct}]

The score is the number that the model writes (`answer: number`), or the probability with which its answer begins with
yes, P(yes) / (P(yes) + P(no)) (`answer: logprobs`): continuous, and one token instead of many. An answer without a
score is a failed score. Of an edit the source picture is sent before the edited one, with the question `edit_template`
(vLLM: `--limit-mm-per-prompt '{"image": 2}'`). The licence and the memory are those of the model that the server runs.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from PIL import Image
from pydantic import Field, field_validator

from ngrpo_lora.config.section import Bounds
from ngrpo_lora.rewards._openai import ServerConfig, VisionServer, read_number

TEMPLATE = """This image was made for the following description.

Description: {prompt}

Rate how well the image shows what the description says, from 0 (nothing of it) to 10 (all of it). First name what is \
right and what is missing or wrong, in one sentence. Then end with a line of the form
Score: N"""

EDIT_TEMPLATE = """The first image was to be edited as follows; the second image is the result.

Edit: {prompt}

Rate the result from 0 to 10: does it show the edit, and is all else as it was in the first image? First name what is \
right and what is missing, wrong or changed without need, in one sentence. Then end with a line of the form
Score: N"""


class Config(ServerConfig, frozen=True):
    """A question to a vision-language model and how its answer is read."""

    template: str = Field(default=TEMPLATE, description="The question; {prompt} is where the prompt goes.")
    edit_template: str = Field(
        default=EDIT_TEMPLATE, description="The question about an edit, beside its source picture and the result."
    )
    answer: Literal["number", "logprobs"] = Field(
        default="number", description="number: what pattern finds in the answer; logprobs: how probable a yes is."
    )
    pattern: str = Field(
        default=r"Score:\s*(-?\d+(?:\.\d+)?)",
        description="Regular expression with one group, the number; its last match counts.",
    )
    score_range: Bounds = Field(
        default=(0.0, 10.0), strict=False, description="[low, high] of the number; one outside is a failed score."
    )

    @field_validator("template", "edit_template")
    @classmethod
    def _holds_the_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError(f"must hold {{prompt}}, where the prompt goes, got {value!r}")
        return value

    @field_validator("pattern")
    @classmethod
    def _has_one_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"must be a regular expression, got {value!r} ({error})") from None
        if groups != 1:
            raise ValueError(f"must have one group, the number, got {groups} in {value!r}; (?:...) groups without one")
        return value

    @field_validator("score_range")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"must be [low, high] with low below high, got {list(value)}")
        return value


class Reward:
    """Asks a vision-language model for its score of one image."""

    def __init__(self, config: Config, device: str):
        self.config = config
        self.server = VisionServer(config)

    async def __call__(self, image: Image.Image, prompt: str, metadata: dict[str, Any]) -> float:
        """Score one image, beside its source where there is one, within `score_range`; for `logprobs` a probability.

        Raises:
            ValueError: the answer holds no score.
            openai.OpenAIError: the server failed, or took too long, at every attempt.
        """
        source = metadata.get("source")
        is_edit = isinstance(source, Image.Image)
        images = [source, image] if is_edit else [image]
        question = (self.config.edit_template if is_edit else self.config.template).replace("{prompt}", prompt)
        if self.config.answer == "logprobs":
            return await self.server.yes_probability(images, question)
        answer = await self.server.answer(images, question)
        return read_number(answer, self.config.pattern, self.config.score_range)
