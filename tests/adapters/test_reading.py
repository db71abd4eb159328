"""LoRA files of every format: what is written stock diffusers loads, what others write is read as they mean it."""

from __future__ import annotations

import json
import logging
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FinishedRun, MakeConfig
from diffusers import FluxPipeline
from safetensors.torch import save_file
from tiny_transformers import MAKERS, make, output, pipeline_of, random_layers
from torch import Tensor

from ngrpo_lora import gaussian_noise, registry
from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.adapters.names import FORMATS, NAMES
from ngrpo_lora.adapters.reading import AdapterFile, Layer, check_fits, read_adapter_file, warn_of_alpha
from ngrpo_lora.adapters.writing import Format, convert, peft_metadata, save_tensors, state_dict
from ngrpo_lora.config import LoraConfig, ModelConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.sampling.sampler import draw, sample_images
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.types import TextEmbeds

WRITABLE = [(family, form) for family in MAKERS for form in FORMATS[family]]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture):
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def header(family: str) -> dict[str, str]:
    return {"ss_base_model_version": {"qwen_image": "qwen", "flux2_klein": "flux_2_klein_4b"}.get(family, family)}


def write(path: Path, layers: dict[str, Layer], family: str) -> Path:
    """As the trainer does."""
    save_tensors(path, state_dict(layers), header(family) | {"lora_adapter_metadata": peft_metadata(layers)})
    return path


def readable_by_diffusers(family: str, form: Format, layers: dict[str, Layer]) -> dict[str, Layer]:
    """Of a tiny FLUX diffusers cannot split what kohya's format has as one."""
    fused = (".attn.to_q", ".attn.to_k", ".attn.to_v", ".proj_mlp")
    tiny = (family, form) == ("flux", "kohya")
    return {name: x for name, x in layers.items() if not (tiny and name.startswith("single") and name.endswith(fused))}


def merged_output(family: str, layers: dict[str, Layer]) -> Tensor:
    """With the weights themselves changed: no loader of anybody's."""
    transformer = make(family)
    for name, layer in layers.items():
        weight = transformer.get_submodule(name).weight
        weight += layer.delta().view_as(weight)
    return output(family, transformer)


def loaded_output(family: str, file: Path | dict[str, Tensor]) -> Tensor:
    """With stock diffusers."""
    transformer = make(family)
    pipeline_of(family, transformer).load_lora_weights(file)
    return output(family, transformer)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def same_layers(actual: dict[str, Layer], expected: dict[str, Layer], tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, layer in expected.items():
        assert relative_error(actual[name].delta(), layer.delta()) <= tolerance, name


# Formats


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


def flux1_layers() -> dict[str, Layer]:
    """Of FLUX.1's true width, one block of each kind."""
    attention = ["to_q", "to_k", "to_v"]
    sides = {f"transformer_blocks.3.attn.{name}": (3072, 3072) for name in [*attention, "to_out.0", "to_add_out"]}
    sides |= {f"transformer_blocks.3.attn.add_{name}_proj": (3072, 3072) for name in "qkv"}
    sides |= {f"transformer_blocks.3.{ff}.net.0.proj": (12288, 3072) for ff in ("ff", "ff_context")}
    sides |= {f"transformer_blocks.3.{ff}.net.2": (3072, 12288) for ff in ("ff", "ff_context")}
    sides |= {f"single_transformer_blocks.17.attn.{name}": (3072, 3072) for name in attention}
    sides |= {"single_transformer_blocks.17.proj_mlp": (12288, 3072)}
    sides |= {"single_transformer_blocks.17.proj_out": (3072, 15360)}
    torch.manual_seed(0)
    return {name: Layer(torch.randn(2, columns), torch.randn(rows, 2)) for name, (rows, columns) in sides.items()}


def effect(tensors: dict[str, Tensor], name: str) -> Tensor:
    """On three fixed inputs."""
    up, down = (tensors[f"transformer.{name}.lora_{part}.weight"].double() for part in "BA")
    inputs = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(0)).double()
    return up @ (down @ inputs)


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


