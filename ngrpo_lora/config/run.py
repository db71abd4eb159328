"""The schema: every section of a run's configuration, with defaults and meanings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from ngrpo_lora import registry
from ngrpo_lora.config.hub import HubConfig, hub_section
from ngrpo_lora.config.model import ModelConfig
from ngrpo_lora.config.paths import PathText, SourceText
from ngrpo_lora.config.plugins import (
    AlgorithmConfig,
    RewardConfig,
    RewardEntries,
    RewardsConfig,
    RolloutConfig,
    Solver,
    check_reward_name,
    load_algorithm,
    reward_section,
)
from ngrpo_lora.config.section import Section, listed
from ngrpo_lora.config.tracking import TrackerEntries

__all__ = [
    "EvaluationConfig",
    "HubConfig",
    "LoraConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "RunConfig",
    "TrainerConfig",
]


PromptSources = (
    Annotated[SourceText, Field(min_length=1)]
    | Annotated[dict[SourceText, Annotated[int, Field(ge=1)]], Field(min_length=1)]
)


class PromptsConfig(Section, frozen=True):
    """Where the prompts of training and of evaluation come from."""

    train: PromptSources = Field(
        default="world:train",
        description="world:train, world:held_out, edits:train, edits:held_out, one task of them (world:train/color); a "
        "UTF-8 file: .txt (one prompt a line), .jsonl, .csv, .tsv, .parquet; a dataset of the Hub, "
        "hf:owner/name?split=train; hpdv2:train, hpdv2:test, one of its styles (hpdv2:test/anime). The column is "
        "prompt, caption or text, or named by #column; the others are metadata. Or several of these with their "
        "weights, {a.txt: 3, b.csv#title: 1}.",
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


class LoraConfig(Section, frozen=True):
    """The adapter that is trained: its rank, its layers, and the weights that it starts from."""

    rank: int = Field(default=16, ge=1, description="Rank of every LoRA pair.")
    alpha: float | None = Field(default=None, gt=0, description="LoRA strength is alpha / rank; null: alpha = rank.")
    targets: Literal["attention", "attention+feed_forward"] = Field(
        default="attention+feed_forward", description="Which layers of the transformer blocks are adapted."
    )
    init_from: PathText | None = Field(
        default=None,
        min_length=1,
        description="LoRA file of any trainer, its folder, or owner/name of the Hub, to start from; null: from "
        "nothing. The reference stays the base, and a resumed run has weights of its own.",
    )

    @property
    def resolved_alpha(self) -> float:
        """The LoRA's alpha, or its rank where alpha is not given."""
        return float(self.rank) if self.alpha is None else self.alpha


