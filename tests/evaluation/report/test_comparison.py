"""What the page of several runs says."""

from __future__ import annotations

from dataclasses import replace

from ngrpo_lora.evaluation.report import comparison


def test_runs_stand_side_by_side_with_what_differs(write_run):
    one, two = write_run("one"), write_run("two", iterations=5, watched=-2.0)
    config = two.config.model_copy(update={"seed": 3})
    page = "\n".join(comparison.sections([one, replace(two, config=config)]))
    assert "two: The trained reward rises while world_manifold gets worse" in page
    assert "one: The trained" not in page
    assert '<td dir="auto">stopped after iteration 5 of 10</td>' in page
    assert page.count("<polyline") == 3 * 2  # reward, strict accuracy and the watched one, of both
    assert '<td dir="auto">seed</td><td dir="auto">0</td><td dir="auto">3</td>' in page
    assert "output_dir" not in page
    assert "rollout.num_steps" not in page  # is the same
    assert page.count('alt="before: ') == 2
    assert page.count('alt="one: ') == page.count('alt="two: ') == 2


def test_a_curve_is_not_shown_twice(write_run):
    page = "\n".join(comparison.sections([write_run("one"), write_run("two")]))
    assert "Held-out trained reward" in page
    assert 'dir="auto">Held-out world</figcaption>' not in page


def test_settings_are_shown_as_in_yaml():
    assert [comparison.show(value) for value in (True, None, 0.5, "auto")] == ["true", "", "0.5", "auto"]
