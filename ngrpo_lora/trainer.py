"""The training loop: Algorithm 1 of Neighbor GRPO, for any algorithm, family and reward.

prompts -> text embeddings -> noises -> ODE rollout -> images -> rewards -> advantages -> loss -> LoRA step -> export
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ngrpo_lora import algorithms, checkpoint, lora, registry, report
from ngrpo_lora.advantages import batch_deviation, reward_spread
from ngrpo_lora.algorithms._base import Algorithm
from ngrpo_lora.config import RewardConfig, RunConfig, dump_config
from ngrpo_lora.devices import resolve_device
from ngrpo_lora.errors import UserError
from ngrpo_lora.export import FILE_NAME, check_export, save_adapter
from ngrpo_lora.noise import derive_seed, gaussian_noise
from ngrpo_lora.optimizers import learning_rate_factor, make_optimizer
from ngrpo_lora.prompts import Prompt, count_longer, open_split
from ngrpo_lora.sampling import draw, load_family
from ngrpo_lora.scoring import Samples, ScoreCache, Scorer, combine, correlations
from ngrpo_lora.solvers import flow_sigmas
from ngrpo_lora.tracking import MetricsFile, closing, console, estimate, opening, progress_bar, save_scores
from ngrpo_lora.types import Metrics, RewardBatch, Rollout, TextEmbeds, Transition, Velocities, mean_metrics

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10


def train(config: RunConfig) -> Metrics:
    """Run a checked configuration to its end; returns the last evaluation.

    Raises:
        UserError: the model cannot be loaded, or the run cannot go on; all that was made is on disk.
    """
    return Trainer(config).run()


class Trainer:
    """One run. `run` is the loop; every other method is one arrow of the data flow."""

    def __init__(self, config: RunConfig):
        if config.trainer.num_threads is not None:
            torch.set_num_threads(config.trainer.num_threads)
        self.config, self.output_dir = config, Path(config.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        # Rewards come first: what they lack should be known before a large model is loaded.
        device = resolve_device(config.model.device)
        self.trained = config.rewards.train
        self.scorer = Scorer(self.trained, device)
        known = [reward.key for reward in self.trained]
        watched = [*config.evaluation.rewards, *strict_reward(config)]
        self.watching = Scorer([reward for reward in watched if reward.key not in known], device)
        caching = any(reward.cache for reward in (*self.trained, *watched))
        self.cache = ScoreCache(self.output_dir / "scores.sqlite") if caching else None
        self.family = load_family(config.model)
        transformer = self.family.transformer
        suffixes, excluded = self.family.lora_targets(config.lora.targets)
        lora.inject(transformer, config.lora, suffixes, excluded, derive_seed(config.seed, "lora"))
        if config.trainer.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.parameters = lora.parameters(transformer)
        self.averaged = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = make_optimizer(config.optimizer, self.parameters.values())
        self.counter = EvaluationCounter(transformer)
        self.device = next(iter(self.parameters.values())).device

        module = registry.load(algorithms, config.algorithm.name)
        self.algorithm: Algorithm = module.Algorithm(config.algorithm, config.rollout)
        self.sigmas = flow_sigmas(config.rollout.num_steps, config.rollout.shift or self.family.settings["shift"])
        seed = derive_seed(config.seed, "prompts")
        self.prompts, held_out = open_split(config.prompts, seed, config.evaluation.seed)
        self.held_out = [held_out.prompt(i) for i in range(config.evaluation.num_prompts)]
        self.warn_of_long_prompts()
        self.iteration = self.skipped_in_a_row = 0
        if config.resume is not None:
            self.restore(checkpoint.load(config.resume, self.output_dir, str(self.device)))

    def run(self) -> Metrics:
        """Algorithm 1: per iteration roll out P groups, score them, and move the anchors."""
        config, total = self.config, self.config.trainer.num_iterations
        (self.output_dir / "config.yaml").write_text(dump_config(config))
        trained = sum(p.numel() for p in self.parameters.values())
        console.print(opening(config, trained, sum(p.numel() for p in self.family.transformer.parameters()) - trained))
        metrics_file = MetricsFile(self.output_dir / "metrics.jsonl", self.iteration if config.resume else None)
        with progress_bar() as bar, interrupt_asked() as interrupted:
            task = bar.add_task("train", total=total, completed=self.iteration, status="evaluating the base model")
            first, evaluation = Clock(), Metrics()
            if self.iteration == 0:
                with first("evaluation"):
                    evaluation = self.evaluate()
                metrics_file.write(0, evaluation | first.seconds)
            last = self.iteration >= total
            while not last:
                clock, nfe = Clock(), self.counter.start()
                prompts = [self.prompts.prompt(i) for i in self.prompt_indices()]
                text = self.family.encode([prompt.text for prompt in prompts])
                rollouts, pending = [], []
                with clock("rollout"):
                    for prompt, rollout in zip(prompts, self.roll_out(text), strict=True):
                        rollouts.append(rollout)
                        pending.append(self.scorer.submit(same_prompt(prompt, self.decode(rollout))))
                with clock("reward"):  # what is left to wait for
                    batch = self.collect(rollouts, pending)
                    advantages = self.algorithm.advantages(batch)
                with clock("update"):
                    policy = self.update(rollouts, advantages, text)
                self.iteration += 1
                last = self.iteration == total or interrupted()
                if self.iteration == 1:
                    evaluations = -(-total // config.evaluation.every)
                    once_s = first.seconds["time/evaluation_s"]
                    console.print(estimate(sum(clock.seconds.values()), total - 1, once_s, evaluations))

                metrics = self.describe(batch) | policy | nfe.per_sample(batch.rewards.numel())
                if self.iteration % config.evaluation.every == 0 or self.iteration == total:
                    with clock("evaluation"):
                        evaluation = self.evaluate()
                    metrics |= evaluation
                metrics |= clock.seconds
                metrics_file.write(self.iteration, metrics)
                if self.iteration % config.trainer.save_every == 0 or last:
                    checkpoint.save(self.output_dir, self.iteration, self.state(), config.trainer.keep_checkpoints)
                bar.update(task, completed=self.iteration, status=status_line(metrics, self.trained))
        if self.iteration < total:
            raise UserError(f"stopped after iteration {self.iteration} of {total}; go on with resume=latest")
        adapter = self.export()
        report.write_summary(self.output_dir)
        console.print(closing(self.output_dir, adapter))
        return evaluation

    def warn_of_long_prompts(self) -> None:
        """Say which encoder reads only the beginnings of some of the first thousand prompts or of the held-out ones."""
        texts = list({prompt.text for prompt in (*map(self.prompts.prompt, range(1000)), *self.held_out)})
        for name, (tokenizer, limit) in self.family.tokenizers().items():
            if longer := count_longer(texts, tokenizer, limit):
                log.warning("%s reads %d tokens: %d of %d prompts are cut there", name, limit, longer, len(texts))

    def prompt_indices(self) -> range:
        """Positions of this iteration's prompts in the source."""
        count = self.config.rollout.prompts_per_iteration
        return range(self.iteration * count, (self.iteration + 1) * count)

    @torch.no_grad()
    def roll_out(self, text: TextEmbeds) -> Iterator[Rollout]:
        """P groups under the old weights, in turn; forward passes of at most `rollout.micro_batch_size` samples."""
        size = self.config.rollout.micro_batch_size or self.config.rollout.group_size
        at_once = max(1, size // self.config.rollout.group_size)  # groups that share their forward passes

        def velocity_fn(latents: Tensor, sigma: float) -> Tensor:
            groups, samples = latents.shape[:2]
            owners = torch.arange(first, first + groups).repeat_interleave(samples)
            chunks = zip(latents.flatten(0, 1).split(size), owners.split(size), strict=True)
            parts = [self.family.velocity(x.to(self.device), sigma, text[group.tolist()]).cpu() for x, group in chunks]
            return torch.cat(parts).view(latents.shape)

        seeds = [derive_seed(self.config.seed, "rollout", self.iteration, group) for group in range(len(text))]
        merged = lora.merged(self.family.transformer) if self.config.rollout.merge_adapter else nullcontext()
        with merged:
            for first in range(0, len(text), at_once):
                now = seeds[first : first + at_once]
                yield from self.algorithm.rollout(velocity_fn, self.sigmas, self.family.latent_shape, now)

    def decode(self, rollout: Rollout) -> list[Image.Image]:
        """The G images of a rollout, `rollout.micro_batch_size` at a time."""
        clean = rollout.latents[-1]
        chunks = clean.split(self.config.rollout.micro_batch_size or len(clean))
        return [image for chunk in chunks for image in self.family.decode(chunk.to(self.device))]

    def collect(self, rollouts: list[Rollout], pending: list[Callable[[], dict[str, Tensor]]]) -> RewardBatch:
        """Scores of P groups as one batch; a sample whose latents are not finite has none.

        Raises:
            UserError: a reward is none, or failed for more than `rewards.max_failed_share`; a checkpoint is written.
        """
        finite = torch.stack([rollout.latents[-1].flatten(1).isfinite().all(1) for rollout in rollouts])  # (P, G)
        try:
            groups = [wait() for wait in pending]
            scores = {label: torch.stack([group[label] for group in groups]) for label in groups[0]}
            scores = {label: raw.where(finite, torch.nan) for label, raw in scores.items()}
            if broken := self.broken(scores):
                raise UserError(broken)
        except UserError as error:
            checkpoint.save(self.output_dir, self.iteration, self.state(), self.config.trainer.keep_checkpoints)
            raise UserError(f"iteration {self.iteration + 1}: {error}, then go on with resume=latest") from None
        return combine(scores, self.trained, self.config.rewards.combine)

    def broken(self, scores: dict[str, Tensor]) -> str | None:
        """What is wrong where too many scores failed."""
        limit = self.config.rewards.max_failed_share
        for label, raw in scores.items():
            share = (~raw.isfinite()).double().mean().item()
            if share > limit or share == 1:
                return (
                    f"reward {label} has no score for {share:.0%} of the images, more than rewards.max_failed_share "
                    f"({limit:g}) allows; reasons are above; mend it or raise the limit"
                )
        return None

    def update(self, rollouts: list[Rollout], advantages: Tensor, text: TextEmbeds) -> Metrics:
        """Every optimizer update of this iteration."""
        updates = self.algorithm.updates(advantages, derive_seed(self.config.seed, "updates", self.iteration))
        factor = learning_rate_factor(self.config.optimizer, self.iteration, self.config.trainer.num_iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * factor
        chunks = [chunked(update, self.config.trainer.micro_batch_size) for update in updates]
        # The first update starts at the old weights; later ones need the old velocities before it moves them.
        old: list[Sequence[Tensor | None]] = [[None] * len(chunks[0])]
        with torch.no_grad():
            old += [[self.velocities(chunk, rollouts, text) for chunk in update] for update in chunks[1:]]
        rows, norms, skipped = [], [], 0
        for update, old_velocities in zip(chunks, old, strict=True):
            size, finite = sum(map(len, update)), True
            for chunk, old_velocity in zip(update, old_velocities, strict=True):
                losses, metrics = self.losses(chunk, rollouts, advantages, text, old_velocity)
                finite = finite and bool(losses.isfinite().all())
                (losses.sum() / size).backward()
                rows += metrics
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.optimizer.max_grad_norm)
            if finite and norm.isfinite():
                self.optimizer.step()
                self.average()
                norms.append(norm.item())
                self.skipped_in_a_row = 0
            else:
                skipped += 1
                self.skipped_in_a_row += 1
                log.warning("iteration %d: loss or gradient is not finite; update skipped", self.iteration + 1)
            self.optimizer.zero_grad()
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite; lower "
                f"optimizer.learning_rate ({self.config.optimizer.learning_rate}) and go on with resume=latest"
            )
        gradient = {"lora/grad_norm": sum(norms) / len(norms) if norms else float("nan")}
        rate = {"lora/learning_rate": self.optimizer.param_groups[0]["lr"]}
        return (
            mean_metrics(rows, self.algorithm.metric_names)
            | gradient
            | rate
            | {"policy/skipped_updates": float(skipped)}
        )

    def velocities(self, chunk: list[Transition], rollouts: list[Rollout], text: TextEmbeds) -> Tensor:
        """Velocities (M, C, H, W) at the starts of transitions, in one forward pass."""
        latents = torch.stack([rollouts[t.group].latents[t.step, t.sample] for t in chunk]).to(self.device)
        sigmas = torch.stack([rollouts[t.group].sigmas[t.step] for t in chunk]).to(self.device)
        return self.family.velocity(latents, sigmas, text[[t.group for t in chunk]])

    def losses(
        self,
        chunk: list[Transition],
        rollouts: list[Rollout],
        advantages: Tensor,
        text: TextEmbeds,
        old: Tensor | None,
    ) -> tuple[Tensor, list[Metrics]]:
        """Losses (M,) of a micro-batch, and each transition's metrics."""
        reference: Sequence[Tensor | None] = [None] * len(chunk)
        if self.algorithm.needs_reference:
            with torch.no_grad(), lora.disabled(self.family.transformer):
                reference = list(self.velocities(chunk, rollouts, text).cpu())
        current = self.velocities(chunk, rollouts, text).cpu()
        old = current.detach() if old is None else old.cpu()
        terms = [
            self.algorithm.loss(rollouts[t.group], advantages[t.group], t, Velocities(new, before, base))
            for t, new, before, base in zip(chunk, current, old, reference, strict=True)
        ]
        return torch.stack([loss for loss, _ in terms]), [metrics for _, metrics in terms]

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights towards the live ones; without an average they are the live ones."""
        decay = self.config.optimizer.ema_decay
        for name, parameter in self.parameters.items():
            self.averaged[name].lerp_(parameter, 1 - decay)

    def evaluate(self) -> Metrics:
        """Held-out prompts, fixed seeds, averaged weights: metrics, every single score, and a picture grid."""
        config, texts = self.config.evaluation, [prompt.text for prompt in self.held_out]
        seeds = [config.seed + i for i in range(len(texts))]
        with self.counter.paused(), lora.swapped(self.family.transformer, self.averaged):
            text = self.family.encode(texts)
            images = draw(self.family, text, seeds, self.config.rollout.solver, self.sigmas.to(self.device))
        samples = Samples(images, texts, [prompt.metadata for prompt in self.held_out])
        pending = [scorer.submit(samples, self.cache) for scorer in (self.scorer, self.watching)]
        scores = {label: raw for wait in pending for label, raw in wait().items()}
        if broken := self.broken(scores):
            if self.iteration == 0:
                raise UserError(f"evaluation of the base model: {broken}")
            log.warning("evaluation at iteration %d: %s", self.iteration, broken)  # a trained adapter is worth more
        shown, stem = slice(config.num_samples), f"{self.iteration:06d}"
        report.save_grid(self.output_dir / "samples" / f"{stem}.png", images[shown], texts[shown])
        save_scores(self.output_dir / "evaluations" / f"{stem}.jsonl", texts, seeds, scores)
        means = {label: raw.nanmean().item() for label, raw in scores.items()}
        metrics = {f"eval/{label}_mean": mean for label, mean in means.items()}
        metrics["eval/reward_mean"] = self.weighted(means)
        if config.strict is not None:
            metrics["eval/strict_accuracy"] = means[strict_reward(self.config)[0].key]
        return metrics

    def weighted(self, means: dict[str, float]) -> float:
        """The weighted sum of raw means: what the curve shows."""
        return float(sum(config.weight * means[config.key] for config in self.trained))

    def describe(self, batch: RewardBatch) -> Metrics:
        """Reward statistics over all valid samples; a group of equal rewards has zero spread."""
        spread = reward_spread(batch.rewards, batch.valid)
        means = {label: scores.nanmean().item() for label, scores in batch.scores.items()}
        raw = {f"rollout/{label}_mean": mean for label, mean in means.items()}
        if len(means) > 1:
            for label, scores in batch.scores.items():
                raw[f"rollout/{label}_failed_share"] = (~scores.isfinite()).double().mean().item()
            raw |= {f"rollout/correlation/{pair}": value for pair, value in correlations(batch.scores).items()}
        return raw | {
            "rollout/reward_mean": self.weighted(means),
            "rollout/reward_std": batch_deviation(batch.rewards, batch.valid),
            "rollout/zero_spread_share": (spread <= 0).double().mean().item(),
            "rollout/failed_share": (~batch.valid).double().mean().item(),
        }

    def state(self) -> dict[str, Any]:
        """What `restore` needs; tensors and plain values only."""
        return {
            "iteration": self.iteration,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same adapter.

        Raises:
            UserError: the checkpoint's adapter has other layers or another rank.
        """
        shapes = {name: p.shape for name, p in self.parameters.items()}
        if {name: p.shape for name, p in state["parameters"].items()} != shapes:
            raise UserError(
                "the checkpoint's adapter has other layers or another rank; resume with its own config.yaml"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
            self.averaged[name].copy_(state["averaged"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]

    def export(self) -> Path:
        """Write `adapter/pytorch_lora_weights.safetensors` and prove it in a fresh pipeline."""
        path = self.output_dir / "adapter" / FILE_NAME
        with self.counter.paused(), lora.swapped(self.family.transformer, self.averaged):
            save_adapter(path, self.family, self.config)
            text = self.family.encode([self.held_out[0].text])
            latents = gaussian_noise((1, *self.family.latent_shape), 0).to(self.device)
            check_export(path, self.family, load_family(self.config.model), text, latents)
        return path


class EvaluationCounter:
    """Counts samples through a module, apart for passes with and without gradient: NFE_theta and NFE_old."""

    def __init__(self, module: nn.Module):
        self.old = self.theta = 0
        self.active = True
        module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active:
            samples = len(kwargs["hidden_states"])
            if torch.is_grad_enabled():
                self.theta += samples
            else:
                self.old += samples

    def start(self) -> EvaluationCounter:
        """Count anew."""
        self.old = self.theta = 0
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count, for as long as the context lasts."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def per_sample(self, samples: int) -> Metrics:
        """NFE divided by the samples of the iteration."""
        return {"nfe/old_per_sample": self.old / samples, "nfe/theta_per_sample": self.theta / samples}


@contextmanager
def interrupt_asked() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a request to stop after this iteration; a second one stops at once."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, previous)
        console.print("stopping after this iteration; press Ctrl-C again to stop at once")

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT)
    if in_main_thread:
        signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)


