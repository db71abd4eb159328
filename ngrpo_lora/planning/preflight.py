"""What can be found wrong with a run before its model loads: files, functions, packages, the output folder."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig, RunConfig, changed_keys, load_config, named_functions
from ngrpo_lora.config.presets import check_model
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.planning.fitting import unfitting
from ngrpo_lora.planning.loras import fused, initial, known_pipeline_of, with_files_of
from ngrpo_lora.planning.misfits import misfits, watched
from ngrpo_lora.prompts.sources import Split, read_split
from ngrpo_lora.records.checkpoints import checkpoints, find, iteration_of, number, resolve
from ngrpo_lora.records.ownership import making, owner

__all__ = ["check_functions", "check_resumable", "check_run", "check_settings"]

# What a resumed run may change: where it runs, how long, what it reports, and what a message advises that ends a run;
# nothing else that changes its updates, or that its evaluations depend on, which are compared with the base's.
MAY_CHANGE = (
    *("output_dir", "resume", "hub.", "tracking", "trainer.", "rollout.micro_batch_size"),
    *(f"evaluation.{key}" for key in ("every", "micro_batch_size", "num_samples", "measures")),
    *("model.device", "model.swap_blocks", "model.text_encoders", "model.vae_tiling"),
    *("optimizer.learning_rate", "rewards.max_failed_share"),
)
MAY_CHANGE_BEFORE_BASE = (*MAY_CHANGE, "evaluation.")  # where the base is still to be evaluated
REMOTE = ("hf:", "hpdv2:")  # prompts that a network may be asked for


def check_run(config: RunConfig) -> None:
    """Check that a run can start here; the output folder is tried and left as it was.

    Raises:
        ConfigError: one line per problem.
    """
    split, problems = _prompts(config)
    problems += [*_settings(config), *_output_dir(config)]
    problems = problems or [*_family(config)]
    problems = problems or [*misfits(config, split)]
    problems = problems or [*unfitting(config)]
    problems = problems or [*_not_writable(Path(config.output_dir))]
    problems = problems or [*_hub(config)]  # last, as it may make the repository
    if problems:
        raise ConfigError(problems)


def check_settings(config: RunConfig) -> None:
    """Do the checks of `check_run` that ask no network and write nothing; the output folder is not looked at.

    Raises:
        ConfigError: one line per problem.
    """
    sources = (config.prompts.train, config.prompts.held_out)
    sources = [[one] if isinstance(one, str) else one for one in sources if isinstance(one, str | dict)]
    local = not any(name.startswith(REMOTE) for source in sources for name in source)
    if problems := [*(_prompts(config)[1] if local else ()), *_settings(config)]:
        raise ConfigError(problems)


def check_functions(config: RunConfig) -> None:
    """Check that the files and modules of all functions that the configuration names are there.

    Raises:
        ConfigError: one line per function that is not.
    """
    if problems := [*_functions(config)]:
        raise ConfigError(problems)


def check_resumable(config: RunConfig) -> None:
    """Check that the run in the output folder has the same settings, but for those that may change.

    Raises:
        ConfigError: one line per setting that differs.
    """
    output_dir = Path(config.output_dir)
    evaluated = any(number(folder) for folder in checkpoints(output_dir))
    if problems := [*_changes(output_dir / "config.yaml", config, evaluated)]:
        raise ConfigError(problems)


def _settings(config: RunConfig) -> Iterator[str]:
    yield from _functions(config)
    yield from _model(config)
    yield from _packages(config)
    yield from initial(config)
    yield from fused(config)
    yield from _of_edits(config)


def _prompts(config: RunConfig) -> tuple[Split, list[str]]:
    """The tables of prompts, or what is wrong with them."""
    try:
        return read_split(config.prompts), []
    except ConfigError as error:
        return Split({}, {}), [*error.problems]


def _functions(config: RunConfig) -> Iterator[str]:
    for key, name in named_functions(config).items():
        try:
            registry.check_function(name)
        except ConfigError as error:
            yield f"{key} {error}"


def _model(config: RunConfig) -> Iterator[str]:
    path = Path(config.model.path)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            yield f"model.path must be a diffusers folder, but {str(path)!r} holds no model_index.json"
    elif path.is_file():
        yield f"model.path must be a folder, but {str(path)!r} is a file; give its diffusers folder"
    else:
        try:
            check_model(config.model.path)
        except ConfigError as error:
            yield str(error)


def _family(config: RunConfig) -> Iterator[str]:
    """Whether the model can be had and is of a known family, by its small index file; nothing else is downloaded."""
    from ngrpo_lora.models._index import family_of

    try:
        family_of(config.model)
        if config.model.edits is not None:
            from ngrpo_lora.models._loading import family_class  # diffusers is slow to import

            family_class(config.model)
    except UserError as error:
        yield str(error)


def _of_edits(config: RunConfig) -> Iterator[str]:
    """Whether the model edits what rewards of edits judge its pictures beside."""
    judging = [reward.key for reward in (*config.rewards.train, *watched(config).values()) if reward.judges_edits]
    if not judging or (pipeline := known_pipeline_of(config)) is None:
        return

    from ngrpo_lora.models._index import edits_pictures

    if not edits_pictures(config.model, pipeline):
        yield (
            f"rewards: {judging[0]} judges edits beside their sources, but model.path {config.model.path!r} edits no "
            "pictures; leave it out, or begin with a preset of a model that does, such as demo-edit or flux-kontext"
        )


def _hub(config: RunConfig) -> Iterator[str]:
    """Whether the run can be pushed; without `hub.repo` nothing is asked."""
    if config.hub.repo is not None:
        from ngrpo_lora.hub.pushing import check_access

        try:
            check_access(config.hub)
        except UserError as error:
            yield str(error)


def _packages(config: RunConfig) -> Iterator[str]:
    if config.optimizer.name.endswith("_8bit") and importlib.util.find_spec("bitsandbytes") is None:
        name = config.optimizer.name
        yield f"optimizer.name={name} needs bitsandbytes, which is not installed; pip install bitsandbytes"
    for name in (tracker.name for tracker in config.tracking):
        if importlib.util.find_spec(name) is None:
            yield (
                f"tracking: {name} needs the package {name}, which is not installed; "
                f"pip install {name.replace('_', '-')}"
            )
    if config.model.quantization != "none":
        from ngrpo_lora.devices import resolve_device
        from ngrpo_lora.models._quantization import check_quantization

        try:
            check_quantization(config.model.quantization, resolve_device(config.model.device))
        except UserError as error:
            yield str(error)


def _output_dir(config: RunConfig) -> Iterator[str]:
    """Whether the output folder is free, and holds what is to be gone on with, or nothing that a new run would lose."""
    output_dir = Path(config.output_dir)
    if used := owner(output_dir):
        yield used
        return
    if wrong := [*_other_kinds(output_dir)]:
        yield from wrong
        return
    resume = resolve(config.resume, output_dir)
    if resume is None:
        yield from _new_run(config, output_dir)
        return
    try:
        if resume == "latest" and not checkpoints(output_dir):
            folder = str(output_dir / "checkpoints")
            remedy = _anew(output_dir) or "drop resume to start anew"
            yield f"resume=latest needs a checkpoint, but {folder!r} holds none; {remedy}"
            return
        folder = find(resume, output_dir).resolve()
    except UserError as error:
        yield str(error)
        return
    run_dir, iteration, total = folder.parents[1], iteration_of(folder), config.trainer.num_iterations
    own = run_dir == output_dir.resolve()  # else evaluations begin anew in the new folder
    if iteration is not None and iteration > total:
        yield (
            f"trainer.num_iterations must be at least {iteration}, which checkpoint {str(folder)!r} is after, got "
            f"{total}; give at least {iteration}, or resume from an earlier checkpoint"
        )
    if (output_dir / "config.yaml").exists() and not own:
        yield f"output_dir must be the resumed run's ({str(run_dir)!r}) or a new one, got {config.output_dir!r}"
    if (run_dir / "config.yaml").is_file():
        yield from _changes(run_dir / "config.yaml", config, own and iteration != 0)


def _other_kinds(output_dir: Path) -> Iterator[str]:
    """Files in place of a run's folders, and folders in place of its files, which it would find out when it saves."""
    for name in ("adapter", "checkpoints", "evaluations", "samples"):
        path = output_dir / name
        if path.exists() and not path.is_dir():
            yield f"output_dir must have a folder {name!r}, or nothing of that name, but {str(path)!r} is none; move it"
    for name in ("config.yaml", "inputs.json", "metrics.jsonl", "report.html", "summary.png"):
        if (path := output_dir / name).is_dir():
            yield f"output_dir must have a file {name!r}, or nothing of that name, but {str(path)!r} is none; move it"


