"""The loop on the embedded model: what it counts, what it touches, how it resumes, and what stops it."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FinishedRun, MakeConfig
from PIL import Image
from safetensors.torch import load_file

from ngrpo_lora.adapters import lora
from ngrpo_lora.config import RunConfig, load_config
from ngrpo_lora.errors import UserError
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.records import checkpoints
from ngrpo_lora.sampling.sampler import draw
from ngrpo_lora.training.optimizers import learning_rate_factor
from ngrpo_lora.training.rollouts import prompts_of, roll_out
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.state import state
from ngrpo_lora.training.trainer import complete, iterate
from ngrpo_lora.training.watcher import Watcher

ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"

EVERY_STEP = {
    "step",
    "rollout/reward_mean",
    "rollout/reward_std",
    "rollout/zero_spread_share",
    "rollout/failed_share",
    "policy/clip_fraction",
    "policy/max_abs_log_ratio",
    "policy/entropy",
    "policy/skipped_updates",
    "nfe/old_per_sample",
    "nfe/theta_per_sample",
    "time/rollout_s",
    "time/reward_s",
    "time/update_s",
    "lora/grad_norm",
    "lora/learning_rate",
}
EVALUATION = {"eval/reward_mean", "eval/strict_accuracy"}


def read_rows(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def assert_same_run(output_dir: Path, other: Path) -> None:
    """Bit for bit: metrics but for wall times, the adapter, and the last state."""
    assert without_times(read_rows(output_dir)) == without_times(read_rows(other))
    assert_same_state(load_file(output_dir / ADAPTER), load_file(other / ADAPTER))
    ours, theirs = (checkpoints.load("latest", folder, "cpu") for folder in (output_dir, other))
    assert_same_state(ours, theirs)


def assert_same_state(ours: Any, theirs: Any) -> None:
    """Nested dictionaries and lists of equal tensors and values."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same_state(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_state(mine, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def tensors_in(nested: Any) -> list[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for value in nested.values() for tensor in tensors_in(value)] if isinstance(nested, dict) else []


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.lora_step.parameters.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# What a run leaves behind -------------------------------------------------------------------------------------------


def test_every_file_of_a_run_is_there(finished_run: FinishedRun):
    folder = finished_run.output_dir
    assert load_config(folder / "config.yaml") == finished_run.run.config
    grids, shown = ["000000.png", "000002.png", "000004.png"], ["0.png", "1.png"]
    assert sorted(path.name for path in (folder / "samples").glob("*.png")) == grids
    assert [sorted(p.name for p in (folder / "samples" / part).iterdir()) for part in ("first", "last")] == [shown] * 2
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["iteration-000002", "iteration-000004"]
    for picture in [folder / "summary.png", *(folder / "samples").rglob("*.png")]:
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 10, picture
    assert (folder / ADAPTER).is_file()
    assert not list(folder.rglob("*.partial"))


