"""What a run will need, before any weights are loaded: memory at every stage, function evaluations, FLOPs.

The model is made from its small JSON files on the meta device, and the trainer's own passes are run there by the
family's own code: their activations and FLOPs are counted (`ngrpo_lora.planning.meter`), not modelled, and on the CPU
the count is exact. Function evaluations and rollout buffers come from a dry run of the algorithm on one-element
latents.

What the count leaves out is held in reserve: `CONTEXT` for the CUDA context and the libraries' workspaces, `SLACK` of
the activations for what kernels and the allocator take besides. Estimates are the activations of encoding and of
scoring, a share of these networks' weights (`ENCODING`, `SCORING`), and `PROCESS`. FLUX.1-dev on an H100 held 97 to
100% of the plan with its reserve at every stage; `nvidia-smi` showed 5% more at the peak, for which `MARGIN` has room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ngrpo_lora.algorithms._opening import open_algorithm
from ngrpo_lora.config import RunConfig
from ngrpo_lora.devices import resolve_dtype
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._blueprint import blank_text
from ngrpo_lora.planning.sizes import Items, base_sizes, optimizer_sizes, reward_networks
from ngrpo_lora.planning.sketch import Sketch, sketch
from ngrpo_lora.types import RewardBatch

__all__ = ["GIB", "MARGIN", "Evaluations", "Plan", "make_plan"]

GIB = 2**30
CONTEXT = 0.75 * GIB
SLACK = 0.1
MARGIN = 0.07  # cards have up to 6% less than their name says, and some of it is the desktop's
PROCESS = 4 * GIB  # Python, PyTorch, CUDA's libraries
ENCODING = 0.05
SCORING = 0.15
SHARD = 10e9  # a file of weights, of which one at a time is read

# Parameters of reward networks, by the path of their weights.


@dataclass(frozen=True)
class Evaluations:
    """Samples through the transformer in one iteration of all processes, as the trainer counts them.

    samples: images drawn. rollout: evaluations in the rollout. theta: with gradient.
    old: all without gradient, in the rollout, for the old policy and for the reference.
    """

    samples: int
    rollout: int
    old: int
    theta: int

    @property
    def old_per_sample(self) -> float:
        """Evaluations without gradient per sample, the metric `nfe/old_per_sample`."""
        return self.old / self.samples

    @property
    def theta_per_sample(self) -> float:
        """Evaluations with gradient per sample, the metric `nfe/theta_per_sample`."""
        return self.theta / self.samples


@dataclass(frozen=True)
class Plan:
    """What a run needs of memory, disk and computation; sizes in bytes.

    origin: where the model's figures are from.
    parameters: number of them in each of its networks and in the adapter.
    gpu: memory on each GPU, by stage and item.
    system: system memory of this machine, by stage and item; without a GPU (`on_cpu`) all of it is there.
    disk: the text embeddings that are kept.
    flops_per_forward: one pass of the transformer for one sample.
    flops: one iteration on all GPUs, but for encoding, rewards and evaluation.
    notes: what could not be counted.
    """

    origin: str
    parameters: dict[str, int]
    gpus: int
    on_cpu: bool
    gpu: dict[str, Items]
    system: dict[str, Items]
    disk: float
    evaluations: Evaluations
    flops_per_forward: float
    flops: float
    notes: tuple[str, ...]

    @property
    def stage(self) -> str:
        """The stage at which a GPU holds most."""
        return max(self.gpu, key=lambda stage: sum(self.gpu[stage].values()))

    @property
    def peak(self) -> float:
        """Most bytes that each GPU holds at any stage."""
        return sum(self.gpu[self.stage].values())

    @property
    def system_peak(self) -> float:
        """Most bytes that system memory holds at any stage."""
        return max(sum(items.values()) for items in self.system.values())

    def fits(self, memory: float) -> bool:
        """Whether GPUs with so many bytes by their names, less MARGIN, are enough; on a CPU, system memory."""
        return (self.system_peak if self.on_cpu else self.peak) <= (1 - MARGIN) * memory


@dataclass(frozen=True)
class Rehearsal:
    """A dry run of one iteration by the algorithm's own code, on one-element latents.

    samples, calls, kept: of one group, its samples, the velocities of its rollout, the latents that the rollout keeps.
    updates: transitions of each update, if every group has advantages.
    """

    samples: int
    calls: int
    kept: int
    updates: list[int]
    needs_reference: bool
    needs_old: bool

    def evaluations(self, groups: int, passes: int) -> Evaluations:
        """Evaluations of an iteration with so many groups, at so many passes of the transformer a velocity."""
        rollout, theta = self.calls * groups * passes, sum(self.updates) * passes
        later = sum(self.updates[1:]) * passes if self.needs_old else 0
        extra = later + (theta if self.needs_reference else 0)
        return Evaluations(self.samples * groups, rollout, rollout + extra, theta)


def rehearse(config: RunConfig, steps: range | None = None) -> Rehearsal:
    """Make a dry run of an iteration: roll out one group, score all groups at random, and count the updates.

    Args:
        steps: those of a rollout that can be trained; None: all.
    """
    algorithm = open_algorithm(config, steps)
    calls, schedule = 0, Schedule(flow_sigmas(config.rollout.num_steps), 1.0)

    def velocity_fn(latents: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += latents.shape[0] * latents.shape[1]
        return torch.zeros_like(latents)

    (rollout,) = algorithm.rollout(velocity_fn, schedule, (1, 1, 1), [0], 0)
    kept = sum(getattr(rollout, field.name).numel() for field in fields(rollout) if field.name != "sigmas")
    shape = (config.rollout.prompts_per_iteration, len(rollout.final))
    rewards = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = RewardBatch(rewards, torch.ones(shape, dtype=torch.bool), {})
    updates = [len(update) for update in algorithm.updates(algorithm.advantages(batch), 0, 0)]
    return Rehearsal(shape[1], calls, kept, updates, algorithm.needs_reference, algorithm.needs_old)


@dataclass(frozen=True)
class Batches:
    """One process's share of an iteration, and how many samples share a pass.

    groups: prompt groups of this process. at_once: of them, groups that are drawn together.
    drawn, decoded, trained: samples of a forward pass, of a decoding, and transitions of a backward pass.
    """

    groups: int
    at_once: int
    drawn: int
    decoded: int
    trained: int

    @classmethod
    def of(cls, config: RunConfig, rehearsal: Rehearsal, gpus: int) -> Batches:
        """Those of a configuration on so many GPUs."""
        rollout = config.rollout
        groups = -(-rollout.prompts_per_iteration // gpus)
        chunk = rollout.micro_batch_size or rollout.group_size
        at_once = min(groups, max(1, chunk // rollout.group_size))
        decoded = min(rollout.micro_batch_size or rehearsal.samples, rehearsal.samples)
        trained = min(config.trainer.micro_batch_size, -(-max(rehearsal.updates) // gpus))
        return cls(groups, at_once, min(chunk, at_once * rehearsal.samples), decoded, trained)


class Estimate:
    """What one process of a run holds: bytes of each thing once, put together by stage in `gpu` and `system`."""

    def __init__(self, config: RunConfig, drawn: Sketch, rehearsal: Rehearsal, gpus: int, on_cpu: bool):
        self.config, self.drawn, self.rehearsal, self.on_cpu = config, drawn, rehearsal, on_cpu
        model, family = config.model, drawn.family
        self.itemsize = family.dtype.itemsize
        self.batches = Batches.of(config, rehearsal, gpus)
        self.forward, self.forward_one = drawn.velocity(self.batches.drawn), drawn.velocity(1)
        self.backward = drawn.velocity(self.batches.trained, True, config.trainer.gradient_checkpointing)
        self.decode = drawn.decode(self.batches.decoded, model.vae_tiling)
        evaluated = min(config.evaluation.micro_batch_size, -(-config.evaluation.num_prompts // gpus))
        self.evaluated = drawn.velocity(evaluated), drawn.decode(evaluated, model.vae_tiling)
        self.unpacked = 0 if model.quantization == "none" else max(layer.weight.nbytes for layer in drawn.linear)

        self.base, self.whole, self.swapped = base_sizes(config, drawn, gpus)
        self.adapter = 4 * sum(drawn.lora)
        self.average = self.adapter if config.optimizer.ema_decay else 0
        self.state, self.paged = optimizer_sizes(config.optimizer, drawn.lora)
        # The state that has drawn the last pictures, and in an update that before it: what an error goes back to.
        self.last = self.adapter + self.average + self.state + self.paged
        sizes = {name: family.dtype_of(name).itemsize for name in family.text_encoders}
        self.encoders = sum(size * drawn.blueprint.parameters(name) for name, size in sizes.items())
        self.networks, self.notes = reward_networks(config)

        latent = 4 * math.prod(family.latent_shape)
        self.kept = latent * rehearsal.kept
        drawn_latents = latent * rehearsal.samples * (config.rollout.num_steps + 1)
        self.trajectories = self.batches.at_once * (drawn_latents + self.kept)
        self.prompt = sum(tensor.nbytes for tensor in blank_text(family, 1).tensors.values())
        negative = self.prompt if family.guided and not family.edits else 0  # of edits it is in every prompt's
        self.texts = self.prompt * self.batches.groups + negative
        self.held_out = self.prompt * -(-config.evaluation.num_prompts // gpus) + negative

    def gpu(self) -> dict[str, Items]:
        """Bytes on the device by stage."""
        model, live = self.config.model, self.adapter + self.average
        resting = sum(self.networks["gpu"].values())
        awake = resting + sum(self.networks["offload"].values())
        scoring = SCORING * awake
        merged = sum(layer.weight.nbytes for layer in self.drawn.adapted) if self.config.rollout.merge_adapter else 0
        always: Items = {
            "transformer": self.base,
            "LoRA": live,
            "optimizer": self.state,
            "VAE": self.drawn.vae,
            "text encoders": self.encoders if model.text_encoders == "keep" else 0,
            "rewards": resting,
            "kept state": self.last if self.on_cpu else 0,
        }
        evaluating = always | {"LoRA": self.adapter + live, "text embeddings": self.held_out}
        encoding: Items = {"text encoders": self.encoders, "activations": ENCODING * self.encoders}
        scored = always | {"rewards": awake, "text embeddings": self.texts, "latents": self.trajectories}
        forward, one = self.forward.peak, self.forward_one.peak + self.unpacked
        evaluated = max(self.evaluated[0].peak + self.unpacked, self.evaluated[1].peak)
        # PyTorch's AdamW takes the root of all second moments at once.
        root = self.adapter if self.config.optimizer.name == "adamw" else 0
        backward = max(self.backward.peak + self.unpacked, root)
        stages: dict[str, Items] = {
            "load": always | {"transformer": self.whole, "LoRA": 0, "optimizer": 0},
            "encode": {"rewards": resting} | encoding if model.text_encoders == "cache" else evaluating | encoding,
            "rollout": scored | {"LoRA": live + merged, "activations": forward + self.unpacked + scoring},
            "decode": scored | {"activations": self.decode.peak + scoring},
            "update": always
            | {"gradients": self.adapter, "text embeddings": self.texts, "activations": backward}
            | {"kept state": 2 * self.last if self.on_cpu else 0},
            "evaluation": evaluating | {"rewards": awake, "activations": max(evaluated, scoring)},
            "export": evaluating | {"LoRA": self.adapter * (2 + self.itemsize / 4) + self.average, "activations": one},
        }
        for items in stages.values():
            items["reserve"] = SLACK * items.get("activations", 0) + (0 if self.on_cpu else CONTEXT)
        return stages

    def system(self) -> dict[str, Items]:
        """Bytes of system memory by stage, of this process."""
        model, drawn = self.config.model, self.drawn
        pictures = 3 * model.height_px * model.width_px * drawn.family.num_frames * self.rehearsal.samples
        training: Items = {
            "processes": PROCESS,
            "text encoders": self.encoders if model.text_encoders == "offload" else 0,
            "rewards": sum(self.networks["offload"].values()) + sum(self.networks["system"].values()),
            "swapped blocks": self.swapped,
            "optimizer": self.paged,
            "rollouts": self.batches.groups * (self.kept + pictures),
            "kept states": 0 if self.on_cpu else 2 * self.last,
        }
        if self.on_cpu:
            held = max(sum(items.values()) for items in self.gpu().values())
            return {"train": training | {"networks and tensors": held}}
        # bitsandbytes quantises on the GPU what it reads; all else is read as a whole.
        read = drawn.vae + (min(drawn.weights, SHARD) if model.quantization in ("nf4", "int8") else drawn.weights)
        read = max(read, self.encoders) if model.text_encoders == "cache" else read + self.encoders
        return {"load": {"processes": PROCESS, "rewards": training["rewards"], "weights": read}, "train": training}


def make_plan(config: RunConfig, gpus: int = 1) -> Plan:
    """Figures for a checked configuration on so many GPUs of one machine, each with a process of its own.

    Raises:
        UserError: no such model, or it cannot be reached and the package does not know it.
    """
    model, on_cpu = config.model, config.model.device == "cpu"
    dtype = resolve_dtype(model.dtype, "cpu") if on_cpu else model.dtype.replace("auto", "bfloat16")
    drawn = sketch(model.model_copy(update={"dtype": dtype}), config.lora)
    family, blueprint = drawn.family, drawn.blueprint
    if model.swap_blocks > (most := len(drawn.blocks[0])):
        raise ConfigError(
            f"model.swap_blocks must be at most {most}, the blocks of this model, got {model.swap_blocks}"
        )
    rehearsal = rehearse(config, family.trained_steps(family.sigmas(config.rollout.num_steps, config.rollout.shift)))
    estimate = Estimate(config, drawn, rehearsal, gpus, on_cpu)
    batches = estimate.batches
    evaluations = rehearsal.evaluations(config.rollout.prompts_per_iteration, drawn.passes)
    per_forward = estimate.forward.flops / batches.drawn / drawn.passes
    per_theta = estimate.backward.flops / batches.trained / drawn.passes
    drawing = evaluations.old * per_forward + evaluations.samples * estimate.decode.flops / batches.decoded
    prompts = config.trainer.num_iterations * config.rollout.prompts_per_iteration + config.evaluation.num_prompts
    networks_of_model = [name for name in (*family.text_encoders, "vae") if name in blueprint.parts]
    return Plan(
        origin=blueprint.origin,
        parameters=drawn.parameters
        | {"LoRA": sum(drawn.lora)}
        | {name: blueprint.parameters(name) for name in networks_of_model},
        gpus=gpus,
        on_cpu=on_cpu,
        gpu={stage: nonzero(items) for stage, items in estimate.gpu().items()},
        system={stage: nonzero(items, gpus) for stage, items in estimate.system().items()},
        disk=estimate.prompt * prompts if model.text_encoders == "cache" else 0,
        evaluations=evaluations,
        flops_per_forward=per_forward,
        flops=drawing + evaluations.theta * per_theta,
        notes=estimate.notes,
    )


def nonzero(items: Items, times: int = 1) -> Items:
    """What there is at all, so many times."""
    return {name: times * size for name, size in items.items() if size}
