"""Calls rewards: images in, one number per image and reward out, NaN where there is none.

Every reward runs in a thread of its own, so that the trainer draws the next group while this one is judged.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from functools import cache, partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.types import Samples

__all__ = ["Scorer", "Wait", "load_reward"]

log = logging.getLogger(__name__)


Form = Literal["batch", "group", "single"]

POLL_S = 0.2


class Wait(Protocol):
    """Waits for the scores (N,) float64 of every reward, and calls `meanwhile` several times a second."""

    def __call__(self, meanwhile: Callable[[], None] = ...) -> dict[str, Tensor]: ...


class Scorer:
    """Calls several rewards at once, each in a thread of its own."""

    def __init__(self, configs: Sequence[RewardConfig], device: str = "cpu"):
        self.rewards = {config.key: BoundReward(config, device) for config in configs}

    def submit(self, samples: Samples, cache: ScoreCache | None = None) -> Wait:
        """Start to score, and return a function that waits for the scores.

        It raises UserError where a reward does, or returns other than a score for each image; a reward that fails
        otherwise gives NaN and is logged.
        """
        pending = {label: in_thread(partial(reward, samples, cache)) for label, reward in self.rewards.items()}

        def wait(meanwhile: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
            for future in pending.values():
                while not wait_for([future], POLL_S).done:
                    meanwhile()
            return {label: future.result() for label, future in pending.items()}

        return wait

    def __call__(self, samples: Samples, cache: ScoreCache | None = None) -> dict[str, Tensor]:
        """Score now: (N,) float64 of every reward by label, NaN where it failed."""
        return self.submit(samples, cache)()


class BoundReward:
    """One reward: called as its parameters ask for, checked, limited in time, and masked with NaN where it fails."""

    def __init__(self, config: RewardConfig, device: str):
        self.config, self.label = config, config.key
        self.function = load_reward(config, device)
        self.form, self.parameters = call_form(config.name, self.function)
        call = self.function if inspect.isroutine(self.function) else type(self.function).__call__
        self.is_async = inspect.iscoroutinefunction(call)
        self.proven = False
        self.reported: set[type[Exception]] = set()
        self.failures: Counter[str] = Counter()  # of the last call: how many images have no score, by reason
        self.one_at_a_time = threading.Lock()

    def __call__(self, samples: Samples, cache: ScoreCache | None = None) -> Tensor:
        """Scores (N,) float64, from the cache where that has them, NaN where the reward failed."""
        if cache is None or not self.config.cache or self.form == "group":
            return self.score(samples)
        keys = cache.keys(self.config, samples)
        known = cache.read(keys)
        missing = [row for row, key in enumerate(keys) if key not in known]
        new = self.score(samples[missing]).tolist() if missing else []
        known |= {keys[row]: score for row, score in zip(missing, new, strict=True)}
        cache.write({keys[row]: known[keys[row]] for row in missing})
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)

    def score(self, samples: Samples) -> Tensor:
        """Scores (N,) float64 from the reward itself, without the cache; NaN where it failed."""
        parts = list(self.parts(samples))
        if self.is_async:
            outcomes = asyncio.run_coroutine_threadsafe(self.gather(samples, parts), event_loop()).result()
        else:
            with self.one_at_a_time:
                outcomes = [self.attempt(partial(self.function, **self.arguments(samples, rows))) for rows in parts]
        scores = torch.full((len(samples),), torch.nan, dtype=torch.float64)
        failures: Counter[str] = Counter()
        for rows, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, UserError):
                raise outcome
            if isinstance(outcome, Exception):
                failures[f"{type(outcome).__name__}: {outcome}"] += len(rows)
            else:
                scores[rows] = self.checked(outcome, len(rows))
        self.failures = failures
        for reason, count in failures.items():
            log.warning("reward %s failed; %d of %d images are masked: %s", self.label, count, len(samples), reason)
        return scores

    def failed(self, error: Exception) -> Exception:
        """Log the traceback of the first error of each type, and return the error."""
        if type(error) not in self.reported:
            self.reported.add(type(error))
            log.warning("reward %s raised", self.label, exc_info=error)
        return error

    def parts(self, samples: Samples) -> Iterator[list[int]]:
        """Row numbers of each call: one image, one group, or `batch_size` images."""
        size = {"single": 1, "group": samples.group_size, "batch": self.config.batch_size or max(1, len(samples))}[
            self.form
        ]
        for start in range(0, len(samples), size):
            yield list(range(start, min(start + size, len(samples))))

    def arguments(self, samples: Samples, rows: list[int]) -> dict[str, Any]:
        """Keyword arguments of the call for these rows, by the names of the reward's parameters."""
        part = samples[rows]
        given = {"images": part.images, "prompts": part.prompts, "metadata": part.metadata}
        if self.form == "single":
            given = {"image": part.images[0], "prompt": part.prompts[0], "metadata": part.metadata[0]}
        if self.form == "group":
            given = {"images": part.images, "prompt": part.prompts[0], "metadata": part.metadata[0]}
        return {name: given[name] for name in self.parameters}

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Call within `timeout_s`, and give what it returns, or the exception that it raised."""
        try:
            if self.config.timeout_s is None:
                with torch.no_grad():
                    return call()
            return in_thread(call).result(self.config.timeout_s)
        except TimeoutError as error:
            return TimeoutError(str(error) or f"no answer in {self.config.timeout_s:g} s (its timeout_s)")
        except Exception as error:
            return self.failed(error)

    async def gather(self, samples: Samples, parts: list[list[int]]) -> list[Any]:
        """Do what `attempt` does for a coroutine function, at most `concurrency` calls at once."""
        free = asyncio.Semaphore(self.config.concurrency)

        async def attempt(rows: list[int]) -> Any:
            async with free:
                answer: Awaitable[Any] = self.function(**self.arguments(samples, rows))
                try:
                    return await asyncio.wait_for(answer, self.config.timeout_s)
                except TimeoutError as error:
                    return TimeoutError(str(error) or f"no answer in {self.config.timeout_s} s (its timeout_s)")
                except Exception as error:
                    return self.failed(error)

        return await asyncio.gather(*(attempt(rows) for rows in parts))

    def checked(self, returned: Any, count: int) -> Tensor:
        """Check what a reward returned, (count,) float64; UserError for another shape.

        A score out of range is a UserError before the reward has given any score, and NaN afterwards.
        """
        try:
            scores = torch.as_tensor(returned, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            scores = torch.empty(0, 0)
        if self.form == "single" and scores.ndim == 0:
            scores = scores[None]
        if scores.shape != (count,):
            wanted = "a number" if self.form == "single" else f"{count} numbers for {count} images"
            raise UserError(f"reward {self.label} must return {wanted}, got {returned!r:.200}")
        if self.config.range is not None:
            low, high = self.config.range
            outside = (scores < low) | (scores > high)
            if outside.any():
                what = f"reward {self.label} must lie in its range [{low:g}, {high:g}], got {scores[outside][0]:g}"
                if not self.proven:
                    raise UserError(f"{what}; fix the reward or its range")
                log.warning("%s; %d images are masked", what, int(outside.sum()))
                scores = scores.where(~outside, torch.nan)
        self.proven = self.proven or bool(scores.isfinite().any())
        return scores


FORMS: dict[tuple[str, ...], Form] = {
    ("images", "prompts"): "batch",
    ("images", "prompt"): "group",
    ("images",): "batch",
    ("image", "prompt"): "single",
    ("image",): "single",
}


def call_form(name: str, function: Callable[..., Any]) -> tuple[Form, list[str]]:
    """Find out from its signature how a reward is called, and by which parameters.

    Raises:
        UserError: the parameters fit none of the forms of a reward.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise UserError(f"reward {name} must be a Python function, got {function!r}; wrap it in one") from None
    wanted = [p.name for p in parameters if p.default is p.empty or p.name in ("prompt", "prompts", "metadata")]
    plain = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)
    form = FORMS.get(tuple(name for name in wanted if name != "metadata"))
    if form is None or not plain:
        raise UserError(
            f"reward {name} must have the parameters (images, prompts, metadata), (image, prompt, metadata) or, for "
            f"whole groups, (images, prompt, metadata), got {inspect.signature(function)}"
        )
    return form, wanted


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Run `call` in a daemon thread without gradient; one that hangs does not keep the program alive."""
    future: Future[Any] = Future()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # a new thread begins with the first

    def run() -> None:
        try:
            with torch.cuda.device(gpu), torch.no_grad():
                future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The one loop that all async rewards share, for as long as the program runs."""
    loop = asyncio.new_event_loop()
    in_thread(loop.run_forever)
    return loop


def load_reward(config: RewardConfig, device: str = "cpu") -> Callable[..., Any]:
    """Load the reward that a configuration names, ready to be called.

    Args:
        device: where a reward that has a network puts it when its own settings say `auto`.
    Raises:
        ConfigError: no such reward or function; the nearest one is named.
        UserError: what the reward needs (a package, weights, a server) is missing.
    """
    if ":" in config.name:
        return registry.resolve_function(config.name)
    module = registry.load(registry.REWARDS, config.name)
    return module.Reward(config, device) if hasattr(module, "Reward") else module.score