def test_every_line_of_the_metrics_has_its_keys_and_finite_numbers(finished_run: FinishedRun):
    rows = read_rows(finished_run.output_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert EVALUATION <= rows[0].keys()
    for row in rows[1:]:
        assert row.keys() >= EVERY_STEP
        assert (row.keys() >= EVALUATION) == (row["step"] % 2 == 0)
    assert all(isinstance(value, int | float) and math.isfinite(value) for row in rows for value in row.values())


def test_the_metrics_say_what_happened(finished_run: FinishedRun):
    config, rows = finished_run.run.config, read_rows(finished_run.output_dir)[1:]
    for iteration, row in enumerate(rows):
        factor = learning_rate_factor(config.optimizer, iteration, 4)
        assert row["lora/learning_rate"] == pytest.approx(config.optimizer.learning_rate * factor)
        assert row["rollout/failed_share"] == row["rollout/zero_spread_share"] == row["policy/skipped_updates"] == 0
        assert 0 < row["rollout/reward_mean"] < 1
        assert row["rollout/reward_std"] > 0
        assert row["policy/max_abs_log_ratio"] > 0
        assert 0 < row["policy/entropy"] <= math.log(4)
        assert row["lora/grad_norm"] > 0
        assert all(row[f"time/{stage}_s"] > 0 for stage in ("rollout", "reward", "update"))


def test_a_run_is_a_function_of_its_configuration(finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path):
    torch.manual_seed(123)  # the global generator must not matter
    complete(prepare(make_config(tmp_path, *finished_run.overrides)))
    assert_same_run(tmp_path, finished_run.output_dir)


# Counts and scope ---------------------------------------------------------------------------------------------------


def test_function_evaluations_are_those_of_the_transformer(finished_run: FinishedRun):
    """Against a hook of the test's own, which also sees the evaluations and the export check."""
    rows, samples = read_rows(finished_run.output_dir)[1:], 2 * 4
    assert finished_run.rows_with_gradient == sum(row["nfe/theta_per_sample"] for row in rows) * samples
    evaluations, export_check = 3 * 2 * 4, 4
    counted = sum(row["nfe/old_per_sample"] for row in rows) * samples
    assert finished_run.rows_without_gradient == counted + evaluations + export_check


@pytest.mark.parametrize(
    ("anchors", "steps", "updates", "reference"), [(2, 2, 2, 0.0), (1, 2, 1, 0.0), (4, 3, 3, 0.0), (2, 3, 2, 0.1)]
)
def test_nfe_closed_form(
    anchors: int, steps: int, updates: int, reference: float, make_config: MakeConfig, tmp_path: Path
):
    """theta = B K / G; old = rollout steps + what the later updates need anew (+ B K / G for a reference term)."""
    run = prepare(
        make_config(
            tmp_path,
            "trainer.num_iterations=1",
            "trainer.micro_batch_size=3",
            f"algorithm.num_anchors={anchors}",
            f"algorithm.num_train_steps={steps}",
            f"algorithm.updates_per_rollout={updates}",
            f"algorithm.reference_weight={reference}",
        )
    )
    complete(run)
    row, trained = read_rows(tmp_path)[-1], anchors * steps / 4
    assert row["nfe/theta_per_sample"] == trained
    later = trained * (updates - 1) / updates
    assert row["nfe/old_per_sample"] == 4 + later + (trained if reference else 0)


def test_a_step_changes_the_adapter_and_nothing_else(finished_run: FinishedRun):
    run = finished_run.run
    live = {"transformer": run.family.transformer, "vae": run.family.vae}
    for part, module in live.items():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            changed = not torch.equal(tensor, finished_run.before[part][name])
            assert changed == (".lora_" in name), name
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in run.lora_step.parameters.items())


def test_the_average_follows_the_steps_by_its_closed_form(finished_run: FinishedRun):
    """decay^n of the start, and (1 - decay) * decay^(n - k) of step k."""
    run, steps = finished_run.run, finished_run.after_each_step
    assert len(steps) == 4 * 2
    decay = run.config.optimizer.ema_decay
    for name, averaged in run.lora_step.averaged.items():
        expected = finished_run.before["transformer"][name] * decay ** len(steps)
        for k, step in enumerate(reversed(steps)):
            expected = expected + (1 - decay) * decay**k * step[name]
        torch.testing.assert_close(averaged, expected)


def test_every_iteration_has_its_own_prompts_and_every_group_its_own_noise(
    finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
):
    run = finished_run.run
    assert prompts_of(run) == range(8, 10)  # after 4 iterations of 2
    text = run.family.encode(["a red star"] * 2)
    first, second = (rollout.latents for rollout in roll_out(run, text))
    assert torch.equal(first, next(roll_out(run, text)).latents)
    assert not torch.equal(first[0], second[0])
    monkeypatch.setattr(run, "iteration", 5)
    assert prompts_of(run) == range(10, 12)
    assert not torch.equal(first[0], next(roll_out(run, text)).latents[0])


