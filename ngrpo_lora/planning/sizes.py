"""Bytes of what a run holds all the time: the base, the optimizer's state, and the networks of rewards."""

from __future__ import annotations

from ngrpo_lora.config import ModelRewardConfig, OptimizerConfig, RunConfig
from ngrpo_lora.planning.sketch import Sketch

Items = dict[str, float]
"""Bytes by what they are for."""

REWARD_PARAMETERS = {
    "MizzenAI/HPSv3": 8.3e9,
    "THUDM/ImageReward": 447e6,
    "apple/DFN5B-CLIP-ViT-H-14-378": 987e6,
    "facebook/mask2former-swin-small-coco-instance": 69e6,
    "openai/clip-vit-large-patch14": 428e6,
    "xswu/HPSv2": 986e6,
    "yuvalkirstain/PickScore_v1": 986e6,
}


def base_sizes(config: RunConfig, drawn: Sketch, gpus: int) -> tuple[float, float, float]:
    """Bytes of all transformers: on each GPU while it is used, there while it is loaded, and in system memory."""
    weights = drawn.quantized(config.model.quantization)
    if count := config.model.swap_blocks:
        away = sum(sum(blocks[-count:]) for blocks in drawn.blocks)
        room = sum(max(blocks[-count:]) * min(count, 2) for blocks in drawn.blocks)  # that they visit
        base = weights - away + room
        return base, base, away
    if config.trainer.strategy == "fsdp" and gpus > 1:
        in_blocks = sum(map(sum, drawn.blocks))
        # Whole are the one that computes, the one that is next, and what is in no block.
        share = in_blocks / gpus + 2 * max(map(max, drawn.blocks)) + weights - in_blocks
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
        if ":" in reward.name:
            unknown.append(f"networks of reward {reward.key}, if it has any: it is a function of your own")
        if not isinstance(reward, ModelRewardConfig) or not reward.path:
            continue
        place = "system" if "cpu" in (reward.device, config.model.device) else "offload" if reward.offload else "gpu"
        itemsize = 4 if reward.dtype == "float32" or (place, reward.dtype) == ("system", "auto") else 2
        paths = [value for value in reward.model_dump().values() if value in REWARD_PARAMETERS]
        found[place] |= {path: itemsize * REWARD_PARAMETERS[path] for path in paths}
        if reward.path not in paths:
            unknown.append(f"the network of reward {reward.key} ({reward.path}), which is of unknown size")
    return found, tuple(unknown)
