"""Writes the report of a run, or of several, as one HTML file that loads nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from string import Template

from ngrpo_lora.evaluation import pages
from ngrpo_lora.evaluation.report import comparison
from ngrpo_lora.evaluation.report import sections as of_one
from ngrpo_lora.evaluation.report.markup import escaped
from ngrpo_lora.evaluation.report.record import Record, names
from ngrpo_lora.records.files import written

__all__ = ["FILE_NAME", "write_report"]

FILE_NAME = "report.html"


def write_report(records: Sequence[Record], path: Path) -> Path:
    """Write the report of one run, or a page that compares several; every run has finished its first evaluation."""
    labels = names([record.folder for record in records])
    if len(records) == 1:
        title, about, body = labels[0], in_short(records[0]), of_one.sections(records[0])
    else:
        title, about, body = f"{len(records)} runs", ", ".join(labels), comparison.sections(records)
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    filled = template.substitute(
        title=escaped(title),
        about=escaped(about),
        when=escaped(time.strftime("%Y-%m-%d %H:%M %Z")),
        style=(pages.HERE / "style.css").read_text(encoding="utf-8"),
        body="\n".join(part for part in body if part),
    )
    with written(path) as partial:
        partial.write_text(filled, encoding="utf-8")
    return path


def in_short(record: Record) -> str:
    """Where a run stands, how long it took, and what its trained rewards came to."""
    trained = {reward.key for reward in record.trained}
    gained = [f"{d.reward} {d.before:.3f} → {d.after:.3f}" for d in record.differences if d.reward in trained]
    time_so_far = of_one.in_minutes(record.seconds) + (" so far" if record.is_running else "")
    return " · ".join([record.state, time_so_far, *gained])
