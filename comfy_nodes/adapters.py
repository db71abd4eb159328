"""LoRA files of any trainer on a MODEL, with their own sampler and noise levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import comfy.lora
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.samplers import KSAMPLER
from comfy_api.latest import io, ui
from torch import Tensor

from ngrpo_lora.adapters.names import original_rows
from ngrpo_lora.adapters.reading import AdapterFile, Layer, examples, log_warnings, read_adapter_file, read_metadata
from ngrpo_lora.adapters.report import describe, lines
from ngrpo_lora.adapters.writing import state_dict
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.sampling.recommended import Recommendation, recommend
from ngrpo_lora.sampling.strengths import StrengthSchedule, parse_schedule, progress

from ._api import schema, show_text
from .sampling import sample_flow, weightless

FOLDER = "loras"
ALPHA = ["fold in", "as ComfyUI reads it"]
FAMILIES = {
    "Flux": "flux",
    "Flux2": "flux2_klein",
    "Lumina2": "z_image",
    "QwenImage": "qwen_image",
    "SD3": "sd3",
    "WAN21": "wan",
}
"""Our families by ComfyUI's model classes; variants of a model are subclasses of these."""

Patches = dict[Any, Any]
"""Patches as `comfy.lora.load_lora` gives them: by weight, or by (weight, rows), or by (weight, rows, function)."""


def family_of(model: ModelPatcher) -> str:
    """Find out which of our families a MODEL belongs to.

    Raises:
        UserError: the MODEL belongs to none.
    """
    kinds = [kind.__name__ for kind in type(model.model).__mro__]
    family = next((FAMILIES[kind] for kind in kinds if kind in FAMILIES), None)
    if family is None:
        raise UserError(
            f"MODEL must be a flow model of {', '.join(sorted(set(FAMILIES.values())))}, got a {kinds[0]}; for others "
            "there is ComfyUI's own LoraLoaderModelOnly"
        )
    return family


def lora_input() -> io.Combo.Input:
    """Make the input that chooses among all LoRA files."""
    files = folder_paths.get_filename_list(FOLDER)
    return io.Combo.Input("lora_name", options=files, tooltip="A file in the loras folder.")


def adapter_path(name: str) -> Path:
    """Path of a file in ComfyUI's loras folders, by its name there.

    Raises:
        ConfigError: there is none, or the name leaves the folders.
    """
    path = folder_paths.get_full_path(FOLDER, name) if name in folder_paths.get_filename_list(FOLDER) else None
    if path is None:
        raise ConfigError(f"lora_name must be a file in ComfyUI's loras folder, got {name!r}; refresh the list with R")
    return Path(path)


def fingerprint(name: str | None) -> tuple[int, ...]:
    """Time and size of a LoRA file, by which a change shows; empty for None, a name that another node gives later."""
    if name is None:
        return ()
    state = adapter_path(name).stat()
    return state.st_mtime_ns, state.st_size


def check_strength(strength: float) -> None:
    """Raise ConfigError for a strength that is not finite."""
    if not math.isfinite(strength):
        raise ConfigError(f"strength must be finite, got {strength}; 1 is as trained, 0 the base")


@dataclass(frozen=True)
class FittingAdapter:
    """A LoRA file of which every layer fits a MODEL, with its patches for that MODEL."""

    file: AdapterFile
    family: str
    patches: Patches


def read_fitting(model: ModelPatcher, path: Path, alpha: str = ALPHA[0]) -> FittingAdapter:
    """Read a LoRA file, and find the weights of a MODEL that it changes.

    Raises:
        UserError: the file is no LoRA, or one of another model; a layer that has no place in the MODEL is an error too.
    """
    family = family_of(model)
    with torch.inference_mode(False):
        file = read_adapter_file(path, family)
        layers = file.layers
        if alpha == ALPHA[1] and file.alpha != "tensors":
            layers = {name: replace(layer, scale=1.0) for name, layer in layers.items()}
        weights = model.model.state_dict()
        targets = places(model, weights, file, family)
        log_warnings(file)
        patches = comfy.lora.load_lora(engine_tensors(layers), targets, log_missing=False)
        assert len(patches) == len(layers), "two layers share a place, or ComfyUI does not read diffusers' names"
        patches |= bias_patches(layers, targets, weights)
    return FittingAdapter(file, family, patches)


