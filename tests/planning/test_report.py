"""A plan in words, and advice that does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import load_config
from ngrpo_lora.planning.plan import GIB, MARGIN, make_plan
from ngrpo_lora.planning.report import shortage, suggest

FLUX = ["prompts.train=world:train", "prompts.held_out=world:held_out"]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


# Advice -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [24, 48])
def test_advice_is_enough_and_none_of_it_is_too_much(memory: int):
    config = load_config("flux", [*FLUX, "trainer.micro_batch_size=4", "trainer.gradient_checkpointing=false"])
    advice = suggest(config, memory * GIB)
    assert advice is not None
    assert not any("group_size" in setting for setting in advice)
    base = {"trainer.micro_batch_size": "4", "trainer.gradient_checkpointing": "false"}

    def fits(settings: list[str]) -> bool:
        overrides = base | dict(setting.split("=", 1) for setting in settings)
        changed = load_config("flux", [*FLUX, *(f"{key}={value}" for key, value in overrides.items())])
        return make_plan(changed).fits(memory * GIB)

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


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_says_whether_it_fits_by_its_exit_status():
    assert run("demo").exit_code == 0
    fitting, failing = run("flux", "--gpu-memory", "48"), run("flux", "--gpu-memory", "24")
    assert (fitting.exit_code, failing.exit_code) == (0, 1)
    assert f"fits the {48 * (1 - MARGIN):.1f} GiB" in fitting.stdout
    assert "what fits: model.text_encoders=cache model.quantization=int8" in failing.stdout
    assert "the package's own figures" in failing.stdout
    assert "group_size" not in failing.stdout


def test_time_follows_from_the_speed_or_from_one_measured_pass():
    figures = make_plan(load_config("flux"))
    seconds = figures.flops / 200e12
    assert f"time: {seconds:.3g} s per iteration at 200 TFLOP/s" in run("flux", "--tflops", "200").stdout
    measured = figures.flops_per_forward / 200e12
    assert f"time: {seconds:.3g} s" in run("flux", "--measured-s-per-forward", str(measured)).stdout
    assert run("flux", "--tflops", "200", "--measured-s-per-forward", "1").exit_code == 2


def test_a_preset_for_several_gpus_is_planned_for_them():
    values = [
        json.loads(run("flux-8x80gb", "--json", *words).stdout) for words in ((), ("--gpus", "8"), ("--gpus", "1"))
    ]
    assert [figures["gpus"] for figures in values] == [8, 8, 1]
    assert values[0]["system_peak"] == values[1]["system_peak"] > 7 * values[2]["system_peak"]


def test_a_reward_of_ones_own_is_named_as_not_counted_and_must_exist(tmp_path: Path):
    path = tmp_path / "mine.py"
    refused = run("flux", f"rewards={path}:score")
    assert refused.exit_code == 2
    assert f"rewards.train.0.name names the file {str(path)!r}, which does not exist here" in refused.stderr
    path.write_text("def score(image):\n    return 0.5\n")
    said = " ".join(run("flux", f"rewards={path}:score").stdout.split())
    assert "not counted: networks of reward mine, if it has any: it is a function of your own" in said


def test_json_holds_all_figures():
    result = run("demo", "--json", "--gpu-memory", "8")
    values = json.loads(result.stdout)
    assert values["fits"] is True
    assert values["peak"] == sum(values["gpu"][values["stage"]].values())
    assert values["evaluations"]["theta"] == 8 * 4 * 4
