"""Every iteration has prompts of its own, and every group its noise."""

from __future__ import annotations

import pytest
import torch
from conftest import FinishedRun

from ngrpo_lora import flow_sigmas
from ngrpo_lora.training.rollouts import prompts_of, roll_out


def test_every_iteration_has_its_own_prompts_and_every_group_its_own_noise(
    finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
):
    run = finished_run.run
    assert prompts_of(run) == [run.prompts.prompt(i) for i in (8, 9)]  # after 4 iterations of 2
    text = run.family.encode(["a red star"] * 2)
    first, second = (rollout.latents for rollout in roll_out(run, text))
    assert torch.equal(first, next(roll_out(run, text)).latents)
    assert not torch.equal(first[0], second[0])
    monkeypatch.setattr(run, "iteration", 5)
    assert prompts_of(run) == [run.prompts.prompt(i) for i in (10, 11)]
    assert not torch.equal(first[0], next(roll_out(run, text)).latents[0])


def test_an_algorithm_is_told_the_iteration_and_the_schedule(
    finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
):
    """What moves with time moves with it, also where a run goes on from a checkpoint."""
    run, told = finished_run.run, []
    rollout = run.algorithm.rollout
    monkeypatch.setattr(run.algorithm, "rollout", lambda *words: (told.append(words), rollout(*words))[1])
    monkeypatch.setattr(run, "iteration", 7)
    next(roll_out(run, run.family.encode(["a red star"])))
    ((_, schedule, shape, _, iteration, _),) = told
    assert (iteration, shape) == (7, run.family.latent_shape)
    assert torch.equal(schedule.sigmas, run.family.sigmas(4))
    assert schedule.shift == run.family.shift(4)
    assert torch.equal(run.family.schedule(4, 1.5).sigmas, flow_sigmas(4, 1.5))  # where the configuration gives a shift
