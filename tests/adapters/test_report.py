"""What is said of a LoRA file, of ours and of other trainers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import refuse, run
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
    assert (said["diffusers"]["scales"], said["kohya"]["scales"]) == ([2.0], [0.25])
    assert said["diffusers"]["advice"].startswith("diffusers applies it, ComfyUI does not")
    assert said["kohya"]["advice"].startswith("neither diffusers nor ComfyUI reads it there")
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
        tensors = {f"lora_unet_{name}.{part}.weight": one for name in layers[:count] for part, one in pair.items()}
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
}


def text_layers(names: list[str], rank: int, count: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(count):
        for form, (down, up) in (TEXT_LAYERS[name][1:] for name in names):
            tensors |= {form.format(layer) + down: torch.ones(rank, 8), form.format(layer) + up: torch.ones(8, rank)}
            tensors |= {form.format(layer) + "alpha": torch.tensor(1.0)} if "lora_te" in form else {}
    return tensors


@pytest.mark.parametrize("names", [["lora_te1", "lora_te3"], ["text_encoder", "text_encoder_2", "text_encoder_3"]])
def test_info_counts_layers_of_text_encoders_which_nothing_else_takes(names: list[str], adapter: Path, tmp_path: Path):
    path = tmp_path / "both.safetensors"
    tensors, metadata = load_file(adapter), read_metadata(adapter)
    save_file(tensors | text_layers(names, 3, 5), path, metadata)
    said, own = describe(path), describe(adapter)
    found = {name: {"kind": TEXT_LAYERS[name][0], "layers": 5, "ranks": {"3": 5}} for name in names}
    assert said["text_encoders"] == found
    for key in ("family", "ranks", "layers", "norm", "alpha", "readers", "settings"):
        assert said[key] == own[key]
    assert "draw" not in said
    shown = "\n".join(" ".join(line.split()) for line in run("info", path))
    for name in names:
        assert f"text encoder {name} {TEXT_LAYERS[name][0]}; 5 layers of rank 3" in shown
    assert "rank 4 (27 layers)" in shown
    assert "cannot be used it adapts text encoders, which are left as they are here" in shown
    output = tmp_path / "x.safetensors"
    for words in (
        ["sample", "-p", "a star", "--adapter", path, "--output", tmp_path],
        ["merge", path, "--output", output],
        ["export", path, "--format", "comfyui", "--output", output],
    ):
        layers = ", ".join(f"5 layers of {name}" for name in sorted(names))
        assert f"it adapts text encoders too ({layers}), which are left as they are here" in refuse(*words)
    assert not output.exists()
    alone = tmp_path / "alone.safetensors"
    save_file(text_layers(names, 3, 5), alone)
    said = describe(alone)
    assert said["text_encoders"] == found
    assert not {"layers", "family", "draw"} & said.keys()
    assert "cannot be used" in "\n".join(run("info", alone))
