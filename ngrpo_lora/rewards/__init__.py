"""Rewards, one file each: `score(images, prompts, metadata) -> scores`, or a class `Reward` with settings of its own.

A file here holds either a function `score`, or `class Config(RewardConfig)` and `class Reward`, which is made with
`Reward(config, device)` and then called like a function. So is any function of yours, by `package.module:function` or
`file.py:function`. The names of the parameters say what is wanted, higher is better, NaN where there is no score:

    score(images, prompts, metadata)   B PIL images, B strings, B dictionaries -> B numbers
    score(image, prompt, metadata)     one of each -> a number
    score(images, prompt, metadata)    all G candidates of a prompt -> G numbers

`prompt` and `metadata` may be left out, and all of them may be `async def`. `scoring.py` calls them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig

__all__ = ["load"]


def load(config: RewardConfig, device: str = "cpu") -> Callable[..., Any]:
    """The reward of a configuration, ready to be called.

    Args:
        device: where a reward that has a network puts it when its own settings say `auto`.
    Raises:
        ConfigError: no such reward or function; the nearest one is named.
        UserError: what the reward needs (a package, weights, a server) is missing.
    """
    if ":" in config.name:
        return registry.resolve_function(config.name)
    module = registry.load(sys.modules[__name__], config.name)
    return module.Reward(config, device) if hasattr(module, "Reward") else module.score
