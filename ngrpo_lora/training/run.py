"""What one run is made of, and how far it has come. `setup.prepare` makes it; every phase is a function of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngrpo_lora.algorithms._base import Algorithm
from ngrpo_lora.config import RunConfig
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.sources import PromptSource
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.training.asking import Asked
from ngrpo_lora.training.best import Best
from ngrpo_lora.training.lora_step import LoraStep
from ngrpo_lora.training.metering import EvaluationCounter
from ngrpo_lora.training.micro_batches import MicroBatches
from ngrpo_lora.training.processes import Processes, base_is_sharded
from ngrpo_lora.training.saving import Saver
from ngrpo_lora.training.watcher import Start, Watchers


@dataclass
class Run:
    """The parts of a run on this process, and its state.

    schedule, evaluation_schedule: noise levels of rollouts and of evaluations.
    prompts, held_out: where training prompts come from, and the fixed ones of evaluations.
    scorer, watching: rewards that are trained on, and those that evaluations add.
    measures: functions of all pictures of an evaluation, by reference.
    iteration: how many iterations are complete.
    kept: the state at the start of the iteration under way, once that has begun to move the adapter.
    sound: the last state that is known to draw pictures, of the iteration before; None before the first one.
    evaluation_missing: whether the iteration that is complete has yet to be evaluated.
    asked: what it was asked for from outside.
    saver: writes checkpoints while training goes on.
    best: the best evaluation so far, of the metric that `trainer.keep_best` names.
    micro_batches: how much goes through the networks at once.
    """

    config: RunConfig
    processes: Processes
    watchers: Watchers
    family: BaseFamily
    lora_step: LoraStep
    algorithm: Algorithm
    schedule: Schedule
    evaluation_schedule: Schedule
    prompts: PromptSource
    held_out: list[Prompt]
    scorer: Scorer
    watching: Scorer
    score_cache: ScoreCache | None
    measures: dict[str, Callable[..., object]]
    counter: EvaluationCounter
    iteration: int = 0
    kept: dict[str, Any] | None = None
    sound: dict[str, Any] | None = None
    evaluation_missing: bool = True
    asked: Asked = field(default_factory=Asked)
    saver: Saver = field(default_factory=Saver)
    best: Best = field(default_factory=lambda: Best(None))
    micro_batches: MicroBatches = field(init=False)

    def __post_init__(self) -> None:
        self.micro_batches = MicroBatches(self.config, self.base_is_sharded)

    @property
    def output_dir(self) -> Path:
        """The folder of everything that the run leaves."""
        return Path(self.config.output_dir)

    def start(self) -> Start:
        """What watchers are told before the run goes on."""
        trained = sum(p.numel() for p in self.lora_step.parameters.values())
        total = sum(p.numel() for transformer in self.family.transformers for p in transformer.parameters())
        processes, voting = self.processes, self.scorer.voting
        return Start(self.config, self.iteration, processes.count, processes.is_main, trained, total - trained, voting)

    @property
    def groups(self) -> range:
        """This process's groups, of the `rollout.prompts_per_iteration` of each iteration."""
        return self.processes.share(self.config.rollout.prompts_per_iteration)

    @property
    def base_is_sharded(self) -> bool:
        """Whether the processes of this run share the frozen base in pieces."""
        return base_is_sharded(self.config.trainer.strategy, self.processes.count)

    @property
    def is_complete(self) -> bool:
        """Whether all iterations that the configuration asks for are done, or evaluations get no better."""
        return self.iteration >= self.config.trainer.num_iterations or self.best.is_out_of_patience

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation belongs to the iteration that has just ended."""
        return self.iteration % self.config.evaluation.every == 0 or self.is_complete

    @property
    def save_due(self) -> bool:
        """Whether a checkpoint belongs to the iteration that has just ended."""
        return self.iteration % self.config.trainer.save_every == 0