def _anew(output_dir: Path) -> str | None:
    """How to begin with the adapter of a run whose checkpoints are gone; None where it has none."""
    adapter = output_dir / "adapter"
    if not any(adapter.glob("*")):
        return None
    return f"no checkpoint is left of its run: give another output_dir, with lora.init_from={adapter}"


def _new_run(config: RunConfig, output_dir: Path) -> Iterator[str]:
    """Whether the folder holds another run; one that was killed before its first checkpoint may start again.

    With other settings too, where not even the base was evaluated: a mistake in them may be what ended it.
    """
    path, metrics = output_dir / "config.yaml", output_dir / "metrics.jsonl"
    if not path.exists():
        return
    resumed = "give resume=latest to go on with it, or another output_dir" if checkpoints(output_dir) else None
    if remedy := resumed or _anew(output_dir):
        yield f"output_dir must not hold another run, but {config.output_dir!r} does; {remedy}"
        return
    if metrics.is_file() and not metrics.stat().st_size:
        return
    try:
        changed = _other_settings(load_config(path), config, MAY_CHANGE_BEFORE_BASE)
    except ConfigError as error:
        changed = [*error.problems]
    if changed:
        yield (
            f"output_dir must not hold another run, but {config.output_dir!r} has the beginning of one, without a "
            f"checkpoint, that has other settings ({changed[0]}); give another output_dir, or remove that folder"
        )


