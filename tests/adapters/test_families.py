"""Whose a file is, by the names, shapes and number of its layers and by its header, and what is open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import refuse, run
from lora_files import renamed, write
from safetensors.torch import load_file, save_file
from tiny_transformers import MAKERS, make, random_layers

from ngrpo_lora.adapters.reading import Layer, read_adapter_file
from ngrpo_lora.adapters.report import describe
from ngrpo_lora.errors import UserError

Sides = dict[str, tuple[int, int]]


def save(path: Path, sides: Sides, form: str = "transformer.{}", header: dict[str, str] | None = None) -> Path:
    torch.manual_seed(0)
    layers = {
        form.format(name): Layer(torch.ones(1, across), torch.ones(rows, 1)) for name, (rows, across) in sides.items()
    }
    save_file(renamed(layers, "{}.lora_{}.weight"), path, header)
    return path


@pytest.mark.parametrize("family", [family for family in MAKERS if family != "hunyuan_video15"])  # FLUX.1's, narrower
def test_a_file_with_feed_forward_layers_needs_no_header_to_be_known(family: str, tmp_path: Path):
    layers = random_layers(family, make(family))
    save_file(renamed(layers, "transformer.{}.lora_{}.weight"), tmp_path / "x.safetensors")
    assert read_adapter_file(tmp_path / "x.safetensors").families == (family,)


@pytest.mark.parametrize(
    ("width", "blocks", "families"),
    [
        (3072, 3, ("flux", "flux2_klein", "qwen_image")),
        (3072, 5, ("flux", "flux2_klein", "qwen_image")),
        (3072, 19, ("flux", "qwen_image")),
        (3072, 60, ("qwen_image",)),
        (4096, 8, ("flux2_klein",)),
        (1536, 24, ("sd3",)),
        (2432, 38, ("sd3",)),
        (2048, 20, ("hunyuan_video15",)),
        (32, 2, ("flux", "flux2_klein", "hunyuan_video15", "qwen_image", "sd3")),
    ],
)
def test_attention_alone_is_told_apart_by_width_and_number_of_blocks(
    width: int, blocks: int, families: tuple[str, ...], tmp_path: Path
):
    sides = {f"transformer_blocks.{block}.attn.to_q": (width, width) for block in range(blocks)}
    assert read_adapter_file(save(tmp_path / "x.safetensors", sides)).families == families


@pytest.mark.parametrize(
    ("sides", "family"),
    [
        ({"double_blocks.0.img_mlp.0": (4, 1)}, "flux"),
        ({"double_blocks.0.img_mlp.0": (6, 1)}, "flux2_klein"),
        ({"double_blocks.0.txt_mlp.2": (1, 4)}, "flux"),
        ({"double_blocks.0.txt_mlp.2": (1, 3)}, "flux2_klein"),
        ({"single_blocks.1.linear1": (7, 1)}, "flux"),
        ({"single_blocks.1.linear1": (9, 1)}, "flux2_klein"),
        ({"single_blocks.1.linear2": (1, 5)}, "flux"),
        ({"single_blocks.1.linear2": (1, 4)}, "flux2_klein"),
        ({"double_blocks.0.img_attn.qkv": (3, 1), "double_blocks.0.img_mlp.0": (4, 1)}, "flux"),
        ({"double_blocks.0.img_attn.qkv": (3, 1), "double_blocks.0.img_mlp.0": (6, 1)}, "flux2_klein"),
    ],
)
@pytest.mark.parametrize("form", ["diffusion_model.{}", "lora_unet_{}"])
def test_the_ratio_of_its_sides_tells_a_layer_of_flux1_from_one_of_flux2(
    sides: Sides, family: str, form: str, tmp_path: Path
):
    flat = form.startswith("lora_unet")
    named = {
        name.replace(".", "_") if flat else name: (3072 * rows, 3072 * across) for name, (rows, across) in sides.items()
    }
    assert read_adapter_file(save(tmp_path / "x.safetensors", named, form)).family == family


@pytest.mark.parametrize(
    ("header", "families"),
    [
        ({"modelspec.architecture": "flux-1-dev/lora"}, ("flux",)),
        ({"ss_base_model_version": "Flux2_Klein_9b"}, ("flux2_klein",)),
        ({"ss_base_model_version": "qwen_image"}, ("qwen_image",)),
        ({"modelspec.architecture": "Qwen-Image/lora", "ss_base_model_version": "flux1"}, ("qwen_image",)),
        ({"ss_network_module": "networks.lora_flux"}, ("flux",)),
        ({"ss_network_module": "networks.lora"}, ("flux", "flux2_klein", "qwen_image")),
        ({"ngrpo": '{"family": "qwen_image"}'}, ("qwen_image",)),
        ({"ngrpo": "[1]", "ss_base_model_version": "hunyuan-video"}, ()),
        ({"modelspec.architecture": "hunyuan-video-1.5/lora"}, ("hunyuan_video15",)),
        ({"modelspec.architecture": "chroma/lora"}, ()),
        ({"ss_base_model_version": "wan2.1"}, ("flux", "flux2_klein", "qwen_image")),
    ],
)
def test_a_headers_own_word_counts_among_families_that_the_layers_leave_open(
    header: dict[str, str], families: tuple[str, ...], tmp_path: Path
):
    """One that names another family of those known is no word on these layers; one of a foreign model is."""
    sides = {f"transformer_blocks.{block}.attn.to_q": (3072, 3072) for block in range(3)}
    assert read_adapter_file(save(tmp_path / "x.safetensors", sides, header=header)).families == families


def test_pefts_settings_name_a_base_model_too(tmp_path: Path):
    sides = {f"transformer_blocks.{block}.attn.to_q": (3072, 3072) for block in range(3)}
    path = save(tmp_path / "adapter_model.safetensors", sides, "base_model.model.{}")
    path.with_name("adapter_config.json").write_text('{"base_model_name_or_path": "black-forest-labs/FLUX.1-dev"}')
    assert read_adapter_file(path).families == ("flux",)


def test_a_file_that_fits_several_families_is_said_to_and_the_user_decides(tmp_path: Path):
    sides = {f"transformer_blocks.{block}.attn.to_q": (3072, 3072) for block in range(3)}
    path, out = save(tmp_path / "x.safetensors", sides), tmp_path / "out.safetensors"
    said = describe(path)
    assert (said["family"], said["families"]) == (None, ["flux", "flux2_klein", "qwen_image"])
    assert "flux or flux2_klein or qwen_image; --family decides" in "\n".join(run("info", path))
    for words in (["--format", "kohya"], ["--format", "comfyui"], ["--format", "diffusers"]):
        message = refuse("export", path, *words, "--output", out)
        assert "fits flux and flux2_klein and qwen_image alike by its layers" in message
        assert message.strip().endswith("give --family")
    assert not out.exists()
    for family, first in (("flux", "lora_unet_double_blocks_0"), ("qwen_image", "lora_unet_transformer_blocks_0")):
        run("export", path, "--format", "kohya", "--family", family, "--output", out)
        assert any(key.startswith(first) for key in load_file(out))
        assert describe(path, family)["family"] == family
    assert "--family must be one of flux, flux2_klein" in refuse(
        "export", path, "--format", "kohya", "--family", "sdxl"
    )
    assert "fits flux and flux2" in refuse("export", path, "--format", "kohya", "--family", "wan", "--output", out)
    run("merge", path, path, "--output", out)  # whose layers have the same names in each of them
    flux = save(tmp_path / "flux.safetensors", sides, header={"ss_base_model_version": "flux1"})
    run("merge", path, flux, "--output", out)
    wan = write(tmp_path / "wan.safetensors", random_layers("wan", make("wan")), "wan")
    assert "is of flux or flux2_klein or qwen_image and" in refuse("merge", path, wan, "--output", out)


@pytest.mark.parametrize(
    ("name", "form"),
    [("single_transformer_blocks.0.attn.to_q", "transformer.{}"), ("single_blocks_0_linear2", "lora_unet_{}")],
)
def test_a_foreign_model_by_its_header_is_not_converted_unless_the_user_says_so(name: str, form: str, tmp_path: Path):
    sides = {name: (3072, 5 * 3072 if form.startswith("lora_unet") else 3072)}
    path = save(tmp_path / "x.safetensors", sides, form, {"modelspec.architecture": "chroma/lora"})
    out = tmp_path / "out.safetensors"
    assert describe(path)["family"] is None
    assert "is of a model that is unknown here" in refuse("export", path, "--format", "kohya", "--output", out)
    run("export", path, "--format", "comfyui", "--family", "flux", "--output", out)
    assert out.exists()


def test_names_that_mean_other_layers_in_each_family_are_not_guessed(tmp_path: Path):
    """FLUX.1's and FLUX.2's first layer of time have other places in diffusers, or none."""
    sides = {"final_layer_linear": (64, 3072), "img_in": (3072, 64)}
    path = save(tmp_path / "x.safetensors", sides, "lora_unet_{}")
    families = read_adapter_file(path).families
    assert len(families) > 1
    for family in families:
        assert set(read_adapter_file(path, family).layers) == {"proj_out", "x_embedder"}
    fused = {"double_blocks_0_img_mlp_0": (3072, 3072)}  # a shape that neither has
    with pytest.raises(
        UserError, match="fits flux and flux2_klein by its layers, which are others in each; give --fam"
    ):
        read_adapter_file(save(tmp_path / "odd.safetensors", fused, "lora_unet_{}"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_readings_are_compared_in_numbers_of_any_type(dtype: torch.dtype, tmp_path: Path):
    """float8 has no comparison of its own."""
    path = save(tmp_path / "x.safetensors", {"transformer_blocks.0.attn.to_q": (3072, 3072)})
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    file = read_adapter_file(path)
    assert (len(file.families), len(file.layers)) == (3, 1)
