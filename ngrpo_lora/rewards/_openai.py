"""A vision-language model behind an OpenAI-compatible server (vLLM, SGLang), asked about an image or an edit.

Source of the protocol: https://platform.openai.com/docs/api-reference/chat; start a server with
`vllm serve MODEL --limit-mm-per-prompt '{"image": 1}'`. The model's memory is the server's, none is needed here.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import Field

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards._http import Url, encode_png

if TYPE_CHECKING:
    from openai import OpenAI

__all__ = ["ServerConfig", "VisionServer", "read_number"]

FIRST_CONTACT_S = 10.0
TOP_LOGPROBS = 20  # the most that OpenAI's protocol allows
MIN_YES_NO = 0.1  # with less probability on both words the model answers something else, and their ratio is noise


class ServerConfig(RewardConfig, frozen=True):
    """Settings of a reward that asks a model behind an OpenAI-compatible server."""

    base_url: Url = Field(default="http://localhost:8000/v1", description="Address of the server, with its /v1.")
    model: str | None = Field(default=None, description="The model's name at the server; null: the only one there.")
    api_key_env: str | None = Field(
        default=None, min_length=1, description="Environment variable that holds the API key; null: none is needed."
    )
    max_tokens: int = Field(default=1024, ge=1, description="Most tokens of an answer.")
    max_retries: int = Field(
        default=5, ge=0, description="Further attempts, ever longer apart, while the server is busy or fails."
    )
    attempt_timeout_s: float = Field(
        default=120.0, gt=0, description="An attempt that takes longer is given up; timeout_s is for all of them."
    )
    cache: bool = True


class VisionServer:
    """A client of one model; every call needs the event loop that all async rewards share."""

    def __init__(self, config: ServerConfig):
        """Make sure that the server is there and has the model.

        Raises:
            UserError: openai is not installed, no API key, no such server, or no such model.
        """
        try:
            from openai import AsyncOpenAI, OpenAI
        except ImportError:
            raise UserError(
                f"reward {config.key} needs the package openai; install it with pip install openai"
            ) from None
        self.config = config
        api_key = "none" if config.api_key_env is None else os.environ.get(config.api_key_env)
        if not api_key:
            raise UserError(
                f"reward {config.key} takes its API key from the environment variable {config.api_key_env}, which is "
                f"empty; set it, or api_key_env"
            )
        self.client = AsyncOpenAI(
            base_url=config.base_url,
            api_key=api_key,
            timeout=config.attempt_timeout_s,
            max_retries=config.max_retries,
        )
        with OpenAI(base_url=config.base_url, api_key=api_key, timeout=FIRST_CONTACT_S, max_retries=1) as client:
            self.model = self.find_model(client)

    def find_model(self, client: OpenAI) -> str:
        """Contact the server and return the model's name there; UserError where either is missing."""
        import openai

        who, url = f"reward {self.config.key}", self.config.base_url
        try:
            offered = [model.id for model in client.models.list().data]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{who}: {url} refuses the API key (status {error.status_code}); put the right one into an environment "
                f"variable and its name into api_key_env, which is {self.config.api_key_env or 'null'}"
            ) from None
        except openai.APIConnectionError as error:
            raise UserError(
                f"{who} reaches no server at {url} ({error.__cause__ or error}); start one, for example with "
                f"`vllm serve MODEL`, or correct base_url"
            ) from None
        except (openai.APIError, AttributeError, TypeError) as error:
            raise UserError(
                f"{who} needs an OpenAI-compatible server, but {url}/models lists no models ({error}); correct "
                f"base_url, which mostly ends in /v1"
            ) from None
        wanted = self.config.model
        if wanted is None and len(offered) != 1:
            raise UserError(f"{who} needs to know which model to ask; set model to one of {', '.join(offered)}")
        if wanted is not None and offered and wanted not in offered:
            raise UserError(
                f"{who}: model must be one of {', '.join(offered)} at {url}, got {wanted!r}"
                f"{registry.nearest(wanted, offered)}"
            )
        return wanted or offered[0]

    async def answer(self, images: Sequence[Image.Image], question: str) -> str:
        """Ask about images, in this order, and return the model's answer, at temperature 0.

        Raises:
            ValueError: it is cut off at max_tokens.
            openai.OpenAIError: the server failed, or took too long, at every attempt.
        """
        completion = await self.client.chat.completions.create(
            model=self.model,
            messages=await _messages(images, question),
            temperature=0,
            max_tokens=self.config.max_tokens,
        )
        choice = completion.choices[0]
        text = choice.message.content or ""
        if choice.finish_reason == "length":
            raise ValueError(f"the answer must end within max_tokens {self.config.max_tokens}, got {text[:200]!r}")
        return text

    async def yes_probability(self, images: Sequence[Image.Image], question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the first token of the answer, in [0, 1]; either word in upper or lower case.

        Raises:
            ValueError: the server tells no probabilities, or the model answers something else.
            openai.OpenAIError: the server failed, or took too long, at every attempt.
        """
        completion = await self.client.chat.completions.create(
            model=self.model,
            messages=await _messages(images, question),
            temperature=0,
            max_tokens=1,
            logprobs=True,
            top_logprobs=TOP_LOGPROBS,
        )
        choice = completion.choices[0]
        if choice.logprobs is None or not choice.logprobs.content:
            raise ValueError(f"the server must tell top_logprobs, got none beside {choice.message.content!r:.200}")
        first = choice.logprobs.content[0].top_logprobs
        yes, no = (
            sum(math.exp(token.logprob) for token in first if token.token.strip().lower() == word)
            for word in ("yes", "no")
        )
        if yes + no < MIN_YES_NO:
            raise ValueError(f"the model must answer yes or no, but they have a probability of {yes + no:.2g}: {first}")
        return yes / (yes + no)


async def _messages(images: Sequence[Image.Image], question: str) -> list[Any]:
    encoded = [await asyncio.to_thread(encode_png, image) for image in images]
    urls = [{"url": f"data:image/png;base64,{data}"} for data in encoded]
    shown = [{"type": "image_url", "image_url": url} for url in urls]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


def read_number(answer: str, pattern: str, score_range: tuple[float, float]) -> float:
    """Read the number in the last match of the pattern's group in an answer.

    Raises:
        ValueError: no match, no number, or not within the range; the answer is quoted.
    """
    found = re.findall(pattern, answer)
    low, high = score_range
    try:
        score = float(found[-1])
    except (IndexError, ValueError):
        score = math.nan
    if not low <= score <= high:
        wanted = f"a number from {low:g} to {high:g}, as {pattern!r} finds it"
        raise ValueError(f"the answer must hold {wanted}, got {answer[:200]!r}")
    return score
