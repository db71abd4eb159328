"""Names of every layer that each family's transformer has: in the original code, and in diffusers.

An original layer may be several of diffusers' side by side (queries, keys and values as one `qkv`); they are listed in
the order of its rows. Sources: diffusers' `loaders/single_file_utils.py` and `loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ALIASES", "EXCHANGED", "NAMES", "XLABS", "Names"]

Names = dict[str, tuple[str, ...]]
"""Each original layer, with `{}` for the number of its block, and the diffusers layers that it consists of."""


def _blocks(original: str, diffusers: str, layers: Mapping[str, str]) -> Names:
    return {
        f"{original}{name}": tuple(f"{diffusers}{part}" for part in parts.split()) for name, parts in layers.items()
    }


def _same(blocks: str, layers: str) -> Names:
    """Names of layers that are called the same in diffusers and in the original code."""
    return {f"{blocks}{name}": (f"{blocks}{name}",) for name in layers.split()}


_FLUX_ATTENTION = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX1_DOUBLE_BLOCK = _FLUX_ATTENTION | {
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_FLUX1_SINGLE_BLOCK = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
_FLUX2_DOUBLE_BLOCK = _FLUX_ATTENTION | {
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_FLUX_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}
_MLP_EMBEDDER = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
_JOINT = "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out"
_HUNYUAN_REFINER = {
    "self_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "self_attn.proj": "attn.to_out.0",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_HUNYUAN_ENDS = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_SANA_BLOCK = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
_SANA_ENDS = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_block.1": "time_embed.linear",
    "final_layer.linear": "proj_out",
}
_SD3_BLOCK = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
_SD3_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_WAN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_WAN_CONDITIONS = {
    "text_embedding.0": "text_embedder.linear_1",
    "text_embedding.2": "text_embedder.linear_2",
    "time_embedding.0": "time_embedder.linear_1",
    "time_embedding.2": "time_embedder.linear_2",
    "time_projection.1": "time_proj",
    "img_emb.proj.1": "image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "image_embedder.ff.net.2",
}
_Z_IMAGE_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")},
}
_Z_IMAGE_MODULATED = _Z_IMAGE_BLOCK | {"adaLN_modulation.0": "adaLN_modulation.0"}
_Z_IMAGE_ENDS = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}

NAMES: dict[str, Names] = {  # by family
    "flux": {
        **_blocks("double_blocks.{}.", "transformer_blocks.{}.", _FLUX1_DOUBLE_BLOCK),
        **_blocks("single_blocks.{}.", "single_transformer_blocks.{}.", _FLUX1_SINGLE_BLOCK),
        **_blocks("time_in.", "time_text_embed.timestep_embedder.", _FLUX_EMBEDDER),
        **_blocks("guidance_in.", "time_text_embed.guidance_embedder.", _FLUX_EMBEDDER),
        **_blocks("vector_in.", "time_text_embed.text_embedder.", _FLUX_EMBEDDER),
        **_blocks("", "", _FLUX_ENDS),
    },
    "flux2_klein": {
        **_blocks("double_blocks.{}.", "transformer_blocks.{}.", _FLUX2_DOUBLE_BLOCK),
        **_blocks(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.attn.",
            {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"},
        ),
        **_blocks("time_in.", "time_guidance_embed.timestep_embedder.", _FLUX_EMBEDDER),
        **_blocks("guidance_in.", "time_guidance_embed.guidance_embedder.", _FLUX_EMBEDDER),
        **_blocks("double_stream_modulation_img.", "double_stream_modulation_img.", {"lin": "linear"}),
        **_blocks("double_stream_modulation_txt.", "double_stream_modulation_txt.", {"lin": "linear"}),
        **_blocks("single_stream_modulation.", "single_stream_modulation.", {"lin": "linear"}),
        **_blocks("", "", _FLUX_ENDS),
    },
    "hunyuan_video15": {  # as ComfyUI has them; Tencent's code has queries, keys and values apart
        **_blocks("double_blocks.{}.", "transformer_blocks.{}.", _FLUX1_DOUBLE_BLOCK),
        **_blocks(
            "txt_in.individual_token_refiner.blocks.{}.",
            "context_embedder.token_refiner.refiner_blocks.{}.",
            _HUNYUAN_REFINER,
        ),
        **_blocks("time_in.", "time_embed.timestep_embedder.", _FLUX_EMBEDDER),
        **_blocks("time_r_in.", "time_embed.timestep_embedder_r.", _FLUX_EMBEDDER),
        **_blocks("txt_in.t_embedder.", "context_embedder.time_text_embed.timestep_embedder.", _FLUX_EMBEDDER),
        **_blocks("txt_in.c_embedder.", "context_embedder.time_text_embed.text_embedder.", _FLUX_EMBEDDER),
        **_blocks("", "", _HUNYUAN_ENDS),
    },
    "qwen_image": {
        **_same("transformer_blocks.{}.", f"{_JOINT} img_mlp.net.0.proj img_mlp.net.2 img_mod.1"),
        **_same("transformer_blocks.{}.", "txt_mlp.net.0.proj txt_mlp.net.2 txt_mod.1"),
        **_same("time_text_embed.timestep_embedder.", "linear_1 linear_2"),
        **_same("", "img_in txt_in norm_out.linear proj_out"),
    },
    "sana": {
        **_blocks("blocks.{}.", "transformer_blocks.{}.", _SANA_BLOCK),
        **_blocks("t_embedder.", "time_embed.emb.timestep_embedder.", _MLP_EMBEDDER),
        **_blocks("", "", _SANA_ENDS),
    },
    "sd3": {
        **_blocks("joint_blocks.{}.", "transformer_blocks.{}.", _SD3_BLOCK),
        **_blocks("t_embedder.", "time_text_embed.timestep_embedder.", _MLP_EMBEDDER),
        **_blocks("y_embedder.", "time_text_embed.text_embedder.", _MLP_EMBEDDER),
        **_blocks("", "", _SD3_ENDS),
    },
    "wan": {
        **_blocks("blocks.{}.self_attn.", "blocks.{}.attn1.", _WAN_ATTENTION),
        **_blocks("blocks.{}.cross_attn.", "blocks.{}.attn2.", _WAN_ATTENTION),
        **_blocks("blocks.{}.cross_attn.", "blocks.{}.attn2.", {"k_img": "add_k_proj", "v_img": "add_v_proj"}),
        **_blocks("blocks.{}.ffn.", "blocks.{}.ffn.", {"0": "net.0.proj", "2": "net.2"}),
        **_blocks("", "condition_embedder.", _WAN_CONDITIONS),
        **_blocks("", "", {"patch_embedding": "patch_embedding", "head.head": "proj_out"}),
    },
    "z_image": {
        **_blocks("layers.{}.", "layers.{}.", _Z_IMAGE_MODULATED),
        **_blocks("noise_refiner.{}.", "noise_refiner.{}.", _Z_IMAGE_MODULATED),
        **_blocks("context_refiner.{}.", "context_refiner.{}.", _Z_IMAGE_BLOCK),
        **_blocks("siglip_refiner.{}.", "siglip_refiner.{}.", _Z_IMAGE_BLOCK),
        **_same("", "cap_embedder.1 siglip_embedder.1 t_embedder.mlp.0 t_embedder.mlp.2"),
        **_blocks("", "", _Z_IMAGE_ENDS),
    },
}

EXCHANGED: dict[str, tuple[str, ...]] = {
    "flux": ("final_layer.adaLN_modulation.1",),
    "flux2_klein": ("final_layer.adaLN_modulation.1",),
    "hunyuan_video15": ("final_layer.adaLN_modulation.1",),
    "sd3": ("final_layer.adaLN_modulation.1", "joint_blocks.{}.context_block.adaLN_modulation.1"),
}
"""Original layers, by family, whose rows are a shift and a scale where diffusers has a scale and a shift.

