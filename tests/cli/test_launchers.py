"""One configuration, started by every launcher that people use: the same run, and one message where it cannot be."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import MakeConfig
from runs import SEVERAL, TROUBLE, assert_nearly_same_run, read_rows
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.utils.distributed import get_free_port

from ngrpo_lora.config import dump_config

BIN = Path(sys.executable).parent


def slow(*values: str) -> Any:
    """A case that is much like its neighbours, and tested with `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


TRAIN = ("-m", "ngrpo_lora", "train")
ACCELERATE = {  # as `accelerate config` writes it for two GPUs of one machine
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "MULTI_GPU",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "gpu_ids": "all",
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}


def start(words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A command in an environment that no launcher has touched, but for these variables."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "OMP_"))}
    return subprocess.Popen(
        [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own | environment
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What each said; all have ended without an error."""
    said = [process.communicate(timeout=240)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return said


@pytest.fixture(scope="module")
def file(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one configuration; each run adds where it goes."""
    folder = tmp_path_factory.mktemp("launchers")
    path = folder / "run.yaml"
    path.write_text(dump_config(make_config(folder / "alone", *SEVERAL, "trainer.num_threads=1")))
    return path


@pytest.fixture(scope="module")
def alone(file: Path) -> Path:
    """The run of one process, by `ngrpo train`."""
    finish(start([BIN / "ngrpo", "train", file, "--num-processes", "1"]))
    return file.parent / "alone"


@pytest.mark.parametrize(
    "launcher", ["torchrun", "accelerate", "machines", *map(slow, ("accelerate-config", "one", "mpirun"))]
)
def test_every_launcher_gives_the_same_run(launcher: str, file: Path, alone: Path, tmp_path: Path):
    train = [*TRAIN, file, f"output_dir={tmp_path / 'run'}"]
    accelerate = [BIN / "accelerate", "launch"]
    if launcher == "torchrun":
        said = finish(start([BIN / "torchrun", "--nproc-per-node", "2", *train]))
    elif launcher == "accelerate":
        said = finish(start([*accelerate, "--multi_gpu", "--num_processes", "2", *train]))
    elif launcher == "accelerate-config":
        (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(ACCELERATE))
        said = finish(start([*accelerate, "--config_file", tmp_path / "accelerate.yaml", *train]))
    elif launcher == "one":
        said = finish(start([*accelerate, "--cpu", "--num_processes", "2", *train]))
        assert "starts several on a CPU by mpirun alone; ngrpo train --num-processes N and torchrun" in said[0]
    elif launcher == "mpirun":  # as it leaves the environment of `accelerate launch --cpu`
        there = {"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
        ranks = ({"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank} for rank in "01")
        said = finish(*(start([sys.executable, *train], **there, **rank) for rank in ranks))
    else:
        there = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        there += ["--main_process_port", str(get_free_port())]
        said = finish(*(start([*accelerate, *there, "--machine_rank", str(rank), *train]) for rank in (0, 1)))
    assert sum(text.count("adapter  ") for text in said) == 1  # the main process alone talks
    assert (" 2 processes" in "".join(said)) == (launcher != "one")
    assert_nearly_same_run(alone, tmp_path / "run")


@pytest.mark.parametrize("launcher", ["torchrun", slow("accelerate")])
def test_what_no_process_can_read_is_said_once(launcher: str, tmp_path: Path):
    first = {"torchrun": ["--nproc-per-node", "2"], "accelerate": ["launch", "--multi_gpu", "--num_processes", "2"]}
    process = start([BIN / launcher, *first[launcher], *TRAIN, "rollout.group_szie=3"])
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("did you mean rollout.group_size?") == 1


def test_what_there_is_to_say_of_an_adapter_is_said_once(file: Path, alone: Path, tmp_path: Path):
    adapter = tmp_path / "adapter.safetensors"
    save_file(load_file(alone / "adapter" / "pytorch_lora_weights.safetensors"), adapter)  # without metadata
    words = [*TRAIN, file, f"output_dir={tmp_path / 'run'}", f"model.fuse={adapter}", "trainer.num_iterations=1"]
    (said,) = finish(start([BIN / "torchrun", "--nproc-per-node", "2", *words]))
    assert said.count("does not say its alpha") == 1


@pytest.mark.slow
def test_more_processes_than_groups_are_refused_once(file: Path, tmp_path: Path):
    words = [*TRAIN, file, f"output_dir={tmp_path / 'run'}", "rollout.prompts_per_iteration=1"]
    process = start([BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", *words])
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("rollout.prompts_per_iteration must be at least the number of processes (2), got 1") == 1


@pytest.mark.parametrize(
    ("launcher", "name"),
    [("ngrpo", "SIGINT"), slow("ngrpo", "SIGTERM"), slow("torchrun", "SIGINT"), slow("torchrun", "SIGTERM")],
)
def test_a_signal_stops_all_processes_after_an_iteration(launcher: str, name: str, file: Path, tmp_path: Path):
    run = tmp_path / "run"
    settings = [file, f"output_dir={run}", "trainer.num_iterations=200", "evaluation.every=200"]
    if launcher == "ngrpo":
        process = start([BIN / "ngrpo", "train", *settings, "--num-processes", "2"])
    else:
        process = start([BIN / "torchrun", "--nproc-per-node", "2", *TRAIN, *settings])
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").is_file() and len(read_rows(run)) > 1):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=120)
    last = read_rows(run)[-1]["step"]
    assert len(re.findall(rf"ngrpo: stopped after iteration {last} of 200; go on with resume=latest", said)) == 1
    assert (run / "checkpoints" / f"iteration-{last:06d}").is_dir()
    if launcher == "ngrpo":
        assert process.returncode == 2
        assert "Traceback" not in said


@pytest.mark.parametrize("processes", [slow("1"), "2"])
def test_sigusr1_to_the_command_saves_a_checkpoint_and_the_run_goes_on(processes: str, file: Path, tmp_path: Path):
    run = tmp_path / "run"
    settings = [f"output_dir={run}", "trainer.num_iterations=200", "evaluation.every=200", "trainer.save_every=200"]
    process = start([BIN / "ngrpo", "train", file, *settings, "--num-processes", processes])

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not what():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)

    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(read_rows(run)) > 1)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: any(run.glob("checkpoints/iteration-*/state.json")))
    steps = len(read_rows(run))
    wait_for(lambda: len(read_rows(run)) > steps)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "Traceback" not in said


@pytest.mark.parametrize("launcher", ["ngrpo", slow("torchrun")])
def test_a_killed_process_ends_all_with_a_checkpoint(launcher: str, file: Path, tmp_path: Path):
    (tmp_path / "trouble.py").write_text(TROUBLE.format("os.kill(os.getpid(), 9)"))
    settings = [file, f"output_dir={tmp_path / 'run'}", f"rewards.train={tmp_path / 'trouble.py'}:score"]
    words = {
        "ngrpo": [BIN / "ngrpo", "train", *settings, "--num-processes", "2"],
        "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", *TRAIN, *settings],
    }
    (tmp_path / "trouble.txt").write_text("now")
    process = start(words[launcher])
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "process 0 of 2 lost another process" in said
    if launcher == "ngrpo":
        assert "process 1 of 2 was killed (SIGKILL, often for lack of memory); go on with resume=latest" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE must be a number of processes, at least 1, got 'two'; unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, r"must then have RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT too; unset WORLD_SIZE"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            r"RANK must be a number from 0 to 1 with WORLD_SIZE=2, got '2'",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "PORT"},
            r"process 0 of 2 could not meet the others at 127.0.0.1:\d+ within trainer.timeout_s \(3 s",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
                "ACCELERATE_USE_DEEPSPEED": "true",
            },
            r"accelerate must start this run without DeepSpeed",
        ),
    ],
    ids=["no-number", "alone", "out-of-range", "nobody-joins", "deepspeed"],
)
def test_an_environment_that_no_launcher_left_is_refused(
    variables: dict[str, str], message: str, file: Path, tmp_path: Path
):
    free = {key: str(get_free_port()) if value == "PORT" else value for key, value in variables.items()}
    process = start([BIN / "ngrpo", "train", file, f"output_dir={tmp_path / 'run'}", "trainer.timeout_s=3"], **free)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.search(message, said), said
    assert "Traceback" not in said


def test_a_second_ctrl_c_ends_all_processes_at_once(file: Path, tmp_path: Path):
    """While one of them waits for a reward that takes minutes."""
    (tmp_path / "trouble.py").write_text(TROUBLE.format("Path(__file__).with_suffix('.now').touch(); time.sleep(300)"))
    (tmp_path / "trouble.txt").write_text("now")
    settings = [file, f"output_dir={tmp_path / 'run'}", f"rewards.train={tmp_path / 'trouble.py'}:score"]
    process = start([BIN / "ngrpo", "train", *settings, "--num-processes", "2"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "trouble.now").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it waits
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 2, said
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
