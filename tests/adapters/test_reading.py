"""LoRA files of other trainers, read as they mean them, and files that are refused."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from lora_files import (
    effect,
    flux1_layers,
    header,
    kohya,
    loaded_output,
    merged_output,
    relative_error,
    renamed,
    same_layers,
    write,
)
from safetensors.torch import save_file
from tiny_transformers import make, output, random_layers
from torch import Tensor

from ngrpo_lora.adapters.reading import AdapterFile, Layer, check_fits, log_warnings, read_adapter_file
from ngrpo_lora.adapters.writing import state_dict
from ngrpo_lora.errors import UserError

# Files of others


@pytest.mark.parametrize("family", ["flux2_klein", "qwen_image", "wan", "z_image"])
def test_kohyas_files_are_read_as_diffusers_reads_them(family: str, tmp_path: Path):
    path = kohya(random_layers(family, make(family)), family, 0.5, tmp_path / "kohya.safetensors")
    file = read_adapter_file(path)
    assert (file.alpha, {layer.scale for layer in file.layers.values()}) == ("tensors", {0.25})
    expected = loaded_output(family, path)
    assert relative_error(loaded_output(family, state_dict(file.layers)), expected) <= 1e-6
    assert relative_error(output(family, make(family)), expected) > 1e-3


def test_kohyas_flux_is_read_as_diffusers_reads_it(tmp_path: Path):
    layers = {name.replace(".3.", ".0.").replace(".17.", ".0."): layer for name, layer in flux1_layers().items()}
    path = kohya(layers, "flux", 3.0, tmp_path / "kohya.safetensors")
    expected, _ = FluxPipeline.lora_state_dict(str(path), return_alphas=True)
    file = read_adapter_file(path)
    assert file.layers.keys() == layers.keys()
    for name, layer in file.layers.items():
        assert relative_error(effect(state_dict({name: layer}), name), effect(expected, name)) <= 1e-6


@pytest.mark.parametrize(
    "form",
    [
        "transformer.{}.lora_{}.weight",
        "diffusion_model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.weight",
        "{}.lora_{}.weight",
        "{}.lora_{}.default.weight",
        "base_model.model.{}.lora_{}.my_adapter.weight",
    ],
)
@pytest.mark.parametrize("family", ["sd3", "z_image"])
def test_diffusers_names_are_read_with_every_prefix(family: str, form: str, tmp_path: Path):
    layers = random_layers(family, make(family))
    save_file(renamed(layers, form), tmp_path / "x.safetensors", header(family))
    file = read_adapter_file(tmp_path / "x.safetensors")
    assert (file.family, file.alpha) == (family, "unsaid")
    same_layers(file.layers, layers)


def test_onetrainers_underscores_are_read(tmp_path: Path):
    layers = random_layers("flux", make("flux"))
    flat = {name.replace(".", "_"): layer for name, layer in layers.items()}
    tensors = renamed(flat, "lora_transformer_{}.lora_{}.weight")
    save_file(tensors, tmp_path / "x.safetensors", header("flux"))
    same_layers(read_adapter_file(tmp_path / "x.safetensors").layers, layers)


@pytest.mark.parametrize(
    ("config", "scale", "pattern_scale"),
    [
        ({"r": 2, "lora_alpha": 2}, 1.0, 1.0),
        ({"r": 2, "lora_alpha": 8}, 4.0, 4.0),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(2), 8 / math.sqrt(2)),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 1}}, 4.0, 0.5),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {".*": 2}}, 4.0, 4.0),
    ],
)
@pytest.mark.parametrize("source", ["header", "adapter_config.json"])
def test_alpha_in_pefts_words_is_what_peft_makes_of_it(
    config: dict[str, Any], scale: float, pattern_scale: float, source: str, tmp_path: Path
):
    layers = random_layers("sd3", make("sd3"))
    expected = {
        name: Layer(x.down, x.up, pattern_scale if name.endswith("attn.to_q") else scale) for name, x in layers.items()
    }
    full = config | {"target_modules": [*layers]}
    if source == "header":
        path, form = tmp_path / "x.safetensors", "transformer.{}.lora_{}.weight"
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": x for key, x in full.items()})}
        save_file(renamed(layers, form), path, metadata)
        assert relative_error(loaded_output("sd3", path), merged_output("sd3", expected)) <= 1e-5  # diffusers agrees
    else:
        path = tmp_path / "adapter_model.safetensors"
        save_file(renamed(layers, "base_model.model.{}.lora_{}.weight"), path)
        path.with_name("adapter_config.json").write_text(json.dumps(full))
    file = read_adapter_file(path)
    assert file.alpha == source
    same_layers(file.layers, expected)


def test_a_folder_that_peft_saved_is_read(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    transformer = make("sd3")
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_out.0"], rank_pattern={"to_out.0": 3}, init_lora_weights=False
    )
    model = get_peft_model(transformer, config)
    expected = output("sd3", model)
    model.save_pretrained(str(tmp_path / "peft"))
    file = read_adapter_file(tmp_path / "peft")
    assert relative_error(merged_output("sd3", file.layers), expected) <= 1e-5


@pytest.mark.parametrize("family", ["flux", "flux2_klein", "qwen_image", "sd3", "wan", "z_image"])
@pytest.mark.parametrize("form", ["transformer.{}.lora_{}.weight", "diffusion_model.{}.lora_{}.weight"])
def test_kohyas_header_alone_is_no_alpha_as_in_diffusers_and_a_file_without_a_word_is_warned_of(
    family: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Converters from kohya's names fold alpha in and leave the header."""
    layers = random_layers(family, make(family))
    own = {"ss_network_dim": "16", "ss_network_alpha": "1.0", "ss_network_module": "networks.lora"}
    path = tmp_path / "x.safetensors"
    save_file(renamed(layers, form), path, header(family) | own)
    file = read_adapter_file(path)
    same_layers(file.layers, layers)
    if form.startswith("transformer"):
        assert relative_error(loaded_output(family, state_dict(file.layers)), loaded_output(family, path)) <= 1e-6
    log_warnings(file)
    assert [record.getMessage() for record in caplog.records] == [
        f"adapter {path} does not say its alpha; it is taken to be the rank"
    ]


