"""An adapter on a MODEL: at one strength, or at one that changes from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import comfy.lora
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ngrpo_lora.errors import UserError
from ngrpo_lora.sampling.strengths import StrengthSchedule, progress

from .fitting import FittingAdapter


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