Of SD3's context blocks only the last is such a layer; the others have six parts, in the same order in both.
"""

XLABS: Names = {
    **_blocks(
        "double_blocks.{}.processor.",
        "transformer_blocks.{}.attn.",
        {
            "qkv_lora1": "to_q to_k to_v",
            "proj_lora1": "to_out.0",
            "qkv_lora2": "add_q_proj add_k_proj add_v_proj",
            "proj_lora2": "to_add_out",
        },
    ),
    **_blocks(
        "single_blocks.{}.processor.",
        "single_transformer_blocks.{}.",
        {"qkv_lora": "attn.to_q attn.to_k attn.to_v", "proj_lora": "proj_out"},
    ),
}
"""XLabs' names of FLUX.1's layers; in single blocks its queries, keys and values are without the feed-forward layer."""

ALIASES: dict[str, Names] = {
    "flux": XLABS | {"single_blocks.{}.linear1_qkv": XLABS["single_blocks.{}.processor.qkv_lora"]},
    "flux2_klein": _blocks(
        "sformer_blocks.{}.",
        "transformer_blocks.{}.",
        {part: part for parts in _FLUX2_DOUBLE_BLOCK.values() for part in parts.split()},
    ),
}
"""Further names that files have for layers, by family: XLabs' and ComfyUI's of FLUX.1, and one that lost its start."""
