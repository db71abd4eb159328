"""diffusers pipelines in the graph: drawn to the bit as `ngrpo sample` draws, also models that ComfyUI cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.config import ModelConfig, parse_config
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.equations.solvers import SOLVERS
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._base import RELOADABLE
from ngrpo_lora.models._index import INDEX, architectures
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.sampling.sampler import Sampler, solve
from ngrpo_lora.sampling.settings import own_settings, with_settings
from ngrpo_lora.world import MODELS

from ._api import Node, checked, filled_lines, listed, make_room, schema, state_of, to_images
from .adapters import adapter_path, fingerprint
from .sources import check_edits, with_sources

Pipeline = io.Custom("NGRPO_PIPELINE")  # an `ngrpo_lora.sampling.sampler.Sampler`

LOCAL = "diffusers/"
"""Prefix of the names of folders in models/diffusers, which might otherwise be names of the Hub."""

OWN = "model's own"
NO_LORA = "none"
PREVIEW_PX = 512


def local_models() -> dict[str, Path]:
    """Find diffusers' folders below models/diffusers, by the name that the list shows."""
    roots = [Path(root) for root in folder_paths.get_folder_paths("diffusers")]
    found = [(root, file.parent) for root in roots for depth in ("*", "*/*") for file in root.glob(f"{depth}/{INDEX}")]
    return {f"{LOCAL}{folder.relative_to(root).as_posix()}": folder for root, folder in sorted(found)}


