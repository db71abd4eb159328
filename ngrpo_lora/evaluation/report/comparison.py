"""The sections of a page that compares runs: held-out figures, curves, the same prompts by all, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ngrpo_lora.config import flatten
from ngrpo_lora.evaluation.report import health
from ngrpo_lora.evaluation.report.charts import Line, chart
from ngrpo_lora.evaluation.report.markup import Html, escaped, picture, section, table, warning
from ngrpo_lora.evaluation.report.record import Record, names
from ngrpo_lora.evaluation.report.sections import GROUP_PX, grid, in_minutes, paragraph

__all__ = ["sections"]


def sections(records: Sequence[Record]) -> list[Html]:
    """Everything that the page says of several runs, in its order; what there is no data for is empty."""
    named = dict(zip(names([record.folder for record in records]), records, strict=True))
    told = [f"{name}: {text}" for name, record in named.items() for text in health.warnings(record)]
    return [
        Html("\n".join(map(warning, told))),
        figures(named),
        curves(named),
        pictures(named),
        differing_settings(named),
    ]


def figures(named: dict[str, Record]) -> Html:
    """A table of the runs, and one of their held-out scores before and after."""
    runs = [(name, record.state, in_minutes(record.seconds)) for name, record in named.items()]
    scores = [
        (
            d.reward,
            name,
            f"{d.before:.3f}",
            f"{d.after:.3f}",
            d.difference.show("+.3f"),
            d.win_rate.show(".0%"),
            d.pairs,
        )
        for name, record in named.items()
        for d in record.differences
    ]
    head = ("reward", "run", "before", "after", "difference", "pictures won", "pictures")
    about = "Each run's last evaluation against its first, the same prompts and seeds; in brackets 95% intervals."
    return section(
        "Runs",
        table(("run", "state", "time"), runs),
        paragraph(about) if scores else "",
        table(head, sorted(scores, key=lambda row: row[0])),
    )


def curves(named: dict[str, Record]) -> Html:
    """Every held-out figure that a run has, one line a run, over iterations."""
    keys = {"eval/reward_mean": "Held-out trained reward", "eval/strict_accuracy": "Held-out strict accuracy"}
    shown = {(record.trained[0].key if len(record.trained) == 1 else "", record.strict) for record in named.values()}
    known = {*next(iter(shown))} if len(shown) == 1 else set()  # the first two curves are theirs, in all runs
    for record in named.values():
        for label in record.pairs.before if record.pairs else []:
            if label not in known:
                keys.setdefault(f"eval/{label}_mean", f"Held-out {label}")

    def lines(key: str) -> list[Line]:
        return [
            Line(title, points, color=number, dots=True)
            for number, (name, record) in enumerate(named.items())
            for title, points in record.held_out(key, name).items()
        ]

    return section("Curves", grid([chart(title, "score", lines(key)) for key, title in keys.items()]))


def pictures(named: dict[str, Record]) -> Html:
    """The same held-out prompt and seed by the base and by every run at its last evaluation."""
    first = next(iter(named.values()))
    rows = []
    for shown in first.shown:
        source = shown.source
        cells = [cell("source", picture(source, f"source: {shown.prompt}", GROUP_PX))] if source else []
        cells += [cell("before", picture(shown.before, f"before: {shown.prompt}", GROUP_PX))]
        for name, record in named.items():
            same = [one for one in record.shown if (one.prompt, one.seed) == (shown.prompt, shown.seed) and one.after]
            cells += [cell(name, picture(one.after, f"{name}: {one.prompt}", GROUP_PX)) for one in same if one.after]
        rows.append(
            f'<p class="prompt" dir="auto">{escaped(shown.prompt)}</p><div class="group">{"".join(cells)}</div>'
        )
    return section("The same prompts and seeds", *rows)


def cell(name: str, image: Html) -> Html:
    """A picture above the name of its run."""
    return Html(f'<figure>{image}<figcaption dir="auto">{escaped(name)}</figcaption></figure>')


def differing_settings(named: dict[str, Record]) -> Html:
    """The settings that are not the same in all runs, apart from their folders."""
    flat = [dict(flatten(record.config.model_dump(mode="json"))) for record in named.values()]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in ("output_dir", "resume")]
    rows = [
        (key, *(show(one.get(key)) for one in flat)) for key in keys if len({str(one.get(key)) for one in flat}) > 1
    ]
    return section("Settings that differ", table(("key", *named), rows))


def show(value: Any) -> str:
    """A setting as it stands in YAML; none at all where a run does not have it."""
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
