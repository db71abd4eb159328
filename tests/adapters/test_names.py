"""What the keys of a file stand for."""

from __future__ import annotations

import pytest
import torch

from ngrpo_lora.adapters.layers import NAMES
from ngrpo_lora.adapters.names import diffusers_names, is_exchanged
from ngrpo_lora.adapters.reading import Layer


@pytest.mark.parametrize(
    "before",
    ["transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "pipe.dit.", "_orig_mod.", ""],
)
def test_what_trainers_put_before_a_name_is_left_out(before: str):
    assert diffusers_names(f"{before}double_blocks.3.img_mlp.0", "flux") == ("transformer_blocks.3.ff.net.0.proj",)
    assert diffusers_names(f"{before}norm_out.linear", "flux") == ("norm_out.linear",)


def test_a_part_of_a_fused_layer_has_a_number_and_other_numbers_are_names():
    assert diffusers_names("double_blocks.3.img_attn.qkv.1", "flux") == ("transformer_blocks.3.attn.to_k",)
    assert diffusers_names("lora_unet_single_blocks_3_linear1_3", "flux") == ("single_transformer_blocks.3.proj_mlp",)
    assert diffusers_names("lora_unet_double_blocks_3_img_attn_qkv_3", "flux") == ()
    assert diffusers_names("transformer.cap_embedder.1", "z_image") == ("cap_embedder.1",)


@pytest.mark.parametrize("family", NAMES)
def test_no_name_means_one_layer_in_the_original_code_and_another_in_diffusers(family: str):
    for original, parts in NAMES[family].items():
        for part in parts:
            assert diffusers_names(f"lora_unet_{part}".replace("{}", "7").replace(".", "_"), family) == (
                part.replace("{}", "7"),
            )
        assert diffusers_names(original.replace("{}", "7"), family) == tuple(part.replace("{}", "7") for part in parts)


def test_flux2s_blocks_are_known_by_a_name_that_lost_its_start():
    (name,) = diffusers_names("diffusion_model.sformer_blocks.2.ff.linear_in", "flux2_klein")
    assert name == "transformer_blocks.2.ff.linear_in"


def test_the_halves_of_a_last_modulation_are_exchanged_in_original_names_alone():
    last = "joint_blocks.23.context_block.adaLN_modulation.1"
    for name in (last, f"diffusion_model.{last}", f"lora_unet_{last.replace('.', '_')}"):
        assert is_exchanged(name, "sd3")
    assert is_exchanged("final_layer.adaLN_modulation.1", "flux2_klein")
    assert not is_exchanged("final_layer.adaLN_modulation.1", "z_image")
    assert not is_exchanged("transformer.norm_out.linear", "flux")
    six_parts = Layer(torch.ones(2, 4), torch.arange(48.0).view(24, 2))
    assert six_parts.exchanged() is six_parts
    halves = Layer(torch.ones(1, 2), torch.arange(4.0).view(4, 1))
    assert halves.exchanged().up.flatten().tolist() == [2, 3, 0, 1]
