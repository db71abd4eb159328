"""The updates of an iteration: which transitions, their velocities and losses, and one LoRA step for each update."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.state import on_cpu, state
from ngrpo_lora.types import Metrics, Rollout, TextEmbeds, Transition, Velocities, mean_metrics

log = logging.getLogger(__name__)

Chunk = list[Transition]
"""A micro-batch of transitions; their groups are counted among this process's own."""


def update(run: Run, rollouts: list[Rollout], advantages: Tensor, text: TextEmbeds) -> Metrics:
    """Make every update of this iteration; gradients are sums over all processes' transitions.

    Args:
        rollouts, text: of this process's groups.
        advantages: of all groups.
    Raises:
        UserError: nothing has moved for long, as losses or gradients are not finite.
    """
    config, step = run.config, run.lora_step
    updates = run.algorithm.updates(advantages, derive_seed(config.seed, "updates", run.iteration), run.iteration)
    run.kept = on_cpu(state(run))  # has drawn this iteration's pictures, which what follows has yet to prove
    rate = step.set_rate(run.iteration, config.trainer.num_iterations)
    own_advantages = advantages[run.groups.start : run.groups.stop]
    chunks = [own_chunks(run, transitions) for transitions in updates]
    rows, norms = [], []
    for transitions, own, old in zip(updates, chunks, old_velocities(run, chunks, rollouts, text), strict=True):
        metrics, finite = [], True
        for chunk, old_velocity in zip(own, old, strict=True):
            losses, described = chunk_losses(run, chunk, rollouts, own_advantages, text, old_velocity)
            finite = finite and bool(losses.isfinite().all())
            step.backward(losses.sum() / len(transitions))
            metrics += described
        everywhere = run.processes.gather((metrics, finite))
        rows += [row for share, _ in everywhere for row in share]
        norms.append(step.take(all(well for _, well in everywhere), empty=not transitions))
        if math.isnan(norms[-1]):
            log.warning("iteration %d: loss or gradient is not finite; update skipped", run.iteration + 1)
    step.check_progress()
    taken = [norm for norm in norms if not math.isnan(norm)]
    return mean_metrics(rows, run.algorithm.metric_names) | {
        "lora/grad_norm": sum(taken) / len(taken) if taken else math.nan,
        "lora/learning_rate": rate,
        "policy/skipped_updates": float(len(norms) - len(taken)),
    }


def own_chunks(run: Run, transitions: list[Transition]) -> list[Chunk]:
    """An update's transitions of this process's groups, which are counted from 0 here, as micro-batches.

    FSDP needs as many forward passes on every process: what is missing is filled with empty micro-batches.
    """
    size = run.config.trainer.micro_batch_size
    own = [t._replace(group=t.group - run.groups.start) for t in transitions if t.group in run.groups]
    chunks = [own[start : start + size] for start in range(0, len(own), size)]
    if run.base_is_sharded:
        shares = run.processes.shares(run.config.rollout.prompts_per_iteration)
        most = max(sum(t.group in groups for t in transitions) for groups in shares)
        chunks += [[]] * (-(-most // size) - len(chunks))
    return chunks


OldVelocities = Sequence[Tensor | None] | None
"""Of a micro-batch, one a transition; None where the weights are still the old ones and the pass itself has them."""


@torch.no_grad()
def old_velocities(
    run: Run, chunks: list[list[Chunk]], rollouts: list[Rollout], text: TextEmbeds
) -> list[list[OldVelocities]]:
    """Old velocities of every micro-batch of every update, before anything moves.

    The first update starts at the old weights. For later ones they are computed where the algorithm needs them.
    """

    def of(chunk: Chunk) -> OldVelocities:
        return [*velocities(run, chunk, rollouts, text).cpu()] if run.algorithm.needs_old else [None] * len(chunk)

    first, *later = chunks
    return [[None] * len(first), *([of(chunk) for chunk in update] for update in later)]


def velocities(run: Run, chunk: Chunk, rollouts: list[Rollout], text: TextEmbeds) -> Tensor:
    """Velocities (M, C, H, W) at the starts of transitions, in one forward pass; of none, that of any one."""
    chunk = chunk or [Transition(0, 0, 0)]
    device = run.family.device
    latents = torch.stack([rollouts[t.group].latents[t.step, t.sample] for t in chunk]).to(device)
    sigmas = torch.stack([rollouts[t.group].sigmas[t.step] for t in chunk]).to(device)
    return run.family.velocity(latents, sigmas, text[[t.group for t in chunk]])


def chunk_losses(
    run: Run, chunk: Chunk, rollouts: list[Rollout], advantages: Tensor, text: TextEmbeds, old: OldVelocities
) -> tuple[Tensor, list[Metrics]]:
    """Losses (M,) of a micro-batch, and each transition's metrics."""
    reference: Sequence[Tensor | None] = [None] * len(chunk)
    if run.algorithm.needs_reference:
        with torch.no_grad(), lora.disabled(run.family.transformer):
            reference = list(velocities(run, chunk, rollouts, text).cpu())
    current = velocities(run, chunk, rollouts, text).cpu()
    if not chunk:
        return current.flatten()[:0].sum(0, keepdim=True), []  # no loss, and a backward pass all the same
    before = current.detach() if old is None else old
    terms = [
        run.algorithm.loss(rollouts[t.group], advantages[t.group], t, Velocities(new, old_one, base))
        for t, new, old_one, base in zip(chunk, current, before, reference, strict=True)
    ]
    return torch.stack([loss for loss, _ in terms]), [metrics for _, metrics in terms]