def test_rewards_and_updates_see_what_the_rollout_saw(make_config: MakeConfig, tmp_path: Path):
    """Euler's rollout is made of the very transitions that are trained: any other prompt, latent or sigma would show
    as a log ratio, which temperature 1 magnifies: a sigma that is wrong by 1e-4 of itself gives 0.04, rounding up to
    2e-4, and that depends on the processor. The reward gets the pictures of a prompt with that prompt.
    """
    run = prepare(
        make_config(
            tmp_path,
            "trainer.num_iterations=1",
            "rollout.solver=euler",
            "algorithm.old_anchor=rollout",
            "algorithm.temperature=1.0",
            "algorithm.num_anchors=4",
            "algorithm.num_train_steps=4",
            "algorithm.updates_per_rollout=1",
        )
    )
    (reward,) = run.scorer.rewards.values()
    score, seen = reward.function, {}

    def spy(images: Any, prompts: Any, metadata: Any) -> Any:
        seen[prompts[0]] = (images, prompts)  # each group is scored in a thread of its own
        return score(images, prompts, metadata)

    reward.function = spy
    complete(run)
    assert read_rows(tmp_path)[1]["policy/max_abs_log_ratio"] < 2e-3
    groups = [seen[run.prompts.prompt(i).text] for i in range(2)]
    assert [prompts for _, prompts in groups] == [[run.prompts.prompt(i).text] * 4 for i in range(2)]
    assert len({image.tobytes() for images, _ in groups for image in images}) == 8


def test_evaluation_draws_fixed_seeds_with_the_averaged_weights(finished_run: FinishedRun):
    run, row = finished_run.run, read_rows(finished_run.output_dir)[-1]
    text = run.family.encode([prompt.text for prompt in run.held_out])
    seeds = [run.config.evaluation.seed + i for i in range(2)]

    def redness() -> float:
        images = draw(run.family, text, seeds, "dpmpp_2m", run.schedule.sigmas)
        return sum(np.asarray(image)[..., 0].mean() / 255 for image in images) / 2

    with lora.swapped(run.family.transformer, run.lora_step.averaged):
        assert row["eval/reward_mean"] == pytest.approx(redness(), abs=1e-9)
    assert row["eval/reward_mean"] != pytest.approx(redness(), abs=1e-9)


def test_prompts_that_an_encoder_cuts_are_counted(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "prompts.txt").write_text("a red star\na red star and a blue circle\n" + "a red star and " * 40)
    (tmp_path / "held_out.txt").write_text("a red star")
    sources = [f"prompts.{key}={tmp_path / name}.txt" for key, name in (("train", "prompts"), ("held_out", "held_out"))]
    prepare(make_config(tmp_path / "run", *sources, "model.max_sequence_length=6"))
    assert "T5 reads 6 tokens: 2 of 3 prompts are cut there" in caplog.text
    assert "CLIP reads 16 tokens: 1 of 3 prompts are cut there" in caplog.text


# Memory levers ------------------------------------------------------------------------------------------------------


def one_update(config: Any) -> tuple[dict[str, torch.Tensor], dict[str, float], Run]:
    """Gradients before the only optimizer step of a run of one iteration, and its metrics.

    Adam divides gradients by their size, so weights after a step would magnify rounding.
    """
    run, gradients = prepare(config), {}
    step = run.lora_step.optimizer.step

    def spy(*args: Any) -> Any:
        gradients.update({name: p.grad.clone() for name, p in run.lora_step.parameters.items() if p.grad is not None})
        return step(*args)

    run.lora_step.optimizer.step = spy  # pyright: ignore
    complete(run)
    return gradients, read_rows(Path(config.output_dir))[1], run


ONE_UPDATE = ["trainer.num_iterations=1", "algorithm.updates_per_rollout=1", "evaluation.num_prompts=1"]


