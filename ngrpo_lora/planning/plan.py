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

from ngrpo_lora import registry
from ngrpo_lora.algorithms._base import Algorithm
from ngrpo_lora.config import ModelRewardConfig, OptimizerConfig, RunConfig
from ngrpo_lora.devices import resolve_dtype
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._blueprint import blank_text
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
REWARD_PARAMETERS = {
    "MizzenAI/HPSv3": 8.3e9,
    "THUDM/ImageReward": 447e6,
    "apple/DFN5B-CLIP-ViT-H-14-378": 987e6,
    "facebook/mask2former-swin-small-coco-instance": 69e6,
    "openai/clip-vit-large-patch14": 428e6,
    "xswu/HPSv2": 986e6,
    "yuvalkirstain/PickScore_v1": 986e6,
}

Items = dict[str, float]


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


def rehearse(config: RunConfig) -> Rehearsal:
    """Make a dry run of an iteration: roll out one group, score all groups at random, and count the updates."""
    module = registry.load(registry.ALGORITHMS, config.algorithm.name)
    algorithm: Algorithm = module.Algorithm(config.algorithm, config.rollout)
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


def make_plan(config: RunConfig, gpus: int = 1) -> Plan:
    """Figures for a checked configuration on so many GPUs of one machine, each with a process of its own.

    Raises:
        UserError: no such model, or it cannot be reached and the package does not know it.
    """
    model, rollout, trainer = config.model, config.rollout, config.trainer
    on_cpu = model.device == "cpu"
    dtype = resolve_dtype(model.dtype, "cpu") if on_cpu else model.dtype.replace("auto", "bfloat16")
    drawn = sketch(model.model_copy(update={"dtype": dtype}), config.lora)
    family, blueprint, itemsize = drawn.family, drawn.blueprint, getattr(torch, dtype).itemsize
    if model.swap_blocks > len(drawn.blocks):
        raise ConfigError(
            f"model.swap_blocks must be at most {len(drawn.blocks)}, the blocks of this model, got {model.swap_blocks}"
        )

    # One process's share of an iteration, and its batches.
    rehearsal = rehearse(config)
    groups = -(-rollout.prompts_per_iteration // gpus)
    chunk = rollout.micro_batch_size or rollout.group_size
    at_once = min(groups, max(1, chunk // rollout.group_size))
    drawn_together = min(chunk, at_once * rehearsal.samples)
    decoded_together = min(rollout.micro_batch_size or rehearsal.samples, rehearsal.samples)
    trained_together = min(trainer.micro_batch_size, -(-max(rehearsal.updates) // gpus))

    forward, forward_one = drawn.velocity(drawn_together), drawn.velocity(1)
    backward = drawn.velocity(trained_together, True, trainer.gradient_checkpointing)
    decode, decode_one = drawn.decode(decoded_together, model.vae_tiling), drawn.decode(1, model.vae_tiling)
    unpacked = 0 if model.quantization == "none" else max(layer.weight.nbytes for layer in drawn.linear)

    # What is there all the time.
    base, whole, swapped = base_sizes(config, drawn, gpus)
    adapter = 4 * sum(drawn.lora)
    average = adapter if config.optimizer.ema_decay else 0
    merged = sum(layer.weight.nbytes for layer in drawn.adapted) if rollout.merge_adapter else 0
    state, paged = optimizer_sizes(config.optimizer, drawn.lora)
    encoders = itemsize * sum(blueprint.parameters(name) for name in family.text_encoders)
    networks, notes = reward_networks(config)
    resting = sum(networks["gpu"].values())
    awake = resting + sum(networks["offload"].values())
    scoring = SCORING * awake

    latent = 4 * math.prod(family.latent_shape)
    kept = latent * rehearsal.kept
    trajectories = at_once * (latent * rehearsal.samples * (rollout.num_steps + 1) + kept)
    prompt = sum(tensor.nbytes for tensor in blank_text(family, 1).tensors.values())
    negative = prompt if family.guided else 0
    texts, held_out = (prompt * groups + negative, prompt * -(-config.evaluation.num_prompts // gpus) + negative)

    always: Items = {
        "transformer": base,
        "LoRA": adapter + average,
        "optimizer": state,
        "VAE": drawn.vae,
        "text encoders": encoders if model.text_encoders == "keep" else 0,
        "rewards": resting,
    }
    evaluating = always | {"LoRA": 2 * adapter + average, "text embeddings": held_out}
    encoding: Items = {"text encoders": encoders, "activations": ENCODING * encoders}
    scored = always | {"rewards": awake, "text embeddings": texts, "latents": trajectories}
    root = adapter if config.optimizer.name == "adamw" else 0  # PyTorch takes that of all second moments at once
    gpu: dict[str, Items] = {
        "load": always | {"transformer": whole, "LoRA": 0, "optimizer": 0},
        "encode": {"rewards": resting} | encoding if model.text_encoders == "cache" else evaluating | encoding,
        "rollout": scored | {"LoRA": adapter + average + merged, "activations": forward.peak + unpacked + scoring},
        "decode": scored | {"activations": decode.peak + scoring},
        "update": always
        | {"gradients": adapter, "text embeddings": texts, "activations": max(backward.peak + unpacked, root)},
        "evaluation": evaluating
        | {"rewards": awake, "activations": max(forward_one.peak + unpacked, decode_one.peak, scoring)},
        "export": evaluating
        | {"LoRA": adapter * (2 + itemsize / 4) + average, "activations": forward_one.peak + unpacked},
    }
    for items in gpu.values():
        items["reserve"] = SLACK * items.get("activations", 0) + (0 if on_cpu else CONTEXT)

    pictures = 3 * model.height_px * model.width_px * family.num_frames * rehearsal.samples
    training: Items = {
        "processes": PROCESS,
        "text encoders": encoders if model.text_encoders == "offload" else 0,
        "rewards": sum(networks["offload"].values()) + sum(networks["system"].values()),
        "swapped blocks": swapped,
        "optimizer": paged,
        "rollouts": groups * (kept + pictures),
    }
    # bitsandbytes quantises on the GPU what it reads; all else is read as a whole.
    read = drawn.vae + (min(drawn.weights, SHARD) if model.quantization in ("nf4", "int8") else drawn.weights)
    read = max(read, encoders) if model.text_encoders == "cache" else read + encoders
    loading = {"processes": PROCESS, "rewards": training["rewards"], "weights": read}
    system = {"load": loading, "train": training}
    if on_cpu:
        system = {"train": training | {"networks and tensors": max(sum(items.values()) for items in gpu.values())}}

    evaluations = rehearsal.evaluations(rollout.prompts_per_iteration, drawn.passes)
    per_forward = forward.flops / drawn_together / drawn.passes
    per_theta = backward.flops / trained_together / drawn.passes
    drawing = evaluations.old * per_forward + evaluations.samples * decode.flops / decoded_together
    prompts = trainer.num_iterations * rollout.prompts_per_iteration + config.evaluation.num_prompts
    networks_of_model = [name for name in (*family.text_encoders, "vae") if name in blueprint.parts]
    return Plan(
        origin=blueprint.origin,
        parameters={"transformer": drawn.parameters, "LoRA": sum(drawn.lora)}
        | {name: blueprint.parameters(name) for name in networks_of_model},
        gpus=gpus,
        on_cpu=on_cpu,
        gpu={stage: nonzero(items) for stage, items in gpu.items()},
        system={stage: nonzero(items, gpus) for stage, items in system.items()},
        disk=prompt * prompts if model.text_encoders == "cache" else 0,
        evaluations=evaluations,
        flops_per_forward=per_forward,
        flops=drawing + evaluations.theta * per_theta,
        notes=notes,
    )


def nonzero(items: Items, times: int = 1) -> Items:
    """What there is at all, so many times."""
    return {name: times * size for name, size in items.items() if size}


def base_sizes(config: RunConfig, drawn: Sketch, gpus: int) -> tuple[float, float, float]:
    """Bytes of the transformer: on each GPU while it is used, there while it is loaded, and in system memory."""
    weights = drawn.quantized(config.model.quantization)
    if count := config.model.swap_blocks:
        away = sum(drawn.blocks[-count:])
        base = weights - away + max(drawn.blocks[-count:]) * min(count, 2)  # the room that they visit
        return base, base, away
    if config.trainer.strategy == "fsdp" and gpus > 1:
        in_blocks = sum(drawn.blocks)  # whole are the one that computes, the one that is next, and what is in no block
        share = in_blocks / gpus + 2 * max(drawn.blocks) + weights - in_blocks
        return share, share, 0
    return weights, weights, 0


def optimizer_sizes(config: OptimizerConfig, sizes: list[int]) -> tuple[int, int]:
    """Bytes of the optimizer's state, on the GPU and in system memory, for weights of so many elements.

    bitsandbytes keeps moments of small weights in float32, has a float32 scale for 256 elements of the others, and
    pages all but the small ones.
    """
    moments = 1 if config.name == "lion_8bit" else 2
    if config.name == "adamw":
        return 4 * moments * sum(sizes), 0
    on_gpu = paged = 0
    for size in sizes:
        if size < 4096:
            on_gpu += 4 * moments * size
            continue
        on_gpu += 4 * moments * -(-size // 256)
        if config.name == "paged_adamw_8bit" and size >= 100_000:
            paged += moments * size
        else:
            on_gpu += moments * size
    return on_gpu, paged


def reward_networks(config: RunConfig) -> tuple[dict[str, Items], tuple[str, ...]]:
    """Bytes of reward networks by where they rest (gpu, offload, system) and by their weights, and what is unknown.

    Rewards that name the same weights share a network.
    """
    found: dict[str, Items] = {"gpu": {}, "offload": {}, "system": {}}
    unknown = []
    for reward in (*config.rewards.train, *config.evaluation.rewards):
        if not isinstance(reward, ModelRewardConfig):
            continue
        place = "system" if "cpu" in (reward.device, config.model.device) else "offload" if reward.offload else "gpu"
        itemsize = 4 if reward.dtype == "float32" or (place, reward.dtype) == ("system", "auto") else 2
        paths = [value for value in reward.model_dump().values() if value in REWARD_PARAMETERS]
        found[place] |= {path: itemsize * REWARD_PARAMETERS[path] for path in paths}
        if reward.path not in paths:
            unknown.append(f"the network of reward {reward.key} ({reward.path}) is of unknown size and left out")
    return found, tuple(unknown)
