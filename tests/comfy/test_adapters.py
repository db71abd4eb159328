"""Load Adapter: what it draws is what the trainer draws with the file, and nothing that does not fit gets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SEED, loras_folder, random_layers, rounded_latents, save_adapter, trainer_latents
from comfy_client import Comfy, Graph, Refused
from graphs import drawing, latents_of, node
from rounding import relative_error
from torch import Tensor

from ngrpo_lora.adapters.loading import load_adapter
from ngrpo_lora.adapters.names import original_rows
from ngrpo_lora.adapters.reading import Layer
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.training.export import describe_adapter


@pytest.fixture(scope="module")
def family() -> BaseFamily:
    return load_family(ModelConfig(device="cpu"))


@pytest.fixture(scope="module")
def layers(family: BaseFamily) -> dict[str, dict[str, Layer]]:
    """Of two adapters."""
    return {name: random_layers(family, seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def loras(comfy: Comfy, family: BaseFamily, layers: Any, make_config: Any, tmp_path_factory: Any) -> Path:
    """The server's folder, with these adapters as a run of six steps writes them."""
    folder = loras_folder(comfy)
    config = make_config(tmp_path_factory.mktemp("run"), "rollout.num_steps=6", "rollout.shift=2.5")
    for name, own in layers.items():
        header = describe_adapter(sorted(f"transformer.{layer}.lora_A.weight" for layer in own), family, config)
        save_adapter(folder / f"{name}.safetensors", own, header)
    return folder


def adapted(name: str = "a", model: Any = ("model", 0), **settings: Any) -> dict[str, Any]:
    given = {"lora_name": f"{name}.safetensors", "strength": 1.0, "schedule": "", "alpha": "fold in"}
    return node("NGRPO_LoadAdapter", model=[*model], **given | settings)


def drawing_with(load: dict[str, Any], **settings: Any) -> Graph:
    graph = drawing(**{"seed": SEED} | settings) | {"load": load}
    graph["guider"]["inputs"]["model"] = ["load", 0]
    return graph


def model_latents(comfy: Comfy, family: BaseFamily, graph: Graph) -> Tensor:
    return latents_of(comfy, comfy.run(graph)) * family.vae.config.scaling_factor


def check_same(drawn: Tensor, base: Tensor, family: BaseFamily, *args: Any, **kwargs: Any) -> None:
    """Latents are those of `trainer_latents`, and far from those of the base."""
    expected, rounding = rounded_latents(family, *args, **kwargs)
    assert relative_error(expected, base) > max(0.005, 100 * rounding)
    assert relative_error(drawn, expected) <= rounding


@pytest.fixture(scope="module")
def base(family: BaseFamily) -> Tensor:
    return trainer_latents(family)


# What it draws


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5, -1.0])
def test_latents_are_the_trainers_at_every_strength(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, base: Tensor, strength: float
):
    drawn = model_latents(comfy, family, drawing_with(adapted(strength=strength)))
    check_same(drawn, base, family, [(layers["a"], lambda step: strength)])


def test_at_strength_0_it_is_the_base_to_the_bit(comfy: Comfy, loras: Path, family: BaseFamily):
    expected = model_latents(comfy, family, drawing(seed=SEED))
    assert torch.equal(model_latents(comfy, family, drawing_with(adapted(strength=0.0))), expected)
    assert torch.equal(model_latents(comfy, family, drawing_with(adapted(schedule="0:0, 1:0"))), expected)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("0:0, 1:1", [0, 1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1]),
        ("0.5:1, 0.5:0", [1, 1, 1, 1, 0, 0, 0, 0]),
        (" 0:2,0.5:0 , 1:-1", [2, 2 - 4 / 7, 2 - 8 / 7, 2 - 12 / 7, -1 / 7, -3 / 7, -5 / 7, -1]),
        ("0.5", [0.5] * 8),
    ],
)
def test_a_schedule_sets_the_strength_of_every_step(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, base: Tensor, schedule: str, factors: list[float]
):
    drawn = model_latents(comfy, family, drawing_with(adapted(strength=1.5, schedule=schedule)))
    check_same(drawn, base, family, [(layers["a"], lambda step: 1.5 * factors[step])])


def test_what_a_schedule_left_behind_does_not_reach_other_graphs(comfy: Comfy, loras: Path, family: BaseFamily):
    """The layers of a model are one and the same in all graphs."""
    expected = model_latents(comfy, family, drawing(seed=SEED))
    model_latents(comfy, family, drawing_with(adapted(schedule="0:1, 1:0"), seed=SEED + 1))
    comfy.run(drawing(seed=SEED + 2))  # what was drawn before is not drawn again
    assert torch.equal(
        model_latents(comfy, family, drawing(seed=SEED) | {"other": node("NGRPO_LoadEmbedded")}), expected
    )


# Several at once


