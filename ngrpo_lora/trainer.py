"""The training loop: Algorithm 1 of Neighbor GRPO, for any algorithm, family and reward.

prompts -> text embeddings -> noises -> ODE rollout -> images -> rewards -> advantages -> loss -> LoRA step -> export
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ngrpo_lora import algorithms, checkpoint, lora, registry, report
from ngrpo_lora.advantages import batch_deviation, reward_spread
from ngrpo_lora.algorithms._base import Algorithm
from ngrpo_lora.config import RewardConfig, RunConfig, dump_config
from ngrpo_lora.devices import resolve_device, use_device, without_cudnn_attention
from ngrpo_lora.distributed import Processes, process_device, shard
from ngrpo_lora.embeddings import EmbeddingCache
from ngrpo_lora.errors import SharedError, UserError
from ngrpo_lora.export import FILE_NAME, check_export, save_adapter
from ngrpo_lora.hub import Pusher
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.noise import derive_seed, gaussian_noise
from ngrpo_lora.optimizers import learning_rate_factor, make_optimizer
from ngrpo_lora.prompts import Prompt, count_longer, open_split
from ngrpo_lora.sampling import draw, load_family
from ngrpo_lora.scoring import Samples, ScoreCache, Scorer, Wait, combine, correlations
from ngrpo_lora.tracking import MetricsFile, closing, console, estimate, opening, progress_bar, save_scores
from ngrpo_lora.types import Metrics, RewardBatch, Rollout, TextEmbeds, Transition, Velocities, mean_metrics
from ngrpo_lora.watcher import Watcher, attend

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10


def train(config: RunConfig, watcher: Watcher | None = None) -> Metrics:
    """Run a checked configuration to its end, in sight of `watcher`; returns the last evaluation.

    Raises:
        UserError: the model cannot be loaded, or the run cannot go on; all that was made is on disk.
    """
    trainer = Trainer(config, watcher)
    with trainer.processes.contact():
        evaluation = trainer.run()
    trainer.processes.close()
    return evaluation


class Trainer:
    """One run. `run` is the loop; every other method is one arrow of the data flow."""

    def __init__(self, config: RunConfig, watcher: Watcher | None = None):
        self.watcher = watcher or Watcher()
        if config.trainer.num_threads is not None:
            torch.set_num_threads(config.trainer.num_threads)
        self.processes = Processes(config.trainer.timeout_s)
        device = process_device(resolve_device(config.model.device))
        use_device(device)
        self.model = config.model.model_copy(update={"device": device})  # as this process has it
        self.divided = config.trainer.strategy == "fsdp" and self.processes.count > 1  # the base, among processes
        self.config, self.output_dir = config, Path(config.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if problem := self.processes.agree(self.misfit(config)):
            raise SharedError(problem)
        # Rewards come first: what they lack should be known before a large model is loaded.
        self.trained = config.rewards.train
        self.scorer = Scorer(self.trained, device)
        known = [reward.key for reward in self.trained]
        watched = [*config.evaluation.rewards, *strict_reward(config)]
        self.watching = Scorer([reward for reward in watched if reward.key not in known], device)
        caching = any(reward.cache for reward in (*self.trained, *watched))
        self.cache = ScoreCache(self.output_dir / "scores.sqlite") if caching else None
        seed = derive_seed(config.seed, "prompts")
        self.prompts, held_out = open_split(config.prompts, seed, config.evaluation.seed)
        self.held_out = [held_out.prompt(i) for i in range(config.evaluation.num_prompts)]
        self.family = self.load_family()
        transformer = self.family.transformer
        # A compiled block would have the call in its graph.
        blocks = [] if config.model.compile else self.family.blocks
        attend(self.watcher, [transformer, *blocks, *parts(self.family.vae, *self.family.encoders)])
        suffixes, excluded = self.family.lora_targets(config.lora.targets)
        lora.inject(transformer, config.lora, suffixes, excluded, derive_seed(config.seed, "lora"))
        if config.lora.init_from is not None and config.resume is None:
            lora.start_from(transformer, self.family.read_adapter(config.lora.init_from), excluded)
        if config.trainer.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.parameters = lora.parameters(transformer)
        if self.divided:
            shard(transformer, self.family.blocks, set(self.parameters.values()), self.family.device)
        if config.model.compile:
            self.family.compile_blocks()
        averaging = config.optimizer.ema_decay > 0
        self.averaged = {n: p.detach().clone() if averaging else p.detach() for n, p in self.parameters.items()}
        self.optimizer = make_optimizer(config.optimizer, self.parameters.values())
        # float16 ends at 6e-8, where the gradients of a large picture begin: they are scaled up on their way.
        in_half = self.family.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.family.device.type, enabled=in_half)
        self.counter = EvaluationCounter(transformer)
        self.device = self.family.device

        module = registry.load(algorithms, config.algorithm.name)
        self.algorithm: Algorithm = module.Algorithm(config.algorithm, config.rollout)
        self.sigmas = self.family.sigmas(config.rollout.num_steps, config.rollout.shift)
        self.groups = self.processes.share(config.rollout.prompts_per_iteration)  # this process's, of each iteration
        self.warn_of_mixed_gpus()
        if self.processes.is_main:
            self.warn_of_long_prompts()
        self.iteration = self.skipped_in_a_row = 0
        self.kept: dict[str, Any] | None = None  # the state at the start of an iteration of several updates
        if config.resume is not None:
            self.restore(self.processes.broadcast(self.checkpoint(config.resume)))

    def warn_of_mixed_gpus(self) -> None:
        """The slowest sets the pace."""
        own = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        names = self.processes.gather(own)
        if self.processes.is_main and len(set(names)) > 1:
            log.warning(
                "processes run on different devices (%s): each iteration waits for the slowest, and the one with the "
                "least memory sets the micro-batch; CUDA_VISIBLE_DEVICES chooses",
                ", ".join(names),
            )

    def misfit(self, config: RunConfig) -> str | None:
        """What of the configuration does not fit the number of processes."""
        groups, count = config.rollout.prompts_per_iteration, self.processes.count
        if groups < count:
            return f"rollout.prompts_per_iteration must be at least the number of processes ({count}), got {groups}"
        if self.divided and groups % count:
            return (
                f"rollout.prompts_per_iteration must be a multiple of the number of processes ({count}) with "
                f"trainer.strategy=fsdp, got {groups}"
            )
        return None

    def load_family(self) -> BaseFamily:
        """The model; with `model.text_encoders: cache` its encoders come and go before the transformer is loaded."""
        model = self.model
        if model.text_encoders != "cache":
            return load_family(model, divided=self.divided)
        cache = EmbeddingCache(self.output_dir / "embeddings", model)
        last = self.config.trainer.num_iterations * self.config.rollout.prompts_per_iteration
        texts = [prompt.text for prompt in (*map(self.prompts.prompt, range(last)), *self.held_out)]
        missing = cache.missing([*texts, model.negative_prompt])
        mine = [missing[i] for i in self.processes.share(len(missing))]
        if mine:
            log.info("encoding %d prompts into %s", len(mine), cache.folder)
            family = load_family(model, "text")
            attend(self.watcher, parts(*family.encoders))
            cache.fill(family, mine)
        self.processes.gather(None)  # all files are there
        family = load_family(model, "image", self.divided)
        family.cache = cache
        return family

    def checkpoint(self, resume: str) -> dict[str, Any]:
        """The state to resume from, on the main process; the others get it from there."""
        problem, state = None, {}
        if self.processes.is_main:
            try:
                state = checkpoint.load(resume, self.output_dir, "cpu")
            except UserError as error:
                problem = str(error)
        if problem := self.processes.agree(problem):
            raise SharedError(problem)
        return state

    def run(self) -> Metrics:
        """Algorithm 1: per iteration roll out P groups, score them, and move the anchors."""
        config, total, processes = self.config, self.config.trainer.num_iterations, self.processes
        console.quiet = not processes.is_main
        pusher = Pusher(self.output_dir, config.hub) if config.hub.repo is not None and processes.is_main else None
        trained = sum(p.numel() for p in self.parameters.values())
        frozen = sum(p.numel() for p in self.family.transformer.parameters()) - trained
        console.print(opening(config, trained, frozen, processes.count))
        metrics_file = None
        if processes.is_main:
            (self.output_dir / "config.yaml").write_text(dump_config(config))
            metrics_file = MetricsFile(self.output_dir / "metrics.jsonl", self.iteration if config.resume else None)
        with progress_bar() as bar, interrupt_asked() as interrupted, self.saved_on_error():
            task = bar.add_task("train", total=total, completed=self.iteration, status="evaluating the base model")
            first, evaluation = Stages(), Metrics()
            cut_off = self.evaluation_due and metrics_file is not None and not metrics_file.has("eval/reward_mean")
            if self.iteration == 0 or processes.any(cut_off):
                with first("evaluation"):
                    evaluation = self.evaluate()
                if metrics_file is not None:
                    metrics_file.write(self.iteration, evaluation | first.metrics)
                self.watcher.after_step(self.iteration, evaluation | first.metrics)
            last = self.iteration >= total
            while not last:
                metrics, stages = self.step(), Stages()
                last = self.iteration == total or processes.any(interrupted())
                if self.iteration == 1:
                    evaluations = -(-total // config.evaluation.every)
                    once_s = first.metrics["time/evaluation_s"]
                    console.print(estimate(iteration_seconds(metrics), total - 1, once_s, evaluations))
                if metrics_file is not None:
                    metrics_file.write(self.iteration, metrics)
                if self.evaluation_due:
                    with stages("evaluation"):
                        evaluation = self.evaluate()
                    metrics |= evaluation | stages.metrics
                    if metrics_file is not None:
                        metrics_file.write(self.iteration, metrics)
                self.watcher.after_step(self.iteration, metrics)
                if self.iteration % config.trainer.save_every == 0 or last:
                    self.save()
                    if pusher is not None and config.hub.push == "checkpoints" and not last:
                        pusher.start()
                bar.update(task, completed=self.iteration, status=status_line(metrics, self.trained))
        if self.iteration < total:
            raise SharedError(f"stopped after iteration {self.iteration} of {total}; go on with resume=latest")
        adapter = self.export()
        if processes.is_main:
            report.write_summary(self.output_dir)
            console.print(closing(self.output_dir, adapter))
        if pusher is not None:
            console.print(f"pushed to                 {pusher.finish()}")
        return evaluation

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation belongs to the iteration that has just ended."""
        return (
            self.iteration % self.config.evaluation.every == 0 or self.iteration == self.config.trainer.num_iterations
        )

    @contextmanager
    def saved_on_error(self) -> Iterator[None]:
        """Whatever ends the block before its time, a checkpoint of the last complete iteration is written."""
        try:
            yield
        except BaseException:
            try:
                if self.kept is not None:
                    self.restore(self.kept)
                self.save()
            except Exception:  # a full disk or a broken device, which may be the first error's reason as well
                log.warning("no checkpoint could be written of iteration %d", self.iteration, exc_info=True)
            raise

    @without_cudnn_attention()  # for checkpointed blocks, which are computed again in the backward pass
    def step(self) -> Metrics:
        """One iteration: draw and score P groups, move the adapter, say what came of it."""
        stages, nfe = Stages(), self.counter.start()
        prompts = [self.prompts.prompt(i) for i in self.prompt_indices()]
        rollouts, pending, shown = [], [], []
        with stages("rollout"):
            text = self.family.encode([prompt.text for prompt in prompts])
            for prompt, rollout in zip(prompts, self.roll_out(text), strict=True):
                rollouts.append(rollout.to("cpu"))
                images = self.decode(rollout)
                shown = shown or images[self.family.num_frames // 2 :: self.family.num_frames]
                samples = self.samples([prompt] * len(rollout.final), images)
                pending.append(self.scorer.submit(samples))
        with stages("reward"):  # what is left to wait for
            batch = self.collect(rollouts, pending)
            advantages = self.algorithm.advantages(batch)
        self.watcher.after_rewards(prompts[0].text, shown, batch.rewards[self.groups.start].tolist())
        with stages("update"):
            policy = self.update(rollouts, advantages, text)
        self.iteration, self.kept = self.iteration + 1, None
        nfe_per_sample = nfe.per_sample(batch.rewards.numel(), self.processes)
        return self.describe(batch) | policy | nfe_per_sample | stages.metrics

    def save(self) -> None:
        """Write a checkpoint, and into it the adapter as it is; all processes hold the same state."""
        if self.processes.is_main:
            keep = self.config.trainer.keep_checkpoints
            folder = checkpoint.save(self.output_dir, self.iteration, self.state(), keep)
            with lora.swapped(self.family.transformer, self.averaged):
                save_adapter(folder / FILE_NAME, self.family, self.config)

    def warn_of_long_prompts(self) -> None:
        """Say which encoder reads only the beginnings of some of the first thousand prompts or of the held-out ones."""
        texts = list({prompt.text for prompt in (*map(self.prompts.prompt, range(1000)), *self.held_out)})
        for name, (tokenizer, limit) in self.family.tokenizers().items():
            if longer := count_longer(texts, tokenizer, limit):
                log.warning("%s reads %d tokens: %d of %d prompts are cut there", name, limit, longer, len(texts))

    def prompt_indices(self) -> range:
        """Positions of this process's prompts of this iteration in the source."""
        start = self.iteration * self.config.rollout.prompts_per_iteration
        return range(start + self.groups.start, start + self.groups.stop)

    @torch.no_grad()
    def roll_out(self, text: TextEmbeds) -> Iterator[Rollout]:
        """This process's groups under the old weights, in turn; `rollout.micro_batch_size` samples a forward pass."""
        size = self.config.rollout.micro_batch_size or self.config.rollout.group_size
        at_once = max(1, size // self.config.rollout.group_size)  # groups that share their forward passes

        def velocity_fn(latents: Tensor, sigma: float) -> Tensor:
            groups, samples = latents.shape[:2]
            owners = torch.arange(first, first + groups).repeat_interleave(samples)
            chunks = zip(latents.flatten(0, 1).split(size), owners.split(size), strict=True)
            parts = [self.family.velocity(x, sigma, text[group.tolist()]) for x, group in chunks]
            return torch.cat(parts).view(latents.shape)

        seeds = [derive_seed(self.config.seed, "rollout", self.iteration, group) for group in self.groups]
        with self.rollout_weights():
            for first in range(0, len(text), at_once):
                now = seeds[first : first + at_once]
                yield from self.algorithm.rollout(velocity_fn, self.sigmas, self.family.latent_shape, now, self.device)

    def rollout_weights(self) -> AbstractContextManager[None]:
        """The adapter beside the base, or added into it."""
        return lora.merged(self.family.transformer) if self.config.rollout.merge_adapter else nullcontext()

    def decode(self, rollout: Rollout) -> list[Image.Image]:
        """The images of a rollout's G samples, `rollout.micro_batch_size` samples at a time."""
        chunks = rollout.final.split(self.config.rollout.micro_batch_size or len(rollout.final))
        return [image for chunk in chunks for image in self.family.decode(chunk)]

    def samples(self, prompts: Sequence[Prompt], images: list[Image.Image]) -> Samples:
        """What rewards see of candidates of one prompt: the image, or some frames of the video, evenly spaced."""
        count, total = self.frames, self.family.num_frames
        chosen = [(2 * i + 1) * total // (2 * count) for i in range(count)]
        shown = [images[start + i] for start in range(0, len(images), total) for i in chosen]
        repeated = [prompt for prompt in prompts for _ in chosen]
        return Samples(shown, [p.text for p in repeated], [p.metadata for p in repeated], len(shown))

    @property
    def frames(self) -> int:
        """How many pictures of each sample are scored."""
        return min(self.config.rewards.frames, self.family.num_frames)

    def collect(self, rollouts: list[Rollout], pending: list[Wait]) -> RewardBatch:
        """Scores of P groups as one batch; a sample whose latents are not finite has none.

        Raises:
            UserError: a reward is none, or failed for more than `rewards.max_failed_share`.
        """
        finite = torch.stack([rollout.final.flatten(1).isfinite().all(1) for rollout in rollouts])  # (P, G)
        scores, problem = {}, None
        try:
            groups = [wait(self.watcher.before_pass) for wait in pending]
            own = {label: torch.stack([self.per_sample(group[label]) for group in groups]) for label in groups[0]}
            scores = {label: raw.where(finite, torch.nan) for label, raw in own.items()}
        except UserError as error:
            problem = str(error)
        problem = self.processes.agree(problem)
        if problem is None:
            shares = self.processes.gather(scores)
            scores = {label: torch.cat([share[label] for share in shares]) for label in scores}
            problem = self.broken(scores)
        if problem is not None:
            raise SharedError(f"iteration {self.iteration + 1}: {problem}, then go on with resume=latest")
        return combine(scores, self.trained, self.config.rewards.combine)

    def per_sample(self, scores: Tensor) -> Tensor:
        """The mean over the frames of each sample."""
        return scores.view(-1, self.frames).mean(1)

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
        """Every optimizer update of this iteration; gradients are sums over all processes' transitions."""
        updates = self.algorithm.updates(advantages, derive_seed(self.config.seed, "updates", self.iteration))
        if len(updates) > 1:
            self.kept = on_cpu(self.state())
        sizes, advantages = [len(update) for update in updates], advantages[self.groups.start : self.groups.stop]
        factor = learning_rate_factor(self.config.optimizer, self.iteration, self.config.trainer.num_iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * factor
        chunks = [self.own_chunks(update) for update in updates]
        # The first update starts at the old weights; later ones need the old velocities before it moves them.
        old: list[Sequence[Tensor | None]] = [[None] * len(chunks[0])]
        with torch.no_grad():
            old += [[self.velocities(chunk, rollouts, text).cpu() for chunk in update] for update in chunks[1:]]
        rows, norms, skipped = [], [], 0
        for update, old_velocities, size in zip(chunks, old, sizes, strict=True):
            own, finite = [], True
            for chunk, old_velocity in zip(update, old_velocities, strict=True):
                losses, metrics = self.losses(chunk, rollouts, advantages, text, old_velocity)
                finite = finite and bool(losses.isfinite().all())
                self.scaler.scale(losses.sum() / size).backward()
                own += metrics
            everywhere = self.processes.gather((own, finite))
            rows += [row for own, _ in everywhere for row in own]
            if self.processes.count > 1 and size:  # where there is nothing to learn anywhere, nothing moves
                for parameter in self.parameters.values():
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.processes.sum_([p.grad for p in self.parameters.values() if p.grad is not None])
            if size:
                self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.optimizer.max_grad_norm)
            if all(finite for _, finite in everywhere) and norm.isfinite():
                if size:
                    self.scaler.step(self.optimizer)
                self.average()
                norms.append(norm.item())
                self.skipped_in_a_row = 0
            else:
                skipped += 1
                self.skipped_in_a_row += 1
                log.warning("iteration %d: loss or gradient is not finite; update skipped", self.iteration + 1)
            if size:
                self.scaler.update()
            self.optimizer.zero_grad()
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise SharedError(
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

    def own_chunks(self, update: list[Transition]) -> list[list[Transition]]:
        """An update's transitions of this process's groups, which are counted from 0 here, as micro-batches.

        FSDP needs as many forward passes on every process: what is missing is filled with empty micro-batches.
        """
        size = self.config.trainer.micro_batch_size
        own = [t._replace(group=t.group - self.groups.start) for t in update if t.group in self.groups]
        chunks = chunked(own, size)
        if self.divided:
            shares = self.processes.shares(self.config.rollout.prompts_per_iteration)
            most = max(sum(t.group in groups for t in update) for groups in shares)
            chunks += [[]] * (-(-most // size) - len(chunks))
        return chunks

    def velocities(self, chunk: list[Transition], rollouts: list[Rollout], text: TextEmbeds) -> Tensor:
        """Velocities (M, C, H, W) at the starts of transitions, in one forward pass; of none, that of any one."""
        chunk = chunk or [Transition(0, 0, 0)]
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
        if not chunk:
            return current.flatten()[:0].sum(0, keepdim=True), []  # no loss, and a backward pass all the same
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
        if not decay:
            return
        for name, parameter in self.parameters.items():
            self.averaged[name].lerp_(parameter, 1 - decay)

    def evaluate(self) -> Metrics:
        """Held-out prompts, fixed seeds, averaged weights: metrics, every single score, and a picture grid."""
        config, texts = self.config.evaluation, [prompt.text for prompt in self.held_out]
        seeds = [config.seed + i for i in range(len(texts))]
        own = self.processes.share(len(texts))
        drawn = list(own)
        if self.divided:  # as many forward passes on every process
            drawn += [own.start] * (max(map(len, self.processes.shares(len(texts)))) - len(own))
        with self.counter.paused(), lora.swapped(self.family.transformer, self.averaged):
            text = self.family.encode([texts[i] for i in drawn])
            images = draw(self.family, text, [seeds[i] for i in drawn], self.config.rollout.solver, self.sigmas)
        scores = self.score(own, images[: len(own) * self.family.num_frames])
        if broken := self.broken(scores):
            if self.iteration == 0:
                raise SharedError(f"evaluation of the base model: {broken}")
            log.warning("evaluation at iteration %d: %s", self.iteration, broken)  # a trained adapter is worth more
        count, frames, stem = config.num_samples, self.family.num_frames, f"{self.iteration:06d}"
        sent = images[frames // 2 :: frames][: max(0, min(len(own), count - own.start))]  # of a video its middle
        shown = [image for share in self.processes.gather(sent) for image in share]
        if self.processes.is_main:
            samples = self.output_dir / "samples"
            report.save_grid(samples / f"{stem}.png", shown, texts[: len(shown)])
            report.save_shown(samples / ("last" if self.iteration else "first"), shown, texts, seeds)
            save_scores(self.output_dir / "evaluations" / f"{stem}.jsonl", texts, seeds, scores)
        means = {label: raw.nanmean().item() for label, raw in scores.items()}
        metrics = {f"eval/{label}_mean": mean for label, mean in means.items()}
        metrics["eval/reward_mean"] = self.weighted(means)
        if config.strict is not None:
            metrics["eval/strict_accuracy"] = means[strict_reward(self.config)[0].key]
        return metrics

    def score(self, own: range, images: list[Image.Image]) -> dict[str, Tensor]:
        """Scores (N,) by every reward of all held-out images, of which this process has drawn its own."""
        samples = self.samples([self.held_out[i] for i in own], images)
        samples = replace(samples, group_size=self.frames)  # each a group of its own
        scores, problem = {}, None
        try:
            pending = [scorer.submit(samples, self.cache) for scorer in (self.scorer, self.watching)]
            scores = {
                label: self.per_sample(raw) for wait in pending for label, raw in wait(self.watcher.before_pass).items()
            }
        except UserError as error:
            problem = str(error)
        if problem := self.processes.agree(problem):
            raise SharedError(problem)
        shares = self.processes.gather(scores)
        return {label: torch.cat([share[label] for share in shares]) for label in scores}

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
            "scaler": self.scaler.state_dict(),
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
        if state.get("scaler"):  # of float16
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"]

    def export(self) -> Path:
        """Write `adapter/pytorch_lora_weights.safetensors` and prove that diffusers loads it as it was trained."""
        path = self.output_dir / "adapter" / FILE_NAME
        with self.counter.paused(), lora.swapped(self.family.transformer, self.averaged):
            if self.processes.is_main:
                save_adapter(path, self.family, self.config)
            self.processes.gather(None)  # the file is there
            text = self.family.encode([self.held_out[0].text])
            latents = gaussian_noise((1, *self.family.latent_shape), 0).to(self.device)
            check_export(path, self.family, text, latents)
        return path


class EvaluationCounter:
    """Counts samples through a module, apart for passes with and without gradient: NFE_theta and NFE_old."""

    def __init__(self, module: nn.Module):
        self.old = self.theta = 0
        self.active = True
        module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active:
            samples = len(args[0] if args else kwargs["hidden_states"])
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

    def per_sample(self, samples: int, processes: Processes) -> Metrics:
        """NFE of all processes divided by the samples of the iteration."""
        old, theta = map(sum, zip(*processes.gather((self.old, self.theta)), strict=True))
        return {"nfe/old_per_sample": old / samples, "nfe/theta_per_sample": theta / samples}


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


class Stages:
    """Wall time of the stages of an iteration, and on a GPU the most memory that PyTorch held in each."""

    def __init__(self) -> None:
        self.metrics: Metrics = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, on_gpu = time.perf_counter(), torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if on_gpu:
            torch.cuda.synchronize()
            self.metrics[f"memory/{stage}_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.metrics[f"time/{stage}_s"] = time.perf_counter() - start


def parts(*networks: nn.Module) -> list[nn.Module]:
    """Every module in these."""
    return [module for network in networks for module in network.modules()]


def on_cpu(state: Any) -> Any:
    """A copy of nested dictionaries and lists, their tensors in system memory."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(on_cpu, state))
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state


def iteration_seconds(metrics: Metrics) -> float:
    """How long an iteration took, without an evaluation."""
    return sum(metrics[f"time/{stage}_s"] for stage in ("rollout", "reward", "update"))


def strict_reward(config: RunConfig) -> list[RewardConfig]:
    """The pass-or-fail reward of the evaluation, if there is one."""
    name = config.evaluation.strict
    given = {reward.name: reward for reward in (*config.rewards.train, *config.evaluation.rewards)}
    return [] if name is None else [given.get(name, RewardConfig(name=name))]


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