def test_a_file_that_changes_nothing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "x.safetensors"
    save_file({key: tensor * 0 for key, tensor in GOOD.items()}, path)
    log_warnings(read_adapter_file(path))
    assert f"adapter {path} changes nothing: every product of its matrices is zero" in caplog.text


def test_the_norm_is_frobenius_of_what_is_added(tmp_path: Path):
    layer = Layer(torch.randn(3, 7), torch.randn(5, 3), -0.5)
    assert layer.norm() == pytest.approx(layer.delta().norm().item(), rel=1e-6)


# Bad input

LAYER = "transformer.transformer_blocks.0.attn.to_q"

GOOD = {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LAYER}.dora_scale": torch.ones(1)}, "to_q' is a DoRA over inputs"),
        ({f"{LAYER}.oft_blocks": torch.ones(1)}, "it is of OFT, whose changes are no sums"),
        ({f"{LAYER}.lora_A.second.weight": torch.ones(2, 32)}, "it has '.*lora_A.*weight' twice, under two names"),
        (
            {"x.lora_A.a.weight": torch.ones(2, 2), "x.lora_B.b.weight": torch.ones(2, 2)},
            r"it holds 2 adapters \(a, b\); save one of them alone",
        ),
        ({"x.nothing": torch.ones(1)}, r"1 of its 3 keys are not of a LoRA \(x.nothing\)"),
        ({"transformer.x.lora_A.weight": torch.ones(2, 2)}, "'transformer.x' has only one of its two matrices"),
        ({f"{LAYER}.lora_A.weight": torch.ones(3, 32)}, r"do not fit each other: \(3, 32\) and \(32, 2\)"),
        ({"lora_unet_nothing.lora_down.weight": torch.ones(2, 2)}, "only one of its two"),
        ({f"{LAYER}.lora_A.weight": torch.ones(2, 32) * 1j}, "has numbers of the type complex64"),
        ({f"{LAYER}.lora_down.weight": torch.ones(2, 32)}, "it has '.*' twice, under two names"),
        (
            {f"{LAYER}.lora_A.{name}.weight": torch.ones(2, 32) for name in ("day", "night")},
            r"it holds 2 adapters \(day, night\); save one of them alone",
        ),
    ],
)
def test_what_is_not_wholly_a_lora_is_refused_with_examples(changes: dict[str, Tensor], message: str, tmp_path: Path):
    save_file(GOOD | changes, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x\.safetensors' is no LoRA that can be used here: .*{message}"):
        read_adapter_file(tmp_path / "x.safetensors")


def test_an_unknown_flat_name_is_refused(tmp_path: Path):
    flat = {"lora_unet_x.lora_down.weight": torch.ones(2, 2), "lora_unet_x.lora_up.weight": torch.ones(2, 2)}
    save_file(flat, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="adapts a layer that no model known here has, 'lora_unet_x'"):
        read_adapter_file(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="adapts a layer that flux does not have, 'lora_unet_x'"):
        read_adapter_file(tmp_path / "x.safetensors", "flux")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, tmp_path: Path):
    save_file(GOOD | {f"{LAYER}.lora_B.weight": torch.full((32, 2), bad)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"has weights that are not finite, in 'transformer\.transformer_blocks\.0"):
        read_adapter_file(tmp_path / "x.safetensors")


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "boom"))


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "adapter.ckpt", "adapter.safetensors"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_is_refused_and_not_run(name: str, archive: bool, tmp_path: Path):
    path = tmp_path / name
    torch.save(Bomb(tmp_path / "boom"), path, _use_new_zipfile_serialization=archive)
    assert zipfile.is_zipfile(path) == archive
    with pytest.raises(UserError, match=r"adapter\.\w+' is a pickle file, which can run any code"):
        read_adapter_file(path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("length", [8, 20, -4])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path):
    save_file(GOOD, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:length])
    with pytest.raises(UserError, match="is no readable safetensors file"):
        read_adapter_file(tmp_path / "x.safetensors")