class OptimizerConfig(Section, frozen=True):
    """The optimizer of the adapter, its learning rate over the run, and the average of its weights."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"] = Field(
        default="adamw", description="Optimizer; the 8-bit ones are bitsandbytes'."
    )
    learning_rate: float = Field(default=3e-4, gt=0, le=1e37, description="Learning rate after warm-up.")
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
    ema_every: int = Field(default=1, ge=1, description="Updates between two steps of that average.")


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
    keep_checkpoints: int = Field(default=3, ge=1, description="How many checkpoints stay on disk: the newest ones.")
    keep_best: str | None = Field(
        default=None,
        pattern="^-?eval/.+",
        description="Metric of evaluations, such as eval/reward_mean: the checkpoint of its greatest value is "
        "written and stays too; with a minus sign in front, of its lowest; null: none.",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="End the run when so many evaluations in a row are no better than the best by trainer.keep_best; "
        "null: never.",
    )
    max_hours: float | None = Field(
        default=None,
        gt=0,
        description="Stop with a checkpoint before the process is so old, as a job's time limit wants; null: no limit.",
    )
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads; null: PyTorch's choice.")
    tf32: bool = Field(
        default=False,
        description="Round the factors of float32 products on a GPU, such as the adapter's beside a base of 16 bits, "
        "to 11 significant bits (TF32): faster, with all rewards' products and a float32 base's rounded as well.",
    )
    cpu_processes: int = Field(
        default=1,
        ge=1,
        description="Processes of a run on a CPU: of two cores, two processes make more than two threads of one.",
    )
    planned_gpus: int = Field(
        default=1, ge=1, description="GPUs that `ngrpo plan` counts with; a run takes all that it is given."
    )
    strategy: Literal["replicated", "fsdp"] = Field(
        default="replicated",
        description="Of several processes: each has the whole base, or they share it in pieces (FSDP2). LoRA gradients "
        "are summed either way.",
    )
    timeout_s: float = Field(
        default=1800.0, gt=0, description="A process that waits longer for the others ends the run with an error."
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainerConfig:
        if self.early_stopping_patience is not None and self.keep_best is None:
            raise ValueError(
                "trainer.keep_best must name a metric of evaluations with trainer.early_stopping_patience="
                f"{self.early_stopping_patience}, got null; for example trainer.keep_best=eval/reward_mean"
            )
        return self


class EvaluationConfig(Section, frozen=True):
    """Held-out prompts with fixed seeds, before, during and after training."""

    every: int = Field(
        default=20, ge=1, description="Iterations between evaluations; the first and the last always run."
    )
    num_prompts: int = Field(default=48, ge=1, description="Held-out prompts, one image each.")
    micro_batch_size: int = Field(
        default=1,
        ge=1,
        description="Images a forward pass; 1: `ngrpo sample` draws the same again, bit for bit, which kernels that "
        "round by the size of a batch do not allow otherwise.",
    )
    seed: int = Field(
        default=1000, ge=0, lt=2**63, description="Seed of the first evaluation image; the rest follow it."
    )
    solver: Solver | None = Field(default=None, description="ODE solver of evaluations; null: rollout.solver.")
    num_steps: int | None = Field(
        default=None, ge=2, le=1000, description="Solver steps of evaluations; null: rollout.num_steps."
    )
    rewards: RewardEntries = Field(
        default=(),
        strict=False,
        description="Rewards that are watched and not trained on, in the form of rewards.train.",
    )
    measures: Annotated[tuple[PathText, ...], BeforeValidator(listed)] = Field(
        default=(),
        strict=False,
        description="Functions package.module:function or file.py:function of all held-out pictures at once: "
        "(images, prompts) -> {name: number}, each reported as eval/name. They see what a score of one picture "
        "cannot, such as variety.",
    )
    strict: str | None = Field(
        default="world_strict", description="Pass-or-fail reward reported as eval/strict_accuracy; null: none."
    )
    num_samples: int = Field(default=12, ge=1, description="Pictures in the sample grid.")

    @field_validator("rewards")
    @classmethod
    def _asks_nobody(cls, value: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        if asking := [reward.key for reward in value if reward.asks_people]:
            raise ValueError(f"must ask no people for held-out pictures, got {asking[0]}; set its ask: false and votes")
        return value

    @field_validator("measures")
    @classmethod
    def _references(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for reference in value:
            registry.check_reference(reference)
        return value

    @field_validator("strict")
    @classmethod
    def _strict_exists(cls, value: str | None) -> str | None:
        return value if value is None else check_reward_name(value)


class RunConfig(Section, frozen=True):
    """Everything that defines a run; its YAML file alone repeats it."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig(), description=ModelConfig.__doc__)
    prompts: PromptsConfig = Field(default_factory=lambda: PromptsConfig(), description=PromptsConfig.__doc__)
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(), description=RolloutConfig.__doc__)
    algorithm: Annotated[SerializeAsAny[AlgorithmConfig], BeforeValidator(load_algorithm)] = Field(
        default_factory=lambda: load_algorithm({}), description="The training objective."
    )
    rewards: Annotated[RewardsConfig, BeforeValidator(reward_section)] = Field(
        default_factory=lambda: RewardsConfig(), description=RewardsConfig.__doc__
    )
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig(), description=LoraConfig.__doc__)
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description=OptimizerConfig.__doc__)
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig(), description=TrainerConfig.__doc__)
    evaluation: EvaluationConfig = Field(
        default_factory=lambda: EvaluationConfig(), description=EvaluationConfig.__doc__
    )
    hub: Annotated[HubConfig, BeforeValidator(hub_section)] = Field(
        default_factory=lambda: HubConfig(), description=HubConfig.__doc__
    )
    tracking: TrackerEntries = Field(
        default=(),
        strict=False,
        description="Trackers of metrics, settings and sample grids: tensorboard, wandb, trackio, comet_ml, mlflow, "
        "clearml, swanlab, aim, dvclive, or mappings such as {name: wandb, project: flux, options: {entity: me}}.",
    )
    output_dir: PathText = Field(
        default="runs/default", min_length=1, description="Folder of this run; made when missing."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of LoRA initialisation, prompt order and noises.")
    resume: PathText | None = Field(
        default=None,
        min_length=1,
        description="latest, or the path of a checkpoint, to go on; auto: go on where there is a checkpoint, else "
        "start; null: a new run.",
    )

    @property
    def evaluation_solver(self) -> Solver:
        """The ODE solver of evaluations and of everything that is drawn with the adapter."""
        return self.evaluation.solver or self.rollout.solver

    @property
    def evaluation_steps(self) -> int:
        """The solver steps of evaluations and of everything that is drawn with the adapter."""
        return self.evaluation.num_steps or self.rollout.num_steps

    @property
    def strict_reward(self) -> RewardConfig | None:
        """The pass-or-fail reward of evaluations, with the settings of its entry where it has one; None without."""
        name, given = self.evaluation.strict, (*self.rewards.train, *self.evaluation.rewards)
        return None if name is None else {one.name: one for one in given}.get(name) or RewardConfig(name=name)

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
