"""The LoRA that distils the embedded model: its targets, its training, and what the shipped one does in four steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.adapters.fusing import load_fused
from ngrpo_lora.config import LoraConfig, ModelConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.equations.solvers import VelocityFn, dpmpp_2m, euler
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.prompts.sources import open_prompts
from ngrpo_lora.world import EMBEDDED, EMBEDDED_TURBO
from ngrpo_lora.world.pretrain_turbo import FINE, SIGMAS, SUBSTEPS, Steps, ask, both, main, train
from ngrpo_lora.world.scenes import parse, split_scenes


@pytest.fixture
def family() -> BaseFamily:
    found = load_family(ModelConfig(path="embedded"))
    lora.inject(found.transformer, LoraConfig(rank=4), *found.lora_targets("attention+feed_forward"), seed=0)
    return found


def velocity_of(family: BaseFamily, prompts: list[str]) -> VelocityFn:
    text = family.encode(prompts)
    return lambda latents, sigma: family.velocity(latents, sigma, text)


@torch.no_grad()
def test_four_steps_of_the_known_velocities_go_where_the_teacher_goes_in_sixteen(family: BaseFamily, tmp_path: Path):
    steps = ask(tmp_path / "steps.safetensors", family, 100, own=False)
    assert steps.step.tolist() == [step for step in range(4) for _ in range(100)]
    latents = steps.start[:100].float()
    end = dpmpp_2m(velocity_of(family, steps.captions[:100]), latents, FINE)[-1]
    for step in range(4):
        here = steps.step == step
        assert torch.allclose(latents, steps.start[here].float(), atol=0.01)
        latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * steps.velocity[here].float()
    assert torch.allclose(latents, end, atol=0.02)
    held_out = {scene.meaning for task in ("color", "two") for scene in split_scenes(task)[1]}
    assert not {parse(caption).meaning for caption in steps.captions} & held_out


@torch.no_grad()
def test_the_students_own_points_are_drawn_with_the_adapter_and_led_on_without(family: BaseFamily, tmp_path: Path):
    for name, weight in lora.parameters(family.transformer).items():
        if "lora_B" in name:
            weight.fill_(0.2)
    steps = ask(tmp_path / "own.safetensors", family, 100, own=True)
    velocity, noise = velocity_of(family, steps.captions[:100]), steps.start[:100].float()
    mine = euler(velocity, noise, SIGMAS)
    with lora.disabled(family.transformer):
        assert not torch.allclose(euler(velocity, noise, SIGMAS)[2], mine[2], atol=0.05)
        end = dpmpp_2m(velocity, mine[2], FINE[2 * SUBSTEPS : 3 * SUBSTEPS + 1])[-1]
    here = steps.step == 2
    assert torch.allclose(steps.start[here].float(), mine[2], atol=0.01)
    known = steps.start[here].float() + (SIGMAS[3] - SIGMAS[2]) * steps.velocity[here].float()
    assert torch.allclose(known, end, atol=0.02)


def test_training_brings_the_adapter_nearer_to_the_known_velocities(family: BaseFamily, tmp_path: Path):
    known = ask(tmp_path / "steps.safetensors", family, 100, own=False)
    known = both(known, known)

    @torch.no_grad()
    def error() -> float:
        found = family.velocity(known.start[:200].float(), SIGMAS[known.step[:200]], family.encode(known.captions[:200]))
        return (found - known.velocity[:200].float()).square().mean().item()

    before = error()
    train(tmp_path / "adapter.safetensors", family, known, 200, 3e-3)
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


@torch.no_grad()
def test_the_shipped_lora_draws_in_four_steps_what_the_base_draws_in_sixteen():
    """Its latents are far nearer to them than those of the base in four steps, by either solver."""
    source = open_prompts("world:held_out", 0)
    prompts = [source.prompt(i).text for i in range(24)]
    turbo, base = load_fused(ModelConfig(fuse={"embedded-turbo": 1.0})), load_family(ModelConfig(path="embedded"))
    noise = torch.stack([gaussian_noise(base.latent_shape, seed) for seed in range(24)])
    end = dpmpp_2m(velocity_of(base, prompts), noise, FINE)[-1]

    def away(found: Tensor) -> float:
        return (found - end).square().mean().item()

    student = away(euler(velocity_of(turbo, prompts), noise, SIGMAS)[-1])
    others = [away(solve(velocity_of(base, prompts), noise, SIGMAS)[-1]) for solve in (euler, dpmpp_2m)]
    assert student < 0.6 * min(others), (student, others)


def test_the_packages_lora_goes_by_its_name():
    assert find_adapter("embedded-turbo").parent == EMBEDDED_TURBO
    assert ModelConfig.model_validate({"fuse": "embedded-turbo"}).fuse == {"embedded-turbo": 1.0}
