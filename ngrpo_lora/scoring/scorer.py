"""Calls rewards: images in, one number per image and reward out, NaN where there is none.

Every reward runs in a thread of its own, so that the trainer draws the next group while this one is judged. What a
reward does with its arguments, or to the process, reaches no other one: see `guests`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.guests.calls import described, in_thread, shown
from ngrpo_lora.guests.files import failure, left_at_import
from ngrpo_lora.guests.house import Guest, kept, thread_kept
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.types import Metrics, Samples

if TYPE_CHECKING:  # it needs a web server, which only votes do
    from ngrpo_lora.voting.voting import Voting

__all__ = ["Scorer", "Wait", "load_reward"]

log = logging.getLogger(__name__)


Form = Literal["batch", "group", "single", "video"]

POLL_S = 0.1


class Wait(Protocol):
    """Waits for the scores (N,) float64 of every reward, and calls `meanwhile` several times a second."""

    def __call__(self, meanwhile: Callable[[], None] = ...) -> dict[str, Tensor]: ...


@runtime_checkable
class Lasting(Protocol):
    """A reward of this package that goes on between its calls: it has figures of its own, and something to close."""

    def metrics(self) -> Metrics: ...

    def close(self) -> None: ...


@runtime_checkable
class AskingPeople(Protocol):
    """A reward that asks people, at a page that is open from when it is made until it is closed."""

    voting: Voting


class Scorer:
    """Calls several rewards at once, each in a thread of its own."""

    def __init__(self, configs: Sequence[RewardConfig], device: str = "cpu"):
        self.rewards: dict[str, BoundReward] = {}
        with ExitStack() as failing:
            failing.callback(self.close)  # where one cannot be had, the page of an earlier one is open
            for config in configs:
                self.rewards[config.key] = BoundReward(config, device)
            failing.pop_all()

    def submit(self, samples: Samples, cache: ScoreCache | None = None) -> Wait:
        """Start to score, and return a function that waits for the scores.

        It raises UserError where a reward does, or returns other than a score for each image; a reward that fails
        otherwise gives NaN and is logged.
        """
        calls = {label: partial(reward, samples, cache) for label, reward in self.rewards.items()}
        # One that may change the whole process waits until nothing is drawn.
        pending = {label: in_thread(call) for label, call in calls.items() if self.rewards[label].guest.known}

        def wait(meanwhile: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
            pending.update({label: in_thread(call) for label, call in calls.items() if label not in pending})
            for future in pending.values():
                while not wait_for([future], POLL_S).done:
                    meanwhile()
            return {label: pending[label].result() for label in calls}

        return wait

    def __call__(self, samples: Samples, cache: ScoreCache | None = None) -> dict[str, Tensor]:
        """Score now: (N,) float64 of every reward by label, NaN where it failed."""
        return self.submit(samples, cache)()

    @property
    def lasting(self) -> dict[str, Lasting]:
        """Rewards by label that go on between their calls."""
        ours = {label: one.function for label, one in self.rewards.items() if one.guest.trusted}
        return {label: function for label, function in ours.items() if isinstance(function, Lasting)}

    @property
    def voting(self) -> Voting | None:
        """The page at which people are asked, where a reward asks them."""
        return next((reward.voting for reward in self.lasting.values() if isinstance(reward, AskingPeople)), None)

    def metrics(self) -> Metrics:
        """Figures that rewards have of themselves, as `label/name`."""
        found = {label: reward.metrics() for label, reward in self.lasting.items()}
        return {f"{label}/{name}": value for label, own in found.items() for name, value in own.items()}

    def close(self) -> None:
        """End what rewards have going on; they are not called any more."""
        for reward in self.lasting.values():
            reward.close()


class BoundReward:
    """One reward: called as its parameters ask for, checked, limited in time, and masked with NaN where it fails."""

    def __init__(self, config: RewardConfig, device: str):
        self.config, self.label = config, config.key
        self.function = load_reward(config, device)
        own, is_ours = left_at_import(config.name.rpartition(":")[0]), config.name in registry.names(registry.REWARDS)
        self.guest = Guest(f"reward {self.label}", own, trusted=is_ours)
        self.form, self.parameters = call_form(config.name, self.function)
        call = self.function if inspect.isroutine(self.function) else type(self.function).__call__
        self.is_async = inspect.iscoroutinefunction(call)
        self.proven = self.silence_told = False
        self.reported: set[type[BaseException]] = set()
        self.failures: Counter[str] = Counter()  # of the last call: how many images have no score, by reason
        self.one_at_a_time = threading.Lock()

    def __call__(self, samples: Samples, cache: ScoreCache | None = None) -> Tensor:
        """Scores (N,) float64, from the cache where that has them, NaN where the reward failed."""
        if cache is None or not self.config.cache or self.form in ("group", "video"):
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
        # Ours that wait for a server must not keep its rewards out: it may be this process.
        is_client = self.guest.trusted and (self.is_async or self.config.name == "remote")
        visit = nullcontext() if is_client else self.guest.inside()
        with nullcontext() if self.is_async else self.one_at_a_time, visit:
            outcomes = self.outcomes(samples, parts)
        scores = torch.full((len(samples),), torch.nan, dtype=torch.float64)
        failures: Counter[str] = Counter()
        for rows, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, UserError):
                raise outcome
            if isinstance(outcome, BaseException):
                failures[described(outcome)] += len(rows)
            else:
                scores[rows] = self.checked(outcome, len(rows))
        self.failures = failures
        for reason, count in failures.items():
            log.warning("reward %s failed; %d of %d images are masked: %s", self.label, count, len(samples), reason)
        return scores

    def outcomes(self, samples: Samples, parts: list[list[int]]) -> list[Any]:
        """What each call returned, or the exception that it raised."""
        if self.is_async:
            return asyncio.run_coroutine_threadsafe(self.gather(samples, parts), event_loop()).result()
        return [self.attempt(partial(self.function, **self.arguments(samples, rows))) for rows in parts]

    def failed(self, error: BaseException) -> BaseException:
        """Log the traceback of the first error of each type, and return the error; one that is the user's has none."""
        if not isinstance(error, UserError) and type(error) not in self.reported:
            self.reported.add(type(error))
            log.warning("reward %s raised", self.label, exc_info=error)
        return error

    def parts(self, samples: Samples) -> Iterator[list[int]]:
        """Row numbers of each call: one image, one group, the frames of one video, or `batch_size` images."""
        if self.form == "video":
            yield from ([*rows] for _, rows in groupby(range(len(samples)), lambda row: id(samples.video(row))))
            return
        size = {"single": 1, "group": samples.group_size, "batch": self.config.batch_size or max(1, len(samples))}[
            self.form
        ]
        for start in range(0, len(samples), size):
            yield list(range(start, min(start + size, len(samples))))

    def arguments(self, samples: Samples, rows: list[int]) -> dict[str, Any]:
        """Keyword arguments of the call for these rows, by the names of the reward's parameters.

        A reward of the user's gets copies, and may do with them what it likes.
        """
        part = samples[rows]
        if not self.guest.trusted:
            images, metadata = [image.copy() for image in part.images], deepcopy([*part.metadata])
            part = replace(part, images=images, metadata=metadata)
            if self.form == "video":
                part = replace(part, videos=[[frame.copy() for frame in part.video(0)]])
        given = {"images": part.images, "prompts": part.prompts, "metadata": part.metadata}
        if self.form == "single":
            given = {"image": part.images[0], "prompt": part.prompts[0], "metadata": part.metadata[0]}
        if self.form == "video":
            given = {"video": part.video(0), "prompt": part.prompts[0], "metadata": part.metadata[0]}
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
        except BaseException as error:  # also of exit(); the user's Ctrl-C reaches the main thread alone
            return self.failed(error)

    async def gather(self, samples: Samples, parts: list[list[int]]) -> list[Any]:
        """Do what `attempt` does for a coroutine function, at most `concurrency` calls at once."""
        free = asyncio.Semaphore(self.config.concurrency)

        async def outcome(rows: list[int]) -> Any:
            try:
                return await self.function(**self.arguments(samples, rows))
            except (asyncio.CancelledError, TimeoutError):
                raise
            except BaseException as error:  # asyncio would end the loop of all rewards with it
                return self.failed(error)

        async def attempt(rows: list[int]) -> Any:
            async with free:
                try:
                    return await asyncio.wait_for(outcome(rows), self.config.timeout_s)
                except TimeoutError as error:
                    return TimeoutError(str(error) or f"no answer in {self.config.timeout_s} s (its timeout_s)")
                except asyncio.CancelledError as error:  # raised by the reward itself
                    return self.failed(error)

        with thread_kept():
            return await asyncio.gather(*(attempt(rows) for rows in parts))

    def checked(self, returned: Any, count: int) -> Tensor:
        """Check what a reward returned, (count,) float64; UserError for another shape.

        A score out of range is a UserError before the reward has given any score, and NaN afterwards.
        """
        scores = numbers(returned)
        if self.form in ("single", "video") and scores.ndim == 0:
            scores = scores.expand(count)  # of a video, the score of each of its images
        if scores.shape != (count,):
            wanted = "a number" if self.form in ("single", "video") else f"{count} numbers for {count} images"
            raise UserError(f"reward {self.label} must return {wanted}, got {shown(returned)}")
        silent = int((~scores.isfinite()).sum())
        if silent and not self.silence_told and not self.config.asks_people:  # who may leave images out
            self.silence_told = True
            what = "returned no finite number for %d of %d images, which are masked; this is said once"
            log.warning(f"reward %s {what}", self.label, silent, count)
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
    ("video", "prompt"): "video",
    ("video",): "video",
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
            f"reward {name} must have the parameters (images, prompts, metadata), (image, prompt, metadata), for whole "
            "videos (video, prompt, metadata) or, for whole groups, (images, prompt, metadata), got "
            f"{inspect.signature(function)}"
        )
    return form, wanted