@pytest.fixture(scope="module")
def plain_update(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory):
    return one_update(make_config(tmp_path_factory.mktemp("plain"), *ONE_UPDATE, "trainer.micro_batch_size=8"))


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.micro_batch_size=1"],
        ["trainer.micro_batch_size=3"],
        ["trainer.gradient_checkpointing=true"],
        ["rollout.micro_batch_size=1"],
        ["rollout.merge_adapter=true"],
    ],
    ids=lambda settings: settings[0].removeprefix("trainer."),
)
def test_memory_levers_change_no_figure(
    settings: list[str], plain_update: Any, make_config: MakeConfig, tmp_path: Path
):
    """Micro-batches of 8 x 1, 3 + 3 + 2 or 1 x 8, recomputed activations, a merged adapter: same update, same count."""
    expected, expected_row, _ = plain_update
    gradients, row, run = one_update(make_config(tmp_path, *ONE_UPDATE, *settings))
    assert run.family.transformer.is_gradient_checkpointing == ("gradient_checkpointing" in settings[0])
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 0
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * scale)
    for key, value in expected_row.items():
        if not key.startswith("time/"):
            assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_gradients_are_clipped_and_their_norm_before_it_reported(
    plain_update: Any, make_config: MakeConfig, tmp_path: Path
):
    limit = plain_update[1]["lora/grad_norm"] / 10
    config = make_config(tmp_path, *ONE_UPDATE, "trainer.micro_batch_size=8", f"optimizer.max_grad_norm={limit}")
    gradients, row, _ = one_update(config)
    norm, plain_norm = (
        torch.stack([gradient.norm() for gradient in found.values()]).norm().item()
        for found in (gradients, plain_update[0])
    )
    assert norm == pytest.approx(limit, rel=1e-3)
    assert row["lora/grad_norm"] == plain_update[1]["lora/grad_norm"] == pytest.approx(plain_norm, rel=1e-5)


# Resume -------------------------------------------------------------------------------------------------------------


def resume_and_compare(finished_run: FinishedRun, make_config: MakeConfig, output_dir: Path) -> None:
    config = make_config(output_dir, *finished_run.overrides, "resume=latest")
    check_run(config)
    complete(prepare(config))
    assert_same_run(output_dir, finished_run.output_dir)


def test_a_killed_run_resumes_bit_for_bit(finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path):
    """Killed in iteration 4: one line after its checkpoint, and in the middle of the next."""
    run = prepare(make_config(tmp_path, *finished_run.overrides))
    update = run.update

    def killed(*args: Any) -> Any:
        if run.iteration == 3:
            raise KeyboardInterrupt
        return update(*args)

    run.update = killed  # pyright: ignore
    run.saved_on_error = nullcontext  # pyright: ignore  # which a kill leaves no time for
    with pytest.raises(KeyboardInterrupt):
        complete(run)
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3]
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000002"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/rew')
    resume_and_compare(finished_run, make_config, tmp_path)


def test_ctrl_c_ends_the_iteration_and_resumes_bit_for_bit(
    finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path
):
    run = prepare(make_config(tmp_path, *finished_run.overrides))
    update, handler = run.update, signal.getsignal(signal.SIGINT)
    run.update = lambda *args: (signal.raise_signal(signal.SIGINT), update(*args))[1]  # pyright: ignore
    with pytest.raises(UserError, match="stopped after iteration 1 of 4; go on with resume=latest"):
        complete(run)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000001"]
    resume_and_compare(finished_run, make_config, tmp_path)


class Stop(Exception):
    """What a test's watcher raises."""


class Stopper(Watcher):
    """Writes down what it is told, and stops the run before the first pass at which `when` is true."""

    def __init__(self, when: Callable[[Run, Stopper], bool] = lambda run, watcher: False):
        self.when, self.run, self.passes, self.updates = when, None, 0, 0
        self.groups: list[tuple[str, int, list[float]]] = []
        self.steps: list[tuple[int, dict[str, float]]] = []

    def watch(self, config: RunConfig) -> Run:
        self.run = prepare(config, self)
        self.run.lora_step.optimizer.register_step_post_hook(lambda *_: setattr(self, "updates", self.updates + 1))
        return self.run

    def before_pass(self) -> None:
        self.passes += 1
        if self.run is not None and self.when(self.run, self):
            raise Stop

    def after_rewards(self, prompt: str, images: Any, rewards: Any) -> None:
        self.groups.append((prompt, len(images), rewards))

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append((step, metrics))


