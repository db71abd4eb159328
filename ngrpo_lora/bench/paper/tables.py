"""The paper's tables from complete runs, each with the paper's own figures beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ngrpo_lora.bench.paper import methods, published, reached
from ngrpo_lora.bench.paper.given import KNOBS, RATE
from ngrpo_lora.bench.paper.methods import BASELINE, LEARNING_RATES, Method
from ngrpo_lora.bench.paper.outcomes import Outcome, by_method, change, is_trained, paired
from ngrpo_lora.bench.paper.plan import Plan
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.evaluation.statistics import compare_scores, mean_interval
from ngrpo_lora.reports.tables import markdown_table
from ngrpo_lora.training.metering import STAGES
from ngrpo_lora.world.meanings import meaning_of

__all__ = ["Column", "Table", "make_tables", "search_table"]


@dataclass(frozen=True)
class Table:
    """A table of text: its title, what it says, its head and its rows, which may be of different tables' methods."""

    title: str
    about: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table as Markdown, below its title."""
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        return f"## {self.title}\n\n{self.about}\n\n{markdown_table(self.head, escaped)}\n"


@dataclass(frozen=True)
class Column:
    """A score in a table: its heading, the reward's label, and of which prompts (see `outcomes.change`)."""

    head: str
    label: str
    trained: bool | None


TITLES = {
    1: "Table 1: every method at equal compute",
    2: "Table 2: a reward that is easily hacked",
    3: "Table 3: what an iteration costs",
    4: "Table 4: the radius of the neighbourhood (perturbation_strength, the paper's σ)",
    5: "Table 5: the number of anchors B",
    6: "Table 6: p of the quasi-norm",
    7: "Table 7, not in the paper: what may be changed of Neighbor GRPO",
    8: "Table 8, not in the paper: a model distilled into four steps",
}
WITH_BASE = (1, 2, 8)
"""Tables whose rows are methods, below the base model's."""

SCORES = (
    "Scores are means over held-out prompts after training, drawn by the same deterministic solver; in brackets the "
    "change from the base model on the same prompts and noises, and its 95% interval over scenes{seeds}."
)
BORROWED = (
    "Learning rate and clip of every row are those that the search found for the method which the row varies, on the "
    "verifier's reward; they were not searched again for the row."
)
HACKED = (
    "All rows are trained on vividness (mean colour saturation), the last one on vividness and the verifier together. "
    "What the verifier says of the pictures was not trained on in the others."
)
TURBO = (
    "All rows train, and draw all pictures, with four Euler steps, the schedule for which `embedded-turbo` distils the "
    "embedded model; learning rate and clip are searched for each as in Table 1. `fine_detail` is what a low-pass "
    "filter would take away: less of it is blur, more of it noise."
)


def make_tables(plan: Plan, outcomes: Sequence[Outcome]) -> list[Table]:
    """Every table of the plan of which there is a complete run."""
    found = by_method(outcomes)
    seeds = " and over seeds" if plan.seeds > 1 else ""
    tables = []
    for number in plan.tables:
        rows = [method for method in methods.rows(number, plan.chosen) if method.name in found]
        if not rows:
            continue
        if number == 3:
            tables.append(cost_table(rows, found))
            continue
        borrowed = "" if number in (1, 8) else f" {BORROWED}"
        length = _length(plan, found[rows[0].name][0].job.config.rollout)
        length = {2: HACKED, 8: f"{TURBO} {length}"}.get(number, length)
        about = f"{length}{borrowed} {SCORES.format(seeds=seeds)}"
        about += f" {published.NOTE}" if published.COLUMNS[number] else ""
        tables.append(score_table(number, TITLES[number], about, rows, found, plan.budget))
        if number == 1:
            tables += equal_iterations(plan, rows, found, seeds)
            tables.append(gains_table(rows, found))
            tables += against_baseline(rows, found, plan.budget)
    return tables


