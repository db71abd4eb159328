"""Turns a checked configuration into the parts of a run: what is refused is refused before anything large is loaded."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.fusing import load_fused
from ngrpo_lora.adapters.loading import read_initial
from ngrpo_lora.algorithms._opening import open_algorithm
from ngrpo_lora.config import ModelConfig, RunConfig
from ngrpo_lora.devices import resolve_device, use_device
from ngrpo_lora.errors import ConfigError, SharedError, UserError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._embeddings import EmbeddingCache
from ngrpo_lora.models._loading import family_class, load_family
from ngrpo_lora.models._offload import blocks_of
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.sources import PromptSource, count_longer, open_run, training_prompts
from ngrpo_lora.ranks import process_device
from ngrpo_lora.records.checkpoints import drop_after, resolve
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.training.best import Best
from ngrpo_lora.training.lora_step import LoraStep
from ngrpo_lora.training.measuring import open_measures
from ngrpo_lora.training.metering import EvaluationCounter
from ngrpo_lora.training.processes import Processes, base_is_sharded, shard
from ngrpo_lora.training.recorder import Recorder
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.screen import Screen
from ngrpo_lora.training.state import resume
from ngrpo_lora.training.tracking import Tracking
from ngrpo_lora.training.watcher import Watcher, Watchers, attend

log = logging.getLogger(__name__)


def prepare(config: RunConfig, *watchers: Watcher, family: BaseFamily | None = None) -> Run:
    """Everything that a run needs, loaded; where it resumes, as it was at its checkpoint.

    Args:
        watchers: told what happens after the run's own, which write its records and the screen.
        family: a model without an adapter, in place of the configured one, which is then not loaded.
    Raises:
        UserError: it does not fit the processes, or a reward, measure, model, adapter or checkpoint cannot be had.
    """
    folder = Path(config.output_dir)
    config = config.model_copy(update={"resume": resolve(config.resume, folder)})
    device = process_device(resolve_device(config.model.device))
    use_device(device)
    processes = Processes(device, config.trainer.timeout_s)
    if config.trainer.num_threads is not None:  # accelerate has a number of its own
        torch.set_num_threads(config.trainer.num_threads)
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    if processes.is_main:  # before the others go on
        folder.mkdir(parents=True, exist_ok=True)
    if problem := processes.agree(misfit(config, processes.count)):
        raise SharedError(problem)
    own: list[Watcher] = [recorder := Recorder(), Tracking(recorder), Screen()] if processes.is_main else [Screen()]
    looking_on = Watchers([*own, *watchers])
    steps = foreseen_steps(config, family)
    algorithm = open_algorithm(config, steps)
    prompts, held_out = open_run(config)
    # Rewards and measures come first: what they lack should be known before a large model is loaded.
    scorer, watching, score_cache = open_rewards(config, device, processes)
    with ExitStack() as failing:
        failing.callback(scorer.close)  # such as a page, which would otherwise stay open
        measures = open_measures(config.evaluation.measures, processes)
        check_shown(config, family or family_class(config.model), scorer, watching)
        model = config.model.model_copy(update={"device": device})  # as this process has it
        family = family or load_model(config, model, processes, looking_on, prompts, held_out)
        watch_passes(looking_on, family)
        parameters = add_lora(config, family, processes.count)
        lora_step = LoraStep(config.optimizer, parameters, processes, family.dtype, family.device)
        counter = EvaluationCounter(family.transformers, processes)
        run = Run(
            config,
            processes,
            looking_on,
            family,
            lora_step,
            algorithm,
            family.schedule(config.rollout.num_steps, config.rollout.shift),
            family.schedule(config.evaluation_steps, config.rollout.shift),
            prompts,
            held_out,
            scorer,
            watching,
            score_cache,
            measures,
            counter,
            best=Best(config.trainer.keep_best, config.trainer.early_stopping_patience),
        )
        warn(run)
        take_up(run)
        failing.pop_all()
    return run


def take_up(run: Run) -> None:
    """Bring a run that resumes to where its checkpoint was; a new one forgets what one that was killed has left."""
    if run.config.resume is not None:
        resume(run, run.config.resume)
    elif run.processes.is_main:
        drop_after(Path(run.config.output_dir), -1)  # before its first checkpoint


def misfit(config: RunConfig, count: int) -> str | None:
    """What of the configuration does not fit so many processes."""
    groups = config.rollout.prompts_per_iteration
    if groups < count:
        return f"rollout.prompts_per_iteration must be at least the number of processes ({count}), got {groups}"
    if base_is_sharded(config.trainer.strategy, count) and groups % count:
        return (
            f"rollout.prompts_per_iteration must be a multiple of the number of processes ({count}) with "
            f"trainer.strategy=fsdp, got {groups}"
        )
    if config.rewards.asks_people and count > 1:
        return f"a reward that asks people needs a run of one process, got {count}; start it with --num-processes 1"
    return None


def foreseen_steps(config: RunConfig, family: BaseFamily | None) -> range:
    """The steps of a rollout at which the adapter can be trained, known before the model is loaded.

    Raises:
        UserError: `model.expert` does not fit the model, or there are no such steps.
    """
    if family is None:
        return family_class(config.model).foreseen_steps(config.model, config.rollout)
    return family.trained_steps(family.sigmas(config.rollout.num_steps, config.rollout.shift))


def open_rewards(config: RunConfig, device: str, processes: Processes) -> tuple[Scorer, Scorer, ScoreCache | None]:
    """The rewards that are trained on, those that evaluations add, and the cache of scores, where one is asked for.

    Raises:
        SharedError: a reward lacks what it needs, or cannot be imported, on some process.
    """
    folder = Path(config.output_dir)
    trained = [reward.within(folder) for reward in config.rewards.train]
    known = [reward.key for reward in trained]
    watched = [*config.evaluation.rewards, *([config.strict_reward] if config.strict_reward else [])]
    scorers, problem = [], None
    with ExitStack() as failing:
        try:
            for chosen in (trained, [reward for reward in watched if reward.key not in known]):
                scorers.append(scorer := Scorer(chosen, device))
                failing.callback(scorer.close)
        except UserError as error:
            problem = str(error)
        if problem := processes.agree(problem):
            raise SharedError(problem)
        failing.pop_all()
    scorer, watching = scorers
    caching = any(reward.cache for reward in (*trained, *watched))
    return scorer, watching, ScoreCache(folder / "scores.sqlite") if caching else None


def load_model(
    config: RunConfig,
    model: ModelConfig,
    processes: Processes,
    watchers: Watchers,
    prompts: PromptSource,
    held_out: list[Prompt],
) -> BaseFamily:
    """The model; with `model.text_encoders: cache` its encoders come and go before the transformer is loaded."""
    sharded = base_is_sharded(config.trainer.strategy, processes.count)
    if model.text_encoders != "cache":
        return load_fused(model, base_is_sharded=sharded)
    cache = EmbeddingCache(Path(config.output_dir) / "embeddings", model)
    negative = [] if family_class(model).edits else [model.negative_prompt]
    missing = cache.missing([*map(prompts.prompt, training_prompts(config)), *held_out, *negative])
    mine = [missing[i] for i in processes.share(len(missing))]
    if mine:
        log.info("encoding %d prompts into %s", len(mine), cache.folder)
        family = load_family(model, "text")
        attend(watchers, modules_of(*family.encoders))
        cache.fill(family, mine)
    processes.gather(None)  # all files are there
    family = load_fused(model, "image", sharded)
    family.cache = cache
    return family


def check_shown(config: RunConfig, family: BaseFamily | type[BaseFamily], *scorers: Scorer) -> None:
    """Raise ConfigError where people would be asked about frames as if each were a candidate, or videos are missing."""
    draws_videos, rewards = family.num_frames != 1, [reward for one in scorers for reward in one.rewards.values()]
    if not draws_videos and (of_videos := [reward.label for reward in rewards if reward.form == "video"]):
        raise ConfigError(
            f"reward {of_videos[0]} is of videos, but model.path {config.model.path!r} draws single pictures; leave "
            "it out, or give a video model and model.num_frames"
        )
    frames = min(config.rewards.frames, config.model.num_frames or config.rewards.frames) if draws_videos else 1
    if config.rewards.asks_people and frames > 1:
        raise ConfigError(
            f"rewards.frames must be 1 with a reward that asks people, who see one picture of each video, got {frames}"
        )


def watch_passes(watchers: Watchers, family: BaseFamily) -> None:
    """Let watchers know of every pass through a block of the transformer and a part of the VAE and the encoders."""
    # A compiled block would have the call in its graph.
    blocks = [] if family.config.compile else family.blocks
    attend(watchers, [*family.transformers, *blocks, *modules_of(family.vae, *family.encoders)])


def modules_of(*networks: nn.Module) -> list[nn.Module]:
    """Every module within these, themselves included."""
    return [module for network in networks for module in network.modules()]


def add_lora(config: RunConfig, family: BaseFamily, num_processes: int) -> dict[str, nn.Parameter]:
    """Put the adapter on the transformer, which is then checkpointed, sharded and compiled as configured.

    Returns:
        The adapter's parameters by name.
    Raises:
        UserError: no layer of this model is adapted, or `lora.init_from` does not fit.
    """
    transformer = family.transformer
    suffixes, excluded = family.lora_targets(config.lora.targets)
    lora.inject(transformer, config.lora, suffixes, excluded, derive_seed(config.seed, "lora"))
    if config.lora.init_from is not None and config.resume is None:
        lora.start_from(transformer, read_initial(family, config.lora.init_from), excluded)
    if config.trainer.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    parameters = lora.parameters(transformer)
    if base_is_sharded(config.trainer.strategy, num_processes):
        for one in family.transformers:
            shard(one, blocks_of(one), set(parameters.values()), family.device)
    if config.model.compile:
        family.compile_blocks()
    return parameters


def warn(run: Run) -> None:
    """Say what makes a run slower, or a prompt shorter, than one might think."""
    device = run.family.device
    names = run.processes.gather(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    if not run.processes.is_main:
        return
    if len(set(names)) > 1:
        log.warning(
            "processes run on different devices (%s): each iteration waits for the slowest, and the one with the "
            "least memory sets the micro-batch; CUDA_VISIBLE_DEVICES chooses",
            ", ".join(names),
        )
    texts = list({prompt.text for prompt in (*map(run.prompts.prompt, range(1000)), *run.held_out)})
    for name, (tokenizer, limit) in run.family.tokenizers().items():
        if longer := count_longer(texts, tokenizer, limit):
            log.warning("%s reads %d tokens: %d of %d prompts are cut there", name, limit, longer, len(texts))
