"""The embedded models as ComfyUI's own MODEL, with their text encoders as CLIP and their VAE.

ComfyUI's loaders cannot find out what so small a FLUX is: the number of heads, and the decoder's widths. Loaded here,
ComfyUI's nodes take it; of those that encode prompts CLIPTextEncode, since its encoders have no tokens to give. The one
that edits takes its source as FLUX.1-Kontext does: of VAEEncode and ReferenceLatent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.world import MODELS

from ._api import Node, checked, listed, schema, to_images

WEIGHTS = "diffusion_pytorch_model.safetensors"
DRAWS = "embedded"


class EmbeddedLatents(comfy.latent_formats.LatentFormat):
    """Latent format: latents in the graph are the VAE's, those in the model are scaled, as with any other model."""

    latent_channels = 16

    def __init__(self, scale_factor: float):
        self.scale_factor = scale_factor


def load_model(path: Path) -> comfy.model_patcher.ModelPatcher:
    """Load the transformer of an embedded model's folder as a MODEL, in float32."""
    folder = path / "transformer"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {name: weight.float() for name, weight in comfy.utils.load_torch_file(str(folder / WEIGHTS)).items()}
    converted = comfy.model_detection.convert_diffusers_mmdit(weights, "")
    found = comfy.model_detection.detect_unet_config(converted, "")
    found["num_heads"] = config["num_attention_heads"]  # which older versions take to be FLUX.1's
    model_config = comfy.model_detection.model_config_from_unet_config(found, converted)
    model_config.sampling_settings = model_config.sampling_settings | {"shift": 3.0}
    model_config.latent_format = EmbeddedLatents(vae_scale(path))
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model(converted, "")
    model.load_model_weights(converted, "")
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def vae_scale(path: Path) -> float:
    """The factor between the VAE's latents and the model's."""
    return json.loads((path / "vae" / "config.json").read_text(encoding="utf-8"))["scaling_factor"]


class TextEncoders(nn.Module):
    """CLIP and T5 in the form of ComfyUI's text models: prompts stand for tokens."""

    dtypes = (torch.float32,)

    def __init__(self, family: BaseFamily):
        super().__init__()
        self.family = family
        self.encoders = nn.ModuleList(family.encoders)

    def encode_token_weights(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode one prompt to its states (1, L, C) and its pooled state (1, C)."""
        (prompt,) = prompts
        text = self.family.encode_alone(prompt)
        return text["prompt_embeds"], text["pooled_prompt_embeds"]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> list[str]:
        """Return the prompt itself, which `encode_token_weights` takes in place of tokens."""
        return [text]

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Do nothing: these encoders have no layers to choose among."""

    def reset_clip_options(self) -> None:
        """Do nothing, as `set_clip_options` does nothing."""


def load_clip(family: BaseFamily) -> comfy.sd.CLIP:
    """Make a CLIP of the text encoders, as the node CLIPTextEncode takes it."""
    encoders = TextEncoders(family)
    device = torch.device("cpu")  # where the family is
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = clip.tokenizer = encoders
    clip.patcher = comfy.model_patcher.ModelPatcher(encoders, load_device=device, offload_device=device)
    clip.layer_idx, clip.apply_hooks_to_conds, clip.use_clip_schedule, clip.tokenizer_options = None, None, False, {}
    return clip


class Codec(nn.Module):
    """The family's VAE with the methods of ComfyUI's own first stages; its pictures are diffusers', to the bit."""

    def __init__(self, family: BaseFamily):
        super().__init__()
        self.family, self.vae = family, family.vae

    def decode(self, latents: Tensor, **options: Any) -> Tensor:
        """Decode latents (B, C, H, W) to pixels (B, 3, 8 H, 8 W) in [-1, 1]."""
        scaled = latents.float() * self.vae.config.scaling_factor
        pictures = [picture for one in scaled.split(1) for picture in self.family.decode(one)]
        return to_images(pictures).movedim(-1, 1) * 2 - 1

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, 8 H, 8 W) in [-1, 1] to latents (B, C, H, W)."""
        return self.vae.encode(pixels.float()).latent_dist.mode()


class EmbeddedVAE(comfy.sd.VAE):
    """The family's VAE in ComfyUI's own class, so that it has all that a node of any version asks a VAE for."""

    def __init__(self, family: BaseFamily):
        device = torch.device("cpu")  # where the family is
        # ComfyUI makes its tiny autoencoder, which has our sizes: 16 channels, 8 x 8 pixels for each of their cells.
        like = comfy.taesd.taesd.TAESD(latent_channels=EmbeddedLatents.latent_channels).state_dict()
        super().__init__(sd=like, device=device, dtype=torch.float32)
        self.first_stage_model = Codec(family)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=device, offload_device=device
        )


class LoadEmbedded(Node):
    """Node that loads an embedded model as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadEmbedded",
            display_name="Load Embedded Model",
            description="The small FLUX that ships with ngrpo-lora: 2.3 million parameters, 64 x 64 pixels, coloured "
            "shapes, any CPU. For trying everything out before a download. Its like that edits is a small "
            "FLUX.1-Kontext.",
            search_aliases=["checkpoint", "demo model", "example model", "tiny flux"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[*MODELS],
                    default=DRAWS,
                    optional=True,
                    tooltip="embedded draws; embedded-edit edits a picture, by ReferenceLatent.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, model: str = DRAWS) -> bool:
        return checked(listed, "model", model, [*MODELS])

    @classmethod
    def execute(cls, model: str = DRAWS) -> io.NodeOutput:
        path = MODELS[listed("model", model, [*MODELS])]
        with torch.inference_mode(False):
            family = load_family(ModelConfig(path=model, device="cpu"))
            return io.NodeOutput(load_model(path), load_clip(family), EmbeddedVAE(family))


NODES: list[type[io.ComfyNode]] = [LoadEmbedded]
