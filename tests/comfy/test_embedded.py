"""The embedded model's VAE is one of ComfyUI's: its nodes take it, and find all that they ask a VAE for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_client import Comfy, Graph
from graphs import drawing, latents_of, node

TILES = {"tile_size": 128, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
CONDITIONS = {"positive": ["text", 0], "negative": ["text", 0]}
ENCODERS = {
    "VAEEncode": {},
    "VAEEncodeTiled": TILES,
    "VAEEncodeForInpaint": {"mask": ["mask", 0], "grow_mask_by": 6},
    "InpaintModelConditioning": {"mask": ["mask", 0], "noise_mask": True} | CONDITIONS,
    "InstructPixToPixConditioning": CONDITIONS,
}
"""ComfyUI's nodes that encode pictures with any VAE, and what they take beside it."""


def with_mask(**drawn: Any) -> Graph:
    """Drawing a picture, and half of it as a mask."""
    return drawing(**drawn) | {"mask": node("SolidMask", value=1.0, width=64, height=64)}


@pytest.mark.parametrize(("kind", "inputs"), ENCODERS.items())
def test_nodes_that_encode_take_it(comfy: Comfy, kind: str, inputs: dict[str, Any]):
    graph = with_mask(seed=7)
    graph["encode"] = node(kind, pixels=["decode", 0], vae=["model", 2], **inputs)
    slot = 2 if "positive" in inputs else 0
    graph["kept"] = node("SaveLatent", samples=["encode", slot], filename_prefix="encoded")
    result = comfy.run(graph)
    assert latents_of(comfy, result, "kept").shape == latents_of(comfy, result).shape


def test_what_is_encoded_is_decoded_again(comfy: Comfy):
    graph = drawing(seed=7)
    graph["encode"] = node("VAEEncode", pixels=["decode", 0], vae=["model", 2])
    graph["again"] = node("VAEDecode", samples=["encode", 0], vae=["model", 2])
    graph["shown again"] = node("PreviewImage", images=["again", 0])
    result = comfy.run(graph)
    assert result.status == "success", result.error
    first, again = (comfy.image(result.outputs[name]["images"][0]).convert("L") for name in ("show", "shown again"))
    apart = [abs(one - other) for one, other in zip(first.tobytes(), again.tobytes(), strict=True)]
    assert sum(apart) / len(apart) < 8  # of 255


def test_tiles_as_large_as_the_picture_change_nothing(comfy: Comfy):
    graph = drawing(seed=7)
    whole = comfy.run(graph)
    tiled = comfy.run(graph | {"decode": node("VAEDecodeTiled", samples=["sample", 0], vae=["model", 2], **TILES)})
    one, other = (comfy.image(drawn.outputs["show"]["images"][0]) for drawn in (whole, tiled))
    assert one.tobytes() == other.tobytes()


def test_it_can_be_saved(comfy: Comfy):
    graph = drawing(seed=7) | {"saved": node("VAESave", vae=["model", 2], filename_prefix="vae/embedded")}
    result = comfy.run(graph)
    assert result.status == "success", result.error
    assert [*(comfy.base / "output" / "vae").glob("embedded*.safetensors")]


def test_it_has_all_that_this_comfyuis_vaes_have(in_process: None):
    import comfy.sd

    from comfy_nodes.embedded import EmbeddedVAE
    from ngrpo_lora.config import ModelConfig
    from ngrpo_lora.models._loading import load_family

    vae = EmbeddedVAE(load_family(ModelConfig(device="cpu")))
    plain = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=16).state_dict(), dtype=torch.float32)
    assert vars(vae).keys() >= vars(plain).keys()
    assert vae.spacial_compression_encode() == vae.spacial_compression_decode() == 8
    assert vae.latent_channels == 16
    assert vae.temporal_compression_decode() is None
    assert vae.get_sd().keys() == vae.first_stage_model.state_dict().keys() != set()
