"""Sections whose keys depend on a name: the algorithm's and each reward's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, field_validator

from ngrpo_lora import registry
from ngrpo_lora.config.paths import expanded
from ngrpo_lora.config.section import DEVICE_PATTERN, Bounds, Section, listed
from ngrpo_lora.errors import ConfigError

__all__ = ["AlgorithmConfig", "ModelRewardConfig", "RewardConfig", "RewardsConfig", "RolloutConfig"]


def check_reward_name(name: str) -> str:
    """Return the name of a reward: a file in rewards/, `package.module:function` or `file.py:function`.

    Whether that module or file exists is checked when a run starts.

    Raises:
        ValueError: it is none of these, or as `expanded`.
    """
    if ":" not in name and not ("." in name and registry.allow_modules):
        registry.check_name(registry.REWARDS, name)
        return name
    name = expanded(name)
    target, function = registry.split_reference(name)
    if not target or not function.isidentifier():
        remedy = "" if ":" in name else f"; give {name}:score, or what its function is called"
        raise ValueError(f"must be a reward's name, package.module:function or file.py:function, got {name!r}{remedy}")
    return name


Solver = Literal["dpmpp_2m", "euler"]


class RolloutConfig(Section, frozen=True):
    """How candidates are drawn: the solver, its steps, and how many candidates of how many prompts."""

    solver: Solver = Field(
        default="dpmpp_2m", description="ODE solver of rollouts; an algorithm with stochastic steps has its own."
    )
    num_steps: int = Field(default=8, ge=2, le=1000, description="Solver steps per image.")
    shift: float | None = Field(
        default=None, gt=0, description="Timestep shift of the schedule; null: the model family's."
    )
    group_size: int = Field(default=12, ge=2, description="G: candidates per prompt, ranked against each other.")
    prompts_per_iteration: int = Field(default=8, ge=1, description="P: prompt groups per iteration.")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="Most images in one forward pass (memory only); null: a whole group."
    )
    merge_adapter: bool = Field(
        default=False,
        description="Add the adapter into the base's weights for rollouts: faster, for a second copy of those weights.",
    )


DEFAULT_ALGORITHM = "neighbor"


class AlgorithmConfig(Section, frozen=True):
    """Base of every algorithm's settings; `config/algorithms/NAME.py` defines `class Config(AlgorithmConfig)`."""

    name: str = Field(description="Algorithm: a file in ngrpo_lora/algorithms.")

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError, with full keys in its message, where these settings and the rollout's do not fit."""

    def steps_in_words(self, rollout: RolloutConfig) -> str:
        """How a rollout draws, for people: such as `8 dpmpp_2m steps`."""
        return f"{rollout.num_steps} {rollout.solver} steps"


def load_algorithm(value: Any) -> Any:
    """Validate the algorithm's section with the `Config` that its `name` chooses; a plain string is the name alone."""
    if isinstance(value, AlgorithmConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"algorithm must be a name or a mapping with one, got {value!r}")
    name = value.get("name", DEFAULT_ALGORITHM)
    if not isinstance(name, str):
        raise ValueError(f"algorithm.name must be a string, got {name!r}")
    try:
        settings = algorithm_settings(name)
    except ConfigError as error:
        raise ValueError(f"algorithm.name {error}") from None
    return settings.model_validate({**value, "name": name})


def algorithm_settings(name: str) -> type[AlgorithmConfig]:
    """The settings class of an algorithm: from `config/algorithms/NAME.py`, or from its own module elsewhere.

    Raises:
        ConfigError: no such algorithm, of which the nearest one is named, or a module that is none.
    """
    module = registry.load(registry.ALGORITHM_SETTINGS, name)
    found = getattr(module, "Config", None)
    if not (isinstance(found, type) and issubclass(found, AlgorithmConfig)):
        raise ConfigError(f"must be a module with a class Config of AlgorithmConfig, but {name!r} has none; add it")
    if "." in name and not isinstance(getattr(module, "Algorithm", None), type):
        raise ConfigError(f"must be a module with a class Algorithm beside its Config, but {name!r} has none; add it")
    return found


