"""Runs of several real processes over gloo: the same results, and an end with a message whatever one of them does."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from flows import run_config
from runs import SEVERAL, TROUBLE, adapter_weights, assert_nearly_same_run, read_rows
from torch.distributed.elastic.utils.distributed import get_free_port

from ngrpo_lora import registry
from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.training.processes import Processes


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    """A server that has imported the trainer once and forks every process from there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ngrpo_lora.training.trainer"])
    return context


def child(rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], sender: Any):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    try:
        sender.send((None, function(*arguments)))
    except UserError as error:
        sender.send((f"{type(error).__name__}: {error}", None))


def run(context: Any, count: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[str | None, Any]]:
    """(error, value) of `function` on every process; a process that died has ("dead", its exit code)."""
    port, processes = get_free_port(), []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(rank, count, port, function, arguments, sender))
        process.start()
        sender.close()
        processes.append((process, receiver))
    results = []
    for process, receiver in processes:
        try:
            results.append(receiver.recv() if receiver.poll(120) else ("hangs", None))
        except EOFError:
            process.join()
            results.append(("dead", process.exitcode))
    for process, _ in processes:
        process.join(20)
        process.kill()
    return results


def train(config: RunConfig) -> float:
    from ngrpo_lora.training.trainer import train

    return train(config)["eval/reward_mean"]