@pytest.mark.parametrize(
    ("when", "iterations"),
    [
        pytest.param(lambda run, seen: True, 0, id="evaluation of the base"),
        pytest.param(lambda run, seen: run.iteration == 1, 1, id="rollout"),
        pytest.param(lambda run, seen: run.iteration == 2 and seen.updates == 5, 2, id="between two updates"),
        pytest.param(lambda run, seen: run.iteration == 2, 2, id="evaluation"),
        pytest.param(lambda run, seen: run.iteration == 4, 4, id="last evaluation"),
        pytest.param(lambda run, seen: len(seen.steps) == 5, 4, id="export"),
    ],
)
def test_a_run_stopped_before_any_pass_resumes_bit_for_bit(
    when: Callable[[Run, Stopper], bool],
    iterations: int,
    finished_run: FinishedRun,
    make_config: MakeConfig,
    tmp_path: Path,
):
    watcher = Stopper(when)
    run = watcher.watch(make_config(tmp_path, *finished_run.overrides))
    with pytest.raises(Stop):
        complete(run)
    newest = checkpoints.checkpoints(tmp_path)[-1]
    assert newest.name == f"iteration-{iterations:06d}"
    assert (newest / "pytorch_lora_weights.safetensors").is_file()
    resume_and_compare(finished_run, make_config, tmp_path)


def test_a_watcher_sees_every_step_and_a_group_of_each(
    finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path
):
    watcher = Stopper()
    run = watcher.watch(make_config(tmp_path, *finished_run.overrides))
    complete(run)
    assert_same_run(tmp_path, finished_run.output_dir)  # it changes nothing
    rows = read_rows(tmp_path)
    assert [{"step": step} | metrics for step, metrics in watcher.steps] == rows
    assert [prompt for prompt, _, _ in watcher.groups] == [run.prompts.prompt(2 * i).text for i in range(4)]
    assert all(images == len(rewards) == 4 for _, images, rewards in watcher.groups)
    samples = 2 * 4  # passes of the transformer, as every micro-batch is a group or fewer
    assert watcher.passes > sum(row["nfe/old_per_sample"] * samples / 4 for row in rows[1:])


def test_while_a_reward_is_waited_for_the_run_can_be_stopped(make_config: MakeConfig, tmp_path: Path):
    never = threading.Event()
    watcher = Stopper(lambda run, seen: waiting.is_set())
    run, waiting = watcher.watch(make_config(tmp_path)), threading.Event()
    (reward,) = run.scorer.rewards.values()
    score = reward.function

    def hang(images: Any, prompts: Any, metadata: Any) -> Any:
        if run.iteration == 0 and prompts[0] == run.prompts.prompt(1).text:  # that of the last group
            waiting.set()
            never.wait(20)
        return score(images, prompts, metadata)

    reward.function = hang
    start = time.monotonic()
    with pytest.raises(Stop):
        complete(run)
    never.set()
    assert time.monotonic() - start < 15
    assert watcher.groups == []
    assert checkpoints.checkpoints(tmp_path)[-1].name == "iteration-000000"


