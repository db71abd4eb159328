"""LoRA files in every format, which stock diffusers loads, under the names that others ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from lora_files import effect, flux1_layers, loaded_output, merged_output, relative_error, same_layers, write
from tiny_transformers import MAKERS, make, output, random_layers

from ngrpo_lora.adapters.names import FORMATS
from ngrpo_lora.adapters.reading import Layer, read_adapter_file
from ngrpo_lora.adapters.writing import Format, convert, save_tensors, state_dict
from ngrpo_lora.errors import UserError

OF_COMFYUI = [("hunyuan_video15", "comfyui")]  # which diffusers does not read
WRITABLE = [(family, form) for family in MAKERS for form in FORMATS[family] if (family, form) not in OF_COMFYUI]


def readable_by_diffusers(family: str, form: Format, layers: dict[str, Layer]) -> dict[str, Layer]:
    """Of a tiny FLUX diffusers cannot split what kohya's format has as one."""
    fused = (".attn.to_q", ".attn.to_k", ".attn.to_v", ".proj_mlp")
    tiny = (family, form) == ("flux", "kohya")
    return {name: x for name, x in layers.items() if not (tiny and name.startswith("single") and name.endswith(fused))}


@pytest.mark.parametrize(("family", "form"), WRITABLE)
def test_a_converted_file_does_in_stock_diffusers_what_the_adapter_does(family: str, form: Format, tmp_path: Path):
    layers = readable_by_diffusers(family, form, random_layers(family, make(family)))
    first = next(iter(layers))
    layers[first] = Layer(torch.cat([layers[first].down] * 2), torch.cat([layers[first].up] * 2, 1), 0.25)
    source = write(tmp_path / "source.safetensors", layers, family)
    tensors, metadata = convert(read_adapter_file(source), form)
    converted = tmp_path / "converted.safetensors"
    save_tensors(converted, tensors, metadata)

    expected = merged_output(family, layers)
    assert relative_error(loaded_output(family, converted), expected) <= 1e-5
    assert relative_error(output(family, make(family)), expected) > 1e-2

    again = read_adapter_file(converted)
    assert again.family == family
    same_layers(again.layers, layers)
    assert sum(layer.rank for layer in again.layers.values()) == sum(layer.rank for layer in layers.values())


@pytest.mark.parametrize(("family", "form"), WRITABLE)
def test_an_adapter_of_some_layers_alone_is_converted_too(family: str, form: Format, tmp_path: Path):
    layers = random_layers(family, make(family), targets="attention")
    layers = {name: layer for name, layer in layers.items() if not name.endswith("to_k")}
    layers = readable_by_diffusers(family, form, layers)
    file = read_adapter_file(write(tmp_path / "source.safetensors", layers, family))
    if (family, form) == ("wan", "kohya"):
        with pytest.raises(UserError, match="leaves out blocks.0.cross_attn.k, blocks.0.ffn.0, .*; give --format comf"):
            convert(file, form)
        return
    tensors, metadata = convert(file, form)
    save_tensors(tmp_path / "converted.safetensors", tensors, metadata)
    actual = loaded_output(family, tmp_path / "converted.safetensors")
    assert relative_error(actual, merged_output(family, layers)) <= 1e-5


def test_kohyas_flux_is_named_as_in_sd_scripts_and_diffusers_splits_it_as_we_joined_it(tmp_path: Path):
    layers = flux1_layers()
    file = read_adapter_file(write(tmp_path / "flux.safetensors", layers, "flux"))
    tensors, _ = convert(file, "kohya")
    assert {key.partition(".")[0] for key in tensors} == {
        *(f"lora_unet_double_blocks_3_{x}_attn_{y}" for x in ("img", "txt") for y in ("qkv", "proj")),
        *(f"lora_unet_double_blocks_3_{x}_mlp_{y}" for x in ("img", "txt") for y in "02"),
        "lora_unet_single_blocks_17_linear1",
        "lora_unet_single_blocks_17_linear2",
    }
    linear1 = "lora_unet_single_blocks_17_linear1"
    assert tensors[f"{linear1}.lora_up.weight"].shape == (7 * 3072, 8)
    assert tensors[f"{linear1}.alpha"] == 8
    found, _ = FluxPipeline.lora_state_dict(dict(tensors), return_alphas=True)
    assert found.keys() == state_dict(layers).keys()
    for name, layer in layers.items():
        assert relative_error(effect(found, name), effect(state_dict({name: layer}), name)) <= 1e-6