def numbers(returned: Any) -> Tensor:
    """What a reward returned as float64, of its own shape; (0, 0) of what holds anything but real numbers."""
    try:
        if is_complex(returned):  # whose imaginary part PyTorch would drop
            raise TypeError
        if isinstance(returned, np.ma.MaskedArray):  # of which PyTorch would take what is behind the mask
            returned = np.ma.filled(returned.astype(float), np.nan)
        return torch.as_tensor(returned, dtype=torch.float64, device="cpu").detach().to_dense()
    except Exception:  # also an OverflowError, and whatever a class of the user's raises
        return torch.empty(0, 0)


def is_complex(value: Any) -> bool:
    """Whether a value is complex, or a list or tuple that holds one which is."""
    if isinstance(value, list | tuple):
        return any(map(is_complex, value))
    return isinstance(value, complex) or "complex" in str(getattr(value, "dtype", ""))


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The one loop that all async rewards share, for as long as the program runs."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        while not loop.is_closed():
            try:
                loop.run_forever()
            except BaseException:  # of a task that a reward has started and that calls exit
                log.warning("a task of an async reward raised", exc_info=True)

    in_thread(run)
    return loop


def load_reward(config: RewardConfig, device: str = "cpu") -> Callable[..., Any]:
    """Load the reward that a configuration names, ready to be called.

    Args:
        device: where a reward that has a network puts it when its own settings say `auto`.
    Raises:
        ConfigError: no such reward or function; the nearest one is named. Or its file fails at its import.
        UserError: what the reward needs (a package, weights, a server) is missing.
    """
    if ":" in config.name:
        try:
            return registry.resolve_function(config.name)
        except ConfigError as error:
            raise ConfigError(f"reward {config.key} {problem}" for problem in error.problems) from error
    try:
        with kept({}) if "." in config.name else nullcontext():
            module = registry.load(registry.REWARDS, config.name)
            return module.Reward(config, device) if hasattr(module, "Reward") else module.score
    except SystemExit as error:
        raise ConfigError(f"reward {config.key} {failure(config.name, error)}") from error