def _length(plan: Plan, rollout: RolloutConfig) -> str:
    samples = rollout.prompts_per_iteration * rollout.group_size
    return (
        f"Each run may spend {plan.budget:g} forward passes for each of the {samples} places of its batch, all "
        "iterations together, a trained one counted as three; iterations follow from that. Forward passes are as "
        "counted; decoding and rewards are not among them, and grow with the number of pictures."
    )


def columns(outcomes: Iterable[Outcome]) -> list[Column]:
    """Score columns: the verifier's two on trained and on left-out tasks, then all other scores on all prompts."""
    some = next(iter(outcomes))
    labels, prompts = [*some.scores[0]], some.prompts
    strict = [reward.key] if (reward := some.job.config.strict_reward) else []
    main = [(some.graded, "reward"), *((label, "strict accuracy") for label in strict)]
    split = not all(map(is_trained, prompts))
    parts = ((True, "trained tasks"), (False, "left-out tasks")) if split else ((None, "all prompts"),)
    found = [Column(f"{name}, {where}", label, trained) for trained, where in parts for label, name in main]
    known = {label for label, _ in main}
    return [Column(label, label, None) for label in labels if label not in known] + found


def score_table(
    number: int, title: str, about: str, rows: Sequence[Method], found: dict[str, list[Outcome]], budget: float
) -> Table:
    """A table of scores at the end of equal compute, below the base model's."""
    shown, measured = columns(found[rows[0].name]), [*found[rows[0].name][0].measures(0)]
    head = ["method" if number in WITH_BASE else "", "seeds", "iterations", "pictures", "forward passes"]
    head += ["NFE_old", "NFE_θ", "s/iter."]
    extra = [f"{name} (paper)" for name in published.COLUMNS[number]]
    lines = [_base_row(number, found[rows[0].name], shown, measured, len(head) - 1)] if number in WITH_BASE else []
    for method in rows:
        outcomes = found[method.name]
        steps = {outcome.job.name: outcome.nearest(budget) for outcome in outcomes}
        spent = _mean(outcome.spent()[steps[outcome.job.name]] for outcome in outcomes)
        step, rollout = next(iter(steps.values())), outcomes[0].job.config.rollout
        pictures = step * rollout.prompts_per_iteration * rollout.group_size
        cells = [method.label, str(len(outcomes)), str(step), str(pictures), f"{spent:.0f}", *_costs(outcomes)]
        cells += [change(outcomes, steps, column.label, column.trained).show() for column in shown]
        cells += _measures(outcomes, steps, measured)
        lines.append((*cells, *_published(number, method.name)))
    return Table(title, about, (*head, *(column.head for column in shown), *measured, *extra), tuple(lines))


def _base_row(
    number: int, outcomes: Sequence[Outcome], shown: Sequence[Column], measured: Sequence[str], blanks: int
) -> tuple[str, ...]:
    steps = {outcome.job.name: 0 for outcome in outcomes}
    cells = [f"{change(outcomes, steps, column.label, column.trained).before:.3f}" for column in shown]
    cells += _measures(outcomes, steps, measured)
    return ("base model", *[""] * blanks, *cells, *_published(number, "base"))


def _measures(outcomes: Sequence[Outcome], steps: Mapping[str, int], names: Sequence[str]) -> list[str]:
    """Means over seeds of what `evaluation.measures` found."""
    found = [outcome.measures(steps[outcome.job.name]) for outcome in outcomes]
    means = [[one[name] for one in found if one.get(name) is not None] for name in names]
    return [f"{_mean(values):.3g}" if values else "" for values in means]


def _published(number: int, name: str) -> list[str]:
    blank = [None] * len(published.COLUMNS[number])
    return ["" if value is None else f"{value:g}" for value in published.FIGURES[number].get(name, blank)]