def test_a_second_ctrl_c_stops_at_once_with_a_checkpoint(
    finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path
):
    run = prepare(make_config(tmp_path, *finished_run.overrides))
    update = run.update

    def twice(*args: Any) -> Any:
        if run.iteration == 1:
            run.lora_step.optimizer.register_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        return update(*args)

    run.update = twice  # pyright: ignore
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not
    try:
        with pytest.raises(KeyboardInterrupt):
            complete(run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoints.checkpoints(tmp_path)[-1].name == "iteration-000001"
    resume_and_compare(finished_run, make_config, tmp_path)


def test_an_error_is_raised_where_no_checkpoint_can_be_written(make_config: MakeConfig, tmp_path: Path):
    run = Stopper(lambda run, seen: run.iteration == 1).watch(make_config(tmp_path))
    run.save = lambda: 1 / 0  # pyright: ignore
    with pytest.raises(Stop):
        complete(run)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_an_8_bit_optimizer_steps_and_resumes_bit_for_bit(name: str, make_config: MakeConfig, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    settings = [f"optimizer.name={name}", "lora.rank=16", "trainer.save_every=1", "evaluation.num_prompts=1"]
    run = prepare(make_config(tmp_path / "whole", *settings))
    before = weights(run)
    complete(run)
    assert not any(torch.equal(before[key], weight) for key, weight in weights(run).items())
    state = checkpoints.load("latest", tmp_path / "whole", "cpu")
    assert any(tensor.dtype == torch.uint8 for tensor in tensors_in(state["optimizer"]))

    middle = checkpoints.checkpoint_dir(tmp_path / "whole", 1)
    resumed = prepare(make_config(tmp_path / "resumed", *settings, f"resume={middle}"))
    assert resumed.iteration == 1
    complete(resumed)
    assert_same_state(checkpoints.load("latest", tmp_path / "resumed", "cpu"), state)
    assert without_times(read_rows(tmp_path / "resumed")) == without_times(read_rows(tmp_path / "whole"))[2:]


def test_in_float16_no_gradient_is_too_small(make_config: MakeConfig, tmp_path: Path):
    """Losses as small as those of a large picture, whose gradients float16 does not have."""
    norms = {}
    for dtype in ("float32", "float16"):
        run = prepare(make_config(tmp_path / dtype, f"model.dtype={dtype}", "evaluation.num_prompts=1"))
        original = run.algorithm.loss

        def loss(*arguments: Any, original: Any = original) -> tuple[torch.Tensor, dict[str, float]]:
            value, metrics = original(*arguments)
            return value * 1e-7, metrics

        run.algorithm.loss = loss
        norms[dtype] = iterate(run)["lora/grad_norm"]
        assert len(state(run)["scaler"]) == (5 if dtype == "float16" else 0)
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.2)


def test_a_checkpoint_of_another_rank_is_refused(finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path):
    middle = checkpoints.checkpoint_dir(finished_run.output_dir, 2)
    with pytest.raises(UserError, match="the checkpoint's adapter has other layers or another rank"):
        prepare(make_config(tmp_path, *finished_run.overrides, "lora.rank=2", f"resume={middle}"))


# What goes wrong ----------------------------------------------------------------------------------------------------


def poison(run: Run, chosen: Callable[[int], bool]) -> None:
    """Losses of the chosen transitions, by their number in the run, become NaN."""
    loss, count = run.algorithm.loss, iter(range(10**6))

    def poisoned(*args: Any) -> Any:
        value, metrics = loss(*args)
        return (value * math.nan if chosen(next(count)) else value), metrics

    run.algorithm.loss = poisoned  # pyright: ignore


def test_unchanged_weights_in_a_later_update_have_a_log_ratio_of_exactly_0(make_config: MakeConfig, tmp_path: Path):
    """With a vanishing rate the second update's old velocities, computed apart, are its new ones to the bit."""
    run = prepare(
        make_config(tmp_path, "trainer.num_iterations=1", "optimizer.learning_rate=1e-30", "trainer.micro_batch_size=3")
    )
    complete(run)
    row = read_rows(tmp_path)[-1]
    assert row["policy/max_abs_log_ratio"] == 0
    assert row["policy/clip_fraction"] == 0
    assert row["lora/grad_norm"] > 0


def test_a_loss_that_is_nan_skips_its_update_alone_and_is_counted(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """One of the four transitions of the first of two updates."""
    run = prepare(make_config(tmp_path, "trainer.num_iterations=1", "trainer.micro_batch_size=1"))
    poison(run, lambda number: number == 1)
    before, after_skip = weights(run), []
    step = run.lora_step.optimizer.step
    run.lora_step.optimizer.step = lambda *args: (after_skip.append(weights(run)), step(*args))[1]  # pyright: ignore
    complete(run)
    assert len(after_skip) == 1
    assert same(before, after_skip[0])
    assert not same(before, weights(run))
    assert all(parameter.isfinite().all() for parameter in run.lora_step.parameters.values())
    assert read_rows(tmp_path)[-1]["policy/skipped_updates"] == 1
    assert "iteration 1: loss or gradient is not finite; update skipped" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_update(value: float, make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path, "trainer.num_iterations=1"))
    next(iter(run.lora_step.parameters.values())).register_hook(lambda gradient: torch.full_like(gradient, value))
    before = weights(run)
    complete(run)
    row = read_rows(tmp_path)[-1]
    assert row["policy/skipped_updates"] == 2
    assert row["lora/grad_norm"] is None
    assert same(before, weights(run))


def test_ten_skipped_updates_in_a_row_end_the_run_with_what_was_made_on_disk(make_config: MakeConfig, tmp_path: Path):
    settings = ["trainer.num_iterations=20", "trainer.save_every=2", "algorithm.updates_per_rollout=4"]
    run = prepare(make_config(tmp_path, *settings, "evaluation.num_prompts=1"))
    # An update has 2 transitions. The first is well, then 9 are not, 1 is, and from then on none.
    poison(run, lambda number: 2 <= number < 20 or number >= 22)
    with pytest.raises(UserError, match=r"13 updates in a row .* lower optimizer.learning_rate \(0.01\)"):
        complete(run)
    assert [row["policy/skipped_updates"] for row in read_rows(tmp_path)[1:]] == [3, 4, 3, 4, 4]
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 5


def reward_of(folder: Path, body: str) -> str:
    (folder / "reward.py").write_text(f"def score(images, prompts, metadata):\n    return {body}\n")
    return f"rewards={folder / 'reward.py'}:score"


def watch_advantages(run: Run) -> list[torch.Tensor]:
    seen, advantages = [], run.algorithm.advantages
    run.algorithm.advantages = lambda batch: seen.append(advantages(batch)) or seen[-1]  # pyright: ignore
    return seen


def test_a_reward_that_is_nan_masks_its_sample_and_is_counted(make_config: MakeConfig, tmp_path: Path):
    """NaN for the first of every four images, else 2, 4, 1 fifths."""
    reward = reward_of(tmp_path, "[float('nan') if i % 4 == 0 else i * 7 % 5 / 5 for i in range(len(images))]")
    run = prepare(make_config(tmp_path / "run", "trainer.num_iterations=1", reward))
    seen = watch_advantages(run)
    complete(run)
    row = read_rows(tmp_path / "run")[-1]
    assert row["rollout/failed_share"] == 0.25
    assert row["rollout/reward_mean"] == pytest.approx(7 / 15)
    deviations = [-1 / 15, 1 / 3, -4 / 15]
    assert row["rollout/reward_std"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 3))
    assert (row["rollout/zero_spread_share"], row["policy/skipped_updates"]) == (0, 0)
    assert row["lora/grad_norm"] > 0
    assert not seen[0][:, 0].any()
    torch.testing.assert_close(seen[0].square().sum(1), torch.tensor([3.0, 3.0]).double())