def chained(*loads: dict[str, Any]) -> Graph:
    """Load Adapter nodes in a row."""
    graph = drawing(seed=SEED)
    for number, load in enumerate(loads):
        graph[f"load{number}"] = load
        if number:
            load["inputs"]["model"] = [f"load{number - 1}", 0]
    graph["guider"]["inputs"]["model"] = [f"load{len(loads) - 1}", 0]
    return graph


@pytest.mark.parametrize("schedules", [("", ""), ("0:1, 1:0", ""), ("", "0:0, 1:1"), ("0:1, 1:0", "0:0, 1:1")])
def test_several_adapters_add_up(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, base: Tensor, schedules: tuple[str, str]
):
    falling = (lambda step: 1 - step / 7) if schedules[0] else (lambda step: 1.0)
    rising = (lambda step: -0.5 * step / 7) if schedules[1] else (lambda step: -0.5)
    graph = chained(adapted("a", schedule=schedules[0]), adapted("b", strength=-0.5, schedule=schedules[1]))
    check_same(model_latents(comfy, family, graph), base, family, [(layers["a"], falling), (layers["b"], rising)])


def test_comfyuis_own_loader_and_samplers_go_with_it(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, base: Tensor
):
    own = node("LoraLoaderModelOnly", model=["model", 0], lora_name="b.safetensors", strength_model=0.7)
    drawn = model_latents(comfy, family, chained(own, adapted(schedule="0:0, 1:1")))
    check_same(drawn, base, family, [(layers["b"], lambda step: 0.7), (layers["a"], lambda step: step / 7)])

    graph = drawing_with(adapted(schedule="0:1, 1:1, 1:0"))  # only the last step differs
    graph["sampler"] = node("KSamplerSelect", sampler_name="euler")
    adapters = [(layers["a"], lambda step: float(step < 7))]
    check_same(model_latents(comfy, family, graph), base, family, adapters, solver="euler")


# How it wants to be drawn


def test_sampler_and_noise_levels_are_those_of_training(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, base: Tensor
):
    graph = drawing_with(adapted())
    graph["sample"]["inputs"] |= {"sampler": ["load", 1], "sigmas": ["load", 2]}
    graph["latent"]["inputs"] |= {"width": ["load", 4], "height": ["load", 5]}
    adapters = [(layers["a"], lambda step: 1.0)]
    check_same(model_latents(comfy, family, graph), base, family, adapters, steps=6, shift=2.5)


def test_a_run_with_eulers_solver_gives_eulers_sampler(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, base: Tensor, make_config: Any, tmp_path: Path
):
    config = make_config(tmp_path, "rollout.num_steps=5", "rollout.solver=euler")
    header = describe_adapter(["transformer.x.lora_A.weight"], family, config)
    save_adapter(loras / "euler.safetensors", layers["a"], header)
    graph = drawing_with(adapted("euler"))
    graph["sample"]["inputs"] |= {"sampler": ["load", 1], "sigmas": ["load", 2]}
    adapters = [(layers["a"], lambda step: 1.0)]
    check_same(model_latents(comfy, family, graph), base, family, adapters, steps=5, solver="euler")


def told(comfy: Comfy, load: dict[str, Any]) -> dict[str, str]:
    """What a node shows, by its first word."""
    graph = {"model": node("NGRPO_LoadEmbedded"), "load": load}
    for name, output in (("guidance", 3), ("width", 4), ("height", 5), ("info", 6)):
        graph[name] = node("PreviewAny", source=["load", output])
    result = comfy.run(graph)
    assert result.status == "success", result.error
    shown = {name: result.outputs[name]["text"][0] for name in ("guidance", "width", "height", "info")}
    assert result.outputs["load"]["text"] == [shown["info"]]
    return shown | dict(line.split(": ", 1) for line in shown["info"].splitlines())


def test_it_shows_what_the_file_says(comfy: Comfy, loras: Path, family: BaseFamily):
    shown = told(comfy, adapted())
    assert float(shown["guidance"]) == family.settings["guidance_scale"]
    assert (shown["width"], shown["height"]) == ("64", "64")
    assert shown["file"] == "a.safetensors"
    assert (shown["family"], shown["base"], shown["alpha"]) == ("flux", "embedded", "folded in")
    assert shown["rank"].startswith("4 (")
    assert "num_steps 6, shift 2.5, solver dpmpp_2m" in shown["settings"]
    assert shown["settings"].endswith("(as in training)")
    assert str(loras) not in shown["info"]


def test_a_file_of_another_trainer_is_drawn_as_its_family_is(comfy: Comfy, loras: Path, layers: Any):
    save_adapter(loras / "foreign.safetensors", layers["a"], {"ss_base_model_version": "flux1"})
    shown = told(comfy, adapted("foreign"))
    assert shown["settings"] == "not in the file; those of the preset flux"
    assert shown["drawn with"] == "8 steps of dpmpp_2m, 720 x 720 px"
    assert (shown["guidance"], shown["width"]) == ("3.5", "720")