def engine_tensors(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Layers' matrices under the keys that ComfyUI's own engine reads, which has DoRA's scales as columns."""
    tensors = state_dict({name: replace(layer, bias=None, magnitude=None) for name, layer in layers.items()})
    scales = {f"transformer.{name}.dora_scale": layer.magnitude for name, layer in layers.items()}
    return tensors | {key: scale[:, None] for key, scale in scales.items() if scale is not None}


def bias_patches(layers: Mapping[str, Layer], targets: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Patches:
    """Changes of biases as ComfyUI's patches, in part of a bias where the MODEL fuses layers.

    Raises:
        UserError: the MODEL has no such bias.
    """
    patches: Patches = {}
    for name, layer in layers.items():
        if (change := layer.folded_bias) is None:
            continue
        target = targets[f"transformer.{name}"]
        weight, *rows = (target,) if isinstance(target, str) else target
        key = f"{weight.removesuffix('.weight')}.bias"
        if key not in weights:
            raise UserError(f"an adapter that changes the bias of {name!r} needs one there, and this MODEL has none")
        patches[(key, *rows[:1]) if rows else key] = ("diff", (change,))
    return patches


def places(model: ModelPatcher, weights: Mapping[str, Tensor], file: AdapterFile, family: str) -> dict[str, Any]:
    """Weights of a MODEL that a file's layers change, by the layers' names; with rows where the MODEL fuses layers.

    Raises:
        UserError: a layer is not there, or in another size.
    """
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    found: dict[str, Any] = {}
    misfits: list[str] = []
    for name, layer in file.layers.items():
        target = known.get(f"transformer.{name}") or original_place(name, family, weights)
        key, rows, *_ = (target, None) if isinstance(target, str) else target or ("", None)
        shape = list(weights[key].shape) if key in weights else []
        if rows is not None:
            shape[0] = rows[2]
        if shape != [*layer.sides]:
            misfits.append(name)
        found[f"transformer.{name}"] = target
    if misfits:
        named = f" of another size{named_base(file)}" if family in file.families else named_base(file)
        raise UserError(
            f"adapter {file.path.name!r} is no LoRA of this MODEL, a {type(model.model).__name__} ({family}): "
            f"{len(misfits)} of its {len(file.layers)} layers are not there or have another size "
            f"({examples(misfits)}); by its layers it is one of {file.fits}{named}"
        )
    return found


def original_place(layer: str, family: str, weights: Mapping[str, Tensor]) -> Any:
    """Place of a layer that ComfyUI's own map lacks, by its name in the original code, which ComfyUI follows."""
    found = original_rows(layer, family)
    if found is None:
        return None
    name, first, share, total = found
    key = f"diffusion_model.{name}.weight"
    if share == total or key not in weights:
        return key
    width = len(weights[key]) // total
    return (key, (0, first * width, share * width))


def named_base(file: AdapterFile) -> str:
    """The base that a file names, as words within a message; empty where it names none."""
    path = file.metadata.get("modelspec.title", "").removeprefix("Neighbor GRPO LoRA for ")
    return f", trained on {path}" if "ngrpo" in file.metadata and path else ""


def apply(model: ModelPatcher, adapter: FittingAdapter, strength: float, schedule: StrengthSchedule) -> ModelPatcher:
    """Put an adapter on a clone of a MODEL; at strength 0 the MODEL itself is returned."""
    constant = schedule.constant
    if not strength or constant == 0:
        return model
    patched = model.clone()
    if constant is None:
        Scheduled(adapter, strength, schedule).put_on(patched)
    else:
        patched.add_patches(adapter.patches, strength * constant)
    return patched


class Scheduled:
    """An adapter whose strength follows the sampling: added to the weights as each layer is computed.

    The MODEL's weights stay as they are, so that no step rounds what another one left.
    """

    def __init__(self, adapter: FittingAdapter, strength: float, schedule: StrengthSchedule):
        self.adapter, self.strength, self.schedule = adapter, strength, schedule
        self.now = 0.0
        self.used = False

    def put_on(self, model: ModelPatcher) -> None:
        """Register this adapter with a MODEL, weight by weight.

        Raises:
            UserError: a layer of it cannot be changed while it computes.
        """
        own: list[ScheduledPatch] = []
        for target, patch in self.adapter.patches.items():
            key, rows, function = (*((target,) if isinstance(target, str) else target), None, None)[:3]
            module = comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
            if key.endswith(".bias"):
                raise UserError(f"a schedule is for weights, but the adapter changes {key!r} too; leave it empty")
            if not isinstance(module, comfy.ops.CastWeightBiasOp):
                raise UserError(
                    f"a schedule needs layers of ComfyUI's own, but {key!r} is of a {type(module).__name__}"
                )
            own.append(ScheduledPatch(self, module, key, patch, rows, function))
            model.add_weight_wrapper(key, own[-1])
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"ngrpo_schedule_{id(self)}", self.at_noise_level)
        # ComfyUI moves them to the GPU, and back only from a MODEL that was there in part.
        model.add_callback(
            CallbacksMP.ON_DETACH, lambda patcher, _: [one.move_to(patcher.offload_device) for one in own]
        )

    def at_noise_level(
        self,
        executor: Any,
        x: Tensor,
        sigma: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = MappingProxyType({}),
        **conditions: Any,
    ) -> Tensor:
        """Wrap `comfy.model_base.BaseModel.apply_model`: one pass, at the strength of its noise level."""
        place = progress(sigma.max().item(), transformer_options["sample_sigmas"].tolist())
        self.now, self.used = self.strength * self.schedule(place), False
        result = executor(x, sigma, c_concat, c_crossattn, control, transformer_options, **conditions)
        if self.now and not self.used:
            raise UserError(
                "this MODEL takes no strength that changes from step to step: its layers compute with weights of "
                "their own (GGUF, for one); leave the schedule empty"
            )
        return result


class ScheduledPatch:
    """One weight of a scheduled adapter, in the form of ModelPatcher's weight functions."""

    def __init__(self, owner: Scheduled, layer: Any, key: str, patch: Any, rows: Any, function: Any):
        self.owner, self.layer, self.key = owner, layer, key
        self.patch, self.rows, self.function = patch, rows, function

    def __call__(self, weight: Tensor) -> Tensor:
        """Add the adapter's part to a weight, which is the layer's own copy."""
        self.owner.used = True
        if not self.owner.now:
            return weight
        patches = [(self.owner.now, self.patch, 1.0, self.rows, self.function)]
        scale = getattr(self.layer, "scale_weight", None)  # of scaled FP8: the layer multiplies by it afterwards
        if scale is None and weight.dtype.itemsize > 1:
            return comfy.lora.calculate_weight(patches, weight, self.key, intermediate_dtype=weight.dtype)
        exact = weight.dtype if weight.dtype.itemsize > 1 else torch.float32  # there is no arithmetic in float8
        factor = 1.0 if scale is None else scale.to(weight.device, exact)
        changed = comfy.lora.calculate_weight(patches, weight.to(exact) * factor, self.key, intermediate_dtype=exact)
        return (changed / factor).to(weight.dtype)

    def move_to(self, device: torch.device) -> int:
        """Move the patch to a device, and return the bytes that it takes there."""
        moved = tuple(part.to(device) if isinstance(part, Tensor) else part for part in self.patch.weights)
        self.patch.weights = moved
        return sum(part.nbytes for part in moved if isinstance(part, Tensor))


def report(name: str, path: Path, model: ModelPatcher, recommendation: Recommendation) -> str:
    """Report what `ngrpo info` says of a file, and the settings with which it is drawn here."""
    rows = dict(lines(describe(path, family_of(model)))) | {"file": name}
    rows.pop("draw")
    info = recommendation.info
    rows["settings"] = f"{rows['settings']} ({recommendation.source})" if "settings" in rows else recommendation.source
    rows["drawn with"] = (
        f"{info.rollout.num_steps} steps of {info.rollout.solver}, {info.model.width_px} x {info.model.height_px} px"
    )
    if note := built_in_guidance(model, recommendation):
        rows["note"] = note
    return "\n".join(f"{what}: {value}" for what, value in rows.items())


def built_in_guidance(model: ModelPatcher, recommendation: Recommendation) -> str | None:
    """A note where built-in guidance shows that a MODEL is of another base, else None; weights do not name a base."""
    own = weightless(recommendation.base, 64, 64).transformer.config.get("guidance_embeds")
    here = model.model.model_config.unet_config.get("guidance_embed")
    if own is None or here is None or own == here:
        return None
    has, lacks = ("with", "none") if own else ("without", "some")
    return (
        f"trained {has} guidance built in ({recommendation.info.model.path}), and this MODEL has {lacks}: it is of "
        "another base, and draws differently"
    )


class LoadAdapter(io.ComfyNode):
    """Node that puts a LoRA on a MODEL, with the sampler and noise levels of its training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadAdapter",
            display_name="Load Adapter",
            description="A LoRA on a MODEL, with the sampler, the noise levels, the guidance and the size that it was "
            "trained with. Reads files of any trainer (diffusers, PEFT, kohya, ComfyUI); one that does not fit the "
            "MODEL in every layer is an error. Several in a row add up.",
            inputs=[
                io.Model.Input("model", tooltip="FLUX, SD3, Qwen-Image, Z-Image, Wan, or the embedded model."),
                lora_input(),
                io.Float.Input(
                    "strength", default=1.0, min=-20.0, max=20.0, step=0.05, tooltip="1: as trained; 0: the base."
                ),
                io.String.Input(
                    "schedule",
                    default="",
                    tooltip="Factors of the strength over the steps, as place:factor from 0, the first step, to 1, the "
                    "last, with straight lines between: 0:0, 0.3:1, 1:0.5. A place given twice is a jump. Empty: 1.",
                ),
                io.Combo.Input(
                    "alpha",
                    options=ALPHA,
                    default=ALPHA[0],
                    tooltip="alpha that stands in the header alone: ComfyUI's own loaders do not see it, and draw with "
                    "another strength than diffusers. Fold in: as it was trained.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Sampler.Output(tooltip="The solver of training."),
                io.Sigmas.Output(tooltip="The noise levels of training."),
                io.Float.Output("guidance", display_name="guidance", tooltip="For FluxGuidance, or as cfg."),
                io.Int.Output("width", display_name="width", tooltip="Of training, in pixels."),
                io.Int.Output("height", display_name="height", tooltip="Of training, in pixels."),
                io.String.Output("info", display_name="info", tooltip="What the file says of itself."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None, strength: float = 1.0, schedule: str | None = "") -> bool | str:
        try:
            if lora_name is not None:
                read_metadata(adapter_path(lora_name))
            check_strength(strength or 0.0)
            parse_schedule(schedule or "")
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **others: Any) -> tuple[int, ...]:
        return fingerprint(lora_name)

    @classmethod
    def execute(cls, model: ModelPatcher, lora_name: str, strength: float, schedule: str, alpha: str) -> io.NodeOutput:
        path = adapter_path(lora_name)
        check_strength(strength)
        adapter = read_fitting(model, path, alpha)
        recommendation = recommend(path, adapter.family)
        info = recommendation.info
        family = weightless(recommendation.base, info.model.height_px, info.model.width_px)
        sigmas = family.sigmas(info.rollout.num_steps, info.rollout.shift)
        guidance = info.model.guidance_scale
        text = report(lora_name, path, model, recommendation)
        show_text(text, cls)
        return io.NodeOutput(
            apply(model, adapter, strength, parse_schedule(schedule)),
            KSAMPLER(sample_flow, {"solver": info.rollout.solver}),
            sigmas,
            float(family.settings["guidance_scale"] if guidance is None else guidance),
            info.model.width_px,
            info.model.height_px,
            text,
            ui=ui.PreviewText(text),
        )


NODES: list[type[io.ComfyNode]] = [LoadAdapter]
