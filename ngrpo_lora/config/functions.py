"""The functions that a configuration refers to: rewards and measures that are no files of this package."""

from __future__ import annotations

from ngrpo_lora.config.run import RunConfig

__all__ = ["named_functions"]


def named_functions(config: RunConfig) -> dict[str, str]:
    """References `package.module:function` or `file.py:function` of rewards and measures, by the key of each."""
    evaluation = config.evaluation
    named = {f"rewards.train.{index}.name": reward.name for index, reward in enumerate(config.rewards.train)}
    named |= {f"evaluation.rewards.{index}.name": reward.name for index, reward in enumerate(evaluation.rewards)}
    named |= {"evaluation.strict": evaluation.strict or ""}
    named |= {f"evaluation.measures.{index}": name for index, name in enumerate(evaluation.measures)}
    return {key: name for key, name in named.items() if ":" in name}
