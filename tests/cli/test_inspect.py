"""`ngrpo config` and `rewards`: what a run would do, without a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from commands import refuse
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import load_config
from ngrpo_lora.registry import REWARDS, names

pytestmark = pytest.mark.usefixtures("nothing_heavy")


def test_config_prints_yaml_that_loads_as_itself(tmp_path: Path):
    result = CliRunner().invoke(app, ["config", "rollout.num_steps=6"])
    assert result.exit_code == 0
    path = tmp_path / "config.yaml"
    path.write_text(result.output)
    assert load_config(path) == load_config(None, ["rollout.num_steps=6"])
    assert yaml.safe_load(result.output)["rollout"]["num_steps"] == 6


def test_config_takes_a_preset_or_a_file_first(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\n")
    for first, seed in (("flux", 0), (str(path), 7)):
        result = CliRunner().invoke(app, ["config", first, "rollout.num_steps=9"])
        assert yaml.safe_load(result.output)["seed"] == seed
        assert yaml.safe_load(result.output)["rollout"]["num_steps"] == 9


def test_describe_lists_every_key():
    result = CliRunner().invoke(app, ["config", "--describe"])
    assert result.exit_code == 0
    for key in ("rollout.group_size", "algorithm.perturbation_strength", "evaluation.strict", "resume"):
        assert f"\n{key} " in result.output


# Rewards ------------------------------------------------------------------------------------------------------------


def test_rewards_are_listed_with_what_they_say():
    lines = CliRunner().invoke(app, ["rewards"]).stdout.splitlines()
    listed = {line.split()[0]: line for line in lines if line and line[0] != "`"}
    assert set(listed) == set(names(REWARDS))
    assert "prefer an image" in listed["hpsv2"]


def test_a_reward_is_described_with_its_settings():
    text = CliRunner().invoke(app, ["rewards", "judge"]).stdout
    assert "P(yes) / (P(yes) + P(no))" in text
    assert re.search(r"^base_url +text +http://localhost:8000/v1 ", text, re.MULTILINE)
    assert re.search(r"^name +text +required ", text, re.MULTILINE)


def test_an_unknown_reward_names_the_nearest():
    assert "did you mean pickscore?" in refuse("rewards", "pikscore")
