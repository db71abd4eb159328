"""The frozen transformer in 8 or 4 bits (`model.quantization`), by diffusers' own quantised loading.

nf4 and int8 are bitsandbytes' NF4 (double quantisation, as QLoRA, arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339);
int8_torchao and float8_torchao are torchao's weight-only types. Text encoders and VAE stay as they are.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ngrpo_lora.errors import UserError

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig

__all__ = ["check_quantization", "pipeline_quantization"]

PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_torchao": "torchao", "float8_torchao": "torchao"}
NEED_GPU = ("nf4", "int8")


def check_quantization(kind: str, device: str) -> None:
    """Make sure that a `model.quantization` can be had on a device.

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
    """What `from_pretrained` takes to quantise the transformer, which computes in `dtype`; None: nothing."""
    if kind == "none":
        return None
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    # LLM.int8 computes in float16 and would warn of it in every layer at every pass.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]  # of the extra torchao
            Float8WeightOnlyConfig,
            Int8WeightOnlyConfig,
        )

        config = TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8_torchao" else Float8WeightOnlyConfig())
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})