@pytest.mark.parametrize(("family", "form"), [("sd3", "kohya"), ("sana", "kohya"), ("sana", "comfyui")])
def test_a_format_without_readers_is_an_error_with_those_that_have_some(family: str, form: Format, tmp_path: Path):
    file = read_adapter_file(write(tmp_path / "x.safetensors", random_layers(family, make(family)), family))
    with pytest.raises(UserError, match=rf"--format {form} .* adapter of {family}; give --format diffusers"):
        convert(file, form)


def test_kohyas_format_needs_the_width_that_diffusers_expects(tmp_path: Path):
    file = read_adapter_file(write(tmp_path / "x.safetensors", random_layers("flux", make("flux")), "flux"))
    with pytest.raises(UserError, match=r"--format kohya needs the width of FLUX.1, 3072, but .* has 32; give --fo"):
        convert(file, "kohya")


# Files of others


def kohya(layers: dict[str, Layer], family: str, alpha: float, path: Path) -> Path:
    """As sd-scripts and musubi-tuner write it: any alpha, dense matrices."""
    tensors: dict[str, Tensor] = {}
    for form, parts in NAMES[family].items():
        for block in range(2):
            found = [layers[name] for part in parts if (name := part.format(block)) in layers]
            if len(found) == len(parts):
                name = "lora_unet_" + form.format(block).replace(".", "_")
                tensors[f"{name}.lora_down.weight"] = found[0].down
                tensors[f"{name}.lora_up.weight"] = torch.cat([layer.up for layer in found])
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, header(family) | {"ss_network_dim": "2", "ss_network_alpha": str(alpha)})
    return path


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


def renamed(layers: dict[str, Layer], form: str) -> dict[str, Tensor]:
    """lora_A and lora_B, unfolded, with `form` around the layer's name."""
    tensors = {}
    for name, layer in layers.items():
        tensors[form.format(name, "A")] = layer.down
        tensors[form.format(name, "B")] = layer.up
    return tensors