class Clock:
    """Wall time of the stages of one iteration."""

    def __init__(self) -> None:
        self.seconds: Metrics = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[f"time/{stage}_s"] = time.perf_counter() - start


def strict_reward(config: RunConfig) -> list[RewardConfig]:
    """The pass-or-fail reward of the evaluation, if there is one."""
    name = config.evaluation.strict
    given = {reward.name: reward for reward in (*config.rewards.train, *config.evaluation.rewards)}
    return [] if name is None else [given.get(name, RewardConfig(name=name))]


def same_prompt(prompt: Prompt, images: list[Image.Image]) -> Samples:
    """One group of candidates."""
    return Samples(images, [prompt.text] * len(images), [prompt.metadata] * len(images), len(images))


def chunked(items: list[Transition], size: int) -> list[list[Transition]]:
    """Consecutive pieces of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def status_line(metrics: Metrics, trained: Sequence[RewardConfig]) -> str:
    """Reward, each of several, function evaluations and the last evaluation, for the progress bar."""
    parts = [f"reward {metrics['rollout/reward_mean']:.3f}"]
    if len(trained) > 1:
        parts = [f"{reward.key} {metrics[f'rollout/{reward.key}_mean']:.3g}" for reward in trained]
    parts.append(f"NFE {metrics['nfe/old_per_sample']:.1f} + {metrics['nfe/theta_per_sample']:.2f}")
    if "eval/reward_mean" in metrics:
        parts.append(f"held-out {metrics['eval/reward_mean']:.3f}")
    return "  ".join(parts)
