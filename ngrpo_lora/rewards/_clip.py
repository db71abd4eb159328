"""CLIP for rewards: one network for all that name the same weights, and its preprocessing without torchvision.

The weights are a folder or a Hub repository in transformers' layout, or one file (.safetensors, .pt, .bin) in
transformers' or in open_clip's layout, whose architecture is the `config.json` of `processor`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ngrpo_lora.config.plugins import ClipConfig, ModelRewardConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards._placement import in_use, placement

__all__ = ["Clip", "Resize", "load_clip", "read_weights", "to_pixels", "unreadable"]

Resize = Literal["crop", "letterbox", "squash"]

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # of CLIP's training images, in [0, 1]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class Clip:
    """A CLIP network with its tokenizer; a lock makes its calls wait for each other, since rewards run in threads."""

    def __init__(self, model: Any, tokenizer: Any, device: str, dtype: torch.dtype, offload: bool):
        self.tokenizer, self.device, self.dtype, self.offload = tokenizer, device, dtype, offload
        self.logit_scale = model.logit_scale.float().exp().item()  # before float16 rounds the logarithm
        self.model = model.eval().requires_grad_(False).to("cpu" if offload else device, dtype)
        self.lock = threading.Lock()
        self.last_images: list[Image.Image] = []
        self.last_resize: Resize | None = None
        self.last_embeds = torch.empty(0)

    @property
    def embed_dim(self) -> int:
        """Width D of the image and text embeddings."""
        return self.model.config.projection_dim

    def cosines(self, images: Sequence[Image.Image], prompts: Sequence[str], resize: Resize) -> Tensor:
        """(B,) float32, the cosine of each image with its prompt."""
        return (self.image_embeds(images, resize) * self.text_embeds(prompts)).sum(-1)

    @torch.no_grad()
    def image_embeds(self, images: Sequence[Image.Image], resize: Resize) -> Tensor:
        """(B, D) float32 image embeddings of length 1; those of the last images are kept for the next reward."""
        with self.lock:
            known = len(images) == len(self.last_images) and resize == self.last_resize
            if not known or any(image is not last for image, last in zip(images, self.last_images, strict=True)):
                size_px = self.model.config.vision_config.image_size
                pixels = torch.stack([to_pixels(image, size_px, resize) for image in images])  # (B, 3, H, W)
                with in_use(self.model, self.device, self.offload) as model:
                    pooled = model.vision_model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
                    features = model.visual_projection(pooled)
                self.last_images, self.last_resize = list(images), resize
                self.last_embeds = F.normalize(features.float(), dim=-1)
            return self.last_embeds

    @torch.no_grad()
    def text_embeds(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) float32 prompt embeddings of length 1; a repeated prompt is encoded once, one too long is cut."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(rows), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        ids = tokens.input_ids.to(self.device)
        with self.lock, in_use(self.model, self.device, self.offload) as model:
            states = model.text_model(input_ids=ids).last_hidden_state
            # What stands after the first end of text does not matter: attention is causal.
            end = (ids == self.tokenizer.eos_token_id).int().argmax(1)
            features = model.text_projection(states[torch.arange(len(ids), device=ids.device), end])
        return F.normalize(features.float(), dim=-1)[[rows[prompt] for prompt in prompts]]


LOADED: WeakValueDictionary[tuple[Any, ...], Clip] = WeakValueDictionary()


def load_clip(config: ClipConfig, device: str, filename: str | None = None) -> Clip:
    """Load a reward's network: one object for all rewards with the same weights and placement.

    Args:
        device: where it runs when the reward's own setting is `auto`.
        filename: the weights in `config.path`, where that does not have transformers' layout.
    Raises:
        UserError: the weights, the architecture or the tokenizer cannot be read, or do not fit each other.
    """
    device, dtype = placement(config, device)
    key = (config.path, config.revision, filename, config.processor, device, dtype, config.offload)
    clip = LOADED.get(key)
    if clip is None:
        clip = Clip(load_model(config, filename), load_tokenizer(config), device, dtype, config.offload)
        LOADED[key] = clip
    return clip


def load_tokenizer(config: ClipConfig) -> Any:
    """Load the CLIP tokenizer of `processor`, or of `path` where that is not set."""
    from transformers import AutoTokenizer

    revision = config.revision if config.processor is None else None
    try:
        return AutoTokenizer.from_pretrained(config.processor or config.path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(config, "processor", config.processor or config.path, "a CLIP tokenizer", error) from error


def load_model(config: ClipConfig, filename: str | None) -> Any:
    """Load transformers' CLIPModel; UserError unless the file or folder holds all of its weights and no others."""
    from transformers import CLIPConfig, CLIPModel

    source: dict[str, Any] = {"pretrained_model_name_or_path": config.path, "revision": config.revision}
    if filename is not None or Path(config.path).is_file():
        state = from_open_clip(read_weights(config, "path", config.path, filename or ""))
        processor = config.processor or config.path
        try:
            architecture = CLIPConfig.from_pretrained(processor)
        except (OSError, ValueError, KeyError) as error:
            raise unreadable(config, "processor", processor, "the config.json of a CLIP network", error) from error
        source = {"pretrained_model_name_or_path": None, "config": architecture, "state_dict": state}
    try:
        loaded = CLIPModel.from_pretrained(**source, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise unreadable(config, "path", config.path, "CLIP weights that fit their config.json", error) from error
    model, report = cast(Any, loaded)  # with output_loading_info it is a pair
    problems = {
        "lacks": set(report["missing_keys"]),
        "has another shape of": {key for key, *_ in report["mismatched_keys"]},
        # Older files hold the position_ids, which are no weights.
        "also has": {key for key in report["unexpected_keys"] if not key.endswith("position_ids")},
    }
    for problem, keys in problems.items():
        if keys:
            names = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise UserError(
                f"reward {config.key}: path must hold all weights of a CLIP network and no others, but "
                f"{config.path!r} {problem} {names}; give weights and processor of one network"
            )
    return model


def read_weights(config: ModelRewardConfig, setting: str, path: str, filename: str) -> dict[str, Tensor]:
    """Read the tensors of a weights file, by name.

    Args:
        setting: what the configuration calls `path`, for errors.
        path: a file, or the folder or Hub id that has `filename`.
    Raises:
        UserError: there is no such file, or it does not hold tensors alone.
    """
    from safetensors.torch import load_file

    from ngrpo_lora.downloads import download

    file = Path(path)
    try:
        if file.is_dir():
            file = file / filename
        elif not file.is_file():
            file = Path(download(path, filename, config.revision if setting == "path" else None))
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except (OSError, ValueError, RuntimeError, EOFError, AttributeError, UnpicklingError, SafetensorError) as error:
        raise unreadable(
            config, setting, path, f"a file of weights{f' ({filename})' * bool(filename)}", error
        ) from error


def unreadable(config: ModelRewardConfig, setting: str, value: str, wanted: str, error: Exception) -> UserError:
    """Make the UserError for a setting of a reward that does not lead to `wanted`."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(
        f"reward {config.key}: {setting} must be {wanted}, on the Hub or on this disk, got {value!r}: {reason}; "
        f"check the name and the connection, or set {setting} to a local copy"
    )


NETWORK = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.proj": "visual_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names; weights that are transformers' stay as they are."""
    if "visual.proj" not in state:
        return state
    converted = {}
    for name, tensor in state.items():
        start = next((start for start in NETWORK if name.startswith(start)), "")
        renamed = NETWORK.get(start, "") + name.removeprefix(start)
        for old, new in BLOCK.items():
            renamed = renamed.replace(old, new)
        if ".in_proj_" in renamed:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                converted[renamed.replace(".in_proj_", f".{part}_proj.")] = piece
        else:
            converted[renamed] = tensor.T if start in ("visual.proj", "text_projection") else tensor
    return converted


def to_pixels(image: Image.Image, size_px: int, resize: Resize) -> Tensor:
    """Preprocess an image of any size and mode into the pixels that the network takes.

    `crop` and `squash` are transformers' and open_clip's operations on 8-bit images, `letterbox` is HPSv2's on floats.

    Returns:
        (3, size_px, size_px) float32, with CLIP's mean and deviation taken off.
    """
    image = image.convert("RGB")
    if resize == "crop":
        image = center_crop(image, size_px)
    elif resize == "squash":
        image = image.resize((size_px, size_px), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if resize == "letterbox":
        levels = letterbox(levels, size_px)
    return (levels - MEAN) / STD


def center_crop(image: Image.Image, size_px: int) -> Image.Image:
    """Resize the shorter side to `size_px` (bicubic), and cut out the middle of the longer one."""
    width, height = (int(size_px * side / min(image.size)) for side in image.size)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size_px, top + size_px))


def letterbox(levels: Tensor, size_px: int) -> Tensor:
    """Letterbox (3, H, W) in [0, 1] to (3, size_px, size_px): longer side resized (bicubic), the rest black."""
    scale = size_px / max(levels.shape[1:])
    height, width = (max(1, round(side * scale)) for side in levels.shape[1:])
    resized = F.interpolate(levels[None], (height, width), mode="bicubic", antialias=True)[0]
    below, right = size_px - height, size_px - width
    return F.pad(resized, (right // 2, right - right // 2, below // 2, below - below // 2))
