"""Graphs in API format that several tests queue."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from comfy_client import REPOSITORY, Comfy, Graph, Result
from safetensors.torch import load_file
from torch import Tensor

PROMPT = "a star above a heart"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node; an input is a value, or [node, output] of another."""
    return {"class_type": kind, "inputs": inputs}


def drawing(
    seed: int = 7, steps: int = 8, size: int = 64, batch: int = 1, solver: str = "dpmpp_2m", prompt: str = PROMPT
) -> Graph:
    """The embedded model by ComfyUI's own sampler node; latents are saved, pictures are shown.

    Node ids: model, text, sampler, sigmas, noise, guider, latent, sample, save, decode, show.
    """
    return {
        "model": node("NGRPO_LoadEmbedded"),
        "text": node("CLIPTextEncode", clip=["model", 1], text=prompt),
        "sampler": node("NGRPO_FlowSampler", solver=solver),
        "sigmas": node(
            "NGRPO_FlowSigmas", base="embedded", steps=steps, width=size, height=size, shift=0.0, denoise=1.0
        ),
        "noise": node("RandomNoise", noise_seed=seed),
        "guider": node("BasicGuider", model=["model", 0], conditioning=["text", 0]),
        "latent": node("EmptySD3LatentImage", width=size, height=size, batch_size=batch),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="test"),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        "show": node("PreviewImage", images=["decode", 0]),
    }


def latents_of(comfy: Comfy, result: Result, saved_by: str = "save") -> Tensor:
    """What SaveLatent wrote."""
    assert result.status == "success", result.error
    described = result.outputs[saved_by]["latents"][0]
    return load_file(Path(comfy.base) / "output" / described["subfolder"] / described["filename"])["latent_tensor"]


def tiny_model(comfy: Comfy, family: str, maker: str = "make_folder", **settings: bool) -> str:
    """Make models/diffusers/tiny/FAMILY with a function of the family's own test; the name in the loader's list."""
    folder = comfy.base / "models" / "diffusers" / "tiny" / family
    tests = REPOSITORY / "tests"
    paths = os.pathsep.join(map(str, (REPOSITORY, tests, tests / "models", tests / "comfy")))
    make = f"""
from pathlib import Path
from engine import declare_operators
operators = declare_operators()
from test_{family} import {maker}
{maker}(Path({str(folder)!r}), **{settings!r})
"""
    if not folder.exists():
        subprocess.run([sys.executable, "-c", make], check=True, env=os.environ | {"PYTHONPATH": paths})
    return f"diffusers/tiny/{family}"