def _costs(outcomes: Sequence[Outcome]) -> list[str]:
    old, theta = (_mean(o.mean(f"nfe/{kind}_per_sample") for o in outcomes) for kind in ("old", "theta"))
    seconds = sum(_mean(o.mean(f"time/{stage}_s") for o in outcomes) for stage in STAGES)
    return [f"{old:.2f}", f"{theta:.2f}", f"{seconds:.2f}"]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def equal_iterations(plan: Plan, rows: Sequence[Method], found: dict[str, list[Outcome]], seeds: str) -> list[Table]:
    """The scores of Table 1 after as many iterations of every method, whatever they cost."""
    step, shown = plan.equal_iterations, columns(found[rows[0].name])
    lines = []
    for method in rows:
        outcomes = found[method.name]
        steps = {outcome.job.name: step for outcome in outcomes}
        spent = _mean(outcome.spent()[step] for outcome in outcomes)
        seconds = _mean(outcome.seconds()[step] for outcome in outcomes)
        cells = [change(outcomes, steps, column.label, column.trained).show() for column in shown]
        lines.append((method.label, f"{spent:.0f}", f"{seconds:.0f}", *cells))
    head = ("method", "forward passes per sample", "seconds", *(column.head for column in shown))
    about = f"The same runs after {step} iterations each. {SCORES.format(seeds=seeds)}"
    return [Table("Table 1, at equal iterations", about, head, tuple(lines))]


def gains_table(rows: Sequence[Method], found: dict[str, list[Outcome]]) -> Table:
    """What it took each method to gain so much over the base model."""
    head = ("method", *(f"+{gain:g}" for gain in reached.GAINS))
    lines = [(method.label, *reached.costs(found[method.name])) for method in rows]
    return Table("Table 1, what a gain costs", reached.ABOUT, head, tuple(lines))


def against_baseline(rows: Sequence[Method], found: dict[str, list[Outcome]], budget: float) -> list[Table]:
    """Every method against Neighbor GRPO with 8 DPM++ steps, picture by picture, at equal compute."""
    if BASELINE not in found:
        return []
    lines = []
    for method in rows:
        pairs = paired(found[method.name], found[BASELINE])
        if method.name == BASELINE or not pairs:
            continue
        ours, theirs = (_joined([pair[side] for pair in pairs], budget) for side in (0, 1))
        prompts = [meaning_of(prompt) for outcome, _ in pairs for prompt in outcome.prompts]
        for difference in compare_scores(method.label, ours, "", theirs, prompts):
            seeds = over_seeds(ours[difference.reward], theirs[difference.reward], len(pairs))
            shown = difference.difference.show("+.3f") + seeds
            lines.append(
                (method.label, difference.reward, shown, difference.win_rate.show(".0%"), str(difference.pairs))
            )
    label = next(method.label for method in methods.METHODS if method.name == BASELINE)
    head = ("method", "score", "difference (95% CI)", "win rate (95% CI)", "pairs")
    about = (
        "Pictures of the same prompts, noises and training seeds at equal compute; intervals are over scenes, and of "
        "differences over seeds as well."
    )
    return [Table(f"Table 1, every method against {label}", about, head, tuple(lines))] if lines else []


def over_seeds(ours: Sequence[float], theirs: Sequence[float], seeds: int) -> str:
    """The interval of a difference over training seeds, as text, of scores that stand seed after seed."""
    if seeds == 1:
        return ""
    differences = np.subtract(ours, theirs).reshape(seeds, -1)
    means = np.ma.masked_invalid(differences).mean(1).filled(np.nan)
    interval = mean_interval(means.tolist(), range(seeds))
    return f", seeds [{interval.low:+.3f}, {interval.high:+.3f}]"


def _joined(outcomes: Sequence[Outcome], budget: float) -> dict[str, list[float]]:
    """All scores at equal compute by label, seed after seed."""
    chosen = [outcome.scores[outcome.nearest(budget)] for outcome in outcomes]
    return {label: [value for scores in chosen for value in scores[label].tolist()] for label in chosen[0]}


