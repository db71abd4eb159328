"""How to draw with a pushed adapter: by diffusers, by the command line and in ComfyUI, as its model card says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.fusing import python_lines, shown
from ngrpo_lora.adapters.names import FORMATS, is_read_by_comfyui
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.hub.pipeline_file import FILES, PIPELINE, SCHEDULER, SCHEDULER_CLASS, has_pipeline
from ngrpo_lora.world import ADAPTERS, MODELS

__all__ = ["VIDEOS", "Adapter", "diffusers_usage", "read_pushed", "usage"]


VIDEOS = {"wan": 16, "hunyuan_video15": 24}
"""Families that draw videos, and their frames a second."""

NEED_TORCHVISION = ("flux2", "qwen_image_edit", "qwen_image_edit_plus")
"""Files in `pipelines/` whose bases have a processor of pictures."""

OWN_SIZE = "pipeline.video_processor.calculate_default_height_width"
"""What cuts the picture that HunyuanVideo 1.5 starts from to one of the pipeline's sizes."""


@dataclass(frozen=True)
class Adapter:
    """Settings in the header of an exported adapter, with the values that the model recommended filled in."""

    family: str
    model: ModelConfig
    rollout: RolloutConfig
    edits: bool
    pipeline: str  # its file in `pipelines/`, if there is one

    @property
    def starts_video(self) -> bool:
        """Whether a source is the first frame of a video of Wan, whose pipeline has needs of its own."""
        return self.edits and self.family == "wan"

    @property
    def fits_source(self) -> bool:
        """Whether the code fits a source to what is drawn, as no pipeline of ours does."""
        return self.edits and not has_pipeline(self.pipeline)

    @property
    def hub_id(self) -> str | None:
        """The base's name on the Hub; None for the embedded model and for a folder."""
        path = self.model.path
        return path if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists() else None


def read_pushed(path: Path) -> Adapter:
    """Read the header of an adapter that this package exported."""
    own = json.loads(read_metadata(path)["ngrpo"])
    model, rollout = ModelConfig.model_validate(own["model"]), RolloutConfig.model_validate(own["rollout"])
    pipeline = str(FILES.get(own.get("pipeline", ""), own["family"]))
    return Adapter(own["family"], model, rollout, own.get("edits", False), pipeline)


def usage(repo: str, revision: str | None, adapter: Adapter, prompt: str, seed: int) -> str:
    """Section of the card: how to draw with diffusers, `ngrpo sample` and ComfyUI."""
    rollout, model = adapter.rollout, adapter.model
    solver = "flow DPM-Solver++ 2M" if rollout.solver == "dpmpp_2m" else "Euler"
    file = PIPELINE if has_pipeline(adapter.pipeline) else SCHEDULER
    source = " --source picture.png" if adapter.edits else ""
    if adapter.fits_source:  # which the code above draws at this size, whatever the shape of the picture
        source += f" --height {model.height_px} --width {model.width_px}"
    exact = f"{rollout.num_steps} steps of {solver}, shift {rollout.shift:.4g}, guidance {shown_guidance(model)}"
    reads = ", which it reads from the adapter, " if file == PIPELINE else " "
    others = ", and torchvision for the processor of its base" if adapter.pipeline in NEED_TORCHVISION else ""
    others += ", and ftfy, without which this pipeline of diffusers fails" if adapter.starts_video else ""
    text = (
        f"## Use it\n\n```python\n{diffusers_usage(repo, revision, adapter, prompt, seed)}\n```\n\n"
        f"This draws as in training: {exact}, {model.width_px} x {model.height_px} px{reads}and with noise levels that "
        f"are never cut to integers. `trust_remote_code` runs one file, [{file}]({file}), which needs no other package "
        f"than diffusers does for LoRA{others}. By the command line, to the same pixels:\n\n"
    )
    shell = "'" + " ".join(prompt.split()).replace("'", "'\\''") + "'"
    if revision is None:
        text += f"```\nngrpo sample --adapter {repo}{source} --prompt {shell} --seed {seed}\n```"
    else:
        text += (
            f"```\nhf download {repo} {FILE_NAME} --revision {revision} --local-dir .\n"
            f"ngrpo sample --adapter {FILE_NAME}{source} --prompt {shell} --seed {seed}\n```"
        )
    if adapter.hub_id is None or "comfyui" not in FORMATS[adapter.family]:
        return text
    return f"{text}\n\n{comfyui_usage(repo if revision is None else FILE_NAME, adapter)}"