class LoadPipeline(Node):
    """Node that loads a diffusers pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadPipeline",
            display_name="Load Diffusers Pipeline",
            description="A model in diffusers' format for Sample Pipeline. It stays loaded while this node does not "
            "change; ComfyUI's own models leave the GPU first.",
            search_aliases=["checkpoint", "diffusers", "hugging face", "load model"],
            advanced=["dtype", "swap_blocks", "vae_tiling"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[*MODELS, *local_models(), *architectures()],
                    default="embedded",
                    tooltip="The small models that ship with ngrpo-lora, one that draws and one that edits; a folder "
                    "below models/diffusers; or a model of the Hub, which is downloaded once.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", "float32", "bfloat16", "float16"],
                    default="auto",
                    tooltip="Number type. auto: bfloat16 where the device computes in it, else float32; of the "
                    "embedded models float32.",
                ),
                io.Combo.Input(
                    "quantization",
                    options=["none", "nf4", "int8", "int8_torchao", "float8_torchao"],
                    default="none",
                    tooltip="Storage of the transformer: nf4 takes a quarter of the memory, the others a half. nf4 and "
                    "int8 need bitsandbytes and a GPU, the others torchao.",
                ),
                io.Combo.Input(
                    "text_encoders",
                    options=["keep", "offload"],
                    default="offload",
                    tooltip="keep: on the GPU; offload: in system memory between prompts.",
                ),
                io.Int.Input(
                    "swap_blocks",
                    default=0,
                    min=0,
                    max=200,
                    tooltip="Transformer blocks that wait in system memory and visit the GPU in turn; only without "
                    "quantization.",
                ),
                io.Boolean.Input(
                    "vae_tiling", default=False, tooltip="Decode in overlapping tiles: less memory for large pictures."
                ),
            ],
            outputs=[Pipeline.Output(display_name="pipeline")],
        )

    @classmethod
    def validate_inputs(
        cls,
        model: str = "embedded",
        dtype: str = "auto",
        quantization: str = "none",
        text_encoders: str = "keep",
        swap_blocks: int = 0,
    ) -> bool:
        options = {"quantization": quantization, "text_encoders": text_encoders, "swap_blocks": swap_blocks}
        return None in options.values() or checked(cls.loading, model, dtype, options)

    @classmethod
    def fingerprint_inputs(cls, model: str | None, **others: Any) -> tuple[tuple[int, ...], ...]:
        folder = local_models().get(model or "")
        files = () if folder is None else sorted(folder.rglob("*"))
        return tuple(state for file in files if (state := state_of(file)))

    @classmethod
    def loading(cls, model: str, dtype: str, options: dict[str, Any]) -> ModelConfig:
        """Configuration of the model that the widgets describe.

        Raises:
            ConfigError: a model that is not in the list, or settings that do not fit each other.
        """
        local = local_models()
        listed("model", model, [*MODELS, *local, *architectures()])
        if model in MODELS and dtype == "auto":
            dtype = "float32"
        section = {"path": str(local.get(model, model)), "dtype": dtype} | options
        try:
            return parse_config({"model": section, "trainer": {"gradient_checkpointing": True}}).model
        except ConfigError as error:
            raise ConfigError(line.replace("model.", "") for line in error.problems) from None

    @classmethod
    def execute(cls, model: str, dtype: str, **options: Any) -> io.NodeOutput:
        config, device = cls.loading(model, dtype, options), comfy.model_management.get_torch_device()
        own = own_settings(config.path)
        config = config.model_copy(update=own.model.model_dump(include=RELOADABLE) | {"device": str(device)})
        make_room(device)
        with torch.inference_mode(False):
            return io.NodeOutput(Sampler(AdapterInfo(config, own.rollout)))


class PipelineSample(Node):
    """Node that draws pictures with a diffusers pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PipelineSample",
            display_name="Sample Pipeline",
            description="Draws by the trainer's own code: the picture of `ngrpo sample` with the same prompt, seed and "
            "settings, to the bit. Settings at 0 are those that the LoRA was trained with, or else the model's own.",
            search_aliases=["diffusers", "generate", "ksampler", "text to image"],
            advanced=["solver", "shift"],
            inputs=[
                Pipeline.Input("pipeline", tooltip="Of Load Diffusers Pipeline."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What to draw, or how to edit the source; every line is a prompt of its own.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Of the first picture of every prompt; the next have the next.",
                ),
                io.Int.Input("batch", default=1, min=1, max=4096, tooltip="Pictures of every prompt."),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    step=16,
                    tooltip="Pixels; 0: the LoRA's or model's, or what suits the source.",
                ),
                io.Int.Input("height", default=0, min=0, max=16384, step=16, tooltip="Pixels; 0: see width."),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Solver steps; 0: the LoRA's or model's."),
                io.Combo.Input(
                    "solver",
                    options=[OWN, *SOLVERS],
                    default=OWN,
                    tooltip="dpmpp_2m or euler; model's own: the LoRA's, else dpmpp_2m.",
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    round=False,
                    tooltip="Timestep shift; 0: the LoRA's or model's.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=False,
                    tooltip="Guidance scale; 0: the LoRA's or model's.",
                ),
                io.Combo.Input(
                    "lora",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    default=NO_LORA,
                    tooltip="A LoRA file of any trainer in models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=False,
                    tooltip="Of the LoRA: 1 is as trained, 0 the base.",
                ),
                io.Noise.Input(
                    "noise",
                    optional=True,
                    tooltip="Noise in place of the seed's, such as that of Neighbor Noise: one row a picture, the same "
                    "for every prompt.",
                ),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="What a model that edits (FLUX.1-Kontext, FLUX.2, Qwen-Image-Edit, embedded-edit) starts "
                    "from, or the first frame of a video (Wan image-to-video): one picture, or one for each prompt.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Prompt by prompt; of a video all frames."),
                io.Latent.Output(
                    display_name="latents", tooltip="The same before decoding, as ComfyUI's VAEs take them."
                ),
                io.String.Output(
                    display_name="prompts", tooltip="One line for each picture, as Score Images takes them."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, prompt: str = "a prompt that another node gives", solver: str = OWN, lora: str = NO_LORA
    ) -> bool:
        return checked(cls.check, prompt, solver, lora)

    @classmethod
    def check(cls, prompt: str, solver: str, lora: str) -> None:
        """Raise ConfigError where the value of a widget cannot be drawn with."""
        if not prompt.strip():
            raise ConfigError("prompt must not be empty; say what to draw")
        listed("solver", solver, [OWN, *SOLVERS])
        if lora != NO_LORA:
            adapter_path(lora)

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, **others: Any) -> tuple[int, ...]:
        return () if lora == NO_LORA else fingerprint(lora)

    @classmethod
    def execute(
        cls,
        pipeline: Sampler,
        prompt: str,
        seed: int,
        batch: int,
        solver: str,
        lora: str,
        strength: float,
        noise: Any = None,
        source: Tensor | None = None,
        **numbers: float,
    ) -> io.NodeOutput:
        cls.check(prompt, solver, lora)
        lines = filled_lines(prompt)
        prompts = with_sources([*map(Prompt, lines)], source)
        pipeline = pipeline.editing(prompts)
        check_edits(pipeline.family.edits, source, Path(pipeline.info.model.path).name)
        adapter = None if lora == NO_LORA else adapter_path(lora)
        changes = {name: value or None for name, value in numbers.items()}
        info = settings(pipeline, adapter, changes | {"solver": None if solver == OWN else solver})
        make_room(pipeline.family.device)
        with torch.inference_mode(False), torch.no_grad():
            sampler = pipeline.with_settings(info)
            if not (numbers["width"] or numbers["height"]):
                sampler = sampler.following(prompts[0])  # all sources are of one size
            shape = sampler.family.latent_shape
            if noise is None:
                rows = torch.cat([gaussian_noise((1, *shape), seed + row) for row in range(batch)])
            else:
                rows = noise.generate_noise({"samples": torch.zeros(batch, *shape)}).float()
            try:
                sampler.use([(adapter, strength)] if adapter else [])
                images, latents = draw(sampler, prompts, rows, cls)
            finally:
                sampler.remove_adapters()
        shown = [text for text in lines for _ in range(batch * sampler.family.num_frames)]
        return io.NodeOutput(to_images(images), {"samples": latents}, "\n".join(shown))


