"""Runs in the graph: their names, folders and adapters, and the configuration that a node describes.

A graph may come from a stranger: it names no file out of ComfyUI's folders, runs no code but that of rewards in
models/ngrpo_rewards, and pushes nothing to the Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from huggingface_hub import constants

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import PromptsConfig, RewardConfig, RunConfig, load_config, preset_names
from ngrpo_lora.config.section import DEVICE_PATTERN
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._loading import family_class
from ngrpo_lora.planning.preflight import check_resumable, check_run
from ngrpo_lora.prompts.sources import Sources, read_split
from ngrpo_lora.records.checkpoints import checkpoints
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.training.best import ended_early

from ._api import check_path, filled_lines, own_folders
from .rewards import Entries, admitted

FOLDER = "ngrpo"
"""Folder within output/ for runs, and within the first loras folder for their adapters."""

GO_ON, ANEW = "go on with it", "start anew beside it"
PACKAGED = {"ngrpo_lora.world.freedom:freedom"}
"""Measures outside of ComfyUI's folders that a graph may name: those of presets."""

TAKEN = {
    "output_dir": "is output/ngrpo/NAME: set name",
    "resume": "is found by name: set name and earlier_run",
    "seed": "has a widget: set run_seed",
    "hub": "is not for graphs: `ngrpo push` pushes a finished run",
}
"""Keys of the configuration that overrides must leave alone, and why."""


def run_dir(name: str) -> Path:
    """Folder of the run of this name."""
    return Path(folder_paths.get_output_directory()) / FOLDER / name


def lora_name(name: str) -> str:
    """Name of a run's adapter in ComfyUI's lists."""
    return os.path.join(FOLDER, f"{name}.safetensors")


def lora_path(name: str) -> Path:
    """Path of a run's adapter in the first loras folder."""
    return Path(folder_paths.get_folder_paths("loras")[0]) / lora_name(name)


INPUTS: dict[str, tuple[Path, ...]] = {}
"""Files that runs were made from, by name: of runs since ComfyUI was started."""

LEFT: dict[str, tuple[int, ...]] = {}
"""`file_times` of runs by name, as their nodes left them: while they hold, later nodes need not compute again."""


def file_times(name: str) -> tuple[int, ...]:
    """Times in ns at which a run's adapter, its copy among the LoRAs and its inputs were written, 0 for none."""
    files = (run_dir(name) / "adapter" / FILE_NAME, lora_path(name), *INPUTS.get(name, ()))
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


def free_name(name: str) -> str:
    """The first of `name`, `name-2` and so on that neither a run nor an adapter has."""
    number, free = 1, name
    while run_dir(free).exists() or lora_path(free).exists():
        number += 1
        free = f"{name}-{number}"
    return free


def check_name(name: str) -> None:
    """Raise ConfigError where `name` cannot be that of a run."""
    if not re.fullmatch(r"\w([\w .-]{0,98}\w)?", name, re.ASCII):
        raise ConfigError(
            "name must be letters from a to z, digits, spaces, ., - and _, beginning and ending with a letter or digit,"
            f" got {name!r}; it is a file's name, without a folder"
        )


def configure(
    preset: str, name: str, overrides: str, iterations: int, seed: int, prompts: str = "", rewards: Entries = ()
) -> RunConfig:
    """Configuration of the run that a node describes; nothing is read but what the overrides name.

    Raises:
        ConfigError: one line per problem.
    """
    check_name(name)
    if preset not in preset_names():  # `load_config` reads files too
        raise ConfigError(f"preset must be one of {', '.join(preset_names())}, got {preset!r}")
    lines = [line for line in filled_lines(overrides) if line[0] != "#"]
    given = ["=".join(part.strip() for part in line.split("=", 1)) for line in lines]
    for line in given:
        key = line.partition("=")[0].partition(".")[0]
        if key in TAKEN:
            raise ConfigError(f"overrides must leave {key} out, which {TAKEN[key]}; got {line!r}")
    own = [f"output_dir={as_yaml(str(run_dir(name)))}", f"seed={seed}"]
    if iterations:
        own.append(f"trainer.num_iterations={iterations}")
    if prompts:
        own.append(f"prompts.train={as_yaml(str(prompts_path(name, prompts)))}")
    if rewards:
        own.append(f"rewards.train={as_yaml([reward.model_dump(mode='json') for reward in rewards])}")
    device = str(comfy.model_management.get_torch_device())
    if re.fullmatch(DEVICE_PATTERN, device) and not any(line.startswith("model.device=") for line in given):
        own.append(f"model.device={device}")
    return within_folders(load_config(preset, [*given, *own]), given_rewards=bool(rewards))


