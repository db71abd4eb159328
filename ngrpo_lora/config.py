"""One checked RunConfig: the only source of defaults, help texts and validation.

A preset or YAML file plus `key=value` overrides go in (`load_config`), a frozen RunConfig or a ConfigError with one
line per problem comes out. Nothing here loads a model or touches the output folder; `preflight.py` does that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ngrpo_lora import registry
from ngrpo_lora.errors import ConfigError

__all__ = [
    "AlgorithmConfig",
    "ConfigError",
    "EvaluationConfig",
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
    "TrainerConfig",
    "changed_keys",
    "describe",
    "describe_reward",
    "dump_config",
    "load_config",
    "parse_config",
    "parse_reward_entries",
    "parse_settings",
    "preset_names",
    "show_value",
]

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "demo"


DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"
Bounds = tuple[float, float]


class Section(BaseModel, frozen=True):
    """A part of the configuration: immutable, unknown keys refused, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


def _listed(value: Any) -> Any:
    """Let `name` stand for `[name]`."""
    return [value] if isinstance(value, str | Mapping) else value


def _check_reward_name(name: str) -> str:
    """A file in rewards/, `package.module:function` or `file.py:function` (its file is looked for at the start)."""
    if ":" in name:
        target, function = registry.split_reference(name)
        if not target or not function.isidentifier():
            raise ValueError(f"must be a reward's name, package.module:function or file.py:function, got {name!r}")
    else:
        from ngrpo_lora import rewards

        registry.check_name(rewards, name)
    return name


class ModelConfig(Section, frozen=True):
    """Which model is tuned and how it is asked for images."""

    family: str = Field(
        default="auto", description="Model family: a file in ngrpo_lora/models; auto: by the pipeline's class."
    )
    path: str = Field(
        default="embedded", min_length=1, description="embedded, a local diffusers folder, or a Hub model id."
    )
    revision: str | None = Field(default=None, description="Hub branch, tag or commit; null: the default branch.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Number type of the frozen base; the LoRA is always float32. "
        "auto: bfloat16 where the device computes in it, otherwise float32.",
    )
    device: str = Field(
        default="auto",
        pattern=DEVICE_PATTERN,
        description="auto (prefers a GPU), cpu, cuda, cuda:N or mps.",
    )
    height_px: int = Field(default=64, ge=16, description="Image height in pixels, a multiple of 16.")
    width_px: int = Field(default=64, ge=16, description="Image width in pixels, a multiple of 16.")
    guidance_scale: float | None = Field(default=None, ge=0, description="Guidance; null: what the model recommends.")
    max_sequence_length: int | None = Field(
        default=None, ge=1, description="Prompt tokens; null: what the model recommends."
    )
    negative_prompt: str = Field(
        default="", description="What guidance by two passes leads away from; models with distilled guidance ignore it."
    )
    num_frames: int | None = Field(
        default=None, ge=1, description="Frames of a video, 4 k + 1; null: what the model recommends."
    )
    quantization: Literal["none", "nf4", "int8", "int8_torchao", "float8_torchao"] = Field(
        default="none",
        description="Storage of the frozen transformer: bitsandbytes' NF4 or INT8, torchao's INT8 or FP8.",
    )
    swap_blocks: int = Field(
        default=0, ge=0, description="Transformer blocks that wait in system memory and visit the GPU in turn."
    )
    text_encoders: Literal["keep", "offload", "cache"] = Field(
        default="keep",
        description="keep: on the model's device; offload: in system memory between uses; cache: all prompts of the "
        "run are encoded before it, into output_dir/embeddings, and the encoders are never beside the transformer.",
    )
    vae_tiling: bool = Field(default=False, description="Decode in overlapping tiles: less memory for large pictures.")
    attention: str | None = Field(
        default=None,
        description="diffusers' attention backend, such as flash or _native_cudnn; null: PyTorch's choice.",
    )
    compile: bool = Field(default=False, description="torch.compile the transformer's repeated blocks.")

    @field_validator("family")
    @classmethod
    def _family_exists(cls, value: str) -> str:
        from ngrpo_lora import models

        if value != "auto":
            registry.check_name(models, value)
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        if self.compile and self.quantization == "nf4":
            raise ValueError("model.compile must be false with model.quantization=nf4, got true; int8_torchao compiles")
        if self.swap_blocks and self.compile:
            raise ValueError(f"model.swap_blocks must be 0 with model.compile=true, got {self.swap_blocks}")
        if self.swap_blocks and self.quantization != "none":
            raise ValueError(
                f"model.swap_blocks must be 0 with a quantised base, got {self.swap_blocks}; swap the blocks of a "
                "16-bit base, or quantise"
            )
        return self

    @field_validator("height_px", "width_px")
    @classmethod
    def _multiple_of_16(cls, value: int) -> int:
        if value % 16:
            below = value // 16 * 16
            raise ValueError(f"must be a multiple of 16, got {value}; the nearest are {below} and {below + 16}")
        return value


