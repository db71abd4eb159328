"""Algorithm 1 of Neighbor GRPO, for any algorithm, model family and reward.

prompts -> text embeddings -> noises -> ODE rollout -> images -> rewards -> advantages -> loss -> LoRA step -> export
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path

from ngrpo_lora.config import RunConfig
from ngrpo_lora.devices import without_cudnn_attention
from ngrpo_lora.ranks import is_first
from ngrpo_lora.records.ownership import owned
from ngrpo_lora.training.asking import ending_in_order, listening
from ngrpo_lora.training.evaluation import evaluate
from ngrpo_lora.training.export import export
from ngrpo_lora.training.metering import Stages
from ngrpo_lora.training.rewarding import collect, describe, middle_frames, submit
from ngrpo_lora.training.rollouts import decode, prompts_of, roll_out
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.state import check_complete, checkpoint_on_error, save
from ngrpo_lora.training.updates import update
from ngrpo_lora.training.watcher import Watcher
from ngrpo_lora.types import Metrics


def train(config: RunConfig, *watchers: Watcher) -> Metrics:
    """Run a checked configuration to its end, in sight of `watchers`; returns the last evaluation.

    Raises:
        UserError: the model cannot be loaded, or the run cannot go on; all that was made is on disk.
    """
    folder = owned(Path(config.output_dir)) if is_first() else nullcontext()
    with ending_in_order(), folder:
        run = prepare(config, *watchers)  # processes, model, LoRA, prompts, rewards, algorithm, optimizer
        with closing(run.scorer), run.processes.contact():
            evaluation = complete(run)
        run.processes.close()
    return evaluation


def complete(run: Run) -> Metrics:
    """Iterate until the run is complete, evaluating and saving on the way, and export its adapter."""
    evaluation, stopped = Metrics(), run.is_complete
    hearing = listening(run.processes.is_main, run.config.trainer.max_hours)
    with run.watchers.looking_on(run.start()), hearing as run.asked, checkpoint_on_error(run):
        asked = run.asked
        if run.evaluation_missing:
            evaluation = evaluate(run)
            run.best.note(run.iteration, evaluation)
            run.watchers.after_step(run.iteration, evaluation)
            run.evaluation_missing = False
        while not stopped:
            metrics = iterate(run)
            run.watchers.after_update(run.iteration, metrics)
            requests = run.processes.gather((asked.stop, asked.take_save()))
            better = False
            if run.evaluation_due:
                metrics |= (evaluation := evaluate(run))
                better = run.best.note(run.iteration, evaluation)
            stopped = run.is_complete or any(reason for reason, _ in requests)
            run.watchers.after_step(run.iteration, metrics)
            if stopped or better or run.save_due or any(wanted for _, wanted in requests):
                save(run)
            tell_of_saves(run, stopped)
            asked.next_lap()
    check_complete(run, run.asked.stop)
    run.watchers.after_end(export(run))
    return evaluation


def tell_of_saves(run: Run, last: bool) -> None:
    """Tell watchers of the checkpoints that have come to disk; the last one is waited for.

    Raises:
        UserError: one could not be written.
    """
    if last:
        run.saver.wait()
    for iteration in run.saver.finished():
        run.watchers.after_save(iteration, last=last and iteration == run.iteration)


@without_cudnn_attention()  # for checkpointed blocks, which are computed again in the backward pass
def iterate(run: Run) -> Metrics:
    """One iteration: draw P groups under the old weights, score them, and move the adapter."""
    stages, prompts = Stages(), prompts_of(run)
    run.counter.reset()
    with stages("rollout"):
        text = run.family.encode(prompts)
        rollouts, pending, shown = [], [], []
        for prompt, rollout in zip(prompts, roll_out(run, text), strict=True):  # Eq. 2, 7
            rollouts.append(rollout.to("cpu"))  # is there when the stage ends
            images = decode(run, rollout)
            shown = shown or middle_frames(run, images)
            pending.append(submit(run, prompt, images))  # is scored while the next group is drawn
    with stages("reward"):  # what is left to wait for
        batch = collect(run, rollouts, pending)
        advantages = run.algorithm.advantages(batch)  # Eq. 3, 11
    run.watchers.after_rewards(prompts[0].text, shown, batch.rewards[run.groups.start].tolist())
    with stages("update"):
        policy = update(run, rollouts, advantages, text)  # Eq. 8 to 10: B anchors, K steps, one or more LoRA steps
    run.iteration, run.sound, run.kept = run.iteration + 1, run.kept, None
    return describe(run, batch) | policy | run.counter.per_sample(batch.rewards.numel()) | stages.metrics
