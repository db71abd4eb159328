"""Train: Neighbor GRPO from the graph, with the configuration of the `ngrpo train` command."""

from __future__ import annotations

import gc
import logging
import re
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from PIL import Image

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import RewardConfig, RunConfig, preset_names
from ngrpo_lora.devices import is_out_of_memory
from ngrpo_lora.errors import OutOfMemory, UserError, first_line
from ngrpo_lora.planning.preflight import check_settings
from ngrpo_lora.records.checkpoints import checkpoints
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.reports.curves import shown_pictures
from ngrpo_lora.reports.tables import figures, figures_table
from ngrpo_lora.training.inputs import changed_inputs, input_files

from ._api import Node, check_given, checked, listed, schema, show_progress, to_images
from .rewards import Chosen, Entries, Rewards
from .runs import (
    ANEW,
    GO_ON,
    INPUTS,
    LEFT,
    check_earlier,
    check_name,
    check_writable,
    configure,
    file_times,
    finished,
    free_name,
    iteration_of,
    lora_path,
    prepared,
    prompt_lines,
    put_adapter,
)
from .view import View, Warnings

OUT_OF_MEMORY = (
    "Out of memory while training: {reason}\nComfyUI's models had been unloaded before (a model of Load Diffusers "
    "Pipeline had not); what the run held is free again. In overrides, most effective first: "
    "trainer.gradient_checkpointing=true, model.text_encoders=cache, model.vae_tiling=true, model.quantization=int8 or "
    "nf4, or model.swap_blocks=20; or a preset for your memory, such as flux-16gb. All but quantization may change for "
    "a run that has begun."
)


NOT_AS_IT_IS = (
    "{key} has changed since this run: the adapter is of the file as it was; start anew beside it, or choose another "
    "name, to train with the file as it is now"
)


def run(config: RunConfig, node: type[io.ComfyNode]) -> list[str]:
    """Train with ComfyUI's models unloaded; whatever ends it, nothing of the run stays in memory.

    Returns:
        What the run has warned of, each once.
    Raises:
        InterruptProcessingException: the user has cancelled.
        UserError: the run cannot go on.
    """
    show_progress("loading", node)
    comfy.model_management.unload_all_models()
    free_memory()
    from ngrpo_lora.evaluation.report.guard import Guard
    from ngrpo_lora.evaluation.report.watching import Reporter
    from ngrpo_lora.hub.watching import HubWatcher
    from ngrpo_lora.training.trainer import train

    warnings, threads, precision = Warnings(), torch.get_num_threads(), torch.get_float32_matmul_precision()
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
        torch.set_float32_matmul_precision(precision)
        if not isinstance(failure, comfy.model_management.InterruptProcessingException):
            free_memory()  # Cancel does not wait for it: ComfyUI does the same right after, and so does the next run
    # Raised here, where no traceback holds the run's tensors.
    if failure is not None:
        state = state_in_words(config)
        show_progress(state, node)
        if isinstance(failure, UserError):
            failure = UserError("\n".join([worded(str(failure)), *(f"- {text}" for text in warnings.said[-3:]), state]))
        raise failure
    return [*dict.fromkeys(warnings.said)]


def free_memory() -> None:
    """Free what nothing holds any more."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def worded(message: str) -> str:
    """A trainer's message as the node shows it, without advice that only a user of the command line can follow."""
    command = r"[;,]?( then)? go on with resume=latest|, or with --source of `ngrpo sample`"
    return re.sub(command, "", message).replace("reasons are above", "see below")


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


class Train(Node):
    """Node that trains a LoRA with Neighbor GRPO."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Train",
            display_name="Train with Neighbor GRPO",
            description="Tunes a model on rewards and puts the LoRA into ComfyUI's lists. The run is in output/ngrpo, "
            "with checkpoints: after Cancel, an error or a restart of ComfyUI, queueing the same graph again goes on "
            "where it stopped, bit for bit; a finished run is not trained again.",
            search_aliases=["dpo", "fine-tune", "finetune", "grpo", "lora", "rl", "rlhf", "train lora"],
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
                    "a folder of models/diffusers; lora.init_from: a LoRA of ComfyUI's list; prompts.train: a file of "
                    "the input folder, with a column source for models that edit. Lines that begin with # are "
                    "comments. One process trains here, whatever trainer.cpu_processes says; several GPUs are the "
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
        checked(listed, "earlier_run", earlier_run, [GO_ON, ANEW])
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
        return 0 if times == LEFT.get(name, (0, 0)) else times

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
        listed("earlier_run", earlier_run, [GO_ON, ANEW])
        check_given("rewards", rewards, RewardConfig, "a reward node")
        check_name(name)
        name = free_name(name) if earlier_run == ANEW else name
        config = configure(preset, name, overrides, iterations, run_seed, prompts, rewards)
        folder = Path(config.output_dir)
        check_earlier(config)
        if finished(config):
            notes = [NOT_AS_IT_IS.format(key=key) for key in changed_inputs(config, folder)]
        else:
            check_writable(lora_path(folder.name).parent)
            check_writable(folder)
            if isinstance(rewards, Chosen):
                rewards.unload()  # the run loads its own
            notes = run(prepared(config, prompts), cls)
        lora = put_adapter(folder / "adapter" / FILE_NAME, folder.name)
        INPUTS[folder.name] = tuple(input_files(config).values())
        LEFT[folder.name] = file_times(folder.name)
        done = f"{lora}: {read_metrics(folder / 'metrics.jsonl')[-1]['step']} iterations"
        with Image.open(folder / "summary.png") as picture:
            summary = picture.convert("RGB")
        # The last preview, and no picture of the output: newer interfaces would show the two below each other.
        total = config.trainer.num_iterations
        bar = comfy.utils.ProgressBar(total, node_id=cls.hidden.unique_id)
        bar.update_absolute(total, preview=("JPEG", summary, None))
        before, after = shown_pictures(folder).values()
        text = "\n".join([done, *figures(folder)])
        said = "\n".join([figures_table(folder), *(f"\n- {note}" for note in notes)])
        shown = {"text": (f"{done}\n\n{said}",)}
        return io.NodeOutput(lora, to_images([summary]), to_images(before), to_images(after), text, ui=shown)


NODES: list[type[io.ComfyNode]] = [Train]
