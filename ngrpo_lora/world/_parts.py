"""What the scripts that make the embedded model and its teacher share: scenes, parts, the flow, and the pipeline."""

# diffusers annotates its constructors' tuples and its outputs too narrowly:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from ngrpo_lora.world.scenes import TASKS, TEMPLATES, Placed, Scene, Task, draw, sample_scene, split_scenes

Layout = Callable[[Scene, np.random.Generator], list[Placed]]
TRAIN_SCENES = {task: split_scenes(task)[0] for task in TASKS}
SHARES: dict[Task, float] = {"single": 1, "two": 2, "count": 2, "color": 1, "position": 3, "attribute": 3}
SHIFT = 3.0  # of the noise levels in training and in sampling: the layout is settled above sigma 0.9


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The caption of a scene in a random template."""
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(scene.caption)


def batch_of_images(n: int, rng: np.random.Generator, layout: Layout) -> tuple[Tensor, list[str]]:
    """Render n random training scenes: images (n, 3, 64, 64) in [-1, 1], and their captions."""
    scenes = [sample_scene(rng, TRAIN_SCENES, SHARES) for _ in range(n)]
    pixels = np.stack([draw(layout(scene, rng), rng) for scene in scenes])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, [caption(scene, rng) for scene in scenes]


def make_vae(channels: tuple[int, ...] = (16, 32, 48, 48), norm_groups: int = 8) -> AutoencoderKL:
    """An eightfold VAE with FLUX's 16 latent channels, of 0.6 M parameters by default."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=norm_groups,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )


def make_transformer(heads: int = 2, single_blocks: int = 2) -> FluxTransformer2DModel:
    """FLUX with heads of width 128 and one double block, of 4.7 M parameters by default."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=single_blocks,
        attention_head_dim=128,
        num_attention_heads=heads,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )


class Flow(nn.Module):
    """Transformer and text encoders as one trainable map (latents, sigma, caption) -> velocity."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text_encoders: tuple[CLIPTextModel, T5EncoderModel],
        tokenizers: tuple[CLIPTokenizer, T5TokenizerFast],
    ):
        super().__init__()
        self.transformer, self.tokenizers = transformer, tokenizers
        self.clip, self.t5 = text_encoders
        self.max_tokens = tokenizers[0].model_max_length
        self.register_buffer("txt_ids", torch.zeros(self.max_tokens, 3), persistent=False)
        self.register_buffer("img_ids", FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32), False)

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP and T5 token ids, each (B, max_tokens), padded as `FluxPipeline.encode_prompt` pads."""
        kwargs = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True, "return_tensors": "pt"}
        clip, t5 = self.tokenizers
        return clip(captions, **kwargs).input_ids, t5(captions, **kwargs).input_ids

    def forward(self, packed: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Packed latents (B, 16, 64), sigma (B,), token ids (B, max_tokens) of CLIP and T5 -> velocity (B, 16, 64)."""
        return self.transformer(
            hidden_states=packed,
            timestep=sigma,
            pooled_projections=self.clip(clip_ids).pooler_output,
            encoder_hidden_states=self.t5(t5_ids)[0],
            txt_ids=self.txt_ids,
            img_ids=self.img_ids,
            return_dict=False,
        )[0]


def shifted(at: Tensor) -> Tensor:
    """Noise levels of the schedule's shape from evenly spread ones, both in [0, 1]."""
    return SHIFT * at / (1 + (SHIFT - 1) * at)


def noised(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents (B, 16, 64) at random noise levels: latents (B, 16, 64), sigma (B,), noise (B, 16, 64)."""
    sigma = shifted(torch.rand(len(clean), generator=generator)[:, None, None])
    noise = torch.randn(clean.shape, generator=generator)
    return (1 - sigma) * clean + sigma * noise, sigma.flatten(), noise


def assemble(flow: Flow, vae: AutoencoderKL, scale: float) -> FluxPipeline:
    """Put the parts together as a stock FluxPipeline in bfloat16."""
    vae.register_to_config(scaling_factor=scale)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=flow.clip,
        tokenizer=flow.tokenizers[0],
        text_encoder_2=flow.t5,
        tokenizer_2=flow.tokenizers[1],
        transformer=flow.transformer,
    )
    return pipeline.to(torch.bfloat16)
