"""The exported file in other hands: a stock FluxPipeline, a header reader, and `sample_images`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FinishedRun, MakeConfig
from lora_files import rewrite
from PIL import Image
from runs import ADAPTER
from safetensors.torch import load_file
from torch import Tensor

from ngrpo_lora import gaussian_noise
from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.config import ModelConfig, parse_config
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.records.metrics import save_scores
from ngrpo_lora.sampling.sampler import draw, sample_images
from ngrpo_lora.training.export import check_export, held_out
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.world import EMBEDDED

PROMPTS = ["a red star", "two blue circles"]


@pytest.fixture(scope="module")
def live_velocity(finished_run: FinishedRun) -> Tensor:
    """Of the trained transformer in memory, with its averaged weights."""
    family = finished_run.run.family
    latents = torch.stack([gaussian_noise(family.latent_shape, seed) for seed in (0, 1)])
    with torch.no_grad(), lora.swapped(family.transformer, finished_run.run.lora_step.averaged):
        return family.velocity(latents, 0.5, family.encode(PROMPTS))


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


# The file -----------------------------------------------------------------------------------------------------------


def test_a_stock_pipeline_with_the_file_has_the_trained_velocity(
    adapter: Path, live_velocity: Tensor, finished_run: FinishedRun
):
    """Diffusers alone, nothing of ours: alpha is not the rank, so a scale that is lost or doubled would show."""
    from diffusers import FluxPipeline

    settings = finished_run.run.family.settings
    pipeline = FluxPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    embeds, pooled, text_ids = pipeline.encode_prompt(
        PROMPTS, None, max_sequence_length=int(settings["max_sequence_length"])
    )
    latents = torch.stack([gaussian_noise(live_velocity.shape[1:], seed) for seed in (0, 1)])
    batch, channels, height, width = latents.shape
    image_ids = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, embeds.device, embeds.dtype)

    def velocity() -> Tensor:
        with torch.no_grad():
            packed = pipeline.transformer(
                hidden_states=pipeline._pack_latents(latents, batch, channels, height, width),
                timestep=torch.full((batch,), 0.5),
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
        return pipeline._unpack_latents(packed, 64, 64, pipeline.vae_scale_factor)

    guided = pipeline.transformer.config.guidance_embeds
    guidance = torch.full((batch,), float(settings["guidance_scale"])) if guided else None
    base = velocity()
    pipeline.load_lora_weights(adapter)
    effect = (live_velocity - base).abs().max().item()
    assert effect > 1e-3
    torch.testing.assert_close(velocity(), live_velocity, rtol=0, atol=1e-3 * effect)


def test_every_tensor_is_float32_and_named_as_peft_diffusers_and_comfyui_read_it(adapter: Path):
    tensors = load_file(adapter)
    layers = {name.rsplit(".lora_", 1)[0] for name in tensors}
    assert set(tensors) == {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    assert all(
        layer.startswith(("transformer.transformer_blocks.", "transformer.single_transformer_blocks."))
        for layer in layers
    )
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for layer in layers:
        assert tensors[f"{layer}.lora_A.weight"].shape[0] == tensors[f"{layer}.lora_B.weight"].shape[1] == 4


def test_the_header_describes_the_adapter(adapter: Path, finished_run: FinishedRun):
    config, header = finished_run.run.config, read_metadata(adapter)
    assert header["format"] == "pt"

    peft = json.loads(header["lora_adapter_metadata"])
    layers = sorted({name.rsplit(".lora_", 1)[0].removeprefix("transformer.") for name in load_file(adapter)})
    assert sorted(peft.pop("transformer.target_modules")) == layers
    assert peft == {"transformer.r": 4, "transformer.lora_alpha": 4}  # alpha is in lora_B

    own, settings = json.loads(header["ngrpo"]), finished_run.run.family.settings
    assert parse_config(own["config"]) == config
    assert [(reward["name"], reward["weight"]) for reward in own["rewards"]] == [(config.rewards.train[0].name, 1.0)]
    assert own["model"]["path"] == "embedded"
    assert own["model"]["guidance_scale"] == settings["guidance_scale"]  # resolved, not "what the model recommends"
    assert own["model"]["max_sequence_length"] == settings["max_sequence_length"]
    assert own["rollout"]["shift"] == finished_run.run.family.shift(4)
    assert (own["rollout"]["solver"], own["rollout"]["num_steps"]) == ("dpmpp_2m", 4)
    assert own["code_version"]

    assert header["modelspec.architecture"] == "flux-1-dev/lora"
    assert header["modelspec.resolution"] == "64x64"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4.0")


def test_the_header_has_no_figures_of_other_prompts_side_by_side(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "eval/reward_mean": 0.25}\n{"step": 4, "eval/reward_mean": 0.5}\n')
    for step in (0, 4):
        save_scores(tmp_path / "evaluations" / f"{step:06d}.jsonl", ["a"], [5], {"a": torch.zeros(1)})
    assert held_out(metrics) == {"iteration": 4, "before": {"reward_mean": 0.25}, "after": {"reward_mean": 0.5}}
    save_scores(tmp_path / "evaluations" / "000004.jsonl", ["a"], [6], {"a": torch.zeros(1)})
    assert held_out(metrics) == {}


def test_the_exported_file_is_the_average(finished_run: FinishedRun):
    run, tensors = finished_run.run, load_file(finished_run.output_dir / ADAPTER)
    assert len(tensors) == len(run.lora_step.averaged)
    for name, averaged in run.lora_step.averaged.items():
        key = f"transformer.{name.replace('.default', '')}"
        scale = 2 if ".lora_B" in name else 1  # alpha 8 over rank 4, folded into B
        assert torch.equal(tensors[key], averaged * scale)


# Files that are wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.5, 1.1, 0.0, float("nan")])
def test_the_export_check_passes_the_file_and_no_other(
    factor: float, adapter: Path, finished_run: FinishedRun, tmp_path: Path
):
    run = finished_run.run
    path = rewrite(adapter, tmp_path / "copy.safetensors", factor)
    text, latents = run.family.encode(PROMPTS[:1]), gaussian_noise((1, *run.family.latent_shape), 0)
    with lora.swapped(run.family.transformer, run.lora_step.averaged):
        if factor == 1.0:
            assert check_export(path, run.family, text, latents) < 1e-3
        else:
            with pytest.raises(UserError, match=r"copy\.safetensors differs from the trained one by"):
                check_export(path, run.family, text, latents)


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
def test_the_export_check_of_a_16_bit_model_allows_for_rounding_only(
    factor: float, make_config: MakeConfig, tmp_path: Path
):
    """A learning rate this large makes an effect as large as a whole run's."""
    overrides = ("model.dtype=bfloat16", "trainer.num_iterations=1", "optimizer.learning_rate=0.05")
    run = prepare(make_config(tmp_path, *overrides))
    complete(run)
    path = rewrite(tmp_path / "adapter" / FILE_NAME, tmp_path / "copy.safetensors", factor)
    text, latents = run.family.encode(PROMPTS[:1]), gaussian_noise((1, *run.family.latent_shape), 0)
    with lora.swapped(run.family.transformer, run.lora_step.averaged):
        if factor == 1.0:
            assert 0 < check_export(path, run.family, text, latents) < 0.2
        else:
            with pytest.raises(UserError, match=r"copy\.safetensors differs from the trained one by"):
                check_export(path, run.family, text, latents)


