"""What has been measured, as tables in Markdown; columns that follow from others are computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ngrpo_lora.bench.gpu.parts import SCALED, Kind
from ngrpo_lora.bench.gpu.results import Result
from ngrpo_lora.bench.paper.published import FIGURES
from ngrpo_lora.reports.tables import markdown_table

__all__ = ["page", "part_table"]

Found = dict[str, Any]
Cell = Callable[[Found, Found], str]
"""A cell of a row, from its figures and those of the first row that is measured."""


def number(key: str, form: str, scale: float = 1.0) -> Cell:
    """A cell with one figure; `-` where it cannot be measured on the device."""
    return lambda found, first: "-" if found[key] is None else form.format(scale * found[key])


def of_plan(measured: str, planned: str) -> Cell:
    """A cell with a peak in GiB beside the plan's for it."""

    def cell(found: Found, first: Found) -> str:
        peak = "-" if found[measured] is None else f"{found[measured]:.2f}"
        return f"{peak} of {found[planned]:.2f}"

    return cell


ITERATION = number("iteration_s", "{:.3f} s")
STAGES = {"rollout": number("rollout_s", "{:.3f} s"), "update": number("update_s", "{:.3f} s"), "iteration": ITERATION}
MEMORY = {
    "rollout: GiB, of planned": of_plan("rollout_gib", "plan_rollout_gib"),
    "update: GiB, of planned": of_plan("update_gib", "plan_update_gib"),
    "reserved GiB": number("reserved_gib", "{:.2f}"),
}

COLUMNS: dict[Kind, dict[str, Cell]] = {
    "iteration": {
        **STAGES,
        "iteration / bare calls": lambda found, first: f"{found['iteration_s'] / found['bare_s']:.3f}",
        "device waits": number("waits", "{:.1%}"),
        **MEMORY,
    },
    "pace": {
        **STAGES,
        "a sample": lambda found, first: f"{found['iteration_s'] / found['samples']:.3f} s",
        "of the first": lambda found, first: f"{found['iteration_s'] / first['iteration_s']:.2f}",
        "NFE_old, NFE_θ": lambda found, first: f"{found['old_per_sample']:.2f}, {found['theta_per_sample']:.2f}",
        **MEMORY,
    },
    "optimizer": {
        "elements": number("elements", "{:,.0f}"),
        "step": number("step_s", "{:.2f} ms", 1000),
        "state: GiB, of planned": of_plan("state_gib", "plan_state_gib"),
        "planned in system memory": number("plan_paged_gib", "{:.2f}"),
    },
    "export": {
        "difference / the adapter's effect": number("difference", "{:.2g}"),
        "file": number("file_mib", "{:.1f} MiB"),
        "write, load and compare": number("check_s", "{:.1f} s"),
    },
    "tests": {
        "passed": number("passed", "{:.0f}"),
        "failed": number("failed", "{:.0f}"),
        "skipped": number("skipped", "{:.0f}"),
        "time": number("tests_s", "{:.0f} s"),
    },
}


def part_table(result: Result) -> str:
    """The table of a part: figures, or what has become of the row in their place."""
    columns = COLUMNS[result["kind"]]
    first = next((row["found"] for row in result["rows"] if row["state"] == "measured"), {})
    lines = []
    for row in result["rows"]:
        if row["state"] == "measured":
            cells = [cell(row["found"], first) for cell in columns.values()]
        else:
            reason = f": {row['reason']}" if row["reason"] else ""
            state = "not measured yet" if row["state"] == "waiting" else row["state"]
            cells = [escaped(f"{state}{reason}"), *[""] * (len(columns) - 1)]
        lines.append([escaped(row["label"]), *cells])
    return markdown_table(["", *columns], lines)


def escaped(text: str) -> str:
    """Text that stays within its cell of a table."""
    return text.replace("|", "\\|")


def page(results: Sequence[Result]) -> str:
    """All tables on one page, each below its title."""
    head, *_ = results
    model = head["rows"][0]["config"]["model"]["path"]
    lines = [
        f"# {model} with random weights: {head['machine']}",
        f"ngrpo-lora {head['version']}, `ngrpo bench report`. Iterations have one prompt and 3 candidates but where a "
        "table says otherwise. Bare calls are an iteration's forward and backward passes, decodings and optimizer "
        "steps alone. Memory is what tensors took at most, beside `ngrpo plan`'s estimate, which has room for the CUDA "
        "context besides. The nodes are left out: their tests run ComfyUI on the CPU (`make test-comfy`).",
    ]
    for result in results:
        lines += [f"## {result['title']}", part_table(result)]
        if result["part"] == "methods":
            lines.append(published())
    return "\n\n".join(lines)


def published() -> str:
    """What the paper gives for the methods that are timed side by side."""
    seconds = {name: FIGURES[3][name][-1] for name in SCALED}
    ours, other = (value for value in seconds.values() if value is not None)
    return f"The paper's Table 3 has {ours} s and {other} s an iteration, a ratio of {other / ours:.2f}, on H800 GPUs."
