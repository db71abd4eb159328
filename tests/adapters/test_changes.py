"""Every method's change of a layer as a pair of matrices, against PEFT, stock diffusers and its own definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import header, loaded_output, merged_output, relative_error, renamed, same_layers
from safetensors.torch import save_file
from tiny_transformers import make, output, random_layers
from torch import Tensor
from torch.nn import functional

from ngrpo_lora.adapters.changes import Layer, grouped, made_layer, nominal_rank, scaled
from ngrpo_lora.adapters.reading import read_adapter_file
from ngrpo_lora.adapters.writing import convert, peft_metadata, save_tensors, state_dict
from ngrpo_lora.errors import UserError

TO_Q = "layers.0.attention.to_q"  # of the tiny Z-Image, 32 x 32

LOKR = {
    "whole": {"lokr_w1": (4, 4), "lokr_w2": (8, 8)},
    "second_in_two": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
    "both_in_two": {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (8, 1), "lokr_w2_b": (1, 8)},
}


def save(path: Path, parts: dict[str, tuple[int, ...]], form: str, **others: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {part: 0.3 * torch.randn(shape) for part, shape in parts.items()} | others
    save_file({form.format(part): tensor for part, tensor in tensors.items()}, path, header("z_image"))
    return tensors


@pytest.mark.parametrize("parts", LOKR.values(), ids=LOKR)
def test_lokr_is_read_and_exported_as_diffusers_reads_it(parts: dict[str, tuple[int, ...]], tmp_path: Path):
    """Whose alpha counts only where a factor is itself a product."""
    path = tmp_path / "lokr.safetensors"
    save(path, parts, f"diffusion_model.{TO_Q}.{{}}", alpha=torch.tensor(0.5))
    expected = loaded_output("z_image", path)
    file = read_adapter_file(path)
    assert relative_error(merged_output("z_image", file.layers), expected) <= 1e-5
    save_tensors(tmp_path / "x.safetensors", *convert(file, "diffusers"))
    assert relative_error(loaded_output("z_image", tmp_path / "x.safetensors"), expected) <= 1e-5
    assert relative_error(output("z_image", make("z_image")), expected) > 1e-3


@pytest.mark.parametrize("kind", ["LoKrConfig", "LoHaConfig"])
def test_pefts_folders_of_other_methods_are_what_peft_makes_of_them(kind: str, tmp_path: Path):
    import peft

    transformer = make("sd3")
    config = getattr(peft, kind)(r=2, alpha=3, target_modules=["to_q", "ff.net.2"], init_weights=False)
    model = peft.get_peft_model(transformer, config)
    expected = output("sd3", model)
    model.save_pretrained(str(tmp_path / "peft"))
    layers = read_adapter_file(tmp_path / "peft", "sd3").layers
    assert relative_error(merged_output("sd3", layers), expected) <= 1e-5


@pytest.mark.parametrize("rank", [2, 8])
def test_loha_is_the_product_of_two_loras(rank: int):
    """Of as low a rank as it has, or of the layer's sides where that is lower."""
    shapes = {"hada_w1_a": (24, rank), "hada_w1_b": (rank, 16), "hada_w2_a": (24, rank), "hada_w2_b": (rank, 16)}
    parts = {part: torch.randn(shape) for part, shape in shapes.items()}
    layer = made_layer(parts)
    expected = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    assert relative_error(layer.delta(), expected) <= 1e-6
    assert (layer.rank, nominal_rank(parts)) == (min(rank**2, 16), rank)