def as_yaml(value: Any) -> str:
    """A value as one line of YAML, for an override."""
    return json.dumps(value, ensure_ascii=False)


def within_folders(config: RunConfig, given_rewards: bool) -> RunConfig:
    """Turn names of ComfyUI's files in a configuration into paths, and check all of its paths and functions.

    Raises:
        ConfigError: a path out of ComfyUI's folders, or a reward or measure that no graph may ask for.
    """
    model, lora = config.model, config.lora
    folders = [Path(root) / model.path for root in folder_paths.get_folder_paths("diffusers")]
    for folder in folders:
        if folder.is_dir():
            model = model.model_copy(update={"path": str(folder)})
            break
    check_path(model.path, "model.path")
    if lora.init_from is not None:
        known = folder_paths.get_full_path("loras", lora.init_from)
        lora = lora.model_copy(update={"init_from": known or lora.init_from})
        check_path(known or lora.init_from or "", "lora.init_from")
    prompts = {key: sources for key, sources in config.prompts if key in ("train", "held_out")}
    for key, sources in prompts.items():
        if not isinstance(sources, float):
            prompts[key] = placed(sources)
            check_sources(prompts[key], f"prompts.{key}")
    if config.evaluation.strict is not None:
        admitted(RewardConfig(name=config.evaluation.strict))
    watched = tuple(map(admitted, config.evaluation.rewards))
    for reference in set(config.evaluation.measures) - PACKAGED:
        admitted(RewardConfig(name=reference))
    evaluation = config.evaluation.model_copy(update={"rewards": watched})
    # Those of reward nodes were admitted there, and know their servers' keys since.
    trained = config.rewards.train if given_rewards else tuple(map(admitted, config.rewards.train))
    own = config.rewards.model_copy(update={"train": trained})
    given = config.prompts.model_copy(update=prompts)
    return config.model_copy(
        update={"model": model, "lora": lora, "prompts": given, "evaluation": evaluation, "rewards": own}
    )


def placed(sources: Sources) -> Sources:
    """Turn names of files in ComfyUI's input folder into paths, a column after its # kept; others stay as they are."""
    if not isinstance(sources, str):
        return {str(placed(name)): weight for name, weight in sources.items()}
    folder = Path(folder_paths.get_input_directory())
    there = any((folder / name).is_file() for name in (sources, sources.rpartition("#")[0]) if name)
    return str(folder / sources) if there else sources


def check_sources(sources: Sources, key: str) -> None:
    """Raise ConfigError where prompts are a file out of ComfyUI's folders."""
    for source in [sources] if isinstance(sources, str) else sources:
        check_path(re.split("[#?]", source.removeprefix("hf:"), maxsplit=1)[0], key)


def check_pictures(prompts: PromptsConfig) -> None:
    """Check that prompts name no source picture out of ComfyUI's folders; those of datasets may be in the Hub's cache.

    Raises:
        ConfigError: as `read_split`, or a picture lies elsewhere.
    """
    own = own_folders()
    cache = [Path(folder).resolve() for folder in (constants.HF_HOME, constants.HF_HUB_CACHE)]
    for key, tables in read_split(prompts)._asdict().items():
        for name, table in tables.items():
            allowed = own + cache if name.startswith("hf:") else own
            for picture in (one for prompt in table.prompts for one in (prompt.source, prompt.mask) if one is not None):
                path = picture.content
                if isinstance(path, Path) and not any(path.resolve().is_relative_to(folder) for folder in allowed):
                    raise ConfigError(
                        f"prompts.{key} must have source pictures in ComfyUI's folders, but {picture.name!r} "
                        f"({picture.place}) is elsewhere; put it beside the prompts"
                    )


