"""The LoRA that distils the embedded model: its targets, its training, and what the shipped one does in four steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.adapters.fusing import load_fused
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.equations.solvers import VelocityFn, dpmpp_2m, euler
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.prompts.sources import open_prompts
from ngrpo_lora.world import EMBEDDED, EMBEDDED_TURBO
from ngrpo_lora.world._parts import Flow
from ngrpo_lora.world.pretrain_turbo import (
    FINE,
    SIGMAS,
    SUBSTEPS,
    ask,
    both,
    main,
    make_student,
    teacher,
    train,
    velocity_of,
)
from ngrpo_lora.world.scenes import parse, split_scenes


@pytest.fixture
def flow() -> Flow:
    return make_student(rank=4)


def test_the_student_is_the_teacher_until_it_is_trained_and_only_its_lora_moves(flow: Flow):
    trained = [name for name, p in flow.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert not any(name.startswith("transformer.proj_out") for name in trained)  # the model's last layer
    velocity, latents = velocity_of(flow, ["a red star"]), torch.randn(1, 16, 64)
    with torch.no_grad(), teacher(flow):
        expected = velocity(latents, 0.9)
    assert torch.equal(velocity(latents, 0.9), expected)


@torch.no_grad()
def test_four_steps_of_the_known_velocities_go_where_the_teacher_goes_in_sixteen(flow: Flow, tmp_path: Path):
    steps = ask(tmp_path / "steps.safetensors", flow, 100, own=False)
    assert steps.step.tolist() == [step for step in range(4) for _ in range(100)]
    latents = steps.start[:100].float()
    end = dpmpp_2m(velocity_of(flow, steps.captions[:100]), latents, FINE)[-1]
    for step in range(4):
        here = steps.step == step
        assert torch.allclose(latents, steps.start[here].float(), atol=0.01)
        latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * steps.velocity[here].float()
    assert torch.allclose(latents, end, atol=0.02)
    held_out = {scene.meaning for task in ("color", "two") for scene in split_scenes(task)[1]}
    assert not {parse(caption).meaning for caption in steps.captions} & held_out


@torch.no_grad()
def test_the_students_own_points_are_drawn_with_the_lora_and_led_on_without(flow: Flow, tmp_path: Path):
    for name, weight in flow.named_parameters():
        if "lora_B" in name:
            weight.fill_(0.2)
    steps = ask(tmp_path / "own.safetensors", flow, 100, own=True)
    velocity, noise = velocity_of(flow, steps.captions[:100]), steps.start[:100].float()
    mine = euler(velocity, noise, SIGMAS)
    with teacher(flow):
        assert not torch.allclose(euler(velocity, noise, SIGMAS)[2], mine[2], atol=0.05)
        end = dpmpp_2m(velocity, mine[2], FINE[2 * SUBSTEPS : 3 * SUBSTEPS + 1])[-1]
    here = steps.step == 2
    assert torch.allclose(steps.start[here].float(), mine[2], atol=0.02)
    known = steps.start[here].float() + (SIGMAS[3] - SIGMAS[2]) * steps.velocity[here].float()
    assert torch.allclose(known, end, atol=0.02)


def test_training_brings_the_student_nearer_to_the_known_velocities(flow: Flow, tmp_path: Path):
    known = ask(tmp_path / "steps.safetensors", flow, 100, own=False)
    known = both(known, known)
    assert len(known.start) == len(known.step) == len(known.velocity) == len(known.captions) == 800

    @torch.no_grad()
    def error() -> float:
        found = flow(known.start[:400].float(), SIGMAS[known.step[:400]], *flow.tokenize(known.captions[:400]))
        return (found - known.velocity[:400].float()).square().mean().item()

    before = error()
    train(tmp_path / "adapter.safetensors", flow, known, 200, 3e-3)
    assert error() < 0.9 * before


def test_a_few_steps_make_a_lora_that_stock_diffusers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = ["--work-dir", str(tmp_path / "work"), "--output-dir", str(tmp_path / "lora")]
    monkeypatch.setattr(
        sys, "argv", ["pretrain_turbo", *folders, "--trajectories", "200", "--steps", "2", "--rank", "4"]
    )
    main()
    pipeline = FluxPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert pipeline.get_active_adapters() == ["default_0"]


def family_velocity(family: BaseFamily, prompts: list[str]) -> VelocityFn:
    text = family.encode(prompts)
    return lambda latents, sigma: family.velocity(latents, sigma, text)


@torch.no_grad()
def test_the_shipped_lora_draws_in_four_steps_what_the_base_draws_in_sixteen():
    """Its latents are far nearer to them than the base's in four steps; one in some lands on another picture."""
    source = open_prompts("world:held_out", 0)
    prompts = [source.prompt(i).text for i in range(24)]
    turbo, base = load_fused(ModelConfig(fuse={"embedded-turbo": 1.0})), load_family(ModelConfig(path="embedded"))
    noise = torch.stack([gaussian_noise(base.latent_shape, seed) for seed in range(24)])
    end = dpmpp_2m(family_velocity(base, prompts), noise, FINE)[-1]

    def away(found: Tensor) -> float:
        return (found - end).square().flatten(1).mean(1).median().item()

    student = away(euler(family_velocity(turbo, prompts), noise, SIGMAS)[-1])
    others = [away(solve(family_velocity(base, prompts), noise, SIGMAS)[-1]) for solve in (euler, dpmpp_2m)]
    assert student < 0.5 * min(others), (student, others)


def test_the_packages_lora_goes_by_its_name():
    assert find_adapter("embedded-turbo").parent == EMBEDDED_TURBO
    assert ModelConfig.model_validate({"fuse": "embedded-turbo"}).fuse == {"embedded-turbo": 1.0}