def test_an_adapter_of_another_base_says_so(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, make_config: Any, tmp_path: Path
):
    header = describe_adapter(["transformer.x.lora_A.weight"], family, make_config(tmp_path))
    own = json.loads(header["ngrpo"])
    own["model"]["path"] = "black-forest-labs/FLUX.1-dev"
    save_adapter(loras / "dev.safetensors", layers["a"], header | {"ngrpo": json.dumps(own)})
    shown = told(comfy, adapted("dev"))
    assert shown["base"] == "black-forest-labs/FLUX.1-dev"
    assert shown["note"].startswith("trained with guidance built in (black-forest-labs/FLUX.1-dev), and this MODEL has")


# Files of other trainers


def kohya(layers: dict[str, Layer], family: str) -> dict[str, Tensor]:
    """As sd-scripts has it, alpha half the rank; embedded layers are narrower than FLUX.1's, so none is fused."""
    tensors = {}
    for name in ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.ff.net.2"):
        original = original_rows(name, family)
        assert original is not None
        flat = f"lora_unet_{original[0].replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": layers[name].down, f"{flat}.lora_up.weight": layers[name].up}
        tensors[f"{flat}.alpha"] = torch.tensor(len(layers[name].down) / 2)
    return tensors


def fused(layers: dict[str, Layer]) -> tuple[dict[str, Tensor], dict[str, Layer]]:
    """A fused layer in ComfyUI's names, and the layers that it stands for."""
    down = torch.randn(4, 128, generator=torch.Generator().manual_seed(3)) / 16
    up = torch.randn(384, 4, generator=torch.Generator().manual_seed(4)) / 4
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    parts = {
        f"transformer_blocks.0.attn.to_{one}": Layer(down, rows) for one, rows in zip("qkv", up.split(128), strict=True)
    }
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, parts


@pytest.fixture(scope="module")
def foreign(loras: Path, layers: Any) -> dict[str, dict[str, Layer]]:
    """Files as others write them, and what each of them means."""
    strong = {name: Layer(layer.down, layer.up, 2.0) for name, layer in layers["a"].items()}
    plain = {key: tensor for key, tensor in state_dict(layers["a"]).items()}
    flux = {"ss_base_model_version": "flux1"}

    def save(name: str, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
        save_tensors(
            loras / f"{name}.safetensors", {k: t.contiguous() for k, t in tensors.items()}, flux | (header or {})
        )

    alpha = {"transformer.r": 4, "transformer.lora_alpha": 8}
    save("header_alpha", plain, {"lora_adapter_metadata": json.dumps(alpha)})
    stable = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.use_rslora": True}
    save("rslora", plain, {"lora_adapter_metadata": json.dumps(stable)})
    peft = {key.replace("transformer.", "base_model.model.", 1): tensor for key, tensor in plain.items()}
    save("peft/adapter_model", peft)
    (loras / "peft" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    save("kohya", kohya(layers["a"], "flux"))
    half = {
        name: Layer(layers["a"][name].down, layers["a"][name].up, 0.5)
        for name in strong
        if name.startswith("transformer_blocks.0.") and name.endswith(("attn.to_out.0", ".ff.net.2"))
    }
    tensors, parts = fused(layers["a"])
    save("fused", tensors)
    sixteen = {key: tensor.bfloat16() for key, tensor in plain.items()}
    save("bfloat16", sixteen)
    rounded = {
        name: Layer(layer.down.bfloat16().float(), layer.up.bfloat16().float()) for name, layer in layers["a"].items()
    }
    return {
        "header_alpha": strong,
        "rslora": strong,
        "peft/adapter_model": strong,
        "kohya": half,
        "fused": parts,
        "bfloat16": rounded,
    }


@pytest.mark.parametrize("name", ["header_alpha", "rslora", "peft/adapter_model", "kohya", "fused", "bfloat16"])
@pytest.mark.parametrize("schedule", ["", "0:1.5, 0.99:1.5, 1:0.5"])
def test_files_of_other_trainers_mean_what_they_say(
    comfy: Comfy, family: BaseFamily, base: Tensor, foreign: Any, name: str, schedule: str
):
    drawn = model_latents(comfy, family, drawing_with(adapted(name, schedule=schedule)))
    check_same(drawn, base, family, [(foreign[name], lambda step: (1.5 if step < 7 else 0.5) if schedule else 1.0)])


@pytest.mark.parametrize("name", ["a", "header_alpha", "kohya", "fused", "bfloat16"])
def test_as_comfyui_reads_it_is_comfyuis_own_loader_to_the_bit(
    comfy: Comfy, family: BaseFamily, foreign: Any, name: str
):
    own = node("LoraLoaderModelOnly", model=["model", 0], lora_name=f"{name}.safetensors", strength_model=0.7)
    expected = model_latents(comfy, family, chained(own))
    drawn = model_latents(comfy, family, chained(adapted(name, strength=0.7, alpha="as ComfyUI reads it")))
    assert torch.equal(drawn, expected)
    folded = model_latents(comfy, family, chained(adapted(name, strength=0.7)))
    assert ((folded - expected).norm() / expected.norm() > 1e-3) == (name == "header_alpha")


def test_velocities_are_those_of_diffusers_loader(comfy: Comfy, loras: Path, foreign: Any):
    """One step is one velocity."""
    own = load_family(ModelConfig(device="cpu"))
    base = trainer_latents(own, steps=1)
    load_adapter(own, str(loras / "header_alpha.safetensors"), 4.0)
    drawn = model_latents(comfy, own, drawing_with(adapted("header_alpha", strength=4.0), steps=1))
    check_same(drawn, base, own, steps=1)


# What does not get through


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strength": "nan"}, "strength must be finite, got nan"),
        ({"strength": "inf"}, "strength must be finite, got inf"),
        ({"schedule": "0:0, 1"}, "schedule must be a number, or places with factors"),
        ({"schedule": "0:0, 2:1"}, "places of a schedule must go up from 0"),
        ({"lora_name": "../a.safetensors"}, "lora_name must be a file in ComfyUI's loras folder"),
        ({"lora_name": "nowhere.safetensors"}, "lora_name must be a file in ComfyUI's loras folder"),
    ],
)
def test_a_bad_input_is_refused_before_anything_runs(comfy: Comfy, loras: Path, settings: dict[str, Any], reason: str):
    with pytest.raises(Refused) as refused:
        comfy.submit(drawing_with(adapted(**settings)))
    assert refused.value.status == 400
    assert reason in refused.value.reasons