def check_without_source(config: RunConfig) -> None:
    """Check that prompts of the node, which have no pictures, are for a model that draws from text alone.

    Raises:
        ConfigError: the model starts from a picture.
        UserError: as `family_class`.
    """
    if family_class(config.model).edits:
        raise ConfigError(
            f"prompts must be empty for {config.model.path!r}, which starts each prompt from a picture; write "
            "prompts.train=edits.jsonl into overrides, a file in ComfyUI's input folder with columns prompt and source"
        )


def prompt_lines(prompts: str) -> list[str]:
    """Prompts of a text, one a line, without empty lines.

    Raises:
        ConfigError: there is no prompt.
    """
    lines = filled_lines(prompts)
    if not lines:
        raise ConfigError(f"prompts must have at least one line of text, got {prompts!r}; one line is one prompt")
    return lines


def prompts_path(name: str, prompts: str) -> Path:
    """File of a run's prompts, named by their digest, so that a run that goes on notices other prompts."""
    digest = hashlib.sha256("\n".join(prompt_lines(prompts)).encode()).hexdigest()[:12]
    return run_dir(name) / f"prompts-{digest}.txt"


def check_earlier(config: RunConfig) -> None:
    """Check that nothing is overwritten, and that a run that goes on stays the same.

    Raises:
        ConfigError: a run of that name has other settings, or there is an adapter without its run.
    """
    folder = Path(config.output_dir)
    if checkpoints(folder):
        try:
            check_resumable(config)
        except ConfigError as error:
            raise ConfigError(
                f"There is a run {folder.name!r} already, and it has other settings:\n{error}\nUndo them to go on with "
                f"it, or choose another name, or {ANEW!r}."
            ) from None
    elif lora_path(folder.name).exists():
        raise ConfigError(
            f"name must be new, or that of a run in output/{FOLDER}, got {folder.name!r}: there is "
            f"{str(lora_path(folder.name))!r}, but no such run; choose another name, or move the file away"
        )


def check_writable(folder: Path) -> None:
    """Make a folder, and check that a megabyte can be written in it.

    Raises:
        UserError: the folder cannot be made or written in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        raise UserError(
            f"The adapter will be written to {str(folder)!r}, but that is not possible: {error.strerror}. Nothing was "
            "trained yet; make the folder writable, or free some space."
        ) from None


def put_adapter(source: Path, name: str) -> str:
    """Copy an adapter to where LoRA lists find it, and return its name there."""
    target = lora_path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written(target) as partial:
        shutil.copy2(source, partial)  # with its time, by which loaders would otherwise take it for another file
    return lora_name(name)


def iteration_of(checkpoint: Path) -> int:
    """Number of iterations after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def finished(config: RunConfig) -> bool:
    """Whether a run has done all its iterations, or ended early as it should, and written its adapter and summary."""
    folder, found = Path(config.output_dir), checkpoints(Path(config.output_dir))
    if not found or not (folder / "adapter" / FILE_NAME).is_file() or not (folder / "summary.png").is_file():
        return False
    done = iteration_of(found[-1]) >= config.trainer.num_iterations
    return done or ended_early(config.trainer, read_metrics(folder / "metrics.jsonl"))


def prepared(config: RunConfig, prompts: str) -> RunConfig:
    """Configuration of the run as it starts: from its latest checkpoint where it has one, with its prompts on disk.

    Raises:
        ConfigError: one line per problem.
    """
    folder = Path(config.output_dir)
    if checkpoints(folder):
        config = config.model_copy(update={"resume": "latest"})
    else:
        (folder / "config.yaml").unlink(missing_ok=True)  # of one that was killed before its first checkpoint
    if prompts:
        check_without_source(config)
        prompts_path(folder.name, prompts).write_text("\n".join(prompt_lines(prompts)) + "\n", encoding="utf-8")
    check_pictures(config.prompts)  # before one is opened
    check_run(config)
    return config
