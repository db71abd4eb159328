"""Adapters on ComfyUI's own classes of every family, tiny: each layer in its place, also where models are offloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import make, random_layers
from torch import Tensor

from ngrpo_lora.adapters.layers import EXCHANGED, NAMES
from ngrpo_lora.adapters.names import row_shares
from ngrpo_lora.adapters.reading import Layer
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.errors import UserError
from ngrpo_lora.sampling.strengths import parse_schedule

HEADERS = {"qwen_image": "qwen", "sd3": "sd3", "wan": "wan", "z_image": "z_image", "flux": "flux1"}
HEADERS |= {"hunyuan_video15": "hunyuan-video-1.5"}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {  # by family: ComfyUI's class, and as small as it can be
    "flux": (
        "Flux",
        {"image_model": "flux", "in_channels": 4, "out_channels": 4, "patch_size": 2, "vec_in_dim": 16}
        | {"context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "theta": 10000}
        | {"depth_single_blocks": 2, "axes_dim": [4, 6, 6], "qkv_bias": True, "guidance_embed": True},
    ),
    "hunyuan_video15": (
        "HunyuanVideo15",
        {"image_model": "hunyuan_video", "in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2]}
        | {"vec_in_dim": None, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2}
        | {"depth_single_blocks": 0, "axes_dim": [4, 6, 6], "theta": 256, "qkv_bias": True, "guidance_embed": False}
        | {"byt5": True, "meanflow": True, "use_cond_type_embedding": True, "vision_in_dim": 16},
    ),
    "qwen_image": (
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 16, "num_layers": 2, "num_attention_heads": 2}
        | {"attention_head_dim": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)},
    ),
    "sd3": (
        "SD3",
        {"depth": 2, "num_blocks": 2, "in_channels": 4, "out_channels": 4, "patch_size": 2, "input_size": None}
        | {"pos_embed_max_size": 16, "num_patches": 256, "adm_in_channels": 16, "pos_embed_scaling_factor": None}
        | {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}}
        | {"qk_norm": "rms", "x_block_self_attn_layers": [0]},
    ),
    "wan": (
        "WAN21_T2V",
        {"image_model": "wan2.1", "model_type": "t2v", "dim": 24, "num_heads": 2, "ffn_dim": 32, "num_layers": 2}
        | {"in_dim": 4, "out_dim": 4, "text_dim": 32, "freq_dim": 32},
    ),
    "z_image": (
        "ZImage",
        {"image_model": "lumina2", "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 32, "axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32], "patch_size": 2, "in_channels": 4}
        | {"qk_norm": True, "z_image_modulation": True, "ffn_dim_multiplier": 8 / 3},
    ),
}


pytestmark = pytest.mark.usefixtures("in_process")


def tiny(family: str) -> Any:
    """A ModelPatcher whose weights are all zero."""
    import comfy.model_patcher
    import comfy.supported_models

    kind, sizes = SIZES[family]
    config = getattr(comfy.supported_models, kind)(sizes)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "").requires_grad_(False)
    for weight in (*model.parameters(), *model.diffusion_model.buffers()):  # which ComfyUI leaves as memory was
        weight.zero_()
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def fitting_layers(
    family: str, weights: dict[str, Tensor], seed: int = 0
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """An adapter of every layer that has a name, and what it adds to the original weights.

    In whose order a fused layer holds its parts is settled with diffusers' loader in tests/test_adapter_file.py.
    """
    draw = torch.Generator().manual_seed(seed)
    layers: dict[str, Layer] = {}
    added: dict[str, Tensor] = {}
    for number in ("0", "1"):
        for form, forms in NAMES[family].items():
            key = f"diffusion_model.{form.format(number)}.weight"
            if key not in weights or key in added:
                continue
            parts = [part.format(number) for part in forms]
            shares, (rows, *columns) = row_shares(parts), weights[key].shape
            for part, share in zip(parts, shares, strict=True):
                up = torch.randn(rows * share // sum(shares), 2, *[1] * len(columns[1:]), generator=draw)
                layers[part] = Layer(torch.randn(2, *columns, generator=draw), up)
            there = [layers[part].exchanged() if form in EXCHANGED.get(family, ()) else layers[part] for part in parts]
            added[key] = torch.cat([layer.delta() for layer in there]).view_as(weights[key])
    return layers, added


def saved(path: Path, layers: dict[str, Layer], family: str) -> Path:
    save_tensors(path, state_dict(layers), {"ss_base_model_version": HEADERS[family]})
    return path


def computed_with(module: Any) -> Tensor:
    """The weight that a layer computes with."""
    import comfy.ops

    return comfy.ops.cast_bias_weight(module, dtype=torch.float32, device=torch.device("cpu"))[0]


@pytest.mark.parametrize("family", SIZES)
def test_every_layer_that_is_trained_has_its_place(family: str, tmp_path: Path):
    from comfy_nodes.fitting import family_of, read_fitting
    from comfy_nodes.schedules import apply

    model = tiny(family)
    assert family_of(model) == family
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    layers, added = fitting_layers(family, before)
    assert set(random_layers(family, make(family))) <= layers.keys()
    adapter = read_fitting(model, saved(tmp_path / "a.safetensors", layers, family))
    patched = apply(model, adapter, 0.5, parse_schedule(""))
    patched.patch_model()
    after = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    patched.unpatch_model()
    for key, weight in after.items():
        torch.testing.assert_close(weight, before[key] + 0.5 * added.get(key, torch.zeros(())), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("memory", [0, 1], ids=["loaded", "offloaded"])
def test_a_schedule_adds_to_what_each_layer_computes_with(family: str, memory: int, tmp_path: Path):
    from comfy_nodes.fitting import read_fitting
    from comfy_nodes.schedules import ScheduledPatch, apply

    model = tiny(family)
    first, added = fitting_layers(family, model.model.state_dict())
    second, more = fitting_layers(family, model.model.state_dict(), seed=1)
    one = read_fitting(model, saved(tmp_path / "a.safetensors", first, family))
    two = read_fitting(model, saved(tmp_path / "b.safetensors", second, family))
    patched = apply(apply(model, one, 0.5, parse_schedule("")), two, 2.0, parse_schedule("0:0, 1:1"))
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
    modules = dict(model.model.named_modules())
    owners = {
        f.owner for m in modules.values() for f in getattr(m, "weight_function", []) if isinstance(f, ScheduledPatch)
    }
    (owner,) = owners
    for now in (0.7, 0.0, -1.5):
        owner.now = now
        for key, weight in added.items():
            actual = computed_with(modules[key.removesuffix(".weight")])
            torch.testing.assert_close(actual, 0.5 * weight + now * more[key], rtol=1e-5, atol=1e-5)
    patched.unpatch_model(torch.device("cpu"))
    model.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
    assert all(not computed_with(modules[key.removesuffix(".weight")]).any() for key in added)


def test_a_schedule_fits_layers_whose_weights_are_scaled_or_of_8_bits(tmp_path: Path):
    """As ComfyUI computes with `scaled_fp8` and `fp8_e4m3fn_fast` weights."""
    import comfy.ops

    from comfy_nodes.fitting import read_fitting
    from comfy_nodes.schedules import ScheduledPatch, apply

    model = tiny("wan")
    layers, added = fitting_layers("wan", model.model.state_dict())
    adapter = read_fitting(model, saved(tmp_path / "a.safetensors", layers, "wan"))
    layer = model.model.diffusion_model.blocks[0].self_attn.q
    scaled = comfy.ops.scaled_fp8_ops().Linear(24, 24, dtype=torch.float32)
    scaled.weight = layer.weight
    scaled.bias = torch.nn.Parameter(torch.zeros(24), requires_grad=False)
    scaled.scale_weight.data.fill_(1 / 512)
    model.model.diffusion_model.blocks[0].self_attn.q = scaled
    apply(model, adapter, 1.0, parse_schedule("0:0, 1:1")).patch_model(torch.device("cpu"))
    (patch,) = scaled.weight_function
    assert isinstance(patch, ScheduledPatch)
    patch.owner.now = 0.5
    expected = 0.5 * added["diffusion_model.blocks.0.self_attn.q.weight"]
    torch.testing.assert_close(scaled(torch.eye(24)).T, expected, rtol=1e-5, atol=1e-5)

    patch.layer = layer
    weight = torch.zeros(24, 24, dtype=torch.float8_e4m3fn)
    changed = patch(weight)
    assert changed.dtype == weight.dtype
    torch.testing.assert_close(changed.float(), expected, rtol=0.07, atol=0.01)


def test_what_a_schedule_needs_leaves_the_gpu_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from comfy_nodes.fitting import read_fitting
    from comfy_nodes.schedules import ScheduledPatch, apply

    model = tiny("wan")
    layers, added = fitting_layers("wan", model.model.state_dict())
    adapter = read_fitting(model, saved(tmp_path / "a.safetensors", layers, "wan"))
    patched = apply(model, adapter, 1.0, parse_schedule("0:0, 1:1"))
    patched.patch_model(torch.device("cpu"))
    moved: list[torch.device] = []
    monkeypatch.setattr(ScheduledPatch, "move_to", lambda self, device: moved.append(device) or 0)
    patched.detach()
    assert moved == [patched.offload_device] * len(added)


def test_a_layer_that_computes_with_weights_of_its_own_takes_no_schedule(tmp_path: Path):
    from comfy_nodes.fitting import read_fitting
    from comfy_nodes.schedules import apply

    model = tiny("wan")
    layers, _ = fitting_layers("wan", model.model.state_dict())
    adapter = read_fitting(model, saved(tmp_path / "a.safetensors", layers, "wan"))
    attention = model.model.diffusion_model.blocks[0].self_attn
    attention.q = torch.nn.Linear(24, 24)
    with pytest.raises(
        UserError, match=r"a schedule needs layers of ComfyUI's own, .*self_attn.q.weight' is of a Linear"
    ):
        apply(model, adapter, 1.0, parse_schedule("0:0, 1:1"))
    apply(model, adapter, 1.0, parse_schedule("1"))


def test_another_kind_of_model_is_refused_by_name(tmp_path: Path):
    import comfy.model_base

    from comfy_nodes.fitting import family_of

    other = tiny("wan")
    other.model = comfy.model_base.LTXV.__new__(comfy.model_base.LTXV)
    with pytest.raises(UserError, match=re.escape("MODEL must be a flow model of flux, flux2_klein")) as refused:
        family_of(other)
    assert "got a LTXV" in str(refused.value)
