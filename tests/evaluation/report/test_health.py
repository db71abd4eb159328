"""Warnings come where a run's figures are not those of a healthy run, and only there."""

from __future__ import annotations

import pytest

from ngrpo_lora.evaluation.report.health import recent, warnings


def test_a_healthy_run_has_no_warning(write_run):
    assert warnings(write_run()) == []


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("policy/clip_fraction", 0.6, "Most of the loss is clipped (60%)"),
        ("policy/max_abs_log_ratio", 1.5, "(|log-ratio| 1.5)"),
        ("policy/entropy", 0.2, "nearly settled (entropy 0.2)"),
        ("rollout/zero_spread_share", 0.75, "(75% are flat)"),
        ("rollout/zero_spread_share", 1.0, "All groups are flat"),
        ("policy/skipped_updates", 2.0, "Updates are skipped, 2 an iteration"),
        ("rollout/failed_share", 0.125, "no score for 12.5% of the pictures"),
    ],
)
def test_what_leaves_the_healthy_range_is_told_with_its_value(write_run, metric: str, value: float, words: str):
    (told,) = warnings(write_run(**{metric.replace("/", "__"): value}))
    assert words in told


def test_a_watched_reward_that_falls_beyond_its_interval_is_told(write_run):
    (told,) = warnings(write_run(watched=-2.0))
    assert "world_manifold gets worse, by -2 [-2, -2]" in told
    assert warnings(write_run("rising", watched=2.0)) == []


def test_the_last_tenth_counts_and_at_least_five(write_run):
    record = write_run()
    for row, value in zip(record.rows[1:], range(10), strict=True):
        row["policy/clip_fraction"] = value
    assert recent(record.rows, "policy/clip_fraction") == (5 + 6 + 7 + 8 + 9) / 5
    assert recent(record.rows, "memory/update_gib") is None
