"""Trackers, read back from what they really leave: every metric at every step once, whatever happened to the run."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeConfig
from runs import Stop, Stopper, read_rows
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import RunConfig, dump_config
from ngrpo_lora.training import tracking
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

LENGTH = ["trainer.num_iterations=5", "trainer.save_every=2", "evaluation.every=2", "evaluation.num_prompts=2"]
Found = dict[str, list[tuple[int, float]]]


@pytest.fixture(autouse=True, scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test reaches a service or the home folder; trackio reads its folder when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def tracked_by(name: str, folder: Path) -> str:
    """The setting, under a project of the test's own."""
    return f"tracking={{name: {name}, project: {folder.parent.name}}}"


def of_tensorboard(folder: Path) -> Found:
    """Scalars of all event files, raw: a step that two files hold is there twice."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: Found = {}
    for path in sorted((folder / "tensorboard").glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tensor_util.make_ndarray(value.tensor))
                    found.setdefault(value.tag, []).append((event.step, number))
    return found


def records(path: Path) -> Iterator[bytes]:
    """What a .wandb file holds: LevelDB's log format, after 7 bytes of its own."""
    data, offset, parts = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def of_wandb(folder: Path) -> Found:
    """What the last offline file would send, raw; it replaces what those before it have of the same run."""
    from wandb.proto import wandb_internal_pb2

    found: Found = {}
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) <= 1  # one id
    for path in files[-1:]:
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for key, text in items.items():
                if not key.startswith("_") and not key.startswith(tracking.SAMPLES):
                    found.setdefault(key, []).append((int(record.history.step.num), float(text)))
    return found


def of_trackio(folder: Path) -> Found:
    from trackio.sqlite_storage import SQLiteStorage

    project = folder.parent.name
    found: Found = {}
    for run in SQLiteStorage.get_runs(project):
        for row in SQLiteStorage.get_logs(project, run):
            for key, value in row.items():
                if isinstance(value, int | float) and key not in ("step", "timestamp"):
                    found.setdefault(key, []).append((row["step"], float(value)))
    return found


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio}


def of_record(folder: Path) -> Found:
    found: Found = {}
    for row in read_rows(folder):
        for key, value in row.items():
            if key != "step" and value is not None:
                found.setdefault(key, []).append((row["step"], value))
    return found


def assert_same(theirs: Found, folder: Path) -> None:
    """A tracker has exactly what the record has, each once."""
    ours = of_record(folder)
    assert theirs.keys() == ours.keys()
    for key, values in ours.items():
        assert Counter(step for step, _ in theirs[key]) == Counter(step for step, _ in values), key
        for step, value in values:
            found = dict(theirs[key])[step]
            # what was computed again after a kill took another time
            assert key.startswith("time/") or math.isclose(found, value, rel_tol=1e-6, abs_tol=1e-7), key


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_has_every_metric_of_every_step_once(name: str, make_config: MakeConfig, tmp_path: Path):
    complete(prepare(make_config(tmp_path / "run", *LENGTH, tracked_by(name, tmp_path / "run"))))
    assert_same(READERS[name](tmp_path / "run"), tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["tensorboard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "trackio"))]
)
def test_two_kills_and_resumes_leave_no_gap_and_no_double(name: str, make_config: MakeConfig, tmp_path: Path):
    """Killed after iteration 1, before any checkpoint of a kill's own, and after 3: checkpoints are at 2 and 4."""
    reward = tmp_path / "deadly.py"
    reward.write_text(
        "import os\nfrom pathlib import Path\nimport numpy as np\n\n\n"
        "def score(images, prompts, metadata):\n"
        f"    rows = len(Path({str(tmp_path / 'run' / 'metrics.jsonl')!r}).read_text().splitlines())\n"
        f"    if rows > int(Path({str(tmp_path / 'when')!r}).read_text()):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]\n"
    )
    settings = [*LENGTH, tracked_by(name, tmp_path / "run"), f"rewards={reward}:score"]
    config = make_config(tmp_path / "run", *settings)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    words = [sys.executable, "-m", "ngrpo_lora", "train", str(tmp_path / "run.yaml"), "--num-processes", "1"]
    own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # of this process
    for when, status, more in ((3, -9, []), (4, -9, ["resume=latest"]), (99, 0, ["resume=latest"])):
        (tmp_path / "when").write_text(str(when))
        done = subprocess.run([*words, *more], capture_output=True, text=True, check=False, env=own)
        assert done.returncode == status, done.stderr
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert_same(READERS[name](tmp_path / "run"), tmp_path / "run")


def test_tensorboard_has_the_settings_and_the_sample_grids(make_config: MakeConfig, tmp_path: Path):
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    complete(prepare(make_config(tmp_path / "run", *LENGTH, "tracking=tensorboard")))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images(tracking.SAMPLES)] == [0, 2, 4, 5]
    assert events.Images(tracking.SAMPLES)[0].encoded_image_string.startswith(b"\x89PNG")
    (settings,) = (tmp_path / "run" / "tensorboard").rglob("hparams.yml")
    assert yaml.safe_load(settings.read_text())["rollout.group_size"] == 4


