"""What a run shows on the terminal."""

from __future__ import annotations

from pathlib import Path

from conftest import MakeConfig

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.records.metrics import MetricsFile
from ngrpo_lora.training.screen import closing, estimate, opening, status_line


def test_the_opening_says_what_the_run_will_do(make_config: MakeConfig, tmp_path: Path):
    config = make_config(tmp_path, "rewards=[world, {name: jpeg, weight: -0.5}]")
    assert opening(config, 1_230_000, 45_600_000).splitlines() == [
        f"neighbor on embedded: 2 iterations into {tmp_path}",
        "  an iteration: 2 prompts x 4 candidates = 8 images",
        "  an image: 4 dpmpp_2m steps, scored by world + -0.5 x jpeg",
        "  trained: 1.23 M LoRA parameters of rank 4 on a frozen 45.6 M",
        "  evaluated on 2 held-out prompts every 2 iterations",
    ]
    several = opening(config, 1_230_000, 45_600_000, processes=2).splitlines()
    assert several[1] == "  2 processes, each with whole groups; the base is replicated"


def test_the_status_names_each_of_several_rewards_and_the_last_evaluation():
    metrics = {"rollout/reward_mean": 0.5, "nfe/old_per_sample": 5.0, "nfe/theta_per_sample": 1.0}
    assert status_line(metrics, [RewardConfig(name="world")]) == "reward 0.500  NFE 5.0 + 1.00"
    metrics |= {"rollout/world_mean": 0.75, "rollout/jpeg_mean": -1234.5, "eval/reward_mean": 0.625}
    several = [RewardConfig(name="world"), RewardConfig(name="jpeg")]
    assert status_line(metrics, several) == "world 0.75  jpeg -1.23e+03  NFE 5.0 + 1.00  held-out 0.625"


def test_the_estimate_counts_iterations_and_evaluations():
    assert estimate(1.2, 400, 15.0, 4) == "  about 9 min: 1.2 s an iteration, 15.0 s an evaluation"
    assert "about 1 min" in estimate(0.1, 3, 0.5, 1)


def test_the_closing_tells_each_of_several_rewards(tmp_path: Path):
    first = {"eval/reward_mean": 1.0, "eval/strict_accuracy": 0.5, "eval/strict_mean": 0.5, "eval/a_mean": 0.25}
    last = {"eval/reward_mean": 1.5, "eval/strict_accuracy": 0.6, "eval/strict_mean": 0.6, "eval/a_mean": 0.125}
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    file.write(0, first)
    file.write(8, last)
    assert "held-out reward           before 1.000  after 1.500  (+0.500)" in closing(tmp_path, tmp_path / "adapter")
    assert "held-out a " not in closing(tmp_path, tmp_path / "adapter")  # it is the reward, and strict the accuracy
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    file.write(0, first | {"eval/b_mean": 0.75})
    file.write(8, last | {"eval/b_mean": 1.375})
    assert "held-out a                before 0.250  after 0.125  (-0.125)" in closing(tmp_path, tmp_path / "adapter")
    assert "held-out b                before 0.750  after 1.375  (+0.625)" in closing(tmp_path, tmp_path / "adapter")