@pytest.mark.parametrize("watched", [False, True])
def test_a_reward_that_fails_from_the_start_ends_the_run_before_it_trains(
    watched: bool, make_config: MakeConfig, tmp_path: Path
):
    reward = reward_of(tmp_path, "1 / 0")
    run = prepare(make_config(tmp_path / "run", f"evaluation.{reward}" if watched else reward))
    before = weights(run)
    with pytest.raises(UserError, match=r"evaluation of the base model: reward reward has no score for 100%"):
        complete(run)
    assert same(before, weights(run))
    assert read_rows(tmp_path / "run") == []


def test_a_reward_that_breaks_on_the_way_stops_the_run_where_it_can_go_on(make_config: MakeConfig, tmp_path: Path):
    """Three of eight scores are missing in iteration 2: too many for a limit of 0.3, few enough for one of 0.4."""
    settings = ["trainer.num_iterations=3", "evaluation.strict=null", "evaluation.every=3"]
    complete(prepare(make_config(tmp_path / "whole", *settings)))

    run = prepare(make_config(tmp_path / "run", *settings, "rewards.max_failed_share=0.3"))
    (reward,) = run.scorer.rewards.values()
    score, broken = reward.function, run.prompts.prompt(2).text
    reward.function = lambda images, prompts, metadata: [
        math.nan if prompt == broken and number else value
        for number, (prompt, value) in enumerate(zip(prompts, score(images, prompts, metadata), strict=True))
    ]
    with pytest.raises(UserError, match=r"iteration 2: reward redness has no score for 38% .* resume=latest"):
        complete(run)
    assert checkpoints.load("latest", tmp_path / "run", "cpu")["iteration"] == 1
    complete(prepare(make_config(tmp_path / "run", *settings, "rewards.max_failed_share=0.3", "resume=latest")))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_reward_that_is_the_same_for_all_that_have_one_has_no_gradient(make_config: MakeConfig, tmp_path: Path):
    reward = reward_of(tmp_path, "[float('nan')] + [-97.1] * (len(images) - 1)")
    run = prepare(make_config(tmp_path / "run", "trainer.num_iterations=1", reward))
    seen = watch_advantages(run)
    complete(run)
    row = read_rows(tmp_path / "run")[-1]
    assert (row["rollout/zero_spread_share"], row["rollout/reward_std"]) == (1, pytest.approx(0, abs=1e-12))
    assert row.keys() >= EVERY_STEP
    assert row["policy/entropy"] is None  # no transition was taken
    assert not seen[0].any()
    assert row["lora/grad_norm"] == 0


