"""`ngrpo plan`: figures against real runs, and against arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, update_peak
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import RunConfig, load_config, preset_names
from ngrpo_lora.errors import UserError
from ngrpo_lora.planning.plan import GIB, Plan, make_plan
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.world import MODELS


def plan(*overrides: str, gpus: int = 1, config: str | None = "flux") -> Plan:
    return make_plan(load_config(config, overrides), gpus)


def total(plan: Plan, stage: str) -> float:
    return sum(plan.gpu[stage].values())


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.num_train_steps=3", "algorithm.updates_per_rollout=4"],
        ["algorithm.reference_weight=0.1", "algorithm.updates_per_rollout=1", "rollout.num_steps=5"],
    ],
)
def test_function_evaluations_are_those_that_a_run_counts(
    overrides: list[str], make_config: MakeConfig, tmp_path: Path
):
    config = make_config(tmp_path / "run", "trainer.num_iterations=1", "evaluation.every=1", *overrides)
    complete(prepare(config))
    counted = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    expected = make_plan(config).evaluations
    assert expected.old_per_sample == counted["nfe/old_per_sample"]
    assert expected.theta_per_sample == counted["nfe/theta_per_sample"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_of_the_trainer_takes_what_is_planned(checkpointing: bool, make_config: MakeConfig, tmp_path: Path):
    settings = [f"trainer.gradient_checkpointing={str(checkpointing).lower()}", "trainer.micro_batch_size=4"]
    config = make_config(tmp_path / "run", "model.device=cpu", "algorithm.updates_per_rollout=1", *settings)
    items = make_plan(config).gpu["update"]
    moved = items["activations"] + items["gradients"] + items["kept state"] / 2  # the other half is there before
    assert moved == pytest.approx(update_peak(config), rel=0.05)


def test_flux_needs_what_arithmetic_says():
    figures = plan()
    assert figures.gpu["update"]["transformer"] == 2 * figures.parameters["transformer"]
    assert figures.parameters["transformer"] == pytest.approx(11.9e9, rel=0.002)
    # Rank 64 on 19 double and 38 single blocks of width 3072, feed-forward 12288.
    double, single = 8 * 2 * 3072 + 4 * (3072 + 12288), 3 * 2 * 3072 + 3 * 3072 + 2 * 12288
    assert figures.parameters["LoRA"] == 64 * (19 * double + 38 * single)
    # Two a weight and token, of 2025 image and 512 text tokens; each stream of a double block sees its own.
    tokens, width = 2025 + 512, 3072
    linear = 19 * 12 * width**2 * tokens + 38 * (3 + 4 + 5) * width**2 * tokens
    attention = 57 * 2 * tokens**2 * width
    # The adapter's: in double blocks each stream's half, in single ones all of it.
    adapter = 64 * (19 * double / 2 + 38 * single) * tokens
    assert figures.flops_per_forward == pytest.approx(2 * (linear + attention + adapter), rel=0.005)
    assert figures.evaluations.old == 8 * 96
    assert figures.evaluations.theta == 8 * 4 * 4
    assert figures.stage == "update"
    assert figures.peak == total(figures, "update")


def test_every_setting_has_its_effect_and_no_other():
    before = plan()

    def change(*overrides: str, gpus: int = 1) -> dict[str, float]:
        after = plan(*overrides, gpus=gpus)
        rows = {**before.gpu["update"], **dict.fromkeys(after.gpu["update"], 0.0)}
        differences = {k: after.gpu["update"].get(k, 0) - before.gpu["update"].get(k, 0) for k in rows}
        return {k: size / GIB for k, size in differences.items() if abs(size) > 0.02 * GIB and k != "reserve"}

    adapter = 4 * before.parameters["LoRA"] / GIB
    assert change("optimizer.name=adamw") == pytest.approx({"optimizer": 0.75 * adapter * 2}, rel=0.02)
    assert change("optimizer.ema_decay=0.9") == pytest.approx({"LoRA": adapter})
    assert change("model.text_encoders=cache") == pytest.approx({"text encoders": -9.1}, rel=0.01)
    assert change("model.quantization=nf4") == pytest.approx({"transformer": -16.45, "activations": 0.105}, rel=0.01)
    assert change("model.quantization=int8") == pytest.approx({"transformer": -11.06, "activations": 0.105}, rel=0.01)
    assert change("model.swap_blocks=20") == pytest.approx({"transformer": -18 * 2 * 141.6e6 / GIB}, rel=0.01)
    assert change("trainer.strategy=fsdp", gpus=8)["transformer"] == pytest.approx(-18.0, rel=0.03)
    assert set(change("trainer.micro_batch_size=2")) == {"activations"}
    assert set(change("trainer.gradient_checkpointing=false")) == {"activations"}
    assert change("model.vae_tiling=true") == {}
    adapted = 2 * (19 * 24 + 38 * 12) * 3072**2  # bytes of the layers with a LoRA
    assert plan("rollout.merge_adapter=true").gpu["rollout"]["LoRA"] == adapted + adapter * GIB
    offloaded = [f"rewards.train=[{', '.join(f'{{name: {n}, offload: true}}' for n in ('hpsv2', 'pickscore'))}]"]
    assert plan(*offloaded).gpu["update"]["rewards"] < 2 * GIB < plan(*offloaded).gpu["rollout"]["rewards"]


def test_groups_are_shared_and_system_memory_is_not():
    alone, together = plan("rollout.prompts_per_iteration=16"), plan("rollout.prompts_per_iteration=16", gpus=8)
    assert together.evaluations == alone.evaluations
    assert together.flops == alone.flops
    assert together.system["load"]["weights"] == 8 * alone.system["load"]["weights"]
    assert together.system["train"]["rollouts"] == alone.system["train"]["rollouts"]


def test_a_reward_of_unknown_size_is_said_to_be_left_out():
    figures = plan("rewards={name: pickscore, path: somebody/else}", "evaluation.rewards=[]")
    assert figures.notes == ("the network of reward pickscore (somebody/else), which is of unknown size",)
    assert "rewards" not in figures.gpu["rollout"]


def test_on_a_cpu_all_is_system_memory():
    figures = plan("model.device=cpu", config="demo")
    assert set(figures.system) == {"train"}
    assert figures.system_peak > figures.peak
    assert "on each GPU" not in run("demo", "model.device=cpu").stdout


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path):
    result = run(f"model.path={tmp_path}")
    assert result.exit_code == 2
    assert "holds no model_index.json" in result.stderr
    with pytest.raises(UserError, match="model.swap_blocks must be at most 57, the blocks of this model, got 60"):
        plan("model.swap_blocks=60")


def test_no_weights_are_read(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    assert make_plan(RunConfig()).peak > 0


def test_every_preset_can_be_planned_without_the_hub():
    from ngrpo_lora.models._index import architectures

    paths = {load_config(name).model.path for name in preset_names()} - {*MODELS}
    assert paths <= set(architectures())
