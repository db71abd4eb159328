"""The updates of an iteration: which transitions, their velocities and losses, and one LoRA step for each update."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.algorithms._base import losses
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.state import on_cpu, state
from ngrpo_lora.types import Metrics, Rollout, TextEmbeds, Transition, Velocities, beside, exact, mean_metrics

log = logging.getLogger(__name__)

DOUBLE = torch.float64

Old = Sequence[Tensor | None] | None
"""Old velocities, one a transition; None where the weights are still the old ones and the pass itself has them."""

T = TypeVar("T")


class Drawn(NamedTuple):
    """What this iteration has drawn of this process's groups; transitions count their groups among these."""

    rollouts: list[Rollout]
    advantages: Tensor
    text: TextEmbeds


class Share(NamedTuple):
    """This process's transitions of an update.

    most: how many the process with the most of them has, where all must make as many passes; else how many these are.
    total: how many all processes have.
    """

    own: list[Transition]
    most: int
    total: int


def update(run: Run, rollouts: list[Rollout], advantages: Tensor, text: TextEmbeds) -> Metrics:
    """Make every update of this iteration; gradients are sums over all processes' transitions.

    Args:
        rollouts, text: of this process's groups.
        advantages: of all groups.
    Raises:
        UserError: nothing has moved for long, as losses or gradients are not finite; or memory is not enough.
    """
    config, step = run.config, run.lora_step
    updates = run.algorithm.updates(advantages, derive_seed(config.seed, "updates", run.iteration), run.iteration)
    run.kept = on_cpu(state(run))  # has drawn this iteration's pictures, which what follows has yet to prove
    rate = step.set_rate(run.iteration, config.trainer.num_iterations)
    drawn = Drawn(rollouts, advantages[run.groups.start : run.groups.stop], text)
    shares = [own_share(run, transitions) for transitions in updates]
    rows, norms = [torch.empty(0, len(run.algorithm.metric_names), dtype=torch.float64)], []
    for share, old in zip(shares, old_velocities(run, shares, drawn), strict=True):
        found = run.micro_batches.update.fit(partial(add_gradients, run, share, drawn, old))
        everywhere = run.processes.gather(found)
        rows += [described for described, _ in everywhere]
        norms.append(step.take(all(well for _, well in everywhere), empty=not share.total))
        if math.isnan(norms[-1]):
            log.warning("iteration %d: loss or gradient is not finite; update skipped", run.iteration + 1)
    step.check_progress()
    taken = [norm for norm in norms if not math.isnan(norm)]
    return mean_metrics(torch.cat(rows), run.algorithm.metric_names) | {
        "lora/grad_norm": sum(taken) / len(taken) if taken else math.nan,
        "lora/learning_rate": rate,
        "policy/skipped_updates": float(len(norms) - len(taken)),
    }


def own_share(run: Run, transitions: list[Transition]) -> Share:
    """An update's transitions of this process's groups, which are counted from 0 here."""
    groups = run.groups
    own = [t._replace(group=t.group - groups.start) for t in transitions if t.group in groups]
    if not run.base_is_sharded:
        return Share(own, len(own), len(transitions))
    shares = run.processes.shares(run.config.rollout.prompts_per_iteration)
    return Share(own, max(sum(t.group in some for t in transitions) for some in shares), len(transitions))


def chunks(items: Sequence[T], size: int, most: int) -> list[Sequence[T]]:
    """Split items into micro-batches; empty ones follow, until there are as many as `most` items make."""
    return [items[start : start + size] for start in range(0, max(len(items), most), size)]


def add_gradients(run: Run, share: Share, drawn: Drawn, old: Old, size: int) -> tuple[Tensor, bool]:
    """Add up the gradients of an update's own transitions, `size` of them a pass; the device is waited for at the end.

    Returns:
        Each transition's metrics, (M, names) float64 on the CPU, and whether all losses are finite.
    """
    run.lora_step.forget()  # what an attempt left for which memory ran out
    found = [torch.zeros(0, 1 + len(run.algorithm.metric_names), dtype=DOUBLE)]
    for index, chunk in enumerate(chunks(share.own, size, share.most)):
        before = None if old is None else old[index * size :][: len(chunk)]
        total, rows = chunk_losses(run, chunk, drawn, before)
        run.lora_step.backward(total / share.total)
        found.append(rows)
    losses, metrics = torch.cat([rows.cpu() for rows in found]).tensor_split([1], 1)
    return metrics, bool(losses.isfinite().all())


@torch.no_grad()
def old_velocities(run: Run, shares: Sequence[Share], drawn: Drawn) -> list[Old]:
    """Old velocities of every update's own transitions, before anything moves.

    The first update starts at the old weights. For later ones they are computed where the algorithm needs them.
    """

    def of(share: Share, size: int) -> list[Tensor]:
        passes = [velocities(run, chunk, drawn).cpu() for chunk in chunks(share.own, size, share.most)]
        return [velocity for chunk in passes for velocity in chunk][: len(share.own)]

    needed, fit = run.algorithm.needs_old, run.micro_batches.update.fit
    later = [fit(partial(of, share)) if needed else [None] * len(share.own) for share in shares[1:]]
    return [None, *later]


def velocities(run: Run, chunk: Sequence[Transition], drawn: Drawn) -> Tensor:
    """Velocities (M, C, H, W) at the starts of transitions, in one forward pass; of none, that of any one."""
    chunk = chunk or [Transition(0, 0, 0)]
    device, rollouts = run.family.device, drawn.rollouts
    latents = torch.stack([rollouts[t.group].latents[t.step, t.sample] for t in chunk]).to(device, non_blocking=True)
    sigmas = torch.stack([rollouts[t.group].sigmas[t.step] for t in chunk]).to(device, non_blocking=True)
    return run.family.velocity(latents, sigmas, drawn.text[[t.group for t in chunk]])


def chunk_losses(run: Run, chunk: Sequence[Transition], drawn: Drawn, old: Old) -> tuple[Tensor, Tensor]:
    """The sum of a micro-batch's losses, and each one with its metrics, (M, 1 + names) float64, on the device."""
    reference = None
    if run.algorithm.needs_reference:
        with torch.no_grad(), lora.disabled(run.family.transformer):
            reference = exact(velocities(run, chunk, drawn))
    current = exact(velocities(run, chunk, drawn))
    names = run.algorithm.metric_names
    if not chunk:  # no loss, and a backward pass all the same
        return current.flatten()[:0].sum(), current.new_zeros(0, 1 + len(names), dtype=DOUBLE)
    known = Velocities(current, current.detach() if old is None else stacked(old, current), reference)
    found, metrics = losses(run.algorithm, drawn.rollouts, drawn.advantages, chunk, known)
    columns = [found.detach(), *(metrics[name] for name in names)]
    return found.sum(), torch.stack([column.double() for column in columns], 1)


def stacked(old: Sequence[Tensor | None], current: Tensor) -> Tensor | None:
    """Old velocities as one tensor beside the current ones; None where the algorithm keeps its own."""
    given = [velocity for velocity in old if velocity is not None]
    return beside(torch.stack(given), current) if given else None