def test_convolutions_of_every_method_are_those_that_lycoris_draws():
    """LyCORIS' "Tucker" forms: a chain of three convolutions, or a core with two matrices on its sides."""
    picture = torch.randn(1, 6, 5, 5)
    down, mid, up = torch.randn(2, 6, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(4, 3, 1, 1)
    layer = made_layer({"down": down, "mid": mid, "up": up})
    chain = functional.conv2d(functional.conv2d(functional.conv2d(picture, down), mid), up)
    weight = layer.delta().view(layer.sides)
    assert relative_error(functional.conv2d(picture, weight), chain) <= 1e-5

    core, rows, columns = torch.randn(2, 2, 3, 3), torch.randn(2, 4), torch.randn(2, 6)
    inner = functional.conv2d(
        functional.conv2d(picture, columns[..., None, None]), core.transpose(0, 1).transpose(0, 1)
    )
    expected = functional.conv2d(inner, rows.T[..., None, None])
    parts = {"w1": torch.ones(1, 1), "t2": core, "w2_a": rows, "w2_b": columns}
    layer = made_layer(parts)
    assert layer.sides == (4, 6, 3, 3)
    assert relative_error(functional.conv2d(picture, layer.delta().view(layer.sides)), expected) <= 1e-5
    ones = {"hada_t2": torch.ones(1, 1, 3, 3), "hada_w2_a": torch.ones(1, 4), "hada_w2_b": torch.ones(1, 6)}
    loha = made_layer({"hada_t1": core, "hada_w1_a": rows, "hada_w1_b": columns, **ones})
    assert relative_error(loha.delta(), layer.delta()) <= 1e-6


def test_a_bias_is_drawn_as_peft_and_diffusers_draw_it(tmp_path: Path):
    """PEFT's counts with alpha / rank."""
    from peft import LoraConfig, get_peft_model

    transformer = make("sd3")
    model = get_peft_model(
        transformer,
        LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k"], lora_bias=True, init_lora_weights=False),
    )
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(parameter, std=float("to_q" in name))
    expected = output("sd3", model)
    model.save_pretrained(str(tmp_path / "peft"))
    layers = read_adapter_file(tmp_path / "peft", "sd3").layers
    assert {name.rpartition(".")[2] for name, layer in layers.items() if layer.bias is not None} == {"to_q"}
    save_tensors(tmp_path / "x.safetensors", state_dict(layers), {"lora_adapter_metadata": peft_metadata(layers)})
    for source in (state_dict(layers), tmp_path / "x.safetensors"):
        assert relative_error(loaded_output("sd3", source), expected) <= 1e-5
    plain = {name: Layer(layer.down, layer.up, layer.scale) for name, layer in layers.items()}
    assert relative_error(loaded_output("sd3", state_dict(plain)), expected) > 1e-3


@pytest.mark.parametrize("zero", [True, False])
def test_wans_changes_of_biases_count_and_those_of_norms_do_not_as_in_diffusers(
    zero: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from ngrpo_lora.adapters.reading import log_warnings

    torch.manual_seed(0)
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 24), f"{name}.lora_up.weight": torch.randn(24, 2)}
    tensors |= {f"{name}.alpha": torch.tensor(1.0), f"{name}.diff_b": torch.randn(24)}
    norms = {"norm3.diff": (24,), "norm3.diff_b": (24,), "self_attn.norm_q.diff": (24,)}
    for norm, shape in norms.items():
        tensors[f"diffusion_model.blocks.0.{norm}"] = torch.zeros(shape) if zero else torch.randn(shape)
    path = tmp_path / "wan.safetensors"
    save_file(tensors, path, {"ss_base_model_version": "wan2.1"})
    expected = loaded_output("wan", path)
    file = read_adapter_file(path)
    assert relative_error(loaded_output("wan", state_dict(file.layers)), expected) <= 1e-6
    without = {name: Layer(layer.down, layer.up, layer.scale) for name, layer in file.layers.items()}
    assert relative_error(loaded_output("wan", state_dict(without)), expected) > 1e-3
    log_warnings(file)
    assert ("changes 2 norms or biases alone, which are left out here" in caplog.text) != zero
    comfyui, _ = convert(file, "comfyui")
    assert comfyui["diffusion_model.blocks.0.self_attn.q.diff_b"].equal(tensors[f"{name}.diff_b"])
    with pytest.raises(UserError, match="--format kohya has no place for the biases that .* changes .blocks.0.attn1.t"):
        convert(file, "kohya")


def test_a_whole_change_stands_in_for_a_pair_and_knows_no_alpha():
    """As diffusers and ComfyUI have it."""
    change = torch.randn(6, 4)
    parts = {"diff": change, "down": torch.randn(2, 4), "up": torch.randn(6, 2), "alpha": torch.tensor(9.0)}
    layer = made_layer(parts)
    assert torch.equal(layer.delta(), change)
    assert nominal_rank(parts) is None
    kernel = torch.randn(6, 4, 3, 3)
    layer = made_layer({"diff": kernel})
    assert layer.sides == kernel.shape
    assert torch.equal(layer.delta().view(layer.sides), kernel)
    assert (
        scaled(made_layer({"down": torch.ones(1, 2), "up": torch.ones(3, 1)}), {}, 0.5)
        .delta()
        .equal(torch.full((3, 2), 0.5))
    )