def test_every_length_of_a_header_may_begin_as_a_pickle_does(tmp_path: Path):
    for padding in range(0, 256, 8):
        save_file(GOOD, tmp_path / "x.safetensors", {"padding": "x" * padding})
        assert read_adapter_file(tmp_path / "x.safetensors").layers


def test_an_adapter_of_another_model_names_layers_and_the_family_that_it_fits(tmp_path: Path):
    wan = read_adapter_file(write(tmp_path / "x.safetensors", random_layers("wan", make("wan")), "wan"), "sd3")
    with pytest.raises(UserError, match=r"no LoRA of this model: 20 of its 20 layers are not there \(blocks.0.attn1.t"):
        check_fits(wan, make("sd3"))
    assert wan.family == "wan"


def test_a_layer_of_another_size_or_that_is_not_there_is_said_without_advice_that_was_followed(tmp_path: Path):
    """The model is given; the message says what the file is of, as far as that can be known."""
    own, transformer = random_layers("sd3", make("sd3")), make("sd3")
    name = "transformer_blocks.1.attn.to_k"

    def message(layers: dict[str, Layer], families: tuple[str, ...]) -> str:
        with pytest.raises(UserError) as refused:
            check_fits(AdapterFile(tmp_path, {}, layers, families, "transformer", "header"), transformer, "sd3")
        return str(refused.value)

    wide = {name: Layer(torch.ones(2, 48), torch.ones(32, 2))}
    assert f"'{name}' is 32 x 48 there and 32 x 32 here, while its other {len(own) - 1} layers" in message(
        own | wide, ("sd3",)
    )
    assert message(wide, ("sd3",)).endswith("by its layers it is of a sd3 of another size")
    assert message(wide, ("flux", "wan")).endswith("it is one of flux or wan; give a model of that family")
    assert message(wide, ()).endswith("it is one of a model that is unknown here")
    more = {"nowhere.to_k": wide[name]}
    assert message(more, ("sd3",)).endswith("by its layers it is of a variant of this model that has them")
    assert f"1 of its {len(own) + 1} layers are not there (nowhere.to_k), while its other {len(own)} layers" in message(
        own | more, ("sd3",)
    )
    check_fits(AdapterFile(tmp_path, {}, own, ("sd3",), "transformer", "header"), transformer)