PromptSources = (
    Annotated[str, Field(min_length=1)] | Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)]
)


class PromptsConfig(Section, frozen=True):
    """Where prompts come from."""

    train: PromptSources = Field(
        default="world:train",
        description="world:train, world:held_out, one task of them (world:train/color); a UTF-8 file: .txt (one prompt "
        "a line), .jsonl, .csv, .tsv, .parquet; a dataset of the Hub, hf:owner/name?split=train; hpdv2:train, "
        "hpdv2:test, one of its styles (hpdv2:test/anime). The column is prompt, caption or text, or named by #column; "
        "the others are metadata. Or several of these with their weights, {a.txt: 3, b.csv#title: 1}.",
    )
    held_out: PromptSources | Annotated[float, Field(gt=0, lt=1)] = Field(
        default="world:held_out",
        description="Evaluation prompts, in the same form as train; or a fraction, such as 0.05, of the files and "
        "datasets in train, which are then not trained on.",
    )
    deduplicate: bool = Field(
        default=True,
        description="Drop prompts of a source that differ from an earlier one in case, spaces or Unicode form only.",
    )


class RolloutConfig(Section, frozen=True):
    """How candidates are drawn."""

    solver: Literal["dpmpp_2m", "euler"] = Field(
        default="dpmpp_2m", description="ODE solver of rollouts and evaluation."
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


class AlgorithmConfig(Section, frozen=True):
    """Base of every algorithm's settings; `algorithms/NAME.py` defines `class Config(AlgorithmConfig)`."""

    name: str = Field(description="Algorithm: a file in ngrpo_lora/algorithms.")

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError, with full keys in its message, where these settings and the rollout's do not fit."""


def _load_algorithm(value: Any) -> Any:
    """Validate the section with the `Config` of the module that its `name` chooses; a plain string is the name."""
    from ngrpo_lora import algorithms

    if isinstance(value, AlgorithmConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"algorithm must be a name or a mapping with one, got {value!r}")
    name = value.get("name", "neighbor")
    if not isinstance(name, str):
        raise ValueError(f"algorithm.name must be a string, got {name!r}")
    try:
        module = registry.load(algorithms, name)
    except ConfigError as error:
        raise ValueError(f"algorithm.name {error}") from None
    return module.Config.model_validate({**value, "name": name})


class RewardConfig(Section, frozen=True):
    """One reward: any function, or a file of rewards/ whose `Config` may add settings of its own."""

    name: str = Field(description="A file in ngrpo_lora/rewards, package.module:function, or file.py:function.")
    weight: float = Field(default=1.0, description="Weight in the sum; negative minimises the reward.")
    label: str | None = Field(
        default=None, pattern=r"^[\w.-]+$", description="Name in metrics and reports; null: the reward's own."
    )
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

    _name = field_validator("name")(_check_reward_name)

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
    def key(self) -> str:
        """The label; else the name of the reward, of its file, or of its function."""
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


def _reward_class(name: Any) -> type[RewardConfig]:
    """The `Config` of the file of that name; of a function, or of no reward at all, RewardConfig."""
    from ngrpo_lora import rewards

    if not isinstance(name, str) or ":" in name or name not in registry.names(rewards):
        return RewardConfig
    return getattr(registry.load(rewards, name), "Config", RewardConfig)


def _load_reward(value: Any) -> Any:
    """Validate an entry with the settings of the reward that it names; a plain string is the name."""
    if isinstance(value, RewardConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a name or a mapping with one, got {value!r}")
    return _reward_class(value.get("name")).model_validate(value)


def _distinct(rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
    keys = [reward.key for reward in rewards]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"must name each reward once, got {', '.join(twice)} twice; give one of them a label")
    return rewards


RewardEntries = Annotated[
    tuple[Annotated[SerializeAsAny[RewardConfig], BeforeValidator(_load_reward)], ...],
    BeforeValidator(_listed),
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

    @field_validator("train")
    @classmethod
    def _not_empty(cls, value: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        if not value:
            raise ValueError("must have at least one entry, got []; name a reward, for example rewards=world")
        return value


def _reward_section(value: Any) -> Any:
    """`world`, `[world, clip_score]` and `{name: world}` stand for the whole section."""
    short = isinstance(value, str | list | tuple) or (isinstance(value, Mapping) and "name" in value)
    return {"train": value} if short else value


class LoraConfig(Section, frozen=True):
    """The adapter."""

    rank: int = Field(default=16, ge=1, description="Rank of every LoRA pair.")
    alpha: float | None = Field(default=None, gt=0, description="LoRA strength is alpha / rank; null: alpha = rank.")
    targets: Literal["attention", "attention+feed_forward"] = Field(
        default="attention+feed_forward", description="Which layers of the transformer blocks are adapted."
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="LoRA file of any trainer, its folder, or owner/name of the Hub, to start from; null: from "
        "nothing. The reference stays the base, and a resumed run has weights of its own.",
    )

    @property
    def resolved_alpha(self) -> float:
        """alpha, or the rank where alpha is not given."""
        return float(self.rank) if self.alpha is None else self.alpha


class OptimizerConfig(Section, frozen=True):
    """How the adapter is updated."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"] = Field(
        default="adamw", description="Optimizer; the 8-bit ones are bitsandbytes'."
    )
    learning_rate: float = Field(default=3e-4, gt=0, description="Learning rate after warm-up.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False, description="Decay rates of the moment estimates."
    )
    weight_decay: float = Field(default=1e-4, ge=0, description="Decoupled weight decay of the LoRA weights.")
    eps: float = Field(default=1e-8, gt=0, description="Term that keeps Adam's division finite (not used by Lion).")
    max_grad_norm: float = Field(default=1.0, gt=0, description="LoRA gradient norm cap.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Learning rate over the run: constant, or decayed to 0."
    )
    warmup_iterations: int = Field(default=0, ge=0, description="Iterations of linear warm-up.")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="Average of the LoRA weights, evaluated and exported; 0: off."
    )


class TrainerConfig(Section, frozen=True):
    """Length of the run, memory and checkpoints."""

    num_iterations: int = Field(
        default=300, ge=1, description="Iterations: each is one rollout, its rewards and its updates."
    )
    micro_batch_size: int = Field(
        default=16, ge=1, description="Transitions per forward and backward pass (memory only)."
    )
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations: less memory, more time.")
    save_every: int = Field(default=50, ge=1, description="Iterations between checkpoints.")
    keep_checkpoints: int = Field(default=3, ge=1, description="How many checkpoints stay on disk.")
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads; null: PyTorch's choice.")
    cpu_processes: int = Field(
        default=1,
        ge=1,
        description="Processes of a run on a CPU: of two cores, two processes make more than two threads of one.",
    )
    strategy: Literal["replicated", "fsdp"] = Field(
        default="replicated",
        description="Of several processes: each has the whole base, or they share it in pieces (FSDP2). LoRA gradients "
        "are summed either way.",
    )
    timeout_s: float = Field(
        default=1800.0, gt=0, description="A process that waits longer for the others ends the run with an error."
    )


class EvaluationConfig(Section, frozen=True):
    """Held-out prompts with fixed seeds, before, during and after training."""

    every: int = Field(
        default=20, ge=1, description="Iterations between evaluations; the first and the last always run."
    )
    num_prompts: int = Field(default=48, ge=1, description="Held-out prompts, one image each.")
    seed: int = Field(
        default=1000, ge=0, lt=2**63, description="Seed of the first evaluation image; the rest follow it."
    )
    rewards: RewardEntries = Field(
        default=(),
        strict=False,
        description="Rewards that are watched and not trained on, in the form of rewards.train.",
    )
    strict: str | None = Field(
        default="world_strict", description="Pass-or-fail reward reported as eval/strict_accuracy; null: none."
    )
    num_samples: int = Field(default=12, ge=1, description="Pictures in the sample grid.")

    @field_validator("strict")
    @classmethod
    def _strict_exists(cls, value: str | None) -> str | None:
        return value if value is None else _check_reward_name(value)


class HubConfig(Section, frozen=True):
    """Where the adapter is pushed, with a model card. `hub=owner/name` is short for hub.repo."""

    repo: str | None = Field(
        default=None, description="Hub repository, owner/name, made when missing; null: nothing is pushed."
    )
    push: Literal["end", "checkpoints"] = Field(
        default="end", description="end: once, after training; checkpoints: also beside it, after every checkpoint."
    )
    private: bool = Field(default=False, description="A repository that is made is a private one.")
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, made when missing, or refs/pr/N; null: the default branch."
    )
    create_pr: bool = Field(default=False, description="Open a pull request; the repository must exist.")
    commit_message: str | None = Field(
        default=None, min_length=1, description="Of every push; null: what was trained, and for how long."
    )
    timeout_s: float = Field(default=1800.0, gt=0, description="A push that takes longer has failed.")

    @field_validator("repo")
    @classmethod
    def _hub_id(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", value, re.ASCII) is None:
            raise ValueError(f"must be owner/name, of letters, digits, -, _ and ., got {value!r}")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> HubConfig:
        if self.create_pr and self.revision is not None:
            raise ValueError(
                f"hub.revision must be null with hub.create_pr=true, got {self.revision!r}; a pull request is opened "
                "against the default branch, and refs/pr/N as hub.revision goes on with one"
            )
        return self


def _hub_section(value: Any) -> Any:
    """`owner/name` and null stand for the whole section."""
    return {"repo": value} if value is None or isinstance(value, str) else value


class RunConfig(Section, frozen=True):
    """Everything that defines a run."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig(), description=ModelConfig.__doc__)
    prompts: PromptsConfig = Field(default_factory=lambda: PromptsConfig(), description=PromptsConfig.__doc__)
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(), description=RolloutConfig.__doc__)
    algorithm: Annotated[SerializeAsAny[AlgorithmConfig], BeforeValidator(_load_algorithm)] = Field(
        default_factory=lambda: _load_algorithm({}), description="The training objective."
    )
    rewards: Annotated[RewardsConfig, BeforeValidator(_reward_section)] = Field(
        default_factory=lambda: RewardsConfig(), description=RewardsConfig.__doc__
    )
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig(), description=LoraConfig.__doc__)
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description=OptimizerConfig.__doc__)
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig(), description=TrainerConfig.__doc__)
    evaluation: EvaluationConfig = Field(
        default_factory=lambda: EvaluationConfig(), description=EvaluationConfig.__doc__
    )
    hub: Annotated[HubConfig, BeforeValidator(_hub_section)] = Field(
        default_factory=lambda: HubConfig(), description=HubConfig.__doc__
    )
    output_dir: str = Field(default="runs/default", min_length=1, description="Folder of this run; made when missing.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of LoRA initialisation, prompt order and noises.")
    resume: str | None = Field(
        default=None, min_length=1, description="latest, or the path of a checkpoint, to go on; null: a new run."
    )

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        self.algorithm.check(self.rollout)
        model, trainer = self.model, self.trainer
        quantized, swapped = model.quantization != "none", model.swap_blocks > 0
        if swapped and not trainer.gradient_checkpointing:
            raise ValueError(
                f"trainer.gradient_checkpointing must be true with model.swap_blocks={model.swap_blocks}, got false; "
                "without it a backward pass needs all blocks at once"
            )
        given = f"model.quantization={model.quantization}" if quantized else f"model.swap_blocks={model.swap_blocks}"
        if self.rollout.merge_adapter and (quantized or swapped):
            raise ValueError(f"rollout.merge_adapter must be false with {given}, got true")
        if trainer.strategy == "fsdp" and (quantized or swapped):
            raise ValueError(f"trainer.strategy must be replicated with {given}, got fsdp")
        if trainer.strategy == "fsdp" and self.rollout.merge_adapter:
            raise ValueError("rollout.merge_adapter must be false with trainer.strategy=fsdp, got true")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 reads a string) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Dumper(yaml.SafeDumper):
    """One key a line, lists of plain values on their key's line."""


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    plain = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _represent_list)


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(config: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """A checked RunConfig from a YAML file or preset and `key=value` overrides.

    Args:
        config: path of a YAML file, or the name of a preset; None is the preset `demo`.
        overrides: `section.key=value`, the value in YAML; later stages win: defaults, file, overrides. A file that
            `extends` a preset or another file (by its path beside the first) has precedence over that.

    Raises:
        ConfigError: anything wrong with the file, the keys or the values; one line per problem.
    """
    data = _read(_find(config))
    _apply(data, overrides)
    return parse_config(data)


def parse_config(data: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig from nested mappings, with ConfigError in place of pydantic's ValidationError."""
    try:
        return RunConfig.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(_problems(error, data)) from None


def parse_reward_entries(entries: Sequence[Any]) -> tuple[RewardConfig, ...]:
    """Checked entries of `rewards.train`: names, mappings, or entries that are already checked.

    Raises:
        ConfigError: as `parse_config`; keys are the reward's own, without the section's name before them.
    """
    try:
        return parse_config({"rewards": {"train": [*entries]}}).rewards.train
    except ConfigError as error:
        raise ConfigError(re.sub(r"rewards\.train(\.[0-9]+)?[. ]?", "", line) for line in error.problems) from None


def parse_settings(text: str) -> dict[str, Any]:
    """A section as people type it: lines of `key=value`, as for the command, or YAML.

    Raises:
        ConfigError: neither.
    """
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    settings: dict[str, Any] = {}
    if all(re.match(r"[\w.]+\s*=", line) for line in lines):
        _apply(settings, [re.sub(r"\s*=\s*", "=", line, count=1) for line in lines])
        return settings
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"settings must be lines of key=value, or YAML; the text {_yaml_problem(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"settings must be lines of key=value, or YAML's key: value, got {text!r}")
    return found


def dump_config(config: RunConfig) -> str:
    """The complete configuration as YAML; `load_config` reads it back to an equal one."""
    values = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, default_flow_style=False)
    return f"# Complete configuration of an ngrpo-lora run. Run it with: ngrpo train THIS_FILE\n{values}"


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`."""
    before, after = (dict(_flatten(config.model_dump(mode="json"))) for config in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _find(config: str | Path | None) -> Path:
    """The file behind a path or a preset's name."""
    if config is None:
        return PRESETS / f"{DEFAULT_PRESET}.yaml"
    path = Path(config)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"config file {str(config)!r} {what}; give a YAML file or a preset: {_presets()}")
    if str(config) not in preset_names():
        hint = registry.nearest(str(config), preset_names())
        raise ConfigError(f"config must be a YAML file or one of the presets {_presets()}, got {str(config)!r}{hint}")
    return PRESETS / f"{config}.yaml"


def _presets() -> str:
    """Those that extend no other: the rest is the same for a memory size each."""
    return ", ".join(name for name in preset_names() if not re.search(r"-(\d+x)?\d+gb$", name))


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file, over those of the preset or file that it `extends`."""
    data = _read_alone(path)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the name of a preset or the path of a file, got {base!r}")
    chain = (*extending, path.resolve())
    found = _find(path.parent / base if (path.parent / base).is_file() else base)
    if found.resolve() in chain:
        names = " -> ".join(str(file) for file in (*chain, found.resolve()))
        raise ConfigError(f"{path}: extends must not lead back to the file itself, but {names}; drop one of them")
    return _over(_read(found, chain), data)


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key, all else as a whole; another algorithm has nothing of the old one's settings."""
    result, own = _written_out(base), _written_out(own)
    for key, value in own.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            name = old.get("name", "neighbor")
            other = key == "algorithm" and value.get("name", name) != name
            result[key] = value if other else old | value
        else:
            result[key] = value
    return result


def _written_out(data: dict[str, Any]) -> dict[str, Any]:
    """The sections that may be given in short, in full."""
    long = dict(data)
    if "rewards" in data:
        long["rewards"] = _reward_section(data["rewards"])
    if "hub" in data:
        long["hub"] = _hub_section(data["hub"])
    if isinstance(data.get("algorithm"), str):
        long["algorithm"] = {"name": data["algorithm"]}
    return long


def _read_alone(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8 text, but byte {error.start} is not; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} {_yaml_problem(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got {data!r}")
    return data


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"is not valid YAML: {error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return f"is not valid YAML: {' '.join(str(error).split())}"


def _apply(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write `key=value` overrides into `data`."""
    problems: list[str] = []
    seen: set[str] = set()
    # The algorithm's name goes first: it decides which settings of the file still apply.
    for override in sorted(overrides, key=lambda text: text.partition("=")[0] not in ("algorithm", "algorithm.name")):
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            problems.append(f"an override must look like key=value, got {override!r}; for example rollout.num_steps=8")
            continue
        if key in seen:
            problems.append(f"{key} is given twice; keep one")
            continue
        seen.add(key)
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            what = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
            problems.append(f"{key} must be a YAML value, got {text!r} ({what}); put text in quotes")
            continue
        if len(parts) == 1 and parts[0] == "algorithm" and isinstance(value, str):
            parts, key = ["algorithm", "name"], "algorithm.name"
        *path, last = parts
        node: Any = data
        for depth, part in enumerate(path, 1):
            if isinstance(node.get(part), str) and part == "algorithm":
                node[part] = {"name": node[part]}
            if depth == 1 and part == "rewards" and node.get(part) is not None:
                node[part] = _reward_section(node[part])
            if depth == 1 and part == "hub":
                node[part] = _hub_section(node.get(part))
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                whole = ".".join(path[:depth])
                problems.append(f"{key} must be a key of a section, but {whole} is none; set {whole}=... as a whole")
                break
        else:
            if key == "algorithm.name" and node.get("name", "neighbor") != value:
                node.clear()  # another algorithm: the file's settings are those of the old one
            node[last] = value
    if problems:
        raise ConfigError(problems)


# ---------------------------------------------------------------------------------------------------------------------
# Problems in words


def _problems(error: ValidationError, data: Mapping[str, Any]) -> list[str]:
    """One line per faulty key: rule, value, remedy."""
    options = {option.key: option for option in describe(data)}
    lines: dict[str, list[tuple[str, Any]]] = {}
    for detail in error.errors():
        parts = [str(part) for part in detail["loc"]]
        if detail["type"] == "extra_forbidden":
            key = ".".join(parts)
            near = _nearest_key(key, [*options, *_reward_keys(parts, data)])
            lines[key] = [(f"unknown key {key}{near}", None)]
            continue
        # Drop what pydantic appends for the branches of a union: they are no keys.
        while parts and not parts[-1].isdigit() and ".".join(parts) not in options and not _in_reward(parts):
            parts.pop()
        lines.setdefault(".".join(parts), []).append((_rule(detail), detail["input"]))
    problems: list[str] = []
    for key, rules in lines.items():
        rule, value = " or ".join(dict.fromkeys(text for text, _ in rules)).replace(" or must be", " or"), rules[0][1]
        if rule.startswith("unknown key"):
            problems.append(rule)
        elif not rule.startswith(("must", "names")):
            problems.append(rule)  # a complete sentence of a check across keys
        else:
            option = options.get(key)
            got = "" if ", got " in rule or rule.startswith("names") else f", got {show_value(value)}"
            meaning = f" ({option.description.rstrip('.')})" if option is not None and got else ""
            problems.append(f"{key} {rule}{got}{meaning}")
    return problems


def _in_reward(parts: Sequence[str]) -> bool:
    """Whether a key lies within an entry of a list of rewards."""
    return len(parts) > 3 and tuple(parts[:2]) in (("rewards", "train"), ("evaluation", "rewards"))


def _reward_keys(parts: Sequence[str], data: Mapping[str, Any]) -> Iterator[str]:
    """The keys that the reward around a key may have; none where there is no reward around it."""
    if _in_reward(parts):
        section = _reward_section(data["rewards"]) if parts[0] == "rewards" else data["evaluation"]
        entry = _listed(section[parts[1]])[int(parts[2])]
        yield from (".".join([*parts[:3], name]) for name in _reward_class(entry["name"]).model_fields)


_RULES = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be more than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "literal_error": "must be {expected}",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "missing": "must be given",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def show_value(value: Any) -> str:
    """A value as a user writes it: YAML's true, false and null, bare names in lists, else Python's form."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _rule(detail: ErrorDetails) -> str:
    """The broken rule in our words; messages of our own validators pass unchanged."""
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":
        return str(context["error"])
    if detail["type"] == "string_pattern_mismatch":
        return "must be one of these forms"
    if detail["type"] in _RULES:
        return _RULES[detail["type"]].format(**context)
    return f"must be valid: {detail['msg']}"


def _nearest_key(key: str, keys: Sequence[str]) -> str:
    """The known key with the same last part, else the one whose last part is spelt most alike, in words."""
    prefix, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == prefix}
    leaves = {k.rpartition(".")[2]: k for k in reversed(keys)}  # the first of its name
    for known in (siblings, leaves):
        close = difflib.get_close_matches(leaf, known, n=1, cutoff=0.6)
        if close:
            return f"; did you mean {known[close[0]]}?"
    if siblings:
        return f"; known are {', '.join(siblings.values())}"
    return "; `ngrpo config --describe` lists all keys"


# ---------------------------------------------------------------------------------------------------------------------
# Description


@dataclass(frozen=True)
class Option:
    """One configuration key: its dotted name, what it accepts, its default and its meaning."""

    key: str
    type: str
    default: Any
    description: str
    is_section: bool = False


def describe(data: Mapping[str, Any] | None = None) -> Iterator[Option]:
    """Every key, sections first, with the keys of the algorithm that `data` chooses (default: neighbor)."""
    section = (data or {}).get("algorithm")
    name = section if isinstance(section, str) else section.get("name") if isinstance(section, Mapping) else None
    yield from _describe(RunConfig, "", name if isinstance(name, str) else "neighbor")


def describe_reward(name: str) -> Iterator[Option]:
    """The settings that an entry `{name: NAME, ...}` of rewards.train may have."""
    yield from _describe(_reward_class(name), "", "neighbor")


def _describe(model: type[Section], prefix: str, algorithm: str) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        annotation = field.annotation
        if key == "algorithm":
            from ngrpo_lora import algorithms

            if algorithm not in registry.names(algorithms):
                algorithm = "neighbor"
            annotation = registry.load(algorithms, algorithm).Config
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield Option(key, "section", None, field.description or "", is_section=True)
            yield from _describe(annotation, f"{key}.", algorithm)
        else:
            yield Option(key, _type_text(annotation, field.metadata), _default(field), _description(model, name))


def _description(model: type[BaseModel], name: str) -> str:
    """A field's description, else that of the field it overrides."""
    bases = [base for base in model.__mro__ if issubclass(base, Section) and name in base.model_fields]
    return next((text for base in bases if (text := base.model_fields[name].description)), "")


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        return [
            entry.model_dump(mode="json", exclude_defaults=True) if isinstance(entry, BaseModel) else entry
            for entry in value
        ]
    return value


def _type_text(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """`int >= 2`, `number > 0 | null`, `a | b`: what a key accepts, for people."""
    plain = {int: "int", float: "number", str: "text", bool: "true | false", type(None): "null"}
    if annotation in plain:
        return f"{plain[annotation]} {', '.join(_bounds(limits))}".strip()
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin is Annotated:
        return _type_text(arguments[0], arguments[1:])
    if origin is tuple:
        items = ["..." if item is Ellipsis else _type_text(item) for item in arguments]
        return f"[{', '.join(items)}]"
    if origin is dict:
        key, value = map(_type_text, arguments)
        return f"{{{key}: {value}}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        first, second, *_ = annotation.model_fields
        return f"{{{first}, {second}, ...}}"
    first, *rest = arguments  # a union; its limits are those of the first member
    return " | ".join([_type_text(first, limits), *map(_type_text, rest)])


def _bounds(limits: Sequence[Any]) -> Iterator[str]:
    """`>= 2` and the like, from annotated_types' or Field's metadata."""
    symbols = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}
    for limit in limits:
        if isinstance(limit, FieldInfo):
            yield from _bounds(limit.metadata)
        elif type(limit) in symbols:
            (bound,) = astuple(limit)
            if bound != 2**63:
                yield f"{symbols[type(limit)]} {bound:g}"
