"""`ngrpo plan`: figures against real runs and real optimizers, and advice that does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, update_peak
from typer.testing import CliRunner

from ngrpo_lora import registry
from ngrpo_lora.cli.app import app
from ngrpo_lora.config import ModelRewardConfig, OptimizerConfig, RunConfig, load_config, preset_names
from ngrpo_lora.errors import UserError
from ngrpo_lora.planning.plan import GIB, MARGIN, REWARD_PARAMETERS, Plan, make_plan, optimizer_sizes
from ngrpo_lora.planning.report import shortage, suggest
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.training.optimizers import make_optimizer
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

FLUX = ["prompts.train=world:train", "prompts.held_out=world:held_out"]


def plan(*overrides: str, gpus: int = 1, config: str | None = "flux") -> Plan:
    return make_plan(load_config(config, overrides), gpus)


def total(plan: Plan, stage: str) -> float:
    return sum(plan.gpu[stage].values())


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
    assert items["activations"] + items["gradients"] == pytest.approx(update_peak(config), rel=0.05)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion_8bit"])
def test_the_optimizer_state_is_counted_to_the_byte(name: Any):
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    sizes = [4095, 4096, 5000, 123_457]
    weights = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = make_optimizer(OptimizerConfig(name=name), weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    tensors = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    real = sum(value.nbytes for key, value in tensors if torch.is_tensor(value) and value.ndim and "qmap" not in key)
    assert optimizer_sizes(OptimizerConfig(name=name), sizes) == (real, 0)


def test_a_paged_optimizer_keeps_large_states_in_system_memory():
    whole, _ = optimizer_sizes(OptimizerConfig(name="adamw_8bit"), [4096, 100_000])
    on_gpu, paged = optimizer_sizes(OptimizerConfig(name="paged_adamw_8bit"), [4096, 100_000])
    assert (on_gpu + paged, paged) == (whole, 200_000)


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


@pytest.mark.parametrize("memory", [24, 48])
def test_advice_is_enough_and_none_of_it_is_too_much(memory: int):
    config = load_config("flux", [*FLUX, "trainer.micro_batch_size=4", "trainer.gradient_checkpointing=false"])
    advice = suggest(config, memory * GIB)
    assert advice is not None
    assert not any("group_size" in setting for setting in advice)
    base = {"trainer.micro_batch_size": "4", "trainer.gradient_checkpointing": "false"}

    def fits(settings: list[str]) -> bool:
        overrides = base | dict(setting.split("=", 1) for setting in settings)
        return plan(*FLUX, *(f"{key}={value}" for key, value in overrides.items())).fits(memory * GIB)

    assert fits(advice)
    for setting in advice:
        assert not fits([other for other in advice if other != setting])


def test_where_nothing_helps_there_is_no_advice():
    assert suggest(load_config("flux"), 4 * GIB) is None


def test_training_is_warned_of_a_card_that_is_too_small():
    config = load_config("flux")
    assert shortage(config, make_plan(config).peak) is None
    warning = shortage(config, 22 * GIB)
    assert warning is not None
    assert "41.6 GiB of GPU memory (update), but 22.0 GiB are free; try model.text_encoders=cache" in warning


@pytest.mark.parametrize("name", registry.names(registry.REWARDS))
def test_the_size_of_every_reward_network_is_known(name: str):
    kind = getattr(registry.load(registry.REWARDS, name), "Config", None)
    if kind is not None and issubclass(kind, ModelRewardConfig):
        assert kind.model_validate({"name": name}).path in REWARD_PARAMETERS


def test_a_reward_of_unknown_size_is_said_to_be_left_out():
    figures = plan("rewards={name: pickscore, path: somebody/else}", "evaluation.rewards=[]")
    assert figures.notes == ("the network of reward pickscore (somebody/else) is of unknown size and left out",)
    assert "rewards" not in figures.gpu["rollout"]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_the_command_says_whether_it_fits_by_its_exit_status():
    assert run("demo").exit_code == 0
    fitting, failing = run("flux", "--gpu-memory", "48"), run("flux", "--gpu-memory", "24")
    assert (fitting.exit_code, failing.exit_code) == (0, 1)
    assert f"fits the {48 * (1 - MARGIN):.1f} GiB" in fitting.stdout
    assert "what fits: model.text_encoders=cache model.quantization=int8" in failing.stdout
    assert "the package's own figures" in failing.stdout
    assert "group_size" not in failing.stdout


def test_time_follows_from_the_speed_or_from_one_measured_pass():
    figures = plan()
    seconds = figures.flops / 200e12
    assert f"time: {seconds:.3g} s per iteration at 200 TFLOP/s" in run("flux", "--tflops", "200").stdout
    measured = figures.flops_per_forward / 200e12
    assert f"time: {seconds:.3g} s" in run("flux", "--measured-s-per-forward", str(measured)).stdout
    assert run("flux", "--tflops", "200", "--measured-s-per-forward", "1").exit_code == 2


def test_json_holds_all_figures():
    result = run("demo", "--json", "--gpu-memory", "8")
    values = json.loads(result.stdout)
    assert values["fits"] is True
    assert values["peak"] == sum(values["gpu"][values["stage"]].values())
    assert values["evaluations"]["theta"] == 8 * 2 * 3


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
    from ngrpo_lora.models._blueprint import architectures

    paths = {load_config(name).model.path for name in preset_names()} - {"embedded"}
    assert paths <= set(architectures())