def refuse(*args: Any, **kwargs: Any) -> None:
    raise ConnectionError("nobody there\nat all")


def test_a_tracker_that_fails_does_not_end_the_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    monkeypatch.setattr(WandBTracker, "start", refuse)
    log, calls = TensorBoardTracker.log, []

    def log_twice(self: Any, values: dict[str, float], step: int) -> None:
        calls.append(step)
        if len(calls) == 3:
            raise OSError("disk full")
        log(self, values, step=step)

    monkeypatch.setattr(TensorBoardTracker, "log", log_twice)
    complete(prepare(make_config(tmp_path / "run", *LENGTH, "tracking=[wandb, tensorboard]")))
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert calls == [0, 1, 2]
    assert caplog.text.count("tracking: wandb failed (ConnectionError: nobody there); the run goes on") == 1
    assert caplog.text.count("tracking: tensorboard failed (OSError: disk full); the run goes on") == 1


def test_what_a_tracker_missed_it_is_sent_when_the_run_goes_on(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also the line of an iteration whose evaluation was never made."""
    settings = [*LENGTH, "tracking=wandb"]
    config = make_config(tmp_path / "run", *settings)
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.tracking.WandBTracker.start", refuse)
        stopper = Stopper(lambda run, watcher: run.iteration == 4)
        run = stopper.watch(config)
        with pytest.raises(Stop):
            complete(run)
    assert not of_wandb(tmp_path / "run")
    complete(prepare(config.model_copy(update={"resume": "latest"})))
    assert_same(of_wandb(tmp_path / "run"), tmp_path / "run")


def test_a_tracker_without_its_package_is_refused_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    find = importlib.util.find_spec
    absent = ("wandb", "comet_ml")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    words = ["train", "--num-processes", "1", f"output_dir={tmp_path / 'run'}", "model.path=nobody/nothing"]
    result = CliRunner().invoke(app, [*words, "tracking=[wandb, comet_ml, tensorboard]"])
    assert result.exit_code == 2
    assert "tracking: wandb needs the package wandb, which is not installed; pip install wandb" in (result.output)
    assert "tracking: comet_ml needs the package comet_ml, which is not installed; pip install comet-ml" in (
        result.output
    )
    assert "tensorboard" not in result.output


def test_settings_are_told_by_dotted_keys(make_config: MakeConfig, tmp_path: Path):
    config: RunConfig = make_config(tmp_path)
    told = tracking.as_told(config)
    assert told["rollout.num_steps"] == config.rollout.num_steps
    assert told["resume"] == "null"
    assert told["optimizer.betas"] == "[0.9, 0.999]"
    assert all(isinstance(value, str | int | float) for value in told.values())
    assert np.isfinite([value for value in told.values() if not isinstance(value, str)]).all()


def test_trackio_keeps_the_runs_of_other_folders_with_the_same_name(make_config: MakeConfig, tmp_path: Path):
    from trackio.sqlite_storage import SQLiteStorage

    setting = f"tracking={{name: trackio, project: {tmp_path.name}}}"
    for folder in ("one", "two"):
        complete(prepare(make_config(tmp_path / folder / "run", *LENGTH, setting)))
    complete(prepare(make_config(tmp_path / "two" / "run", *LENGTH, setting, "resume=latest")))
    records = SQLiteStorage.get_run_records(tmp_path.name)
    assert [record["name"] for record in records] == ["run", "run"]
    assert (tmp_path / "one" / "run" / "trackio-id.txt").read_text() in {record["id"] for record in records}