def comfyui_usage(place: str, adapter: Adapter) -> str:
    """Paragraph of the card: how to draw in ComfyUI with the adapter at `place`, as the command line is given it."""
    rollout, model = adapter.rollout, adapter.model
    sampler = "the sampler `euler`"
    if rollout.solver == "dpmpp_2m":
        sampler = (
            "the node SamplerDPMPP_2M_SDE with eta 0, which is this solver (the sampler `dpmpp_2m` is not: it weights "
            "its second-order term by the log of sigma alone)"
        )
    beside = "".join(f", `{shown(file)}` before it at {strength:g}" for file, strength in model.fuse.items())
    of_pair = "" if model.expert is None else f" on the {model.expert.replace('_', '-')} model"
    put = "put the file"
    if not is_read_by_comfyui(adapter.family):  # which would load it without effect, and only say so in its log
        put = f"`ngrpo export {place} --format comfyui` writes it with the names that ComfyUI knows; put that file"
    return (
        f"**ComfyUI**: {put} into `ComfyUI/models/loras`, load it with LoraLoaderModelOnly at strength "
        f"1.0{of_pair}{beside}, and sample with {rollout.num_steps} steps, shift {rollout.shift:.4g}, guidance "
        f"{shown_guidance(model)} and {sampler}."
    )


def shown_guidance(model: ModelConfig) -> str:
    """The guidance scale in words; of a model with two transformers both."""
    if model.expert is None:
        return f"{model.guidance_scale:g}"
    return f"{model.guidance_scale:g} (high noise) and {model.guidance_scale_2:g} (low noise)"


def diffusers_usage(repo: str, revision: str | None, adapter: Adapter, prompt: str, seed: int) -> str:
    """Python code that draws one picture as in training, by the repository's pipeline or its scheduler alone."""
    model, embedded = adapter.model, adapter.model.path in MODELS
    base = f"MODELS[{adapter.model.path!r}]" if embedded else repr(adapter.hub_id or f"path/to/{Path(model.path).name}")
    base += f", revision={model.revision!r}" if model.revision else ""
    dtype, device = number_types(adapter), "cpu" if embedded else "cuda"
    where = repr(repo) if revision is None else f"{repo!r}, revision={revision!r}"
    head = ["import torch", "from diffusers import DiffusionPipeline"]
    names = ["ADAPTERS"] * any(one in ADAPTERS for one in model.fuse) + ["MODELS"] * embedded
    own = [f"from ngrpo_lora.world import {', '.join(names)}"] if names else []
    image, opened = (", image=picture", ['picture = Image.open("picture.png")']) if adapter.edits else ("", [])
    head += [f"from PIL import Image{', ImageOps' if adapter.fits_source else ''}"] if adapter.edits else []
    if adapter.fits_source:
        opened = [  # as people see it, as `records.pictures.as_seen` reads one
            'picture = ImageOps.exif_transpose(Image.open("picture.png")).convert("RGBA")',
            'picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")',
            f"picture = ImageOps.fit(picture, {(model.width_px, model.height_px)}, Image.Resampling.LANCZOS)",
        ]
    if has_pipeline(adapter.pipeline):
        branch = "" if revision is None else f"custom_revision={revision!r}, "
        lines = [
            *head,
            *own,
            "",
            "pipeline = DiffusionPipeline.from_pretrained(",
            f"    {base}, custom_pipeline={repo!r}, {branch}trust_remote_code=True, dtype={dtype}",
            f').to("{device}")',
            *python_lines(model),
            f"pipeline.load_lora_weights({where})",
            *opened,
            f"image = pipeline({prompt!r}, seeds={seed}{image}).images[0]",
            'image.save("image.png")',
        ]
        return "\n".join(lines)
    fps, settings = VIDEOS.get(adapter.family), {"prompt": prompt} | call_settings(adapter)
    lines = [
        *head,
        *(["from diffusers.utils import export_to_video"] if fps else []),
        "from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module",
        *own,
        "",
        "Scheduler = get_class_from_dynamic_module(",
        f"    {where}, module_file={SCHEDULER!r}, class_name={SCHEDULER_CLASS!r}, trust_remote_code=True",
        ")",
        f'pipeline = DiffusionPipeline.from_pretrained({base}, dtype={dtype}).to("{device}")',
        f"pipeline.scheduler = Scheduler.from_config(pipeline.scheduler.config, {scheduler_settings(adapter)})",
        *loading_lines(adapter, where),
        *opened,
        f"{'video' if fps else 'image'} = pipeline(",
        *(["    image=picture,"] if adapter.edits else []),
        *(f"    {name}={value!r}," for name, value in settings.items()),
        f'    generator=torch.Generator("cpu").manual_seed({seed}),',
        ").frames[0]" if fps else ").images[0]",
        f'export_to_video(video, "video.mp4", fps={fps})' if fps else 'image.save("image.png")',
    ]
    return "\n".join(lines)