def _changes(path: Path, config: RunConfig, evaluated: bool) -> Iterator[str]:
    """Differences to the run's own configuration that would make the resumed run another one.

    Args:
        evaluated: whether the resumed run keeps the evaluation of its base, with which later ones are compared.
    """
    try:
        old = load_config(path)
    except ConfigError as error:
        yield from (f"resume: {path}: {problem}" for problem in error.problems)
        return
    same = with_files_of(_with_calls_of(old, config), config, path.parent)
    for change in _other_settings(same, config, MAY_CHANGE_BEFORE_BASE):
        yield f"a resumed run must keep its settings, but {change}; undo it, or start anew in another output_dir"
    for change in _evaluated_otherwise(old, config) if evaluated else ():
        yield (
            f"a resumed run must evaluate as it did its base, or the two could not be compared, but {change}; undo it, "
            f"or start anew in another output_dir with lora.init_from={str(path.parent)!r}"
        )


def _other_settings(old: RunConfig, new: RunConfig, may_change: tuple[str, ...]) -> list[str]:
    """Differences that make the new configuration another run, such as `seed: 0 -> 1`."""
    return [change for change in changed_keys(old, new) if not change.startswith(may_change)]


def _evaluated_otherwise(old: RunConfig, new: RunConfig) -> Iterator[str]:
    """Differences by which figures of evaluations could not be compared; what is watched may come or go."""
    allowed = (*MAY_CHANGE, "evaluation.rewards", "evaluation.strict")
    yield from (change for change in _other_settings(old, new, allowed) if change.startswith("evaluation."))
    before, after = old.evaluation.measures, new.evaluation.measures
    if {*before} - {*after} and {*after} - {*before}:  # one may be measured by another function under the same name
        yield f"evaluation.measures: {[*before]} -> {[*after]}"
    now = watched(new)
    for key, reward in watched(old).items():
        if key in now and (was := _called_as(reward, now[key])) != now[key]:
            shown = (str(one.model_dump(mode="json", exclude_defaults=True)) for one in (was, now[key]))
            yield f"{key}: {' -> '.join(shown)}"


def _with_calls_of(old: RunConfig, new: RunConfig) -> RunConfig:
    """The old configuration with what may change of the new one's rewards, for those that are in both."""
    known = {reward.key: reward for reward in new.rewards.train}
    train = tuple(_called_as(reward, known.get(reward.key)) for reward in old.rewards.train)
    return old.model_copy(update={"rewards": old.rewards.model_copy(update={"train": train})})


def _called_as(old: RewardConfig, new: RewardConfig | None) -> RewardConfig:
    """A reward with what may change as another of its kind has it."""
    if type(old) is not type(new):
        return old
    return old.model_copy(update={field: getattr(new, field) for field in old.may_change})


def _not_writable(output_dir: Path) -> Iterator[str]:
    """Whether the folder can be made and written to; what was made to try it is gone again."""
    try:
        with making(output_dir), tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        yield f"output_dir must be a writable folder, but {str(output_dir)!r} is not: {error.strerror}; choose another"