def cost_table(rows: Sequence[Method], found: dict[str, list[Outcome]]) -> Table:
    """Function evaluations, as counted while training, and seconds of each stage of an iteration."""
    lines = []
    for method in rows:
        outcomes = found[method.name]
        config = outcomes[0].job.config
        group = config.rollout.group_size
        anchors, trained = (getattr(config.algorithm, key, None) or "" for key in ("num_anchors", "num_train_steps"))
        old, theta, seconds = _costs(outcomes)
        counted = _mean(o.spent()[o.last] / o.last for o in outcomes)
        stages = [f"{_mean(o.mean(f'time/{stage}_s') for o in outcomes):.2f}" for stage in STAGES]
        cost = (f"{outcomes[0].job.cost:.2f}", f"{counted:.2f}")
        lines.append(
            (method.label, *map(str, (group, anchors, trained)), old, theta, *cost, *stages, seconds)
            + (*_published(3, method.name),)
        )
    head = ("method", "G", "B", "K", "NFE_old", "NFE_θ", "forward passes, foreseen", "counted")
    times = ("rollout s", "reward s", "update s", "s/iter.")
    about = (
        "Per sample of an iteration: function evaluations without gradients (old velocities of later updates and the "
        "reference included) and with them; NFE_old + 3 NFE_θ as foreseen and as counted, which is less where groups "
        "of equal rewards are skipped. Seconds are of an iteration of the whole batch, decoding and rewards included, "
        "beside as many other runs as the report says. NFE_θ is B K / G for Neighbor GRPO. MixGRPO trains its window "
        "of 4 steps, as in its code; the paper counts 14. BranchGRPO's nodes are counted once, whichever leaves share "
        f"them; the paper counts 20. {published.NOTE}"
    )
    paper = [f"{name} (paper)" for name in published.COLUMNS[3]]
    return Table(TITLES[3], about, (*head, *times, *paper), tuple(lines))


def search_table(entries: Sequence[dict[str, Any]]) -> Table:
    """All points of the search with their validation rewards, the winner of each method marked."""
    lines = []
    for entry in entries:
        rate, knob = RATE, KNOBS[entry["method"]]
        for point in entry["points"] or [entry]:
            won = (point[rate], point[knob]) == (entry[rate], entry[knob])
            shown = [_validated(point, part) for part in ("", "whole_")] if entry["points"] else ["not searched", ""]
            edge = bool(entry["points"]) and point[rate] in (LEARNING_RATES[0], LEARNING_RATES[-1])
            used = ("at the edge" if edge else "yes") if won else ""
            lines.append((entry["label"], point[rate], f"{knob.partition('.')[2]} {point[knob]}", *shown, used))
    about = (
        "The reward, with its 95% interval, on captions of training scenes of the trained tasks, with other seeds than "
        "the tables', after runs of a quarter of their compute and at least 16 iterations, and after runs as long as "
        "the tables'. One run a point: where intervals overlap, chance has its part in the choice. Every method is "
        "searched alike: three learning rates, the next one beyond while the best is the lowest or highest, then the "
        "second setting with the best rate; then the best of these and the next lower rate go the whole length, and "
        "the next below while the lowest does best there. The first of equal rewards wins, which has the lower "
        "learning rate. A winner at the edge of all rates might be better still beyond it."
    )
    head = ("method", "learning rate", "second setting", "reward after a quarter", "after the whole length", "used")
    return Table("Search", about, head, tuple(lines))


def _validated(point: dict[str, Any], part: str) -> str:
    """A point's validation reward with its interval; nothing where no such run was called for."""
    reward, half = point.get(f"{part}validation_reward"), point.get(f"{part}half_interval")
    if reward is None:
        return "failed or missing" if f"{part}validation_reward" in point else ""
    return f"{reward:.3f}" + ("" if half is None else f" ± {half:.3f}")