@pytest.mark.parametrize("family", ["sd3", "z_image"])
def test_a_dora_is_drawn_as_peft_draws_it_and_cannot_be_written_elsewhere(family: str, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    transformer = make(family)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(transformer, config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    expected = output(family, model)
    model.save_pretrained(str(tmp_path / "peft"))
    file = read_adapter_file(tmp_path / "peft", family)
    save_tensors(tmp_path / "x.safetensors", *convert(file, "diffusers"))
    for source in (state_dict(file.layers), tmp_path / "x.safetensors"):
        assert relative_error(loaded_output(family, source), expected) <= 1e-5
    columns = {
        key.replace("lora_magnitude_vector", "dora_scale"): tensor[:, None] if "magnitude" in key else tensor
        for key, tensor in state_dict(file.layers).items()
    }
    save_file(columns, tmp_path / "kohya.safetensors")
    again = read_adapter_file(tmp_path / "kohya.safetensors", family)
    assert relative_error(loaded_output(family, state_dict(again.layers)), expected) <= 1e-5
    with pytest.raises(
        UserError, match="--format comfyui cannot hold the DoRA .*: ComfyUI divides by another norm; gi"
    ):
        convert(file, "comfyui")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_numbers_of_other_types_are_what_diffusers_makes_of_them(dtype: torch.dtype, tmp_path: Path):
    layers = random_layers("sd3", make("sd3"))
    tensors = renamed(layers, "transformer.{}.lora_{}.weight")
    path = tmp_path / "x.safetensors"
    save_file({key: tensor.clamp(-2, 2).to(dtype) for key, tensor in tensors.items()}, path, header("sd3"))
    file = read_adapter_file(path)
    assert relative_error(loaded_output("sd3", state_dict(file.layers)), loaded_output("sd3", path)) <= 1e-6


def test_rows_of_a_fused_layer_take_their_bias_and_scales_along(tmp_path: Path):
    """Kohya's qkv of FLUX.1 with DoRA's scales for each row."""
    width = 8
    name, parts = "lora_unet_double_blocks_0_img_attn_qkv", torch.randn(3 * width)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, width),
        f"{name}.lora_up.weight": torch.randn(3 * width, 2),
        f"{name}.dora_scale": parts[:, None].clone(),
        f"{name}.diff_b": parts.flip(0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    layers = read_adapter_file(tmp_path / "x.safetensors", "flux").layers
    for i, letter in enumerate("qkv"):
        layer = layers[f"transformer_blocks.0.attn.to_{letter}"]
        rows = slice(i * width, (i + 1) * width)
        assert torch.equal(layer.magnitude, parts[rows])  # type: ignore[arg-type]
        assert torch.equal(layer.bias, parts.flip(0)[rows])  # type: ignore[arg-type]
        whole = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        torch.testing.assert_close(layer.delta(), whole[rows])


@pytest.mark.parametrize(
    ("key", "layer", "part"),
    [
        ("x.lora_A.weight", "x", "down"),
        ("x.lora_B.default.weight", "x", "up"),
        ("x.lora_A.my_adapter.weight", "x", "down"),
        ("x.lora_B", "x", "up"),
        ("lora_unet_x.lora_down.weight", "lora_unet_x", "down"),
        ("x.lora.up.weight", "x", "up"),
        ("x.lora_linear_layer.down.weight", "x", "down"),
        ("single_blocks.0.processor.qkv_lora.up.weight", "single_blocks.0.processor.qkv_lora", "up"),
        ("blocks.0.processor.qkv_lora1.down.weight", "blocks.0.processor.qkv_lora1", "down"),
        ("x.alpha", "x", "alpha"),
        ("x.lora_B.default.bias", "x", "bias"),
        ("x.lora_magnitude_vector", "x", "magnitude"),
        ("x.lora_magnitude_vector.default.weight", "x", "magnitude"),
        ("x.lokr_w2_a", "x", "w2_a"),
        ("x.hada_w1_b.default", "x", "hada_w1_b"),
        ("x.diff_b", "x", "diff_b"),
        ("x.weight", None, None),
        ("x.lora_A.bias", None, None),
        ("x.up.weight", None, None),
    ],
)
def test_a_key_is_a_layer_and_what_it_has_of_it(key: str, layer: str | None, part: str | None):
    groups, unknown = grouped({key: torch.ones(1)})
    assert [(name, *parts) for name, parts in groups.items()] == ([] if layer is None else [(layer, part)])
    assert unknown == ([key] if layer is None else [])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "half": ({"down": (2, 4)}, "has only one of its two matrices"),
    "other_ranks": ({"down": (2, 4), "up": (4, 3)}, r"do not fit each other: \(2, 4\) and \(4, 3\)"),
    "no_rank": ({"down": (0, 4), "up": (4, 0)}, "do not fit each other"),
    "vectors": ({"down": (4,), "up": (4,)}, "do not fit each other"),
    "a_kernel_in_up": ({"down": (2, 4, 1, 1), "up": (4, 2, 3, 3)}, "do not fit each other"),
    "a_flat_mid": ({"down": (2, 4), "mid": (2, 2), "up": (4, 2)}, "do not fit each other"),
    "alpha_alone": ({"alpha": ()}, "has alpha and no matrices"),
    "a_flat_change": ({"diff": (4,), "down": (2, 4)}, r"has a change of \(4,\)"),
    "a_long_bias": ({"down": (2, 4), "up": (4, 2), "diff_b": (5,)}, r"has a bias of \(5,\) for 4 rows"),
    "dora_over_inputs": ({"down": (2, 4), "up": (6, 2), "magnitude": (1, 4)}, "is a DoRA over inputs"),
    "dora_over_inputs_of_a_square": ({"down": (2, 4), "up": (4, 2), "magnitude": (1, 4)}, "is a DoRA over inputs"),
    "lokr_in_part": ({"w1": (2, 2)}, "has no w2, neither whole nor as two matrices"),
    "lokr_of_other_ranks": ({"w1": (2, 2), "w2_a": (4, 2), "w2_b": (3, 4)}, "do not fit each other"),
    "loha_in_part": ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4)}, "has no hada_w2"),
    "tucker_in_part": ({"w1": (2, 2), "t2": (2, 2, 3, 3)}, "has only some of t2, w2_a and w2_b"),
}


