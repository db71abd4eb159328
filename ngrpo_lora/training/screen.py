"""What a run shows on the terminal: what it will do, a progress bar, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ngrpo_lora.config import RewardConfig, RunConfig
from ngrpo_lora.console import console, progress_bar
from ngrpo_lora.reports.tables import figures
from ngrpo_lora.training.metering import iteration_seconds
from ngrpo_lora.training.watcher import Start, Watcher
from ngrpo_lora.types import Metrics


class Screen(Watcher):
    """The terminal of the main process; those of the others stay quiet."""

    def before_start(self, start: Start) -> None:
        """What the run will do, and a bar from where it stands."""
        console.quiet = not start.is_main
        console.print(opening(start.config, start.trained, start.frozen, start.processes))
        self.config, self.evaluation_s = start.config, 0.0
        self.bar = progress_bar()
        total, status = start.config.trainer.num_iterations, "evaluating the base model"
        self.task = self.bar.add_task("train", total=total, completed=start.iteration, status=status)
        self.bar.start()

    def after_update(self, step: int, metrics: Metrics) -> None:
        """After the first iteration: how long the rest will take."""
        if step == 1:
            total = self.config.trainer.num_iterations
            evaluations = -(-total // self.config.evaluation.every)
            console.print(estimate(iteration_seconds(metrics), total - 1, self.evaluation_s, evaluations))

    def after_step(self, step: int, metrics: Metrics) -> None:
        """How far the run is, and what the last iteration came to."""
        if step == 0:
            self.evaluation_s = metrics["time/evaluation_s"]
        if "rollout/reward_mean" in metrics:
            self.bar.update(self.task, completed=step, status=status_line(metrics, self.config.rewards.train))

    def after_end(self, adapter: Path) -> None:
        """The figures of the run, and where everything is."""
        console.print(closing(Path(self.config.output_dir), adapter))

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()


def opening(config: RunConfig, trained: int, total: int, processes: int = 1) -> str:
    """What the run will do, with the derived batch numbers."""
    rollout, length = config.rollout, config.trainer.num_iterations
    samples = rollout.prompts_per_iteration * rollout.group_size
    names = " + ".join(f"{r.weight:g} x {r.key}" if r.weight != 1 else r.key for r in config.rewards.train)
    lines = [
        f"{config.algorithm.name} on {config.model.path}: {length} iterations into {config.output_dir}",
        f"  an iteration: {rollout.prompts_per_iteration} prompts x {rollout.group_size} candidates = {samples} images",
        f"  an image: {config.algorithm.steps_in_words(rollout)}, scored by {names}",
        f"  trained: {trained / 1e6:.2f} M LoRA parameters of rank {config.lora.rank} on a frozen {total / 1e6:.1f} M",
        f"  evaluated on {config.evaluation.num_prompts} held-out prompts every {config.evaluation.every} iterations",
    ]
    if processes > 1:
        lines.insert(1, f"  {processes} processes, each with whole groups; the base is {config.trainer.strategy}")
    return "\n".join(lines)


def estimate(iteration_s: float, iterations: int, evaluation_s: float, evaluations: int) -> str:
    """How long the rest takes, by what the first iteration and the first evaluation took."""
    minutes = (iteration_s * iterations + evaluation_s * evaluations) / 60
    return f"  about {max(1, round(minutes))} min: {iteration_s:.1f} s an iteration, {evaluation_s:.1f} s an evaluation"


def closing(output_dir: Path, adapter: Path) -> str:
    """The figures of a run, and where everything is."""
    lines = [
        *figures(output_dir),
        f"pictures and curve        {output_dir / 'summary.png'}",
        f"adapter                   {adapter}",
        f"draw with it              ngrpo sample --adapter {adapter} --prompt '...' --seed 0",
        f"how sure it is            ngrpo score {output_dir}",
    ]
    return "\n".join(lines)


def status_line(metrics: Metrics, trained: Sequence[RewardConfig]) -> str:
    """Reward, each of several, function evaluations and the last evaluation, for the progress bar."""
    parts = [f"reward {metrics['rollout/reward_mean']:.3f}"]
    if len(trained) > 1:
        parts = [f"{reward.key} {metrics[f'rollout/{reward.key}_mean']:.3g}" for reward in trained]
    parts.append(f"NFE {metrics['nfe/old_per_sample']:.1f} + {metrics['nfe/theta_per_sample']:.2f}")
    if "eval/reward_mean" in metrics:
        parts.append(f"held-out {metrics['eval/reward_mean']:.3f}")
    return "  ".join(parts)
