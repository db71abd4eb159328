"""The frozen transformer in 8 or 4 bits (`model.quantization`), by diffusers' own quantised loading.

nf4 and int8 are bitsandbytes' NF4 (double quantisation, as QLoRA, arXiv 2305.14314) and the weights of its LLM.int8
(arXiv 2208.07339); int8_torchao and float8_torchao are torchao's weight-only types. Layers compute with their inputs as
they are; text encoders and VAE stay as they are.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ngrpo_lora.errors import UserError

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig

__all__ = ["check_quantization", "keep_inputs_whole", "pipeline_quantization"]

PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_torchao": "torchao", "float8_torchao": "torchao"}
NEED_GPU = ("nf4", "int8")


def check_quantization(kind: str, device: str) -> None:
    """Check that a `model.quantization` is available on a device.

    Raises:
        UserError: its package is not installed, or it needs a GPU.
    """
    if kind == "none":
        return
    if find_spec(PACKAGES[kind]) is None:
        raise UserError(
            f"model.quantization={kind} needs {PACKAGES[kind]}, which is not installed; pip install {PACKAGES[kind]}"
        )
    if kind in NEED_GPU and not device.startswith("cuda"):
        raise UserError(
            f"model.quantization={kind} needs a CUDA GPU, but the model's device is {device}; "
            "set it to int8_torchao or none"
        )


def pipeline_quantization(kind: str, dtype: torch.dtype) -> PipelineQuantizationConfig | None:
    """The `quantization_config` for `from_pretrained`, with transformers that compute in `dtype`; None for `none`."""
    if kind == "none":
        return None
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]  # of the extra torchao

        config = TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8_torchao" else Float8WeightOnlyConfig())
    return PipelineQuantizationConfig(quant_mapping={"transformer": config, "transformer_2": config})


def keep_inputs_whole(module: nn.Module) -> None:
    """Make bitsandbytes' INT8 layers compute with unquantised inputs, so that only their weights are in 8 bits.

    LLM.int8 quantises the inputs too, all but their outliers, and keeps them where gradient checkpointing cannot let
    go of them: on an H100 its rollouts of FLUX.1 took 2.3 times as long as bfloat16's, and its update 10 GiB more.
    """
    from bitsandbytes.nn import Linear8bitLt

    for layer in module.modules():
        if isinstance(layer, Linear8bitLt):
            layer.forward = partial(int8_linear, layer)


def int8_linear(layer: Any, x: Tensor) -> Tensor:
    """The output of a bitsandbytes INT8 layer, in the number type of its input `x`."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return Int8Linear.apply(x, layer.weight, layer.weight.SCB, bias)


class Int8Linear(torch.autograd.Function):
    """`x W^T + b` for a frozen W, of which only the 8 bits are kept for the backward pass.

    weight: (out, in) int8. scale: (out,), the largest absolute value of each row, stored as 127.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, unpack(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (weight, scale) = gradients, ctx.saved_tensors
        return gradient @ unpack(weight, scale, gradient.dtype), None, None, None


def unpack(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantise INT8 weights: `weight * scale / 127` row by row, (out, in) in `dtype`."""
    return weight.to(dtype).mul_(scale[:, None] / 127)


def quantize_linears(module: nn.Module, kind: str, device: torch.device) -> None:
    """Replace the linear layers within a module by bitsandbytes' quantised ones, as a family does when it loads."""
    from bitsandbytes import nn as bnb
    from bitsandbytes.functional import int8_vectorwise_quant

    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            quantize_linears(child, kind, device)
            continue
        features, weight = (child.in_features, child.out_features, child.bias is not None), child.weight.data
        if kind == "nf4":
            layer = bnb.Linear4bit(*features, compute_dtype=weight.dtype, quant_type="nf4")
            # pyright reads the signature of torch's Parameter
            layer.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")  # pyright: ignore
        else:
            layer = bnb.Linear8bitLt(*features, has_fp16_weights=False)
            packed, scale, _ = int8_vectorwise_quant(weight.half())
            layer.weight = bnb.Int8Params(packed, requires_grad=False, SCB=scale)  # pyright: ignore
            keep_inputs_whole(layer)
        layer.bias = child.bias
        setattr(module, name, layer.to(device).requires_grad_(False))