def settings(pipeline: Sampler, adapter: Path | None, changes: dict[str, Any]) -> AdapterInfo:
    """Settings to draw with: those of the widgets, else the LoRA's, else the model's.

    Raises:
        ConfigError: a value that is not possible, by the name of its widget.
    """
    own = own_settings(pipeline.info.model.path, adapter)
    try:
        return with_settings(own, changes)
    except ConfigError as error:
        raise ConfigError(line.removeprefix("--") for line in error.problems) from None


def draw(
    sampler: Sampler, prompts: list[Prompt], noises: Tensor, node: type[io.ComfyNode]
) -> tuple[list[Image.Image], Tensor]:
    """Draw every prompt from every noise, each alone in its batch, with progress, previews and Cancel.

    Returns:
        Pictures, and latents (P * B, ...) as the VAE has them.
    """
    total = len(prompts) * len(noises) * (len(sampler.sigmas) - 1)
    progress, done = comfy.utils.ProgressBar(total, node_id=node.hidden.unique_id), 0
    images: list[Image.Image] = []
    latents = []

    def before_step() -> None:
        nonlocal done
        comfy.model_management.throw_exception_if_processing_interrupted()
        shown = ("JPEG", images[-1], PREVIEW_PX) if images and done % (len(sampler.sigmas) - 1) == 0 else None
        progress.update_absolute(done, total, shown)
        done += 1

    for prompt in prompts:
        text = sampler.family.encode([prompt])
        for noise in noises.split(1):
            clean = solve(sampler.family, text, noise, sampler.solver, sampler.sigmas, before_step)
            images += sampler.family.decode(clean)
            latents.append(sampler.family.vae_latents(clean.float()).cpu())
    progress.update_absolute(total, total, ("JPEG", images[-1], PREVIEW_PX))
    return images, torch.cat(latents)


NODES: list[type[io.ComfyNode]] = [LoadPipeline, PipelineSample]