def test_a_model_that_is_none_is_refused(make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "FluxPipeline"')
    with pytest.raises(UserError, match=r"model_index\.json is no JSON"):
        prepare(make_config(tmp_path / "run", f"model.path={tmp_path / 'model'}"))


def test_two_rewards_are_trained_on_and_reported_each(make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "two.py").write_text(
        "import numpy as np\n"
        "def red(images, prompts, metadata):\n    return [np.asarray(i)[..., 0].mean() / 255 for i in images]\n"
        "def blue(images, prompts, metadata):\n    return [np.asarray(i)[..., 2].mean() / 255 for i in images]\n"
    )
    red, blue = f"{tmp_path}/two.py:red", f"{tmp_path}/two.py:blue"
    rewards = f"[{red}, {{name: {blue}, weight: -0.5}}]"
    complete(prepare(make_config(tmp_path / "run", "trainer.num_iterations=1", f"rewards={rewards}")))
    row = read_rows(tmp_path / "run")[-1]
    for stage in ("rollout", "eval"):
        parts = row[f"{stage}/red_mean"] - 0.5 * row[f"{stage}/blue_mean"]
        assert row[f"{stage}/reward_mean"] == pytest.approx(parts)
    assert -1 <= row["rollout/correlation/red~blue"] <= 1
    assert row["rollout/red_failed_share"] == row["rollout/blue_failed_share"] == 0


def test_an_evaluation_leaves_every_score_by_prompt_and_seed(finished_run: FinishedRun):
    rows = [json.loads(line) for line in (finished_run.output_dir / "evaluations" / "000004.jsonl").open()]
    texts = [prompt.text for prompt in finished_run.run.held_out]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(texts[0], 1000), (texts[1], 1001)]
    last = read_rows(finished_run.output_dir)[-1]
    for label in ("redness", "world_strict"):
        assert sum(row[label] for row in rows) / 2 == pytest.approx(last[f"eval/{label}_mean"])


def test_groups_are_scored_while_others_are_still_drawn(make_config: MakeConfig, tmp_path: Path):
    """The first group's reward waits until the second group is being rolled out."""
    run = prepare(make_config(tmp_path / "run", "trainer.num_iterations=1", "evaluation.strict=null"))
    (reward,) = run.scorer.rewards.values()
    score, rollout, second, groups = reward.function, run.algorithm.rollout, threading.Event(), []

    def watch_rollout(*arguments: Any) -> Any:
        groups.append(1)
        if len(groups) == 2:
            second.set()
        return rollout(*arguments)

    def wait(images: Any, prompts: Any, metadata: Any) -> Any:
        if len(images) == 4:  # no evaluation
            assert second.wait(30)
        return score(images, prompts, metadata)

    run.algorithm.rollout, reward.function = watch_rollout, wait  # pyright: ignore
    complete(run)
    assert read_rows(tmp_path / "run")[-1]["rollout/failed_share"] == 0


def test_the_exported_file_is_the_average(finished_run: FinishedRun):
    run, tensors = finished_run.run, load_file(finished_run.output_dir / ADAPTER)
    assert len(tensors) == len(run.lora_step.averaged)
    for name, averaged in run.lora_step.averaged.items():
        key = f"transformer.{name.replace('.default', '')}"
        scale = 2 if ".lora_B" in name else 1  # alpha 8 over rank 4, folded into B
        assert torch.equal(tensors[key], averaged * scale)
