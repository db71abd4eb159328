"""Tables are made of what was measured, and what follows from it is computed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ngrpo_lora.bench.gpu.parts import make_parts
from ngrpo_lora.bench.gpu.report import page, part_table
from ngrpo_lora.bench.gpu.results import opened_result

MEMORY = {"rollout_gib": 23.456, "update_gib": 31.0, "reserved_gib": 33.0}
FOUND: dict[str, Any] = {
    **{"rollout_s": 3.0, "reward_s": 0.0, "update_s": 2.0, "iteration_s": 5.0, "bare_s": 4.0, "waits": 0.125},
    **{"samples": 3, "old_per_sample": 8.0, "theta_per_sample": 4 / 3},
    **MEMORY,
    **{"plan_rollout_gib": 25.0, "plan_update_gib": 32.0},
}


def results(tmp_path: Path) -> dict[str, Any]:
    """The results of all parts, of which nothing is measured."""
    return {part.name: opened_result(part, tmp_path / part.name, "an H100") for part in make_parts("cuda")}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_an_iteration_has_its_ratio_its_waiting_and_its_plan(tmp_path: Path):
    result = results(tmp_path)["sizes"]
    first, second, third = result["rows"]
    first["state"], first["found"] = "measured", FOUND
    second["state"], second["found"] = "measured", FOUND | dict.fromkeys(MEMORY)
    third["state"], third["reason"] = "out of memory", "tried to allocate 2 | 3 GiB"
    head, _, *rows = cells(part_table(result).replace("\\|", "/"))
    assert dict(zip(head, rows[0], strict=True)) == {
        "": "720 px",
        "rollout": "3.000 s",
        "update": "2.000 s",
        "iteration": "5.000 s",
        "iteration / bare calls": "1.250",
        "device waits": "12.5%",
        "rollout: GiB, of planned": "23.46 of 25.00",
        "update: GiB, of planned": "31.00 of 32.00",
        "reserved GiB": "33.00",
    }
    assert rows[1][-3:] == ["- of 25.00", "- of 32.00", "-"]
    assert rows[2] == ["1024 px", "out of memory: tried to allocate 2 / 3 GiB", *[""] * 7]


def test_methods_are_compared_with_the_first_that_was_measured(tmp_path: Path):
    result = results(tmp_path)["methods"]
    for row, seconds in zip(result["rows"], (5.0, 20.0), strict=True):
        row["state"], row["found"] = "measured", FOUND | {"iteration_s": seconds}
    head, _, *rows = cells(part_table(result))
    assert [row[head.index("of the first")] for row in rows] == ["1.00", "4.00"]
    assert [row[head.index("a sample")] for row in rows] == ["1.667 s", "6.667 s"]
    assert rows[0][head.index("NFE_old, NFE_θ")] == "8.00, 1.33"


def test_the_page_has_all_tables_and_names_what_is_not_measured(tmp_path: Path):
    found = results(tmp_path)
    text = page([*found.values()])
    assert text.startswith("# black-forest-labs/FLUX.1-dev with random weights: an H100\n")
    for result in found.values():
        assert f"## {result['title']}\n\n{part_table(result)}" in text
    assert text.count("not measured yet") == sum(len(result["rows"]) for result in found.values())
    assert f"a ratio of {237.86 / 45.08:.2f}" in text


@pytest.mark.parametrize("part", [part.name for part in make_parts("cpu")])
def test_every_row_of_a_table_has_all_its_cells(part: str, tmp_path: Path):
    assert len({len(line) for line in cells(part_table(results(tmp_path)[part]))}) == 1
