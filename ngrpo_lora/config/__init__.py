"""One checked RunConfig: the only source of keys, defaults, meanings and rules.

A preset or YAML file plus `key=value` overrides go in (`load_config`), a frozen RunConfig or a ConfigError with one
line per problem comes out. Nothing here loads a model or touches the output folder; `planning/preflight.py` does that.
"""

from ngrpo_lora.config.description import Option, describe, describe_reward
from ngrpo_lora.config.functions import named_functions
from ngrpo_lora.config.hub import HubConfig
from ngrpo_lora.config.model import Expert, ModelConfig
from ngrpo_lora.config.plugins import AlgorithmConfig, ModelRewardConfig, RewardConfig, RewardsConfig, RolloutConfig
from ngrpo_lora.config.problems import show_value
from ngrpo_lora.config.reading import (
    changed_keys,
    dump_config,
    flatten,
    load_config,
    parse_config,
    parse_reward_entries,
    parse_settings,
    parse_value,
    preset_names,
)
from ngrpo_lora.config.run import (
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    PromptsConfig,
    RunConfig,
    TrainerConfig,
)
from ngrpo_lora.config.section import Section
from ngrpo_lora.config.tracking import TrackerConfig
from ngrpo_lora.errors import ConfigError

__all__ = [
    "AlgorithmConfig",
    "ConfigError",
    "EvaluationConfig",
    "Expert",
    "HubConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelRewardConfig",
    "OptimizerConfig",
    "Option",
    "PromptsConfig",
    "RewardConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "TrackerConfig",
    "TrainerConfig",
    "changed_keys",
    "describe",
    "describe_reward",
    "dump_config",
    "flatten",
    "load_config",
    "named_functions",
    "parse_config",
    "parse_reward_entries",
    "parse_settings",
    "parse_value",
    "preset_names",
    "show_value",
]