@pytest.mark.parametrize(
    "form",
    [
        "transformer.{}.lora_{}.weight",
        "diffusion_model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.weight",
        "{}.lora_{}.weight",
        "{}.lora_{}.default.weight",
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


def test_kohyas_header_alone_is_folded_and_a_file_without_a_word_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    layers = random_layers("sd3", make("sd3"))
    tensors = renamed(layers, "transformer.{}.lora_{}.weight")
    save_file(tensors, tmp_path / "said.safetensors", {"ss_network_dim": "16", "ss_network_alpha": "4.0"})
    save_file(tensors, tmp_path / "unsaid.safetensors")
    said, unsaid = (read_adapter_file(tmp_path / name) for name in ("said.safetensors", "unsaid.safetensors"))
    assert {layer.scale for layer in said.layers.values()} == {0.25}
    assert {layer.scale for layer in unsaid.layers.values()} == {1.0}
    for file in (said, unsaid):
        warn_of_alpha(file)
    assert [record.getMessage() for record in caplog.records] == [
        f"adapter {tmp_path / 'unsaid.safetensors'} does not say its alpha; it is taken to be the rank"
    ]


def test_the_norm_is_frobenius_of_what_is_added(tmp_path: Path):
    layer = Layer(torch.randn(3, 7), torch.randn(5, 3), -0.5)
    assert layer.norm() == pytest.approx(layer.delta().norm().item(), rel=1e-6)


# Whose it is


@pytest.mark.parametrize("family", MAKERS)
def test_a_file_with_feed_forward_layers_needs_no_header_to_be_known(family: str, tmp_path: Path):
    layers = random_layers(family, make(family))
    save_file(renamed(layers, "transformer.{}.lora_{}.weight"), tmp_path / "x.safetensors")
    ambiguous = {"sd3": (None, "flux", "sd3")}  # its layers' names are those of FLUX.1's double blocks
    assert read_adapter_file(tmp_path / "x.safetensors").family in ambiguous.get(family, (family,))


@pytest.mark.parametrize(
    ("width", "blocks", "family"),
    [
        (3072, 19, "flux"),
        (3072, 5, "flux2_klein"),
        (4096, 8, "flux2_klein"),
        (3072, 60, "qwen_image"),
        (1536, 24, "sd3"),
        (2432, 38, "sd3"),
    ],
)
def test_attention_alone_is_told_apart_by_width_and_number_of_blocks(
    width: int, blocks: int, family: str, tmp_path: Path
):
    layers = {
        f"transformer_blocks.{block}.attn.to_q": Layer(torch.ones(1, width), torch.ones(width, 1))
        for block in range(blocks)
    }
    save_file(renamed(layers, "transformer.{}.lora_{}.weight"), tmp_path / "x.safetensors")
    assert read_adapter_file(tmp_path / "x.safetensors").family == family


# To start from


def injected(family: str, rank: int, targets: str = "attention+feed_forward") -> Any:
    """A transformer with the trainer's own LoRA, whose alpha is not its rank."""
    kind, transformer = registry.load(registry.MODELS, family).Family, make(family)
    suffixes = kind.attention + (kind.feed_forward if targets != "attention" else ())
    lora.inject(transformer, LoraConfig(rank=rank, alpha=3.0), [*suffixes], [], seed=0)
    return transformer


@pytest.mark.parametrize("family", ["flux", "qwen_image", "sana", "sd3", "wan", "z_image"])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_run_starts_with_the_effect_of_the_file_that_it_starts_from(family: str, form: Format, tmp_path: Path):
    """Ranks 1 to 2 in a LoRA of rank 4: what is left over has zeros in lora_B, and a lora_A to learn with."""
    if form not in FORMATS[family]:
        pytest.skip(f"{family} has no such format")
    path, layers = tmp_path / "x.safetensors", random_layers(family, make(family))
    layers = {name: x for name, x in layers.items() if f"{family}.{name}" != "flux.proj_out"}
    if form == "kohya":
        kohya(layers, family, 0.5, path)
    else:
        first = next(iter(layers))
        layers[first] = Layer(layers[first].down[:1], layers[first].up[:, :1])
        write(path, layers, family)
    file = read_adapter_file(path, family)
    transformer = injected(family, rank=4)
    lora.start_from(transformer, file, [])
    assert relative_error(output(family, transformer), merged_output(family, file.layers)) <= 1e-6
    parameters = lora.parameters(transformer)
    for name, layer in file.layers.items():
        down, up = (parameters[f"{name}.lora_{part}.default.weight"] for part in "AB")
        assert not up[:, layer.rank :].any()
        assert down[layer.rank :].flatten(1).any(1).all()


def test_a_file_of_higher_rank_says_which_rank_is_needed(tmp_path: Path):
    file = read_adapter_file(write(tmp_path / "x.safetensors", random_layers("sd3", make("sd3")), "sd3"))
    with pytest.raises(
        UserError, match=r"lora.rank must be at least 2, that of lora.init_from .*x.safetensors', got 1"
    ):
        lora.start_from(injected("sd3", rank=1), file, [])


def test_layers_that_a_run_does_not_train_are_an_error_unless_nothing_follows_from_them(tmp_path: Path):
    layers = random_layers("sd3", make("sd3"))
    file = read_adapter_file(write(tmp_path / "x.safetensors", layers, "sd3"))
    with pytest.raises(UserError, match=r"adapts 6 layers that lora.targets leaves out \(transformer_blocks.0.ff.net"):
        lora.start_from(injected("sd3", rank=2, targets="attention"), file, [])
    unused = "transformer_blocks.1.attn.add_q_proj"
    transformer = make("sd3")
    attention = registry.load(registry.MODELS, "sd3").Family.attention
    suffixes = [*attention, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj"]
    lora.inject(transformer, LoraConfig(rank=2), [*suffixes, "ff_context.net.2"], [unused], seed=0)
    lora.start_from(transformer, file, [unused])
    assert relative_error(output("sd3", transformer), merged_output("sd3", layers)) <= 1e-6


def test_training_goes_on_from_an_adapter_and_a_resumed_run_has_its_own_weights(
    make_config: MakeConfig, finished_run: FinishedRun, tmp_path: Path
):
    """The first evaluation is that of the file, and the reference is still the base."""
    source = finished_run.output_dir
    settings = (f"lora.init_from={source}", "lora.rank=6", "trainer.num_iterations=1", "evaluation.every=1")
    config = make_config(tmp_path / "run", *settings)
    check_run(config)
    run = prepare(config)
    expected = sample_images(find_adapter(source), None, [p.text for p in run.held_out[:1]], [1000])[0]
    text = run.family.encode([run.held_out[0].text])
    drawn = draw(run.family, text, [1000], config.rollout.solver, run.schedule.sigmas)[0]
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1
    latents = gaussian_noise((1, *run.family.latent_shape), 0)
    with torch.no_grad(), lora.disabled(run.family.transformer):
        assert torch.equal(run.family.velocity(latents, 0.5, text), base_velocity(latents, text))
    complete(run)
    trained = {name: p.detach().clone() for name, p in run.lora_step.parameters.items()}

    resumed = make_config(tmp_path / "run", *settings, "resume=latest")
    (tmp_path / "elsewhere").mkdir()
    resumed = resumed.model_copy(update={"lora": resumed.lora.model_copy(update={"init_from": "gone.safetensors"})})
    for name, parameter in prepare(resumed).parameters.items():
        assert torch.equal(parameter, trained[name])


def base_velocity(latents: Tensor, text: TextEmbeds) -> Tensor:
    with torch.no_grad():
        return load_family(ModelConfig()).velocity(latents, 0.5, text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.init_from=gone", r"lora.init_from: adapter must be a LoRA file, a run's .*, but 'gone' does not exist"),
        ("lora.rank=1", "lora.rank must be at least 4, that of lora.init_from"),
    ],
)
def test_what_is_wrong_with_a_start_is_said_before_a_model_loads(
    setting: str, message: str, make_config: MakeConfig, finished_run: FinishedRun, tmp_path: Path
):
    settings = {"lora.init_from": str(finished_run.output_dir)} | dict([setting.split("=")])
    config = make_config(tmp_path / "run", *(f"{key}={value}" for key, value in settings.items()))
    with pytest.raises(ConfigError, match=message):
        check_run(config)


# Bad input


LAYER = "transformer.transformer_blocks.0.attn.to_q"
GOOD = {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LAYER}.dora_scale": torch.ones(1)}, "it is a DoRA, not a plain pair of matrices"),
        ({f"{LAYER}.lokr_w1": torch.ones(1)}, "it is a LoKr"),
        ({"lora_te_text_model_0.lora_down.weight": torch.ones(1)}, "adapts text encoders too"),
        ({"x.diff_b": torch.ones(1)}, r"1 of its 3 keys are not of a LoRA \(x.diff_b\)"),
        ({"transformer.x.lora_A.weight": torch.ones(2, 2)}, "only one of the two matrices is there for transformer.x"),
        ({f"{LAYER}.lora_A.weight": torch.ones(3, 32)}, r"do not fit each other: \(3, 32\) and \(32, 2\)"),
        ({"lora_unet_nothing.lora_down.weight": torch.ones(2, 2)}, "only one of the two"),
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


def test_a_folder_gives_the_one_adapter_in_it(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"adapter must be .* does not exist"):
        find_adapter(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"holds no pytorch_lora_weights.safetensors and no other"):
        find_adapter(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model.bin' is a pickle file"):
        find_adapter(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert find_adapter(tmp_path).name == "a.safetensors"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(ConfigError, match=r"must be one LoRA, but .* holds a.safetensors and b.safetensors; give the"):
        find_adapter(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert find_adapter(tmp_path).name == "pytorch_lora_weights.safetensors"


def test_an_adapter_of_another_model_names_layers_and_the_family_that_it_fits(tmp_path: Path):
    wan = read_adapter_file(write(tmp_path / "x.safetensors", random_layers("wan", make("wan")), "wan"), "sd3")
    with pytest.raises(UserError, match=r"no LoRA of this model: 20 of its 20 layers are not there \(blocks.0.attn1.t"):
        check_fits(wan, make("sd3"))
    assert wan.family == "wan"
    own = random_layers("sd3", make("sd3"))
    name = "transformer_blocks.1.attn.to_k"
    wide = own | {name: Layer(torch.ones(2, 48), torch.ones(32, 2))}
    file = AdapterFile(tmp_path, {}, wide, "sd3", "transformer", "header")
    with pytest.raises(UserError, match=rf"'{name}' is 32 x 48 there and 32 x 32 here; by its layers it is one of sd3"):
        check_fits(file, make("sd3"))
    check_fits(AdapterFile(tmp_path, {}, own, "sd3", "transformer", "header"), make("sd3"))
