"""The sections of one run's report: curves, pictures, accuracy by task, the policy's figures, time, and settings."""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version

from ngrpo_lora.adapters.header import code_version
from ngrpo_lora.config import dump_config
from ngrpo_lora.evaluation.report import health
from ngrpo_lora.evaluation.report.charts import Line, chart
from ngrpo_lora.evaluation.report.markup import Html, escaped, picture, section, table, warning
from ngrpo_lora.evaluation.report.record import Record, Shown
from ngrpo_lora.evaluation.statistics import mean_interval, share_interval
from ngrpo_lora.records.files import digest
from ngrpo_lora.records.metrics import measured, series
from ngrpo_lora.reports.curves import running_mean
from ngrpo_lora.training.metering import STAGES
from ngrpo_lora.world.meanings import meaning_of
from ngrpo_lora.world.scenes import TASKS, parse

__all__ = ["in_minutes", "sections", "slider"]

SHOWN_PX, GROUP_PX, SOURCE_PX = 768, 320, 256  # pictures in the page have at most this size
ALL, OTHER = "all", "other prompts"
INTERVALS = "in brackets 95% intervals, for which prompts that mean the same count as one"


def sections(record: Record) -> list[Html]:
    """Everything that the report of one run says, in its order; what there is no data for is empty."""
    return [
        Html("\n".join(map(warning, health.warnings(record)))),
        curves(record),
        held_out_scores(record),
        before_and_after(record),
        group(record),
        accuracy_by_task(record),
        policy(record),
        cost(record),
        settings(record),
    ]


def curves(record: Record) -> Html:
    """Curves of the trained reward, of each reward on held-out prompts, of strict accuracy and of measures."""
    rows, trained = record.rows, {reward.key for reward in record.trained}
    labels = list(record.pairs.before) if record.pairs else []
    charts = [training_curve(record), accuracy_curve(record)]
    for label in labels:
        kind = "trained on" if label in trained else "watched"
        if label != record.strict and not (len(trained) == 1 and label in trained):
            lines = held_out_lines(record, f"eval/{label}_mean", label, color=2)
            charts.append(chart(f"Held-out {label} ({kind})", label, lines))
    for name in measured(next((row for row in rows if "eval/reward_mean" in row), {})):
        lines = held_out_lines(record, f"eval/{name}", name, color=3)
        charts.append(chart(f"Held-out {name} (measure)", name, lines))
    return section("Curves", grid(charts))


def training_curve(record: Record) -> Html:
    """The trained reward with its spread and its running mean, and the same reward on held-out prompts."""
    training = series(record.rows, "rollout/reward_mean")
    deviation = dict(series(record.rows, "rollout/reward_std"))
    # The deviation of several standardised rewards is on another scale than their mean.
    own_scale = len(record.trained) == 1 or record.config.rewards.combine == "raw"
    spread = [deviation.get(step, 0.0) for step, _ in training] if own_scale else []
    width = len(training) // 10
    lines = [
        Line("training", training, spread, color=0, faint=True),
        Line(f"training, mean of {width}", running_mean(training, width) if width > 1 else [], color=0),
        *held_out_lines(record, "eval/reward_mean", "held-out", color=1),
    ]
    note = "The band is one standard deviation of the candidates about their group's mean." if spread else ""
    return chart(f"Reward: {' + '.join(reward.key for reward in record.trained)}", "reward", lines, note)


def accuracy_curve(record: Record) -> Html:
    """Strict accuracy over the evaluations."""
    lines = held_out_lines(record, "eval/strict_accuracy", "strict accuracy", color=4)
    return chart("Held-out strict accuracy", "share of pictures", lines)


def held_out_lines(record: Record, key: str, name: str, color: int) -> list[Line]:
    """A metric of evaluations as a line, and as one more for each set of other prompts that evaluations drew."""
    return [Line(title, points, color=color, dots=True) for title, points in record.held_out(key, name).items()]


def grid(figures: Sequence[Html], kind: str = "charts") -> Html:
    """Figures side by side, as many as the window has room for; empty without any."""
    body = "\n".join(figure for figure in figures if figure)
    return Html(f'<div class="{kind}">\n{body}\n</div>' if body else "")


