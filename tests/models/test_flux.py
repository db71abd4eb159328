"""The FLUX family on the embedded model: what reaches the transformer, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from family_checks import check_another_size

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models.flux import Family
from ngrpo_lora.types import TextEmbeds

PROMPTS = ["a red star", "two blue circles", "a photo of a heart above a cross"]


@pytest.fixture(scope="module")
def family() -> Family:
    return Family(ModelConfig(), "cpu")


@pytest.fixture(scope="module")
def text(family: Family) -> TextEmbeds:
    return family.encode(PROMPTS)


def noise(family: Family, batch: int) -> torch.Tensor:
    return torch.randn(batch, *family.latent_shape, generator=torch.Generator().manual_seed(0))


class Echo:
    """A transformer that remembers what it was given and answers with its latents."""

    def __init__(self, guided: bool):
        self.config = SimpleNamespace(guidance_embeds=guided)
        self.seen: dict[str, Any] = {}

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor]:
        self.seen = inputs
        return (inputs["hidden_states"],)


@pytest.mark.parametrize("sigma", [1.0, 0.123456789, 1 / 3])
def test_sigma_reaches_the_transformer_unrounded_and_latents_come_back_in_place(
    sigma: float, family: Family, text: TextEmbeds, monkeypatch: pytest.MonkeyPatch
):
    """No integer timesteps: diffusers would truncate 123.456 to 123."""
    monkeypatch.setattr(family, "transformer", Echo(guided=False))
    latents = noise(family, 3)
    assert torch.equal(family.velocity(latents, sigma, text), latents)
    seen = family.transformer.seen
    assert torch.equal(seen["timestep"], torch.full((3,), sigma))
    assert seen["guidance"] is None
    packed = family.pipeline._pack_latents(latents, *latents.shape)
    assert torch.equal(seen["hidden_states"], packed)


def test_a_guidance_distilled_model_gets_its_guidance(text: TextEmbeds, monkeypatch: pytest.MonkeyPatch):
    family = Family(ModelConfig(guidance_scale=2.5), "cpu")
    assert family.settings["guidance_scale"] == 2.5
    monkeypatch.setattr(family, "transformer", Echo(guided=True))
    family.velocity(noise(family, 3), 0.5, text)
    assert torch.equal(family.transformer.seen["guidance"], torch.full((3,), 2.5))


def test_a_batch_of_sigmas_is_that_of_each(family: Family, text: TextEmbeds):
    latents, sigmas = noise(family, 3), torch.tensor([1.0, 0.5, 0.1])
    with torch.no_grad():
        together = family.velocity(latents, sigmas, text)
        apart = [family.velocity(latents[[i]], sigmas[i].item(), text[[i]])[0] for i in range(3)]
        elsewhere = family.velocity(latents, 0.5, text)
    assert together.shape == latents.shape
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.stack(apart), rtol=1e-4, atol=1e-4)
    assert (together[0] - elsewhere[0]).abs().max() > 1e-3


def test_an_embedding_is_that_of_its_prompt_alone(family: Family, text: TextEmbeds):
    assert len(text) == 3
    for row, prompt in enumerate(PROMPTS):
        alone = family.encode([prompt])
        for name, tensor in text[[row]].tensors.items():
            torch.testing.assert_close(alone.tensors[name], tensor)


def test_pictures_have_the_configured_size(family: Family):
    small = Family(ModelConfig(height_px=32, width_px=96), "cpu")
    channels = family.latent_shape[0]
    assert small.latent_shape == (channels, 4, 12)
    for image in small.decode(noise(small, 2)):
        assert image.size == (96, 32)
        assert np.asarray(image).std() > 0
    with torch.no_grad():
        assert small.velocity(noise(small, 2), 0.5, small.encode(PROMPTS[:2])).shape == (2, channels, 4, 12)


def test_half_precision_is_inside_the_model_only(text: TextEmbeds):
    half = Family(ModelConfig(dtype="bfloat16"), "cpu")
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        velocity = half.velocity(noise(half, 2), 0.5, half.encode(PROMPTS[:2]))
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()


def test_the_dynamic_shift_is_exp_mu_linear_in_the_tokens(family: Family, monkeypatch: pytest.MonkeyPatch):
    """FLUX.1-dev's figures: mu is 0.5 at 256 tokens and 1.15 at 4096, the tokens of 1024 px."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    dynamic = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    monkeypatch.setattr(family.pipeline, "scheduler", dynamic)
    for cells, mu in ((32, 0.5), (128, 1.15), (64, 0.63)):  # tokens are 2 x 2 cells
        monkeypatch.setattr(family, "latent_shape", (16, cells, cells))
        assert family.shift(8) == pytest.approx(math.exp(mu), rel=1e-4)
    monkeypatch.setattr(family.pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert family.shift(8) == 3.0


def test_feed_forward_layers_are_optional_and_the_last_layer_is_left_out(family: Family):
    everything, excluded = family.lora_targets("attention+feed_forward")
    attention, none = family.lora_targets("attention")
    assert set(attention) < set(everything)
    assert not any("ff" in name or "mlp" in name for name in attention)
    assert (excluded, none) == (["proj_out"], [])


def test_a_folder_that_is_no_flux_pipeline_is_an_error_that_names_it(tmp_path: Path):
    for content in ("{", '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}'):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(UserError, match=f"model.path '{tmp_path}' could not be loaded as a FluxPipeline"):
            Family(ModelConfig(path=str(tmp_path)), "cpu")


def test_a_loaded_model_can_be_asked_for_another_size():
    small = {"height_px": 64, "width_px": 64}
    check_another_size("embedded", small, {"height_px": 48, "width_px": 96, "max_sequence_length": 16})