@pytest.fixture(scope="module")
def alone(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, which the runs of several must equal."""
    output_dir = tmp_path_factory.mktemp("alone")
    train(make_config(output_dir, *SEVERAL))
    return output_dir


@pytest.mark.parametrize(("count", "setting"), [(2, ""), (3, ""), (4, ""), (2, "trainer.strategy=fsdp")])
def test_results_do_not_depend_on_the_number_of_processes(
    count: int, setting: str, context: Any, alone: Path, make_config: MakeConfig, tmp_path: Path
):
    """Three processes own one, one and two of four groups."""
    results = run(context, count, train, make_config(tmp_path, *SEVERAL, *([setting] if setting else [])))
    assert [error for error, _ in results] == [None] * count
    assert len({value for _, value in results}) == 1
    assert_nearly_same_run(alone, tmp_path)


OTHERS = {
    "mix": ["algorithm.window_size=2"],
    "mix_flash": ["algorithm.window_size=2"],
    "branch": ["algorithm.split_every=1"],
}


@pytest.mark.parametrize("algorithm", [name for name in registry.names(registry.ALGORITHMS) if name != "neighbor"])
def test_every_algorithm_sees_the_same_iteration_whoever_drew_its_groups(
    algorithm: str, context: Any, make_config: MakeConfig, tmp_path: Path
):
    """Advantages of all groups, of which some algorithms take a common deviation, and updates that divide samples."""
    settings = ["rollout.num_steps=4", "rollout.prompts_per_iteration=3", "evaluation.num_prompts=3"]
    settings += ["algorithm.updates_per_rollout=2", "optimizer.learning_rate=1e-3", *OTHERS.get(algorithm, [])]
    for count in (1, 2):
        results = run(context, count, train, run_config(make_config, tmp_path / str(count), algorithm, *settings))
        assert [error for error, _ in results] == [None] * count
    assert_nearly_same_run(tmp_path / "1", tmp_path / "2")


WHERE = """
import os
import numpy as np

def where(images, prompts):
    assert os.environ.get("RANK", "0") == "0", "another process measures"
    means = [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
    return {"second": means[1], "last": means[-1], "pictures": len(images), "prompts": len(prompts)}

def fails(images, prompts):
    raise ValueError("nothing here")
"""


def test_pictures_of_all_processes_are_measured_together_and_in_order(
    context: Any, make_config: MakeConfig, tmp_path: Path
):
    (tmp_path / "where.py").write_text(WHERE)
    settings = [*SEVERAL, "trainer.num_iterations=1"]
    whole = make_config(tmp_path / "run", *settings, f"evaluation.measures={tmp_path / 'where.py'}:where")
    assert [error for error, _ in run(context, 2, train, whole)] == [None] * 2
    for step, row in enumerate(read_rows(tmp_path / "run")):
        scores = [json.loads(line) for line in (tmp_path / "run" / "evaluations" / f"{step:06d}.jsonl").open()]
        assert (row["eval/pictures"], row["eval/prompts"]) == (5, 5)
        assert row["eval/second"] == pytest.approx(scores[1]["redness"], abs=1e-6)
        assert row["eval/last"] == pytest.approx(scores[4]["redness"], abs=1e-6)
    failing = make_config(tmp_path / "failed", *settings, f"evaluation.measures={tmp_path / 'where.py'}:fails")
    (problem, _), (same, _) = run(context, 2, train, failing)
    assert problem == same
    assert "SharedError: evaluation of the base model: evaluation.measures: " in str(problem)
    assert "where.py:fails failed (ValueError: nothing here)" in str(problem)


def test_where_there_is_nothing_to_learn_no_process_moves(context: Any, make_config: MakeConfig, tmp_path: Path):
    reward = tmp_path / "flat.py"
    reward.write_text("def score(images):\n    return [0.5] * len(images)\n")
    settings = [*SEVERAL, f"rewards={reward}:score", "optimizer.weight_decay=0.5"]
    train(make_config(tmp_path / "one", *settings))
    assert [error for error, _ in run(context, 2, train, make_config(tmp_path / "two", *settings))] == [None] * 2
    assert torch.equal(adapter_weights(tmp_path / "one"), adapter_weights(tmp_path / "two"))


def test_a_run_goes_on_with_another_number_of_processes(
    context: Any, alone: Path, make_config: MakeConfig, tmp_path: Path
):
    half = make_config(tmp_path, *SEVERAL, "trainer.save_every=1")
    run(context, 2, train, half)
    for path in (tmp_path / "checkpoints").glob("iteration-000002"):
        path.rename(tmp_path / "later")
    results = run(context, 4, train, half.model_copy(update={"resume": "latest"}))
    assert [error for error, _ in results] == [None] * 4
    assert_nearly_same_run(alone, tmp_path)


@pytest.mark.parametrize(
    ("does", "message", "strategy"),
    [
        ("os.kill(os.getpid(), 9)", "lost another process", "replicated"),
        ('__import__("ctypes").CDLL(None)._exit(1)', "lost another process", "fsdp"),
        ("return [float('nan')] * len(images)", "has no score for 50% of the images", "replicated"),
    ],
    ids=["killed", "ends", "fails"],
)
def test_what_befalls_one_process_ends_all_with_a_message_and_the_run_can_go_on(
    does: str, message: str, strategy: str, context: Any, make_config: MakeConfig, tmp_path: Path
):
    reward, trouble = tmp_path / "trouble.py", tmp_path / "trouble.txt"
    reward.write_text(TROUBLE.format(does))
    settings = [*SEVERAL, f"rewards={reward}:score", "rewards.max_failed_share=0.1", "trainer.save_every=1"]
    config = make_config(tmp_path / "run", *settings, f"trainer.strategy={strategy}")
    one = config.model_copy(update={"trainer": config.trainer.model_copy(update={"num_iterations": 1})})
    assert [error for error, _ in run(context, 2, train, one)] == [None, None]
    trouble.write_text("now")
    begin = time.monotonic()
    results = run(context, 2, train, config.model_copy(update={"resume": "latest"}))
    assert time.monotonic() - begin < 60
    assert message in str(results[0][0])
    assert "resume=latest" in str(results[0][0])
    assert results[1][0] == ("dead" if message == "lost another process" else results[0][0])
    trouble.unlink()
    assert [error for error, _ in run(context, 2, train, config.model_copy(update={"resume": "latest"}))] == [
        None,
        None,
    ]
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1, 2]


def wait_for_a_slow_one(timeout_s: float) -> None:
    processes = Processes(timeout_s=timeout_s)
    if processes.rank == 1:
        time.sleep(timeout_s + 4)
    processes.gather(processes.rank)


def test_waiting_for_a_slow_process_is_bounded(context: Any):
    results = run(context, 2, wait_for_a_slow_one, 2.0)
    assert "waited for the others longer than trainer.timeout_s (2)" in str(results[0][0])
    assert results[1][0] is not None


def gather_and_sum() -> tuple[Any, ...]:
    processes = Processes(timeout_s=30.0)
    tensors = [torch.full((2,), 1.0 + processes.rank), torch.tensor([[10.0 * processes.rank]])]
    processes.sum_(tensors)
    problem = "not good" if processes.rank == 2 else None
    collected = (
        processes.gather(processes.rank),
        processes.broadcast(processes.rank),
        processes.any(processes.rank == 1),
    )
    agreed = (processes.agree(problem), processes.agree(None), processes.agree("the same"))
    return (list(processes.share(8)), collected, [t.tolist() for t in tensors], agreed)


def test_processes_share_gather_sum_and_agree(context: Any):
    results = run(context, 3, gather_and_sum)
    assert [value[0] for _, value in results] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    for _, (_, collected, tensors, agreed) in results:
        assert collected == ([0, 1, 2], 0, True)
        assert tensors == [[6.0, 6.0], [[30.0]]]
        assert agreed == ("process 2 of 3: not good", None, "the same")


def test_fewer_groups_than_processes_are_refused_before_the_model_loads(
    context: Any, make_config: MakeConfig, tmp_path: Path
):
    config = make_config(tmp_path, "rollout.prompts_per_iteration=2", "model.path=nobody/nothing")
    for error, _ in run(context, 3, train, config):
        assert error == (
            "SharedError: rollout.prompts_per_iteration must be at least the number of processes (3), got 2"
        )


def test_what_a_divided_base_cannot_do_is_refused(context: Any, make_config: MakeConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rollout\.merge_adapter must be false with trainer\.strategy=fsdp"):
        make_config(tmp_path, "trainer.strategy=fsdp", "rollout.merge_adapter=true")
    uneven = make_config(tmp_path, *SEVERAL, "trainer.strategy=fsdp", "rollout.prompts_per_iteration=3")
    for error, _ in run(context, 2, train, uneven):
        assert "rollout.prompts_per_iteration must be a multiple of the number of processes (2)" in str(error)
