"""What a comparison leaves beside its runs: `results.json`, `results.md`, figures, and one page with all of them."""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import torch

from ngrpo_lora.adapters.header import code_version
from ngrpo_lora.bench.paper import figures, methods
from ngrpo_lora.bench.paper.claims import claims_table
from ngrpo_lora.bench.paper.outcomes import Outcome, by_method
from ngrpo_lora.bench.paper.plan import Plan
from ngrpo_lora.bench.paper.tables import Table, make_tables, search_table
from ngrpo_lora.evaluation import pages
from ngrpo_lora.evaluation.judging import write_json
from ngrpo_lora.records.files import written

__all__ = ["write"]

TITLE = "Neighbor GRPO and its peers on the embedded model"
CAPTIONS = {
    "figure-5.png": "Figure 5: held-out reward over iterations, compute and time; mean and range over seeds.",
    "figure-8.png": f"Figure 8: one neighbourhood after training, for the prompt “{figures.GROUP_PROMPT}”.",
    "figure-9.png": "Figure 9: the same prompts and noises by every method at the end of its run.",
}


def write(
    plan: Plan,
    outcomes: Sequence[Outcome],
    tuning: Sequence[dict[str, Any]],
    command: Sequence[str],
    total: int,
    at_once: int,
) -> None:
    """Write everything anew from the runs that are complete, `total` of them when none is missing."""
    folder = plan.output_dir
    claims = claims_table(plan, outcomes)
    tables = [
        *([claims] if claims else []),
        *make_tables(plan, outcomes),
        *([search_table(tuning)] if tuning else []),
    ]
    drawn = draw(plan, outcomes)
    dearer = [outcome.job.name for outcome in outcomes if outcome.exceeds()]
    about = provenance(plan, command, at_once) | {
        "complete_runs": len(outcomes),
        "runs": total,
        "dearer_than_foreseen": dearer,
    }
    results = about | {
        "tuning": [*tuning],
        "tables": [
            {"title": t.title, "about": t.about, "head": [*t.head], "rows": [[*r] for r in t.rows]} for t in tables
        ],
        "outcomes": [outcome.summary() for outcome in outcomes],
    }
    with written(folder / "results.json") as partial:
        write_json(partial, results)
    words = in_words(about)
    with written(folder / "results.md") as partial:
        shown = [f"![{CAPTIONS[name]}]({name})\n\n{CAPTIONS[name]}\n" for name in drawn]
        parts = [f"# {TITLE}\n", f"{words}\n", *(table.markdown() for table in tables), *shown]
        partial.write_text("\n".join(parts), encoding="utf-8")
    with written(folder / "index.html") as partial:
        partial.write_text(page(words, tables, [folder / name for name in drawn]), encoding="utf-8")


def draw(plan: Plan, outcomes: Sequence[Outcome]) -> list[str]:
    """Draw the figures of Table 1's methods that are complete; returns the names of their files."""
    found = by_method(outcomes)
    main = [(m.label, found[m.name]) for m in methods.METHODS if m.name in found]
    if not main:
        return []
    figures.draw_curves(plan.output_dir / "figure-5.png", main)
    neighbors = [(label, runs) for label, runs in main if runs[0].job.config.algorithm.name == "neighbor"]
    if neighbors:
        figures.draw_groups(plan.output_dir / "figure-8.png", neighbors)
    figures.draw_side_by_side(plan.output_dir / "figure-9.png", main)
    return ["figure-5.png", *(["figure-8.png"] if neighbors else []), "figure-9.png"]


def provenance(plan: Plan, command: Sequence[str], at_once: int) -> dict[str, Any]:
    """How, where and when the figures came about."""
    return {
        "command": " ".join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "diffusers")}
        | {"ngrpo-lora": code_version(), "python": platform.python_version()},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if plan.common["model.device"] == "cuda" else None,
            "runs_at_once": at_once,
        },
        "seeds": [*range(plan.seeds)],
        "budget_forward_passes_per_sample": plan.budget,
        "equal_iterations": plan.equal_iterations,
        "settings": dict(plan.common),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def in_words(about: dict[str, Any]) -> str:
    """Where the figures come from, in a few sentences."""
    machine, versions = about["machine"], about["versions"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    where += f", {machine['runs_at_once']} runs at once"
    return (
        f"{about['complete_runs']} of {about['runs']} runs are complete. Made by `{about['command']}` on "
        f"{about['date']}, {where}, ngrpo-lora {versions['ngrpo-lora']}, PyTorch {versions['torch']}. Training seeds: "
        f"{', '.join(map(str, about['seeds']))}. Every run is an ordinary run folder below `runs/`, with its "
        "configuration, its metrics and its adapter. Runs that counted more forward passes than were foreseen, "
        "by more than an iteration's: "
        f"{', '.join(about['dearer_than_foreseen']) or 'none'}."
    )


def page(words: str, tables: Sequence[Table], pictures: Sequence[Path]) -> str:
    """One HTML page that loads nothing else."""
    body = [_html(table) for table in tables]
    for path in pictures:
        caption = html.escape(CAPTIONS[path.name])
        picture = f'<img src="{pages.data_uri(path)}" alt="{caption}">'
        body.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    style = (pages.HERE / "style.css").read_text(encoding="utf-8")
    return template.substitute(title=TITLE, style=style, about=html.escape(words), body="\n".join(body))


def _html(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "\n".join(line(row, "td") for row in table.rows)
    inner = f"<table>\n{line(table.head, 'th')}\n{rows}\n</table>"
    return f'<h2>{html.escape(table.title)}</h2>\n<p>{html.escape(table.about)}</p>\n<div class="wide">{inner}</div>'
