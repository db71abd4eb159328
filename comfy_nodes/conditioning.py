"""Prompt embeddings: from a diffusers pipeline's text encoders, into files and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.sampling.conditioning import Conditioning, load_conditioning, save_conditioning
from ngrpo_lora.sampling.sampler import Sampler

from ._api import Node, checked, listed, make_room, register_folder, schema, state_of
from .pipelines import Pipeline

EMBEDDINGS = "ngrpo_embeddings"
"""Folder of models/ that holds the files of embeddings."""

SUFFIX = ".safetensors"
NO_FILE = f"(no file in models/{EMBEDDINGS})"
POOLED = ("flux", "sd3")
STATES = ("flux", "sd3", "qwen_image", "z_image", "wan")
"""Families whose encoders give what ComfyUI's own give; flux and sd3 with a pooled state."""

LEFT: dict[Path, tuple[int, ...]] = {}
"""`state_of` files as their nodes have left them."""

register_folder(EMBEDDINGS, SUFFIX)


class SavePromptEmbeddings(Node):
    """Node that saves CONDITIONING in a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "SavePromptEmbeddings",
            display_name="Save Prompt Embeddings",
            description=f"Writes conditioning to models/{EMBEDDINGS}, so that the text encoders are not needed again, "
            "or may be on another computer.",
            search_aliases=["cache prompt", "save conditioning", "text embeddings"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="Of any text encoder."),
                io.String.Input(
                    "name", default="prompt", tooltip=f"Of the file in models/{EMBEDDINGS}, without a folder."
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Whether a file of that name may be replaced."),
            ],
            outputs=[io.Conditioning.Output(tooltip="The same.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str = "prompt") -> bool:
        return checked(file_of, name)

    @classmethod
    def fingerprint_inputs(cls, name: str | None, **others: Any) -> Any:
        """Fingerprint: another one where the file is not as the node has left it, so that it is written again."""
        if name is None:
            return 0
        path = file_of(name)
        return 0 if state_of(path) == LEFT.get(path, ()) else state_of(path)

    @classmethod
    def execute(cls, conditioning: Conditioning, name: str, overwrite: bool) -> io.NodeOutput:
        path = file_of(name)
        if path.exists() and not overwrite and not same(load_conditioning(path), conditioning):
            raise UserError(f"{path.name!r} is there already, with other contents; give another name, or overwrite it")
        save_conditioning(path, conditioning)
        LEFT[path] = state_of(path)
        return io.NodeOutput(conditioning, ui={"text": (f"{path.name}\n{described(conditioning)}",)})


def file_of(name: str) -> Path:
    """Path at which a file of that name is or will be.

    Raises:
        ConfigError: the name is empty, or has a folder or odd characters in it.
    """
    stem = name.strip().removesuffix(SUFFIX)
    if re.fullmatch(r"\w[\w .-]{0,120}", stem) is None:
        raise ConfigError(f"name must be letters, digits, spaces, _, - and ., without a folder, got {name!r}")
    return Path(folder_paths.get_folder_paths(EMBEDDINGS)[0]) / f"{stem}{SUFFIX}"


def same(a: Any, b: Any) -> bool:
    """Whether two conditionings are equal to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def described(conditioning: Conditioning) -> str:
    """Shapes of the tensors of conditioning, as one line of text for each entry."""
    lines = []
    for states, others in conditioning:
        tensors = {"states": states} | {name: one for name, one in others.items() if isinstance(one, torch.Tensor)}
        lines.append(", ".join(f"{name} {tuple(one.shape)}" for name, one in tensors.items()))
    return "\n".join(lines)


class LoadPromptEmbeddings(Node):
    """Node that loads CONDITIONING from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadPromptEmbeddings",
            display_name="Load Prompt Embeddings",
            description="Conditioning as Save Prompt Embeddings wrote it, to the bit; or a safetensors file of your "
            "own with prompt_embeds (1, L, C) and, for FLUX.1 and SD3, pooled_prompt_embeds (1, C).",
            search_aliases=["cached prompt", "load conditioning", "text embeddings"],
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folder_paths.get_filename_list(EMBEDDINGS) or [NO_FILE],
                    tooltip=f"A file in models/{EMBEDDINGS}; R refreshes the list.",
                )
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, name: str = "") -> bool:
        return checked(stored, name) if name else True

    @classmethod
    def fingerprint_inputs(cls, name: str | None) -> int:
        return 0 if name is None else stored(name).stat().st_mtime_ns

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        with torch.inference_mode(False):
            conditioning = load_conditioning(stored(name))
        return io.NodeOutput(conditioning, ui={"text": (described(conditioning),)})


def stored(name: str) -> Path:
    """Path of a file that is in models/ngrpo_embeddings.

    Raises:
        ConfigError: there is none of that name.
    """
    there = folder_paths.get_filename_list(EMBEDDINGS)
    return Path(folder_paths.get_full_path_or_raise(EMBEDDINGS, listed("name", name, there or [NO_FILE])))


class EncodePrompt(Node):
    """Node that makes CONDITIONING of a prompt by a pipeline's text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "EncodePrompt",
            display_name="Encode Prompt by Pipeline",
            description="A prompt as a diffusers pipeline's own text encoders give it, for ComfyUI's MODEL of the same "
            "kind: FLUX.1, SD3, Qwen-Image, Z-Image and Wan. Of other models the two have different forms.",
            search_aliases=["clip text encode", "diffusers", "t5", "text encoder"],
            inputs=[
                Pipeline.Input("pipeline", tooltip="Of Load Diffusers Pipeline."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="One prompt; it may be empty for what is led away from.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, pipeline: Sampler, prompt: str) -> io.NodeOutput:
        family = pipeline.family
        name = type(family).__module__.rpartition(".")[2]
        if name not in STATES:
            raise UserError(
                f"pipeline must be one of {', '.join(STATES)} to give conditioning for ComfyUI's MODEL, got {name}; "
                "draw it with Sample Pipeline"
            )
        if family.edits:
            raise UserError(
                f"pipeline must be a model that draws from text alone to give conditioning, got "
                f"{Path(pipeline.info.model.path).name}, which starts from a picture; draw it with Sample Pipeline, or "
                "encode the prompt with ComfyUI's own nodes"
            )
        make_room(family.device)
        device = comfy.model_management.intermediate_device()  # where ComfyUI's own encoders leave it, as float32
        with torch.inference_mode(False):
            text = {name: one.to(device, torch.float32) for name, one in family.encode([prompt]).tensors.items()}
        others: dict[str, Any] = {}
        if name in POOLED:
            others["pooled_output"] = text["pooled_prompt_embeds"]
        if name == "flux" and family.transformer.config.guidance_embeds:
            others["guidance"] = float(family.settings["guidance_scale"])
        return io.NodeOutput([[text["prompt_embeds"], others]])


NODES: list[type[io.ComfyNode]] = [SavePromptEmbeddings, LoadPromptEmbeddings, EncodePrompt]
