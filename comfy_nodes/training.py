"""Train: Neighbor GRPO from the graph, with the configuration of the `ngrpo train` command.

A graph may come from a stranger: it names no file out of ComfyUI's folders, runs no code but that of rewards in
models/ngrpo_rewards, and pushes nothing to the Hub.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import RewardConfig, RunConfig, load_config, preset_names
from ngrpo_lora.config.section import DEVICE_PATTERN
from ngrpo_lora.devices import is_out_of_memory
from ngrpo_lora.errors import ConfigError, OutOfMemory, UserError, first_line
from ngrpo_lora.planning.preflight import check_resumable, check_run, check_settings
from ngrpo_lora.prompts.sources import Sources
from ngrpo_lora.records.checkpoints import checkpoints
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.reports.curves import Group, draw_progress, shown_pictures
from ngrpo_lora.reports.tables import figures
from ngrpo_lora.training.best import ended_early
from ngrpo_lora.training.watcher import Watcher
from ngrpo_lora.types import Metrics

from ._api import check_path, schema, show_text, to_images
from .rewards import Chosen, Entries, Rewards, admitted

FOLDER = "ngrpo"
"""Folder within output/ for runs, and within the first loras folder for their adapters."""

GO_ON, ANEW = "go on with it", "start anew beside it"
PREVIEW_S = 1.0
PREVIEW_SHARE = 0.05
"""Largest share of the time that previews take."""

PACKAGED = {"ngrpo_lora.world.freedom:freedom"}
"""Measures outside of ComfyUI's folders that a graph may name: those of presets."""

TAKEN = {
    "output_dir": "is output/ngrpo/NAME: set name",
    "resume": "is found by name: set name and earlier_run",
    "seed": "has a widget: set run_seed",
    "hub": "is not for graphs: `ngrpo push` pushes a finished run",
}
"""Keys of the configuration that overrides must leave alone, and why."""

OUT_OF_MEMORY = (
    "Out of memory while training: {reason}\nComfyUI's models had been unloaded before (a model of Load Diffusers "
    "Pipeline had not); what the run held is free again. In overrides, most effective first: "
    "trainer.gradient_checkpointing=true, model.text_encoders=cache, model.vae_tiling=true, model.quantization=int8 or "
    "nf4, or model.swap_blocks=20; or a preset for your memory, such as flux-16gb. All but quantization may change for "
    "a run that has begun."
)


def run_dir(name: str) -> Path:
    """Folder of the run of this name."""
    return Path(folder_paths.get_output_directory()) / FOLDER / name


def lora_name(name: str) -> str:
    """Name of a run's adapter in ComfyUI's lists."""
    return os.path.join(FOLDER, f"{name}.safetensors")


def lora_path(name: str) -> Path:
    """Path of a run's adapter in the first loras folder."""
    return Path(folder_paths.get_folder_paths("loras")[0]) / lora_name(name)


MADE: dict[str, tuple[int, int]] = {}
"""`file_times` of runs by name, as their nodes left them: while they hold, later nodes need not compute again."""


def file_times(name: str) -> tuple[int, int]:
    """Times in ns at which a run's adapter and its copy among the LoRAs were written, 0 for none."""
    adapter, copy = run_dir(name) / "adapter" / FILE_NAME, lora_path(name)
    return (
        adapter.stat().st_mtime_ns if adapter.exists() else 0,
        copy.stat().st_mtime_ns if copy.exists() else 0,
    )


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
            f"name must be letters, digits, spaces, ., - and _, beginning and ending with a letter or digit, got "
            f"{name!r}; it is a file's name, without a folder"
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
    lines = [line.strip() for line in overrides.splitlines()]
    given = ["=".join(part.strip() for part in line.split("=", 1)) for line in lines if line and line[0] != "#"]
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
    for key, sources in (("train", config.prompts.train), ("held_out", config.prompts.held_out)):
        if not isinstance(sources, float):
            check_sources(sources, f"prompts.{key}")
    if config.evaluation.strict is not None:
        admitted(RewardConfig(name=config.evaluation.strict))
    watched = tuple(map(admitted, config.evaluation.rewards))
    for reference in set(config.evaluation.measures) - PACKAGED:
        admitted(RewardConfig(name=reference))
    evaluation = config.evaluation.model_copy(update={"rewards": watched})
    # Those of reward nodes were admitted there, and know their servers' keys since.
    trained = config.rewards.train if given_rewards else tuple(map(admitted, config.rewards.train))
    own = config.rewards.model_copy(update={"train": trained})
    return config.model_copy(update={"model": model, "lora": lora, "evaluation": evaluation, "rewards": own})


