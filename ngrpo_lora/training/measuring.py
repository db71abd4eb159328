"""Measures of an evaluation: functions of all held-out pictures at once, which see what a score of one cannot."""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Real

import numpy as np
from PIL import Image

from ngrpo_lora import registry
from ngrpo_lora.errors import ConfigError, SharedError, UserError, first_line
from ngrpo_lora.guests.calls import described, in_thread, shown
from ngrpo_lora.guests.files import left_at_import
from ngrpo_lora.guests.house import Guest
from ngrpo_lora.training.processes import Processes
from ngrpo_lora.training.rewarding import middle_frames
from ngrpo_lora.training.run import Run
from ngrpo_lora.types import Metrics

__all__ = ["measure", "open_measures"]

log = logging.getLogger(__name__)


def open_measures(references: Sequence[str], processes: Processes) -> dict[str, Callable[..., object]]:
    """Import the functions of `evaluation.measures`, by reference.

    Raises:
        SharedError: there is no such function, or it does not take images and prompts.
    """
    functions: dict[str, Callable[..., object]] = {}
    problems: list[str] = []
    for index, reference in enumerate(references):
        try:
            functions[reference] = registry.resolve_function(reference)
        except ConfigError as error:
            problems.append(f"evaluation.measures.{index} {error}")
            continue
        try:
            inspect.signature(functions[reference]).bind([], [])
        except (TypeError, ValueError) as error:
            problems.append(
                f"evaluation.measures.{index} must be a function of (images, prompts), but {reference} is not "
                f"({first_line(error)}); give it these two parameters"
            )
    if problem := processes.agree("\n".join(problems) or None):
        raise SharedError(problem)
    return functions


def measure(run: Run, images: list[Image.Image]) -> Metrics:
    """Measure the held-out pictures of all processes, of which this one has drawn `images`; `eval/...` metrics.

    A function sees one picture a prompt, of a video its middle frame. The main process calls it for all.

    Raises:
        SharedError: a function failed on the base model's pictures; on those of a trained one that is only logged.
    """
    if not run.measures:
        return {}
    own = [np.asarray(image) for image in middle_frames(run, images)]
    pictures = [Image.fromarray(pixels) for share in run.processes.gather(own) for pixels in share]
    prompts, metrics, problems = [prompt.text for prompt in run.held_out], Metrics(), []
    if run.processes.is_main:
        for reference, function in run.measures.items():
            try:
                metrics |= call(reference, function, pictures, prompts, metrics)
            except UserError as error:
                problems.append(str(error))
    metrics, problems = run.processes.broadcast((metrics, problems))
    if problems and run.iteration == 0:
        raise SharedError(f"evaluation of the base model: {problems[0]}")
    for problem in problems:
        log.warning("evaluation at iteration %d: %s", run.iteration, problem)
    return metrics


def call(
    reference: str,
    function: Callable[..., object],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    known: Metrics,
) -> Metrics:
    """Call one function, and check what it returns; `eval/...` metrics, none of them among those that are `known`.

    Raises:
        UserError: it failed, or returned other than finite numbers by name, or a name that means something else.
    """

    def visit() -> object:
        try:
            with guest(reference).inside():
                returned = function([image.copy() for image in images], [*prompts])
                return dict(returned) if isinstance(returned, Mapping) else returned
        except BaseException as error:  # also of exit(); the user's Ctrl-C reaches the main thread alone
            return error

    returned = in_thread(visit).result()
    if isinstance(returned, BaseException):
        log.warning("measure %s raised", reference, exc_info=returned)
        raise UserError(
            f"evaluation.measures: {reference} failed ({described(returned)}); correct it, or take it out of the list"
        )
    metrics = Metrics()
    for name, value in returned.items() if isinstance(returned, dict) else [(None, None)]:
        number = as_float(value)
        if not isinstance(name, str) or not math.isfinite(number):
            raise UserError(
                f"evaluation.measures: {reference} must return finite numbers by name, such as {{'hue_bits': 2.5}}, "
                f"got {shown(returned)}; leave out what cannot be measured"
            )
        key = f"eval/{name}"
        free = re.fullmatch(r"[\w.-]+(?<!_mean)", name) and name != "strict_accuracy" and key not in known
        if not free:
            raise UserError(
                f"evaluation.measures: {reference} must give names of its own, of letters, digits, _, - and ., that do "
                f"not end in _mean as those of rewards do, got {name!r}; rename it"
            )
        metrics[key] = number
    return metrics


@cache
def guest(reference: str) -> Guest:
    """How the function behind `reference` behaves, as far as is known in this process."""
    return Guest(f"measure {reference}", left_at_import(registry.split_reference(reference)[0]))


def as_float(value: object) -> float:
    """A real number as float; NaN of anything else, and of what is too large for one."""
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except Exception:
        return math.nan