class RewardConfig(Section, frozen=True):
    """One reward: any function, or a file of rewards/ whose `Config` may add settings of its own.

    may_change: settings that a resumed run may have others of: how the reward is called and checked, not what it is.
    """

    may_change: ClassVar[tuple[str, ...]] = ("range", "batch_size", "timeout_s", "concurrency", "cache")

    name: str = Field(description="A file in ngrpo_lora/rewards, package.module:function, or file.py:function.")
    weight: float = Field(default=1.0, description="Weight in the sum; negative minimises the reward.")
    label: str | None = Field(default=None, description="Name in metrics and reports; null: the reward's own.")
    clip: Bounds | None = Field(
        default=None, strict=False, description="Scores are held within [low, high] before they are added up."
    )
    range: Bounds | None = Field(
        default=None, strict=False, description="What scores may be: one outside [low, high] is an error, or a failure."
    )
    batch_size: int | None = Field(default=None, ge=1, description="Most images a call; null: all at once.")
    timeout_s: float | None = Field(
        default=600.0, gt=0, description="A call that takes longer has failed; null: wait for ever."
    )
    concurrency: int = Field(default=16, ge=1, description="Calls under way at once, for rewards that are async.")
    cache: bool = Field(
        default=False, description="Keep the scores of evaluations by image and prompt, in output_dir/scores.sqlite."
    )

    _name = field_validator("name")(check_reward_name)

    @field_validator("label")
    @classmethod
    def _of_letters(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]+", value):
            raise ValueError(f"must be of letters, digits, _, - and ., got {value!r}; leave out all others")
        return value

    @field_validator("weight")
    @classmethod
    def _not_zero(cls, value: float) -> float:
        if value == 0:
            raise ValueError("must not be 0, got 0.0; name a reward in evaluation.rewards to watch it only")
        return value

    @field_validator("clip", "range")
    @classmethod
    def _low_to_high(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError(f"must be [low, high] with low below high, got {list(value)}")
        return value

    @property
    def asks_people(self) -> bool:
        """Whether scores come from people: they take their time, and what they do not say is no failure."""
        return False

    @property
    def judges_edits(self) -> bool:
        """Whether it is a reward of this package that judges each picture beside its source."""
        return ":" not in self.name and registry.defines(registry.REWARDS, self.name, "NEEDS_SOURCE")

    def within(self, folder: Path) -> Self:
        """These settings, with what depends on the run's folder filled in."""
        return self

    @property
    def key(self) -> str:
        """The reward's name in metrics: its label, else the name of the reward, of its file or of its function."""
        target, function = registry.split_reference(self.name) if ":" in self.name else (self.name, "")
        own = target if function in ("", "score") else function
        return self.label or (Path(own).stem if own.endswith(".py") else own.rpartition(".")[2])


class ModelRewardConfig(RewardConfig, frozen=True):
    """A reward that runs a network of its own."""

    path: str = Field(default="", description="Weights: a Hub id, a folder or a file.")
    revision: str | None = Field(default=None, description="Hub branch, tag or commit; null: the default branch.")
    device: str = Field(default="auto", pattern=DEVICE_PATTERN, description="auto: where the tuned model is.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number type of the network; auto: float16 on a GPU, else float32."
    )
    offload: bool = Field(default=False, description="Keep the network in system memory between uses.")

    @field_validator("path", "processor", "tokenizer", "head", "color_model", check_fields=False)
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return value and expanded(value)


class ClipConfig(ModelRewardConfig, frozen=True):
    """A reward that runs a CLIP network."""

    processor: str | None = Field(
        default=None,
        description="Tokenizer and, for a single file of weights, config.json: a Hub id or a folder; null: path.",
    )


def reward_class(name: Any) -> type[RewardConfig]:
    """The settings class of a reward: from `config/rewards/NAME.py` or from its own file, else RewardConfig."""
    if not isinstance(name, str) or ":" in name or name not in registry.names(registry.REWARDS):
        return RewardConfig
    if name in registry.names(registry.REWARD_SETTINGS):
        return registry.load(registry.REWARD_SETTINGS, name).Config
    if registry.defines(registry.REWARDS, name, "Config"):
        return registry.load(registry.REWARDS, name).Config
    return RewardConfig


def load_reward_entry(value: Any) -> Any:
    """Validate a reward's entry with the settings class that its name chooses; a plain string is the name alone."""
    if isinstance(value, RewardConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a name or a mapping with one, got {value!r}")
    return reward_class(value.get("name")).model_validate(value)


def _distinct(rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
    keys = [reward.key for reward in rewards]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"must name each reward once, got {', '.join(twice)} twice; give one of them a label")
    return rewards


RewardEntries = Annotated[
    tuple[Annotated[SerializeAsAny[RewardConfig], BeforeValidator(load_reward_entry)], ...],
    BeforeValidator(listed),
    AfterValidator(_distinct),
]


class RewardsConfig(Section, frozen=True):
    """What is trained on: one reward or the weighted sum of several. `rewards=world` is short for rewards.train."""

    train: RewardEntries = Field(
        default=(RewardConfig.model_construct(name="world"),),
        strict=False,
        description="A name, or a list of names and of {name, weight, ...}; `ngrpo rewards` lists them.",
    )
    combine: Literal["standardized", "raw"] = Field(
        default="standardized",
        description="Several rewards: standardised within each group and weighted (MixGRPO), or raw and weighted.",
    )
    frames: int = Field(
        default=4, ge=1, description="Frames of a video that are scored, evenly spaced; its score is their mean."
    )
    max_failed_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="The run stops, with a checkpoint, where a larger share of an iteration's images has no score.",
    )

    @property
    def asks_people(self) -> bool:
        """Whether people are asked for scores of one of the rewards."""
        return any(reward.asks_people for reward in self.train)

    @field_validator("train")
    @classmethod
    def _one_page(cls, value: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        if len(asking := [reward.key for reward in value if reward.asks_people]) > 1:
            raise ValueError(f"must ask people for one reward, got {', '.join(asking)}; set ask: false on the others")
        return value

    @field_validator("train")
    @classmethod
    def _not_empty(cls, value: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        if not value:
            raise ValueError("must have at least one entry, got []; name a reward, for example rewards=world")
        return value


def reward_section(value: Any) -> Any:
    """Expand the short forms `world`, `[world, clip_score]` and `{name: world}` to the whole section."""
    short = isinstance(value, str | list | tuple) or (isinstance(value, Mapping) and "name" in value)
    return {"train": value} if short else value
