"""What is tried rather than looked up, in a process of its own: a library that crashes or hangs ends that alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ngrpo_lora
from ngrpo_lora.errors import UserError
from ngrpo_lora.planning.doctor.findings import Finding

__all__ = ["eight_bit", "embedded_model"]

LIMIT_S = 300
"""Seconds that a trial may take: a cold start of the libraries on a slow disk, and seconds of computing."""

CHILD = """
import sys
from ngrpo_lora.errors import first_line
try:
    from ngrpo_lora.planning.doctor import trials
    print(getattr(trials, sys.argv[1])())
except Exception as error:
    sys.exit(f"{type(error).__name__}: {first_line(error)}")
"""


def eight_bit() -> Iterator[Finding]:
    """Whether bitsandbytes computes on the device that a run would take."""
    yield tried("8-bit", optimizer_step.__name__, "take optimizer.name=adamw, or pip install --upgrade bitsandbytes")


def embedded_model() -> Iterator[Finding]:
    """Whether the embedded model loads and computes."""
    yield tried("embedded model", forward_pass.__name__, "see the lines above; where all is well there, report this")


def tried(check: str, function: str, remedy: str) -> Finding:
    """The verdict on a function of this file that says what it has done, or raises."""
    folder = str(Path(ngrpo_lora.__file__).parents[1])  # also where this package lies in a clone
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, "-P", "-c", CHILD, function], {**os.environ, "PYTHONPATH": path}
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return Finding(check, "problem", f"did not end within {LIMIT_S} seconds", remedy)
    if child.returncode == 0:
        return Finding(check, "ok", last_line(child.stdout))
    if child.returncode < 0:
        return Finding(check, "problem", f"crashed ({signal.Signals(-child.returncode).name})", remedy)
    return Finding(check, "problem", last_line(child.stderr) or f"ended with status {child.returncode}", remedy)


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def optimizer_step() -> str:
    """Take one step of 8-bit AdamW, the first of which moves each weight by the learning rate, and store in NF4."""
    import torch
    from bitsandbytes import functional, optim

    from ngrpo_lora.devices import resolve_device

    device = resolve_device("auto")
    weights = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    weights.grad = gradient.clone()
    optim.AdamW8bit([weights], lr=0.125, weight_decay=0).step()
    if not torch.allclose(weights.detach(), -0.125 * gradient.sign(), rtol=0.01):
        raise UserError(f"bitsandbytes computes a wrong step of AdamW on {device}")
    stored = functional.dequantize_4bit(*functional.quantize_4bit(gradient, quant_type="nf4"))
    if not (stored - gradient).abs().mean() < 0.1:  # 0.073 of normal numbers; NaN is not less
        raise UserError(f"bitsandbytes stores wrong numbers in NF4 on {device}")
    return f"AdamW and NF4 compute on {device}"


def forward_pass() -> str:
    """Take the embedded model's velocity at pure noise for one prompt, which must be finite and not all one number."""
    import torch

    from ngrpo_lora.config import ModelConfig
    from ngrpo_lora.models._loading import load_family

    family = load_family(ModelConfig(dtype="auto"))
    noise = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0)).to(family.device)
    with torch.no_grad():
        velocity = family.velocity(noise, 1.0, family.encode(["a red star"]))
    where = f"on {family.device} in {str(family.dtype).removeprefix('torch.')}"
    if not velocity.isfinite().all() or velocity.std() == 0:
        raise UserError(f"a forward pass {where} gives numbers that are not finite, or all the same")
    return f"a forward pass {where} gives finite numbers"