def test_wan_is_written_under_the_names_that_comfyui_asks_for(tmp_path: Path):
    """Of Wan it maps no names of diffusers'."""
    file = read_adapter_file(write(tmp_path / "wan.safetensors", random_layers("wan", make("wan")), "wan"))
    tensors, _ = convert(file, "comfyui")
    assert {key.removesuffix(".weight") for key in tensors if ".0." in key[:26]} == {
        f"diffusion_model.blocks.0.{layer}.lora_{part}"
        for layer in (*(f"{a}_attn.{x}" for a in ("self", "cross") for x in "qkvo"), "ffn.0", "ffn.2")
        for part in "AB"
    }


def test_hunyuan_video_is_written_under_the_names_that_comfyui_asks_for(tmp_path: Path):
    """Of it too it maps none of diffusers', and has queries, keys and values in one; so are they joined."""
    layers = random_layers("hunyuan_video15", make("hunyuan_video15"))
    file = read_adapter_file(write(tmp_path / "x.safetensors", layers, "hunyuan_video15"))
    tensors, _ = convert(file, "comfyui")
    parts = [f"{x}_{y}" for x in ("img", "txt") for y in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    assert {key.removesuffix(".weight") for key in tensors} == {
        f"diffusion_model.double_blocks.{block}.{part}.lora_{side}" for block in "01" for part in parts for side in "AB"
    }
    save_tensors(tmp_path / "converted.safetensors", tensors, {})
    same_layers(read_adapter_file(tmp_path / "converted.safetensors", "hunyuan_video15").layers, layers)


@pytest.mark.parametrize(("family", "form"), [("sd3", "kohya"), ("sana", "kohya"), ("sana", "comfyui")])
def test_a_format_without_readers_is_an_error_with_those_that_have_some(family: str, form: Format, tmp_path: Path):
    file = read_adapter_file(write(tmp_path / "x.safetensors", random_layers(family, make(family)), family))
    with pytest.raises(UserError, match=rf"--format {form} .* adapter of {family}; give --format diffusers"):
        convert(file, form)


def test_kohyas_format_needs_the_width_that_diffusers_expects(tmp_path: Path):
    file = read_adapter_file(write(tmp_path / "x.safetensors", random_layers("flux", make("flux")), "flux"))
    with pytest.raises(UserError, match=r"--format kohya needs the width of FLUX.1, 3072, but .* has 32; give --fo"):
        convert(file, "kohya")


def test_kohyas_format_says_which_layers_diffusers_would_leave_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    layers = {"transformer_blocks.0.ff.net.2": Layer(torch.ones(1, 128), torch.ones(32, 1))}
    convert(read_adapter_file(write(tmp_path / "blocks.safetensors", layers, "flux")), "kohya")
    assert not caplog.records
    layers["x_embedder"] = Layer(torch.ones(1, 16), torch.ones(32, 1))
    convert(read_adapter_file(write(tmp_path / "more.safetensors", layers, "flux")), "kohya")
    (record,) = caplog.records
    assert "of kohya's names diffusers leaves out x_embedder; ComfyUI" in record.getMessage()


def test_of_wan_kohyas_format_has_blocks_alone(tmp_path: Path):
    layers = random_layers("wan", make("wan")) | {"proj_out": Layer(torch.ones(1, 24), torch.ones(16, 1))}
    file = read_adapter_file(write(tmp_path / "x.safetensors", layers, "wan"))
    with pytest.raises(UserError, match=r"for Wan's blocks alone, but .* adapts head.head too; give --format comfyui"):
        convert(file, "kohya")
    assert "diffusion_model.head.head.lora_A.weight" in convert(file, "comfyui")[0]
