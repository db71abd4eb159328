"""What is said of a LoRA file, of ours and of other trainers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refuse, run
from pictures import pixels
from safetensors.torch import load_file, save_file
from tiny_transformers import make, random_layers

from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.adapters.report import describe
from ngrpo_lora.adapters.writing import state_dict


def test_info_says_what_an_alpha_that_is_not_folded_does_to_whom(adapter: Path, tmp_path: Path):
    tensors = load_file(adapter)
    said = {}
    for name, header in {
        "none": {},
        "diffusers": {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})},
        "kohya": {"ss_network_dim": "4", "ss_network_alpha": "1"},
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", header)
        said[name] = describe(tmp_path / f"{name}.safetensors")["alpha"]
    assert said["none"]["advice"].startswith("taken to be the rank")
    assert (said["diffusers"]["scales"], said["kohya"]["scales"]) == ([2.0], [1.0])
    assert said["diffusers"]["advice"].startswith("diffusers applies it, ComfyUI does not")
    assert said["kohya"]["advice"] == "taken to be folded in: kohya's header names 1 of 4, which no reader heeds"
    assert "alpha / rank 2, from header" in "\n".join(run("info", tmp_path / "diffusers.safetensors"))


def test_info_tells_what_is_of_other_trainers_and_what_is_of_no_use_here(tmp_path: Path):
    pair = {"lora_down": torch.ones(2, 8), "lora_up": torch.ones(8, 2)}
    unet = {f"lora_unet_down_blocks_0_to_q.{part}.weight": tensor for part, tensor in pair.items()}
    save_file(unet, tmp_path / "unet.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    said = describe(tmp_path / "unet.safetensors")
    assert (said["trainer"], said["base"]) == ("kohya's sd-scripts or musubi-tuner", "sdxl_base_v1-0")
    assert "which is no flow model" in said["unusable"]
    layers = state_dict(random_layers("wan", make("wan")))
    save_file(layers, tmp_path / "wan.safetensors")
    said = describe(tmp_path / "wan.safetensors")
    assert (said["family"], said["readers"]) == ("wan", ["diffusers"])  # ComfyUI has no such names of Wan
    assert said["draw"].endswith('--model MODEL --prompt "..."')
    assert "diffusers; `ngrpo export --format comfyui` for comfyui" in "\n".join(run("info", said["file"]))
    save_file({"weight": torch.ones(1)}, tmp_path / "no.safetensors")
    assert "none of its keys is one of a LoRA (weight)" in refuse("info", tmp_path / "no.safetensors")


def test_info_names_the_readers_that_take_every_layer(tmp_path: Path):
    pair = {"lora_down": torch.ones(2, 32), "lora_up": torch.ones(32, 2)}
    layers = ("double_blocks_0_img_attn_proj", "single_blocks_0_modulation_lin", "img_in")  # diffusers loses the last
    for count, readers in ((2, ["diffusers", "comfyui"]), (3, ["comfyui"])):
        tensors = {
            f"lora_unet_{name}.{part}.weight": one.clone() for name in layers[:count] for part, one in pair.items()
        }
        save_file(tensors, tmp_path / "x.safetensors", {"ss_base_model_version": "flux1"})
        assert describe(tmp_path / "x.safetensors")["readers"] == readers


TEXT_LAYERS = {  # as kohya's sd-scripts, diffusers, older diffusers and PEFT write them
    "lora_te1": (
        "CLIP",
        "lora_te1_text_model_encoder_layers_{}_self_attn_q_proj.",
        ("lora_down.weight", "lora_up.weight"),
    ),
    "lora_te3": ("T5", "lora_te3_encoder_block_{}_layer_0_SelfAttention_q.", ("lora_down.weight", "lora_up.weight")),
    "text_encoder": (
        "CLIP",
        "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj.",
        ("lora_A.weight", "lora_B.weight"),
    ),
    "text_encoder_2": (
        "CLIP",
        "text_encoder_2.text_model.encoder.layers.{}.self_attn.q_proj.lora_linear_layer.",
        ("down.weight", "up.weight"),
    ),
    "text_encoder_3": ("unknown", "base_model.model.text_encoder_3.layers.{}.q.", ("lora_A.weight", "lora_B.weight")),
    "text_encoders.clip_l": (
        "CLIP",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.{}.self_attn.q_proj.",
        ("lora_down.weight", "lora_up.weight"),
    ),
    "text_encoders.t5xxl": (
        "T5",
        "text_encoders.t5xxl.transformer.encoder.block.{}.layer.0.SelfAttention.q.",
        ("lora_A.weight", "lora_B.weight"),
    ),
    "lycoris_te1": (
        "CLIP",
        "lycoris_te1_text_model_encoder_layers_{}_self_attn_q_proj.",
        ("lora_down.weight", "lora_up.weight"),
    ),
    "bundle_emb": ("unknown", "bundle_emb.word{}.", ("lora_down.weight", "lora_up.weight")),
}


def text_layers(names: list[str], rank: int, count: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(count):
        for form, (down, up) in (TEXT_LAYERS[name][1:] for name in names):
            tensors |= {form.format(layer) + down: torch.ones(rank, 8), form.format(layer) + up: torch.ones(8, rank)}
            tensors |= {form.format(layer) + "alpha": torch.tensor(1.0)} if "lora_te" in form else {}
    return tensors


@pytest.mark.parametrize(
    "names",
    [
        ["lora_te1", "lora_te3"],
        ["text_encoder", "text_encoder_2", "text_encoder_3"],
        ["text_encoders.clip_l", "text_encoders.t5xxl"],
        ["bundle_emb", "lycoris_te1"],
    ],
)
def test_layers_of_text_encoders_are_counted_and_left_out_with_a_warning(
    names: list[str], adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "both.safetensors"
    tensors, metadata = load_file(adapter), read_metadata(adapter)
    save_file(tensors | text_layers(names, 3, 5), path, metadata)
    said, own = describe(path), describe(adapter)
    found = {name: {"kind": TEXT_LAYERS[name][0], "layers": 5, "ranks": {"3": 5}} for name in names}
    assert said["text_encoders"] == found
    for key in ("family", "ranks", "layers", "norm", "alpha", "readers", "settings"):
        assert said[key] == own[key]
    assert said["draw"].startswith("ngrpo sample")
    shown = "\n".join(" ".join(line.split()) for line in run("info", path))
    for name in names:
        assert f"text encoder {name} {TEXT_LAYERS[name][0]}; 5 layers of rank 3; left out" in shown
    assert "rank 4 (27 layers)" in shown
    layers = ", ".join(f"5 layers of {name}" for name in sorted(names))
    alike = {}
    for source in (path, adapter):
        output = tmp_path / source.stem
        for words in (
            ["sample", "-p", "a star", "--steps", 2, "--adapter", source, "--output", output],
            ["merge", source, "--output", output / "merged.safetensors"],
            ["export", source, "--format", "comfyui", "--output", output / "x.safetensors"],
        ):
            caplog.clear()
            run(*words)
            assert (f"adapts {layers} too, which are left out here" in caplog.text) == (source == path)
        (picture,) = output.glob("*.png")
        alike[source] = pixels(picture), load_file(output / "merged.safetensors"), load_file(output / "x.safetensors")
    (drawn, *files), (expected, *own_files) = alike.values()
    assert np.array_equal(drawn, expected)
    for file, own_file in zip(files, own_files, strict=True):
        assert file.keys() == own_file.keys()
        assert all(torch.equal(file[key], own_file[key]) for key in file)
    alone = tmp_path / "alone.safetensors"
    save_file(text_layers(names, 3, 5), alone)
    said = describe(alone)
    assert said["text_encoders"] == found
    assert not {"layers", "family", "draw"} & said.keys()
    assert "cannot be used" in "\n".join(run("info", alone))
    message = refuse("export", alone, "--format", "diffusers", "--output", tmp_path / "none.safetensors")
    assert f"it adapts {layers} and nothing of the transformer" in message


@pytest.mark.parametrize(
    "header",
    [
        {"ngrpo_merged": '["x"]'},
        {"ngrpo_merged": '[{"weight": "x"}, {"weight": 1}]'},
        {"ngrpo_merged": "5"},
        {"ngrpo": '{"rewards": ["a", {"weight": null}, {"name": 3, "weight": 2}]}'},
        {"ngrpo": '{"rewards": 5, "held_out": 5}'},
        {"ngrpo": '{"held_out": {"before": {"a": "b", "c": 1}, "after": {"c": 2}}}'},
        {"ngrpo": '{"held_out": {"before": 3}}'},
        {"ngrpo": '{"model": "x", "rollout": 1}'},
        {"ngrpo": '{"model": {"path": 3}, "rollout": {"num_steps": [1]}}'},
        {"ngrpo": "[]", "software": "[1]"},
        {"software": '{"name": 5}', "modelspec.architecture": ""},
    ],
)
def test_a_header_of_another_form_under_our_keys_is_left_out(header: dict[str, str], adapter: Path, tmp_path: Path):
    """Edited by hand, or by another program."""
    path = tmp_path / "x.safetensors"
    save_file(load_file(adapter), path, header)
    assert "27 layers" in "\n".join(run("info", path))
    json.loads("\n".join(run("info", "--json", path)))
    run("merge", path, path, "--output", tmp_path / "merged.safetensors", "--family", "flux")
