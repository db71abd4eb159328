"""A LoRA file on a model: one that fits, at its strength."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ngrpo_lora.adapters.loading import load_adapter
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.sampling.sampler import sample_images

PROMPT, LAYER = "a red star", "transformer.single_transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": (2,)},
        {"transformer.nowhere.to_q.lora_A.weight": (4, 256), "transformer.nowhere.to_q.lora_B.weight": (256, 4)},
        {"unet.down.to_q.lora_A.weight": (4, 256), "unet.down.to_q.lora_B.weight": (256, 4)},
        {f"{LAYER}.lora_A.weight": (4, 99), f"{LAYER}.lora_B.weight": (99, 4)},
        {f"{LAYER}.lora_A.weight": (4, 256)},
    ],
    ids=["no_lora", "no_such_layer", "another_model", "another_width", "half"],
)
def test_a_file_that_does_not_fit_the_model_is_an_error(tensors: dict[str, tuple[int, ...]], tmp_path: Path):
    path = tmp_path / "other.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(UserError, match=r"other\.safetensors' is no LoRA"):
        sample_images(path, None, [PROMPT], [0])


def test_an_adapter_of_another_trainer_is_folded_and_counts_as_strong_as_asked(tmp_path: Path):
    """alpha is twice the rank, which diffusers reads from the header, so that it counts once and not twice."""
    family = load_family(ModelConfig(device="cpu"))
    layer = family.transformer.get_submodule(LAYER.removeprefix("transformer."))
    pair = {"lora_A": torch.randn(2, layer.in_features), "lora_B": torch.randn(layer.out_features, 2)}
    peft = {"r": 2, "lora_alpha": 4, "target_modules": [LAYER.removeprefix("transformer.")]}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in peft.items()})}
    path, x = tmp_path / "other.safetensors", torch.randn(3, layer.in_features)
    save_file({f"{LAYER}.{part}.weight": tensor for part, tensor in pair.items()}, path, header)
    base, update = layer(x), 2 * x @ pair["lora_A"].T @ pair["lora_B"].T
    for name, strength in (("default", 1.0), ("weak", 0.25), ("none", 0.0)):
        load_adapter(family, path, strength, name)
        adapted = family.transformer.get_submodule(LAYER.removeprefix("transformer."))(x)
        torch.testing.assert_close(adapted - base, strength * update, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_that_is_not_finite_is_refused(strength: float, tmp_path: Path):
    with pytest.raises(
        ConfigError, match=f"the strength of an adapter must be finite, got {strength}; 1 is as trained"
    ):
        load_adapter(load_family(ModelConfig(device="cpu")), tmp_path / "gone.safetensors", strength)
