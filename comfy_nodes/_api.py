"""What the nodes share: schemas that any ComfyUI takes, pictures in its form, and messages without tracebacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import fields
from functools import partial, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from server import PromptServer
from torch import Tensor

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.tables import lines_of
from ngrpo_lora.records.pictures import as_seen
from ngrpo_lora.registry import nearest
from ngrpo_lora.scoring.scorer import in_thread
from ngrpo_lora.seeds import SEEDS

T = TypeVar("T")
CATEGORY = "Neighbor GRPO"


class Node(io.ComfyNode):
    """What all nodes of this package are: their widgets' values are checked before they execute.

    ComfyUI checks only values that stand in the graph, and of these only what `validate_inputs` does not take: never
    what other nodes give.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = vars(cls).get("execute")
        if own is not None and not hasattr(own.__func__, "__wrapped__"):  # ComfyUI executes copies of the class
            cls.execute = classmethod(after_checks(own.__func__))


def after_checks(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Make an `execute` that raises ConfigError where the value of a widget is none that the widget could have."""

    @wraps(execute)
    def checked_execute(cls: type[io.ComfyNode], **given: Any) -> io.NodeOutput:
        for one in (cls.SCHEMA or cls.define_schema()).inputs:
            if one.id in given:
                check_widget(one, given[one.id])
        return execute(cls, **given)

    return checked_execute


def check_widget(widget: io.Input, value: Any) -> None:
    """Check the value of a number, a text or a switch; choices are checked by their nodes, since lists of files change.

    Raises:
        ConfigError: it is of another kind, or out of range.
    """
    low, high, rule, right = -math.inf, math.inf, "", True
    if isinstance(widget, io.Int.Input | io.Float.Input):
        whole = isinstance(widget, io.Int.Input)
        low = low if widget.min is None else widget.min
        high = high if widget.max is None else widget.max
        if getattr(widget, "control_after_generate", None):
            high = SEEDS - 1  # as those of ComfyUI's own nodes
        right = isinstance(value, Integral if whole else Real) and low <= value <= high
        low_to_high = f"{low} to {high}" if whole else f"{low:g} to {high:g}"
        rule = f"a {'whole ' if whole else ''}number from {low_to_high}"
    elif isinstance(widget, io.String.Input):
        right, rule = isinstance(value, str), "text"
    elif isinstance(widget, io.Boolean.Input):
        right, rule = isinstance(value, Integral), "true or false"
    if not right:
        raise ConfigError(f"{widget.id} must be {rule}, got {value!r}; change it here, or in the node connected to it")


def schema(node_id: str, *, advanced: Collection[str] = (), **settings: Any) -> io.Schema:
    """Make a schema in our category; what this ComfyUI's schemas do not have is left out.

    Args:
        advanced: widgets that few need; interfaces that know of such show them on request.
    """
    for widget in settings["inputs"]:
        if widget.id in advanced:
            widget.extra_dict["advanced"] = True
    known = {field.name for field in fields(io.Schema)}
    kept = {name: value for name, value in settings.items() if name in known}
    return io.Schema(node_id=f"NGRPO_{node_id}", category=CATEGORY, **kept)


def to_images(pictures: Sequence[Image.Image]) -> Tensor:
    """B pictures of one size -> IMAGE (B, H, W, 3) in [0, 1].

    ComfyUI saves `int(255 * x)`: an eighth of a step more than k / 255 keeps every pixel what it is.
    """
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]).astype(np.float32)
    return torch.from_numpy(np.minimum(pixels + 0.125, 255) / 255)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """IMAGE (B, H, W, C) in [0, 1] -> B RGB pictures, the inverse of `to_images`.

    As the commands read files: one channel is grey, and what is transparent, by 2 channels or 4, is on white.
    """
    channels = images[..., :3] if images.shape[-1] > 4 else images
    pixels = (channels.float().clamp(0, 1) * 255).cpu().numpy().astype(np.uint8)
    return [as_seen(Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one)) for one in pixels]


def state_of(path: Path) -> tuple[int, ...]:
    """Time and size of a file, by which a change shows; empty where there is none."""
    state = path.stat() if path.is_file() else None
    return () if state is None else (state.st_mtime_ns, state.st_size)


def filled_lines(text: str) -> list[str]:
    """The lines of a text as the commands read files, without spaces around them and without empty ones."""
    return [line.strip() for line in lines_of(text) if line.strip()]


def listed(what: str, value: str, options: Sequence[str]) -> str:
    """Check that a choice is in its list, as ComfyUI 0.3.75 does not for all values of a graph, and return it.

    Raises:
        ConfigError: it is not in the list.
    """
    if value not in options:
        raise ConfigError(f"{what} must be one of {', '.join(options)}, got {value!r}{nearest(value, options)}")
    return value


def checked(check: Callable[..., Any], *arguments: Any) -> bool:
    """Run a check for `validate_inputs`, whose error refuses the graph: ComfyUI repeats a message for every input.

    An input from another node is None before that node has run; `execute` checks it then.

    Raises:
        UserError: that of the check.
    """
    if all(argument is not None for argument in arguments):
        check(*arguments)
    return True


def check_given(name: str, value: Any, kind: type, source: str) -> None:
    """Check that an input has a tuple of a kind; outputs of any type, as Train's `lora_name`, connect to every input.

    Raises:
        ConfigError: it has something else.
    """
    if not isinstance(value, tuple) or not all(isinstance(one, kind) for one in value):
        raise ConfigError(f"{name} must come from {source}, got {value!r}; connect another output")


def show_progress(text: str, node: type[io.ComfyNode]) -> None:
    """Write how far a node is below its widgets, for as long as it runs; its result is `ui={"text": (...,)}`.

    The node's schema must have `hidden=[io.Hidden.unique_id]`.
    """
    PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def register_folder(name: str, suffix: str) -> None:
    """Make models/NAME, and its namesakes of extra_model_paths.yaml, known to ComfyUI for files of this suffix."""
    folder = Path(folder_paths.models_dir) / name
    folder_paths.add_model_folder_path(name, str(folder), is_default=True)
    known, _ = folder_paths.folder_names_and_paths[name]
    folder_paths.folder_names_and_paths[name] = (known, {suffix})
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)


def own_folders() -> list[Path]:
    """Folders that graphs may read: input, output, temp, and all folders of models; never that of the nodes."""
    models = [
        path
        for name, (paths, _) in folder_paths.folder_names_and_paths.items()
        if name != "custom_nodes"
        for path in paths
    ]
    own = [folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.get_temp_directory()]
    return [Path(path).resolve() for path in (*own, folder_paths.models_dir, *models)]


def check_path(value: str, what: str) -> None:
    """Refuse a path out of ComfyUI's folders; a name of the Hub, which is no path, passes.

    Raises:
        ConfigError: the path lies elsewhere.
    """
    path = Path(value).expanduser()
    looks_like_one = path.is_absolute() or value.startswith((".", "~")) or ".." in path.parts or path.exists()
    if looks_like_one and not any(path.resolve().is_relative_to(folder) for folder in own_folders()):
        raise ConfigError(
            f"{what} must lie in one of ComfyUI's folders, got {value!r}; put it into {folder_paths.models_dir!r}"
        )


def make_room(device: torch.device) -> None:
    """Unload ComfyUI's own models from the GPU, since ComfyUI knows nothing of ours."""
    if device.type != "cpu":
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()


def cancellable(call: Callable[..., T], *arguments: Any) -> T:
    """Run a call in another thread, so that Cancel ends the wait; the call itself runs on, and its result is dropped.

    Raises:
        InterruptProcessingException: the user has cancelled.
    """
    future = in_thread(partial(call, *arguments))
    while not future.done():
        wait([future], 0.1)
        comfy.model_management.throw_exception_if_processing_interrupted()
    return future.result()
