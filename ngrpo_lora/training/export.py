"""The adapter as one file that PEFT, diffusers and ComfyUI load alike, and that says how to sample with it.

Layout: `transformer.<module>.lora_A.weight` / `.lora_B.weight`, alpha folded into lora_B (ComfyUI reads no
alpha from the header), and a minimal `lora_adapter_metadata` naming every adapted layer in full. Under
`ngrpo` the header holds the model, solver, steps, shift and guidance of the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.header import code_version
from ngrpo_lora.config import RunConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.records.files import no_room, written
from ngrpo_lora.records.metrics import has_same_prompts, read_metrics
from ngrpo_lora.training.run import Run
from ngrpo_lora.types import TextEmbeds


def save_adapter(path: Path, family: BaseFamily, config: RunConfig) -> None:
    """Write the live adapter to `path`, atomically.

    Raises:
        UserError: the disk has no room for it.
    """
    live = lora.parameters(family.transformer)  # not the whole state, which a sharded base would have to gather
    tensors = adapter_tensors(family, live, config)
    with no_room(path, sum(tensor.nbytes for tensor in tensors.values())), written(path) as partial:
        save_file(tensors, partial, describe_adapter(sorted(tensors), family, config))


def adapter_tensors(family: BaseFamily, weights: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """The tensors of an adapter's file, from weights by the names of the transformer's parameters.

    Those that need no change share their memory with the weights where these are float32 in system memory.
    """
    scale = config.lora.resolved_alpha / config.lora.rank
    tensors: dict[str, Tensor] = {}
    for name, weight in get_peft_model_state_dict(family.transformer, {**weights}, lora.ADAPTER_NAME).items():
        folded = weight * scale if ".lora_B." in name else weight
        tensors[f"transformer.{name}"] = folded.detach().float().cpu().contiguous()
    return tensors


def describe_adapter(keys: list[str], family: BaseFamily, config: RunConfig) -> dict[str, str]:
    """Header metadata: for diffusers, for model managers (modelspec, kohya's ss_), and our own."""
    layers = [key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in keys if ".lora_A." in key]
    rank = config.lora.rank
    peft = {"transformer.r": rank, "transformer.lora_alpha": rank, "transformer.target_modules": layers}
    model = config.model.model_copy(update=family.settings)
    shift = config.rollout.shift or family.shift(config.evaluation_steps)
    rollout = config.rollout.model_copy(
        update={"shift": shift, "solver": config.evaluation_solver, "num_steps": config.evaluation_steps}
    )
    own = {
        "code_version": code_version(),
        "family": type(family).__module__.rpartition(".")[2],
        "pipeline": family.pipeline_class,
        **({"edits": True} if family.edits else {}),
        **({"fused": family.fused} if family.fused else {}),
        "model": model.model_dump(mode="json"),
        "rollout": rollout.model_dump(mode="json"),
        "rewards": [reward.model_dump(mode="json") for reward in config.rewards.train],
        "held_out": held_out(Path(config.output_dir) / "metrics.jsonl"),
        "config": config.model_dump(mode="json"),
    }
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(peft, sort_keys=True),
        "ngrpo": json.dumps(own, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": f"Neighbor GRPO LoRA for {config.model.path}",
        "modelspec.resolution": f"{config.model.width_px}x{config.model.height_px}",
        "ss_base_model_version": family.kohya_version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": Path(config.output_dir).name,
    }


def held_out(metrics: Path) -> dict[str, Any]:
    """Means of a run's first and last evaluation so far; empty where there are no two of the same prompts and seeds."""
    rows = read_metrics(metrics) if metrics.is_file() else []
    rows = [row for row in rows if row.get("eval/reward_mean") is not None]
    if len(rows) < 2 or not has_same_prompts(metrics.parent):
        return {}
    before, after = (
        {key.removeprefix("eval/"): value for key, value in row.items() if "eval/" in key}
        for row in (rows[0], rows[-1])
    )
    return {"iteration": rows[-1]["step"], "before": before, "after": after}


def export(run: Run) -> Path:
    """Write a run's averaged adapter, and prove that diffusers loads it as it was trained; returns the file.

    Raises:
        UserError: the file does not do what the trained adapter does.
    """
    path = run.output_dir / "adapter" / FILE_NAME
    with run.counter.paused(), lora.swapped(run.family.transformer, run.lora_step.averaged):
        if run.processes.is_main:
            save_adapter(path, run.family, run.config)
        run.processes.gather(None)  # the file is there
        text = run.family.encode([run.held_out[0]])
        latents = gaussian_noise((1, *run.family.latent_shape), 0).to(run.family.device)
        check_export(path, run.family, text, latents)
    return path


@torch.no_grad()
def check_export(path: Path, family: BaseFamily, text: TextEmbeds, latents: Tensor) -> float:
    """Load the file beside the live adapter, as any user's pipeline would, and compare velocities with it.

    Returns:
        Root mean square of the difference over that of the adapter's effect.
    Raises:
        UserError: the file does not do what the live adapter does.
    """
    sigma = family.probe_sigma
    live = family.velocity(latents, sigma, text)
    # A 16-bit pipeline rounds the adapter on loading, and with it everything that is computed from there on; in a deep
    # model, with guidance, that is several times the rounding of a single number.
    rounded = {name: p.to(family.dtype).float() for name, p in lora.parameters(family.transformer).items()}
    with lora.swapped(family.transformer, rounded):
        noise = rms(family.velocity(latents, sigma, text) - live)
    with lora.disabled(family.transformer):
        effect = rms(live - family.velocity(latents, sigma, text))
    try:
        with lora.beside_another():
            family.load_lora(str(path), "exported")
        family.use_loras("exported")
        difference = rms(family.velocity(latents, sigma, text) - live)
    finally:
        lora.remove(family.transformer, "exported")
    tolerance = 1e-3 if family.dtype == torch.float32 else 0.1
    floor = max(1e-5, torch.finfo(family.dtype).eps) * rms(live) + 2 * noise
    if not difference <= tolerance * effect + floor:
        raise UserError(
            f"the exported adapter {path} differs from the trained one by {difference:.3g} of {effect:.3g}; "
            "the checkpoints hold the trained weights"
        )
    return difference / effect if effect else 0.0


def rms(x: Tensor) -> float:
    """The root mean square of a tensor's values, as a Python number."""
    return x.double().square().mean().sqrt().item()