# Sampling -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(adapter: Path) -> np.ndarray:
    """Two prompts with two seeds, prompt-major."""
    return pixels(sample_images(adapter, None, PROMPTS, [3, 4]))


def test_an_image_does_not_depend_on_what_is_drawn_with_it(adapter: Path, sampled: np.ndarray):
    assert len({image.tobytes() for image in sampled}) == 4
    assert np.array_equal(pixels(sample_images(adapter, None, PROMPTS[1:], [4]))[0], sampled[3])
    many = pixels(sample_images(adapter, None, [*PROMPTS, "a heart", *PROMPTS], [9, 3]))
    assert np.array_equal(many[[1, 3, 7, 9]], sampled[[0, 2, 0, 2]])


def test_the_sampled_images_are_those_of_the_run(finished_run: FinishedRun, sampled: np.ndarray):
    """Export, reload, same image: with the run's own solver, steps and shift."""
    run = finished_run.run
    with lora.swapped(run.family.transformer, run.lora_step.averaged):
        text = run.family.encode([prompt for prompt in PROMPTS for _ in range(2)])
        images = draw(run.family, text, [3, 4, 3, 4], "dpmpp_2m", run.schedule.sigmas)
    assert abs(pixels(images) - sampled).max() <= 1


def test_strength_scales_the_adapter_and_0_is_the_base(adapter: Path, finished_run: FinishedRun, sampled: np.ndarray):
    family = load_family(ModelConfig())
    base = pixels(draw(family, family.encode(PROMPTS), [3, 3], "dpmpp_2m", family.sigmas(4)))
    assert np.array_equal(pixels(sample_images(adapter, None, PROMPTS, [3], strength=0.0)), base)
    distances = [
        np.abs(pixels(sample_images(adapter, None, PROMPTS, [3], strength=strength)) - base).mean()
        for strength in (0.5, 2.0)
    ]
    full = np.abs(sampled[[0, 2]] - base).mean()
    assert 0 < distances[0] < full < distances[1]