def check_sources(sources: Sources, key: str) -> None:
    """Raise ConfigError where prompts are a file out of ComfyUI's folders."""
    for source in [sources] if isinstance(sources, str) else sources:
        check_path(re.split("[#?]", source.removeprefix("hf:"), maxsplit=1)[0], key)


def prompt_lines(prompts: str) -> list[str]:
    """Prompts of a text, one a line, without empty lines.

    Raises:
        ConfigError: there is no prompt.
    """
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
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


class View(Watcher):
    """Watcher that shows a run at its node; Cancel stops the run."""

    def __init__(self, config: RunConfig, node: type[io.ComfyNode]):
        self.folder, self.total, self.node = Path(config.output_dir), config.trainer.num_iterations, node
        self.bar = comfy.utils.ProgressBar(self.total, node_id=node.hidden.unique_id)
        self.group: Group | None = None
        self.first: tuple[int, float] | None = None  # step and time of the first that was seen
        self.next_preview = 0.0

    def before_pass(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def after_rewards(self, prompt: str, images: Sequence[Image.Image], rewards: Sequence[float]) -> None:
        self.group = Group(prompt, images, rewards)

    def after_step(self, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        self.first = self.first or (step, now)
        preview = None
        if now >= self.next_preview or step >= self.total:
            preview = ("JPEG", draw_progress(self.folder, self.group), None)
            drawn = time.monotonic()
            self.next_preview = drawn + max(PREVIEW_S, (drawn - now) / PREVIEW_SHARE)
        self.bar.update_absolute(step, preview=preview)
        show_text(self.text(step, now, metrics), self.node)

    def text(self, step: int, now: float, metrics: Metrics) -> str:
        """Say which iteration a run is at, its rewards, and how many minutes are left."""
        said = [f"iteration {step} of {self.total}"]
        for key, name in (("rollout/reward_mean", "reward"), ("eval/reward_mean", "held-out")):
            if key in metrics:
                said.append(f"{name} {metrics[key]:.3f}")
        first, start = self.first or (step, now)
        if step > first:
            said.append(f"{(now - start) / (step - first) * (self.total - step) / 60:.0f} min left")
        return ", ".join(said)


class Warnings(logging.Handler):
    """Keeps the last warnings of a run: a trainer's error says that the reasons are above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last: deque[str] = deque(maxlen=3)

    def emit(self, record: logging.LogRecord) -> None:
        self.last.append(record.getMessage())


def run(config: RunConfig, node: type[io.ComfyNode]) -> None:
    """Train with ComfyUI's models unloaded; whatever ends it, nothing of the run stays in memory.

    Raises:
        InterruptProcessingException: the user has cancelled.
        UserError: the run cannot go on.
    """
    show_text("loading", node)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    from ngrpo_lora.evaluation.report.guard import Guard
    from ngrpo_lora.evaluation.report.watching import Reporter
    from ngrpo_lora.hub.watching import HubWatcher
    from ngrpo_lora.training.trainer import train

    warnings, threads = Warnings(), torch.get_num_threads()
    logging.getLogger("ngrpo_lora").addHandler(warnings)
    failure: Exception | None = None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            train(config, View(config, node), Guard(), Reporter(), HubWatcher())
    except comfy.model_management.InterruptProcessingException:
        failure = comfy.model_management.InterruptProcessingException()
    except OutOfMemory as error:
        failure = UserError(OUT_OF_MEMORY.format(reason=error.reason))
    except UserError as error:
        failure = UserError(str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = UserError(OUT_OF_MEMORY.format(reason=first_line(error)))
    finally:
        logging.getLogger("ngrpo_lora").removeHandler(warnings)
        torch.set_num_threads(threads)
        gc.collect()
        comfy.model_management.soft_empty_cache()
    # Raised here, where no traceback holds the run's tensors.
    if failure is not None:
        state = state_in_words(config)
        show_text(state, node)
        if isinstance(failure, UserError):
            failure = UserError("\n".join([worded(str(failure)), *(f"- {text}" for text in warnings.last), state]))
        raise failure


def worded(message: str) -> str:
    """A trainer's message as the node shows it, without advice that only a user of the command line can follow."""
    return re.sub(r"[;,]?( then)? go on with resume=latest", "", message).replace("reasons are above", "see below")


def state_in_words(config: RunConfig) -> str:
    """Say how far a run came, and how it goes on; its adapter so far is put into the LoRA lists."""
    folder = Path(config.output_dir)
    found = checkpoints(folder)
    if not found:
        return f"The run {folder.name!r} has no checkpoint yet; queue the graph again to start it."
    done = iteration_of(found[-1])
    total = config.trainer.num_iterations
    said = f"{done} of {total} iterations are in {str(folder)!r}; queue the graph again to go on."
    if done:
        try:
            said += f" The adapter so far: {put_adapter(found[-1] / FILE_NAME, f'{folder.name}-{done:06d}')}"
        except OSError as error:
            said += f" The adapter so far could not be copied to the LoRAs: {error.strerror}."
    return said


class Train(io.ComfyNode):
    """Node that trains a LoRA with Neighbor GRPO."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Train",
            display_name="Train with Neighbor GRPO",
            description="Tunes a model on rewards and puts the LoRA into ComfyUI's lists. The run is in output/ngrpo, "
            "with checkpoints: after Cancel, an error or a restart of ComfyUI, queueing the same graph again goes on "
            "where it stopped, bit for bit; a finished run is not trained again.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=preset_names(),
                    default="demo",
                    tooltip="What everything else starts from. demo: the embedded model, any CPU; the others are for "
                    "the model and the GPU memory that they name. FLUX.1-dev and others are downloaded from the Hub.",
                ),
                io.String.Input(
                    "name",
                    default="my-adapter",
                    tooltip="Of the run, output/ngrpo/NAME, and of the adapter, loras/ngrpo/NAME.safetensors.",
                ),
                io.String.Input(
                    "overrides",
                    default="",
                    multiline=True,
                    tooltip="Settings over the preset's, one key=value a line, as for the command: "
                    "optimizer.learning_rate=1e-4. `ngrpo config --describe` lists all keys. model.path: a Hub id or "
                    "a folder of models/diffusers; lora.init_from: a LoRA of ComfyUI's list. Lines that begin with # "
                    "are comments. One process trains here, whatever trainer.cpu_processes says; several GPUs are the "
                    "command's.",
                ),
                io.Int.Input(
                    "iterations", default=0, min=0, max=1_000_000, tooltip="0: as many as the preset or overrides say."
                ),
                # Not `seed`, which ComfyUI changes after every run unless told otherwise.
                io.Int.Input("run_seed", default=0, min=0, max=2**63 - 1, tooltip="The same seed, the same adapter."),
                io.Combo.Input(
                    "earlier_run",
                    options=[GO_ON, ANEW],
                    default=GO_ON,
                    tooltip=f"Where there is a run of this name. {GO_ON}: from its latest checkpoint, to more "
                    f"iterations if asked for; its other settings must be the same. {ANEW}: as NAME-2, NAME-3, ...",
                ),
                Rewards.Input(
                    "rewards", optional=True, tooltip="What is trained on; not connected: the preset's rewards."
                ),
                io.String.Input(
                    "prompts",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="Training prompts, one a line; empty: the preset's. Evaluations keep theirs, which "
                    "prompts.held_out in overrides changes: 0.1 holds out a tenth of these.",
                ),
            ],
            outputs=[
                io.AnyType.Output(
                    display_name="lora_name", tooltip="The adapter as LoRA lists have it: for lora_name of a loader."
                ),
                io.Image.Output(display_name="summary", tooltip="Curves, and held-out pictures before and after."),
                io.Image.Output(display_name="before", tooltip="Held-out pictures of the base model."),
                io.Image.Output(display_name="after", tooltip="The same prompts and seeds with the adapter."),
                io.String.Output(display_name="figures", tooltip="Held-out figures before and after."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        preset: str | None = None,
        name: str | None = None,
        overrides: str | None = None,
        iterations: int | None = None,
        run_seed: int | None = None,
        earlier_run: str | None = None,
        rewards: Entries | None = (),
        prompts: str | None = "",
    ) -> bool:
        """Refuse to queue what cannot run, by an error: ComfyUI shows a returned message once for every input."""
        if earlier_run not in (None, GO_ON, ANEW):
            raise ConfigError(f"earlier_run must be {GO_ON!r} or {ANEW!r}, got {earlier_run!r}")
        if prompts:
            prompt_lines(prompts)
        if preset is None or name is None or overrides is None:  # what comes from other nodes is not known yet
            return True
        numbers = iterations or 0, run_seed or 0
        config = configure(preset, name, overrides, *numbers, prompts or "")
        check_settings(configure(preset, name, overrides, *numbers))  # no file of prompts is there
        if None not in (iterations, run_seed, rewards, prompts) and earlier_run == GO_ON:
            check_earlier(config)
        return True

    @classmethod
    def fingerprint_inputs(cls, name: str | None, earlier_run: str | None, **others: Any) -> Any:
        """Fingerprint: always new for a new run; for the same run it changes when others have changed its files."""
        if earlier_run == ANEW or name is None:
            return time.time()
        times = file_times(name)
        return 0 if times == MADE.get(name, (0, 0)) else times

    @classmethod
    def execute(
        cls,
        preset: str,
        name: str,
        overrides: str,
        iterations: int,
        run_seed: int,
        earlier_run: str,
        rewards: Entries = (),
        prompts: str = "",
    ) -> io.NodeOutput:
        own = cls.hidden.prompt.get(cls.hidden.unique_id, {"inputs": {}})  # a node that a loop made is not in it
        if isinstance(own["inputs"].get("prompts"), list):
            prompt_lines(prompts)  # of another node, an empty text is no wish for the preset's
        check_name(name)
        name = free_name(name) if earlier_run == ANEW else name
        config = configure(preset, name, overrides, iterations, run_seed, prompts, rewards)
        folder = Path(config.output_dir)
        check_earlier(config)
        if not finished(config):
            check_writable(lora_path(folder.name).parent)
            check_writable(folder)
            if isinstance(rewards, Chosen):
                rewards.unload()  # the run loads its own
            run(prepared(config, prompts), cls)
        lora = put_adapter(folder / "adapter" / FILE_NAME, folder.name)
        MADE[folder.name] = file_times(folder.name)
        text = "\n".join([f"{lora}: {read_metrics(folder / 'metrics.jsonl')[-1]['step']} iterations", *figures(folder)])
        show_text(text, cls)
        with Image.open(folder / "summary.png") as picture:
            summary = to_images([picture])
        before, after = shown_pictures(folder).values()
        return io.NodeOutput(
            lora, summary, to_images(before), to_images(after), text, ui=ui.PreviewImage(summary, cls=cls)
        )


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
        prompts_path(folder.name, prompts).write_text("\n".join(prompt_lines(prompts)) + "\n", encoding="utf-8")
    check_run(config)
    return config


NODES: list[type[io.ComfyNode]] = [Train]