def loading_lines(adapter: Adapter, where: str) -> list[str]:
    """Python code that puts the adapter from `where`, its place as code, on a stock pipeline.

    HunyuanVideo 1.5's has no loader and no settings of guidance and prompt length in its call, nor of the size where it
    is given a picture, which it would cut to one of its own sizes.
    """
    model = adapter.model
    if adapter.family != "hunyuan_video15":
        second = ", load_into_transformer_2=True" if model.expert == "low_noise" else ""
        return [*python_lines(model), f"pipeline.load_lora_weights({where}{second})"]
    return [
        *python_lines(model, by_pipeline=False),
        f"pipeline.transformer.load_lora_adapter({where}, weight_name={FILE_NAME!r})",
        f"pipeline.guider = pipeline.guider.new(guidance_scale={model.guidance_scale!r})",
        f"pipeline.tokenizer_max_length = {model.max_sequence_length}",
        *([f"{OWN_SIZE} = lambda height, width, target_size: (height, width)"] if adapter.edits else []),
    ]


def number_types(adapter: Adapter) -> str:
    """The number types in which a run loads its base, as Python code: of Wan some networks stay in float32."""
    plain = f"torch.{'bfloat16' if adapter.model.dtype == 'auto' else adapter.model.dtype}"
    if adapter.family != "wan" or plain == "torch.float32":
        return plain
    names = ["vae", "image_encoder"] if adapter.starts_video and adapter.model.expert is None else ["vae"]
    whole = ", ".join(f'"{name}": torch.float32' for name in names)
    return f'{{"default": {plain}, {whole}}}'


def call_settings(adapter: Adapter) -> dict[str, Any]:
    """Settings with which a run draws, as arguments of a stock pipeline's call."""
    model, rollout = adapter.model, adapter.rollout
    settings: dict[str, Any] = {}
    if model.negative_prompt:
        settings["negative_prompt"] = model.negative_prompt
    settings |= {"height": model.height_px, "width": model.width_px, "num_inference_steps": rollout.num_steps}
    if adapter.family != "hunyuan_video15":
        settings |= {"guidance_scale": model.guidance_scale, "max_sequence_length": model.max_sequence_length}
    elif adapter.edits:  # the picture's size is drawn
        del settings["height"], settings["width"]
    if model.expert is not None:
        settings["guidance_scale_2"] = model.guidance_scale_2
    if adapter.family in VIDEOS and model.num_frames:
        settings["num_frames"] = model.num_frames
    if adapter.family == "sana":  # its times begin at 0.999, and small sizes are not drawn larger
        levels = [round(0.999 * (1 - step / rollout.num_steps), 6) for step in range(rollout.num_steps)]
        settings |= {"sigmas": levels, "use_resolution_binning": False}
    return settings


def scheduler_settings(adapter: Adapter) -> str:
    """A run's shift and solver as arguments of the scheduler; multistep configurations call the shift `flow_shift`."""
    shift = f"flow_shift={adapter.rollout.shift!r}"
    return shift if adapter.rollout.solver == "dpmpp_2m" else f"{shift}, solver_order=1"
