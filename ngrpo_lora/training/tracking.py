"""Copies a run's record to experiment trackers (TensorBoard, Weights & Biases, trackio, ...) through accelerate.

`metrics.jsonl` is the record, a tracker its copy. When a run goes on, wandb's service says which steps it has, and is
sent the others; any other tracker, and wandb offline, is sent the whole record anew, in place of the old where that is
on this machine. What a tracker was sent shortly before a kill may never have been stored, so nothing here counts on it.
A tracker that fails is left alone until the run is started again; it never ends a run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image

from ngrpo_lora.config import RunConfig, TrackerConfig, flatten
from ngrpo_lora.errors import first_line
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.training.recorder import Recorder
from ngrpo_lora.training.watcher import Start, Watcher
from ngrpo_lora.types import Metrics

__all__ = ["Tracking"]

log = logging.getLogger(__name__)

SAMPLES = "eval/samples"
"""The name under which trackers have the sample grid of an evaluation."""

Row = dict[str, Any]


class Tracking(Watcher):
    """Sends every line of the record once to each tracker that is configured, on the main process."""

    def __init__(self, recorder: Recorder):
        """`recorder` comes before it and has written what is sent."""
        self.recorder, self.sinks = recorder, []

    def before_start(self, start: Start) -> None:
        """Start the trackers, which are handed what they lack with the next line."""
        self.sinks: list[_Sink] = []
        for tracker in start.config.tracking:
            sink = _Sink(tracker, start.config, start.iteration)
            sink.attempt(sink.start)
            self.sinks.append(sink)

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Send the line of this step, whole, and those before it that are missing."""
        for sink in self.sinks:
            sink.attempt(lambda sink=sink: sink.send(self.recorder.metrics.last))

    def close(self) -> None:
        """Send what is left, and end."""
        for sink in self.sinks:
            sink.attempt(sink.finish)


class _Sink:
    """One tracker, and how far it has come."""

    def __init__(self, config: TrackerConfig, run: RunConfig, iteration: int):
        self.config, self.run, self.iteration, self.alive = config, run, iteration, True
        self.folder, self.sent = Path(run.output_dir), -1
        self.behind: list[Row] = []

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something with the tracker; one that fails is left alone from then on."""
        if not self.alive:
            return
        try:
            action()
        except Exception as error:
            self.alive = False
            log.warning(
                "tracking: %s failed (%s: %s); the run goes on without it, and metrics.jsonl has everything",
                self.config.name,
                type(error).__name__,
                first_line(error),
            )

    def start(self) -> None:
        """Start the tracker, tell it the configuration, and read what it lacks."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # which accelerate's trackers ask who is the main process
        kind = LOGGER_TYPE_TO_CLASS[self.config.name]
        self.tracker = kind(*self._place(), **self._identity(), **self.config.options)
        self.tracker.start()
        if self.config.name == "trackio":
            self._remember(self.tracker.tracker.id)
        if self.config.name == "wandb" and not self.tracker.tracker.offline:
            self.sent = self.tracker.tracker.step - 1
        self.behind = [row for row in read_metrics(self.folder / "metrics.jsonl") if row["step"] > self.sent]
        self.tracker.store_init_configuration(as_told(self.run))

    def send(self, row: Row) -> None:
        """Send a line, after those before it that are missing."""
        rows = [*(earlier for earlier in self.behind if earlier["step"] < row["step"]), row]
        self.behind = []
        for one in rows:
            if one["step"] > self.sent:
                self._send(one)

    def finish(self) -> None:
        """Send what is missing, and end."""
        for row in self.behind:
            self._send(row)
        self.tracker.finish()

    def _send(self, row: Row) -> None:
        step = row["step"]
        self.tracker.log({key: value for key, value in row.items() if key != "step" and value is not None}, step=step)
        path = self.folder / "samples" / f"{step:06d}.png"
        if path.is_file():
            with Image.open(path) as image:
                self._send_samples(np.asarray(image.convert("RGB")), step)
        self.sent = step

    def _send_samples(self, pixels: np.ndarray, step: int) -> None:
        if self.config.name == "tensorboard":
            self.tracker.log_images({SAMPLES: pixels[None]}, step=step, dataformats="NHWC")
        elif self.config.name == "trackio":
            import trackio

            self.tracker.log({SAMPLES: trackio.Image(pixels)}, step=step)
        elif hasattr(self.tracker, "log_images"):
            self.tracker.log_images({SAMPLES: [pixels]}, step=step)

    def _place(self) -> tuple[str, ...]:
        """Positional arguments of accelerate's class: what it calls the run's name, and a folder where it wants one."""
        if self.config.name == "tensorboard":
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)  # all of it is written anew
            return "tensorboard", str(self.folder)
        with_folder = self.config.name in ("mlflow", "aim")
        return (self.config.project, str(self.folder)) if with_folder else (self.config.project,)

    def _identity(self) -> dict[str, Any]:
        """The run's own name, and what makes the tracker go on with it."""
        name = self.folder.resolve().name
        if self.config.name == "wandb":
            self._remember(identity := self._known() or uuid4().hex)
            return {"name": name, "id": identity, "resume": "allow", "dir": str(self.folder)}
        if self.config.name == "trackio":
            known = self._known()
            replaced = known is None or forget(self.config, known)
            return {"name": name if replaced else f"{name}, resumed at {self.iteration}"}
        return {"run_name": name} if self.config.name == "mlflow" else {}

    @property
    def _id_file(self) -> Path:
        return self.folder / f"{self.config.name}-id.txt"

    def _known(self) -> str | None:
        """The id by which the tracker knows this run, kept in its folder; None for a new run."""
        return self._id_file.read_text(encoding="utf-8").strip() if self.iteration and self._id_file.is_file() else None

    def _remember(self, identity: str) -> None:
        self._id_file.write_text(identity, encoding="utf-8")


def forget(config: TrackerConfig, identity: str) -> bool:
    """Delete trackio's former copy of a run, whose record it is about to get anew; False where it is elsewhere."""
    import trackio

    elsewhere = {"space_id", "server_url"} & config.options.keys()
    if elsewhere or {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys():
        return False
    try:
        former = [run for run in trackio.Api().runs(config.project) if run.id == identity]
    except ValueError:  # no such project
        former = []
    for run in former:
        run.delete()
    return True


def as_told(config: RunConfig) -> dict[str, str | int | float | bool]:
    """A configuration by dotted keys, as trackers take it: numbers and text as they are, all else as JSON."""
    values = flatten(config.model_dump(mode="json"))
    return {key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in values}
