"""How any base draws: attention backends, tiles, compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttention

from ngrpo_lora.adapters import lora
from ngrpo_lora.config import LoraConfig, ModelConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.errors import UserError
from ngrpo_lora.models.flux import Family
from ngrpo_lora.training.setup import prepare


@pytest.fixture(scope="module")
def family() -> Family:
    return Family(ModelConfig(), "cpu")


@pytest.fixture
def _backend() -> Iterator[None]:
    """diffusers keeps the last backend for the whole process."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("_backend")
def test_another_attention_backend_gives_the_same_velocities(family: Family):
    other: Any = Family(ModelConfig(attention="_native_math"), "cpu")
    backends = {
        module.processor._attention_backend
        for module in other.transformer.modules()
        if isinstance(module, FluxAttention)
    }
    assert backends == {AttentionBackendName("_native_math")}
    latents, text = gaussian_noise((1, *family.latent_shape), 0), family.encode(["a red star"])
    with torch.no_grad():
        expected, actual = family.velocity(latents, 0.5, text), other.velocity(latents, 0.5, text)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(("name", "why"), [("fast", "must be one of"), ("flash", "flash-attn|flash_attn")])
def test_an_attention_backend_that_is_not_there_is_an_error(name: str, why: str):
    with pytest.raises(UserError, match=f"model.attention={name} cannot be used for training here: .*({why})"):
        Family(ModelConfig(attention=name), "cpu")


@pytest.mark.usefixtures("_backend")
def test_an_attention_backend_without_a_backward_pass_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def inference_only(query: Any, key: Any, value: Any, **settings: Any) -> torch.Tensor:
        return query.detach()

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName("_native_math"), inference_only)
    with pytest.raises(UserError, match="model.attention=_native_math cannot be used for training here: .*grad"):
        Family(ModelConfig(attention="_native_math"), "cpu")


def test_a_large_picture_is_decoded_in_tiles(family: Family, monkeypatch: pytest.MonkeyPatch):
    tiled = Family(ModelConfig(vae_tiling=True), "cpu")
    assert (tiled.vae.use_tiling, family.vae.use_tiling) == (True, False)
    seen = []
    decode = type(tiled.vae.decoder).forward
    monkeypatch.setattr(
        type(tiled.vae.decoder), "forward", lambda self, x, *rest: (seen.append(x.shape[-1]), decode(self, x, *rest))[1]
    )
    latents = gaussian_noise((1, family.latent_shape[0], 16, 16), 0)
    picture = np.asarray(tiled.decode(latents)[0]).astype(int)
    assert picture.shape == (128, 128, 3)
    assert max(seen) == 8
    corner = np.asarray(family.decode(latents[..., :8, :8])[0]).astype(int)
    assert np.abs(picture - corner.mean())[:48, :48].mean() > 5
    assert np.abs(picture[:48, :48] - corner[:48, :48]).max() <= 1  # from there on neighbours are blended


def test_a_run_compiles_every_block(make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path, "model.compile=true"))
    assert len(run.family.blocks) == 4
    assert all(block._compiled_call_impl is not None for block in run.family.blocks)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss_and_gradients():
    family = Family(ModelConfig(), "cpu")
    transformer = family.transformer
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[:1]
    lora.inject(transformer, LoraConfig(rank=4), *family.lora_targets("attention+feed_forward"), 0)
    for parameter in lora.parameters(transformer).values():
        parameter.data = torch.randn_like(parameter) / 10
    transformer.enable_gradient_checkpointing()
    latents, text = gaussian_noise((1, *family.latent_shape), 0), family.encode(["a star"])

    def results() -> list[torch.Tensor]:
        transformer.zero_grad()
        loss = family.velocity(latents, 0.5, text).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in lora.parameters(transformer).values() if p.grad is not None)]

    eager = results()
    for block in family.blocks:
        block.compile()
    compiled = results()
    assert len(eager) == 1 + len(lora.parameters(transformer))
    assert not all(map(torch.equal, compiled, eager))  # other kernels
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