def held_out_scores(record: Record) -> Html:
    """The last evaluation against the first, reward by reward."""
    if record.pairs is None:
        return Html("")
    rows = [
        (d.reward, f"{d.before:.3f}", f"{d.after:.3f}", d.difference.show("+.3f"), d.win_rate.show(".0%"), d.pairs)
        for d in record.differences
    ]
    head = ("reward", "before", "after", "difference", "pictures won", "pictures")
    about = (
        f"Held-out prompts after iteration {record.pairs.last} against iteration {record.pairs.first}, the same "
        f"prompts and seeds; {INTERVALS}."
    )
    return section("Held-out scores", paragraph(about), table(head, rows))


def before_and_after(record: Record) -> Html:
    """A slider for each held-out prompt of which pictures are kept."""
    if not record.shown:
        return Html("")
    about = "Drag over a picture, or use the arrow keys: left of the line is the base, right of it the last evaluation."
    later = any(shown.after for shown in record.shown)
    figures = [slider(shown, scores(record, shown)) for shown in record.shown]
    return section("Before and after", paragraph(about if later else "The base model."), grid(figures, "pairs"))


def slider(shown: Shown, told: str = "") -> Html:
    """Two pictures in one place, with a line between them that moves; only the first, where there is no second."""
    before = picture(shown.before, f"before: {shown.prompt}", SHOWN_PX)
    inner = before
    if shown.after is not None:
        inner = (
            f'{picture(shown.after, f"after: {shown.prompt}", SHOWN_PX)}<div class="over">{before}</div>'
            '<span class="tag">before</span><span class="tag right">after</span>'
            f'<input type="range" min="0" max="100" value="50" aria-label="before and after: {escaped(shown.prompt)}">'
        )
    below = " · ".join(text for text in (f"seed {shown.seed}" if shown.seed else "", told) if text)
    source = ""
    if shown.source is not None:
        edited = picture(shown.source, f"source: {shown.prompt}", SOURCE_PX)
        source = f'<br><span class="faint">edited from</span><div class="source">{edited}</div>'
    return Html(
        f'<figure><div class="pair">{inner}</div><figcaption><span dir="auto">{escaped(shown.prompt)}</span>'
        f'<br><span class="faint">{escaped(below)}</span>{source}</figcaption></figure>'
    )


def scores(record: Record, shown: Shown) -> str:
    """The trained rewards of a shown picture, before and after."""
    pairs = record.pairs
    if pairs is None:
        return ""
    rows = [
        i
        for i, key in enumerate(zip(pairs.prompts, pairs.seeds, strict=True))
        if (key[0], str(key[1])) == (shown.prompt, shown.seed)
    ]
    return " · ".join(
        f"{reward.key} {pairs.before[reward.key][row]:.3g} → {pairs.after[reward.key][row]:.3g}"
        for row in rows[:1]
        for reward in record.trained
        if reward.key in pairs.before
    )


def group(record: Record) -> Html:
    """The pictures of the newest group that was kept, ranked by reward (Figure 8 of the paper)."""
    if not record.group:
        return Html("")
    first = record.group[0]
    figures = [
        Html(
            f"<figure>{picture(one.path, f'rank {rank}, reward {one.reward:.3g}', GROUP_PX)}"
            f"<figcaption>{rank}. <b>{one.reward:.3g}</b></figcaption></figure>"
        )
        for rank, one in enumerate(record.group, 1)
    ]
    prompt = Html(f'<p class="prompt" dir="auto">{escaped(first.prompt)}</p>')
    about = f"The {len(figures)} candidates of one prompt in iteration {first.iteration}, best first, by their reward."
    return section("One neighbourhood", paragraph(about), prompt, grid(figures, "group"))