def damaged(loras: Path, damage: str) -> Path:
    """A file that cannot be read."""
    whole = (loras / "a.safetensors").read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "garbage": b"\x07nothing" * 50, "empty": b""}
    if damage == "pickle":
        torch.save({"x": torch.ones(1)}, path := loras / "pickle.pt")
    elif damage == "disguised":
        torch.save({"x": torch.ones(1)}, path := loras / "disguised.safetensors")
    else:
        (path := loras / f"{damage}.safetensors").write_bytes(contents[damage])
    return path


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "pickle", "disguised"])
def test_a_file_that_is_none_is_refused_before_anything_runs(comfy: Comfy, loras: Path, damage: str):
    path = damaged(loras, damage)
    with pytest.raises(Refused) as refused:
        comfy.submit(drawing_with(adapted(lora_name=path.name)))
    assert refused.value.status == 400
    what = "is a pickle file" if path.name in ("pickle.pt", "disguised.safetensors") else "is no readable safetensors"
    assert what in refused.value.reasons


ONE = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("name", "tensors", "reasons"),
    [
        (
            "none_fits",
            {"layers.3.attention.to_q": (3840, 3840)},
            ["a Flux (flux): 1 of its 1 layers", "one of z_image"],
        ),
        (
            "other_size",
            {"transformer_blocks.0.attn.to_q": (3072, 3072)},
            ["1 of its 1 layers are not there or have an"],
        ),
        ("deeper", {ONE: (128, 128), "transformer_blocks.9.attn.to_q": (128, 128)}, ["1 of its 2 layers", "blocks.9"]),
        (
            "half_known",
            {ONE: (128, 128), "nowhere.to_q": (128, 128)},
            ["1 of its 2 layers are not there", "nowhere.to_q"],
        ),
        ("sdxl", {"lora_unet_input_blocks_4_1_proj_in": (640, 640)}, ["adapts a layer that flux does not have"]),
        ("wan", {"blocks.0.attn1.to_q": (1536, 1536)}, ["by its layers it is one of wan"]),
    ],
)
def test_a_file_that_does_not_fit_in_every_layer_is_an_error(
    comfy: Comfy, loras: Path, name: str, tensors: dict[str, tuple[int, int]], reasons: list[str]
):
    layers = {layer: Layer(torch.ones(2, columns), torch.ones(rows, 2)) for layer, (rows, columns) in tensors.items()}
    weights = state_dict(layers)
    if name == "sdxl":
        weights = {
            k.replace("transformer.", "").replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t
            for k, t in weights.items()
        }
    save_tensors(loras / f"{name}.safetensors", weights, {})
    result = comfy.run(drawing_with(adapted(name)))
    assert (result.status, result.error_node) == ("error", "load")
    for reason in (f"{name}.safetensors' is no LoRA", *reasons):
        assert reason in result.error
    assert comfy.run(drawing()).status == "success"