@pytest.mark.parametrize(("shapes", "message"), BAD.values(), ids=BAD)
def test_what_is_missing_or_does_not_fit_is_said(shapes: dict[str, tuple[int, ...]], message: str):
    with pytest.raises(ValueError, match=message):
        made_layer({part: torch.ones(shape) for part, shape in shapes.items()})


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(torch.tensor(1.0), 0.5), (torch.tensor([1.0]), 0.5), (torch.tensor([[1]]), 0.5), (torch.tensor(0.0), 0.0)],
)
def test_an_alpha_of_any_shape_that_holds_one_number_counts(alpha: Tensor, scale: float, tmp_path: Path):
    name = "lora_unet_layers_0_attention_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
    save_file(tensors | {f"{name}.alpha": alpha}, tmp_path / "x.safetensors")
    (layer,) = read_adapter_file(tmp_path / "x.safetensors").layers.values()
    assert layer.scale == scale


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.ones(0), torch.tensor(float("nan")), torch.tensor(1j)])
def test_an_alpha_that_is_no_number_is_refused(alpha: Tensor, tmp_path: Path):
    name = "lora_unet_layers_0_attention_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
    save_file(tensors | {f"{name}.alpha": alpha}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"alpha what cannot be understood: [02] numbers|not finite|type complex64"):
        read_adapter_file(tmp_path / "x.safetensors")


def test_words_in_headers_where_kohya_has_numbers_are_no_alpha(tmp_path: Path):
    """Of kohya's own: LyCORIS writes `Dynamic`, others `None`; and of PEFT's, which are refused in words."""
    layers = random_layers("z_image", make("z_image"))
    tensors = renamed(layers, "diffusion_model.{}.lora_{}.weight")
    for dim, alpha in (("Dynamic", "None"), ("16", "1.0"), ("None", "8"), ("0", "0"), ("", "")):
        save_file(tensors, tmp_path / "x.safetensors", {"ss_network_dim": dim, "ss_network_alpha": alpha})
        file = read_adapter_file(tmp_path / "x.safetensors")
        assert file.alpha == "unsaid"
        same_layers(file.layers, layers)
    for text in (
        '{"transformer.lora_alpha": "Dynamic"}',
        '{"transformer.lora_alpha": null}',
        '{"transformer.alpha_pattern": {"[": 1}}',
        '{"transformer.alpha_pattern": 3}',
        "[1]",
        "{",
    ):
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(UserError, match="alpha what cannot be understood|has settings of PEFT that cannot be read"):
            read_adapter_file(tmp_path / "x.safetensors")
