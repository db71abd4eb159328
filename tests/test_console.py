"""The progress of a run on the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from ngrpo_lora.console import progress_bar


def test_the_bar_counts_iterations_and_a_status_of_any_length_is_the_line_below():
    screen = io.StringIO()
    bar = progress_bar()
    task = bar.add_task("train", total=8, completed=3, status="evaluating")
    bar.update(task, completed=4, status="reward 0.5  " * 20)
    Console(file=screen, width=400).print(bar.get_renderable())
    line, below = (line.rstrip() for line in screen.getvalue().splitlines())
    assert line.startswith("train")
    assert "4/8" in line
    assert below == "  " + ("reward 0.5  " * 20).rstrip()