def accuracy_by_task(record: Record) -> Html:
    """Strict accuracy in the first and the last evaluation, by the task of the embedded world that a prompt is of."""
    pairs, label = record.pairs, record.strict
    if pairs is None or label is None or label not in pairs.after:
        return Html("")
    tasks = [task_of(prompt) for prompt in pairs.prompts]
    kinds = [kind for kind in (*TASKS, OTHER) if kind in tasks]
    rows = []
    for kind in [*(kinds if kinds != [OTHER] else []), ALL]:
        chosen = [i for i, task in enumerate(tasks) if kind in (task, ALL)]
        meanings = [meaning_of(pairs.prompts[i]) for i in chosen]
        before, after = ([side[label][i] for i in chosen] for side in (pairs.before, pairs.after))
        gained = mean_interval([new - old for old, new in zip(before, after, strict=True)], meanings)
        shares = (share_interval(values, meanings).show(".0%") for values in (before, after))
        difference = gained.show("+.0%") if gained.low < gained.high else f"{gained.value:+.0%}"  # all gain the same
        rows.append((kind, len(chosen), *shares, difference))
    head = ("task", "pictures", f"iteration {pairs.first}", f"iteration {pairs.last}", "difference")
    about = f"The share of held-out pictures that pass {label}; {INTERVALS}."
    return section("Accuracy by task", paragraph(about), table(head, rows))


def task_of(prompt: str) -> str:
    """The task of the embedded world that a prompt is of, or OTHER."""
    try:
        return parse(prompt).task
    except ValueError:
        return OTHER


def policy(record: Record) -> Html:
    """Small curves of the policy's figures, each with what a healthy run shows."""
    charts = [
        chart(
            figure.title, figure.label, [Line(figure.title, series(record.rows, figure.key), color=5)], figure.healthy
        )
        for figure in health.FIGURES
    ]
    return section("Policy", grid(charts))


def cost(record: Record) -> Html:
    """Time and GPU memory of each stage, and function evaluations of a sample."""
    spent = {stage: [value for _, value in series(record.rows, f"time/{stage}_s")] for stage in (*STAGES, "evaluation")}
    each = {stage: math.fsum(values) / max(1, record.iteration) for stage, values in spent.items() if values}
    memory = {
        stage: max((gib for _, gib in series(record.rows, f"memory/{stage}_gib")), default=None) for stage in each
    }
    on_gpu, rows = any(memory.values()), []
    for stage, seconds in each.items():
        bar = Html(f'<span class="bar" style="width: {100 * seconds / (max(each.values()) or 1):.1f}%"></span>')
        gib = memory[stage]
        rows.append((stage, f"{seconds:.2f} s", bar, *([f"{gib:.1f} GiB" if gib else ""] if on_gpu else [])))
    head = ("stage", "an iteration", "", *(["most GPU memory"] if on_gpu else []))
    texts = [f"{in_minutes(record.seconds)} in all."]
    if evaluations := spent["evaluation"]:
        one = math.fsum(evaluations) / len(evaluations)
        texts.append(f"An evaluation takes {one:.1f} s and comes every {record.config.evaluation.every} iterations.")
    old, theta = (health.recent(record.rows, f"nfe/{part}_per_sample") for part in ("old", "theta"))
    if old is not None and theta is not None:
        texts.append(f"Function evaluations of a sample: {old:.2f} without gradients and {theta:.2f} with them.")
    return section("Time", paragraph(" ".join(texts)), table(head, rows))


def settings(record: Record) -> Html:
    """The command that runs it again, the adapter, versions and the whole configuration."""
    command = f"ngrpo train {shlex.quote(str(record.folder / 'config.yaml'))}"
    parts = [paragraph("Again, with all settings:"), Html(f"<pre>{escaped(command)}</pre>")]
    if record.adapter is not None:
        text = f"{record.adapter}\nSHA-256 {digest(record.adapter)}"
        parts += [paragraph("The adapter:"), Html(f"<pre>{escaped(text)}</pre>")]
    versions = {"ngrpo-lora": code_version(), **{name: version(name) for name in ("torch", "diffusers")}}
    words = ", ".join(f"{name} {number}" for name, number in versions.items())
    parts.append(paragraph(f"This page was written by {words}, Python {platform.python_version()}."))
    yaml = escaped(dump_config(record.config))
    parts.append(Html(f"<details><summary>All settings</summary><pre>{yaml}</pre></details>"))
    return section("Settings", *parts)


def paragraph(text: str) -> Html:
    """A paragraph of plain words."""
    return Html(f"<p>{escaped(text)}</p>")


def in_minutes(seconds: float) -> str:
    """A duration, as in `3 h 05 min`, `12 min` or `40 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
