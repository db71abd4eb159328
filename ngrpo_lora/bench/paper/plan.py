"""Which training runs a comparison needs, and with which configurations: a pure function of what is asked for.

Equal compute: a run has as many iterations as cost `budget` forward passes per sample together (`cost.py`), but at
least `equal_iterations`, so that the same run also serves the comparison at equal iterations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ngrpo_lora.bench.paper import methods
from ngrpo_lora.bench.paper.given import Given, point_of, read_given
from ngrpo_lora.bench.paper.methods import LEARNING_RATES, TABLES, WATCHED, Method
from ngrpo_lora.config import RunConfig, parse_config, parse_settings
from ngrpo_lora.config.paths import expanded
from ngrpo_lora.errors import ConfigError

__all__ = ["PROFILES", "Job", "Plan", "Profile", "Tuned", "main_jobs", "make_plan", "search_job"]

TRAINED_TASKS = ("two", "color", "attribute")
"""Tasks of the embedded world that are trained; the others are left out, to see what training does to them."""

TRAINED = "{world:train/two: 1, world:train/color: 2, world:train/attribute: 3}"

COMMON = {
    "model.dtype": "float32",  # in 16 bits the velocities that SDE methods keep would round by more than their clip
    "prompts.train": TRAINED,
    "prompts.held_out": "world:held_out",
    "rollout.group_size": "12",
    "rollout.prompts_per_iteration": "4",
    "rollout.micro_batch_size": "48",
    "rollout.merge_adapter": "true",
    "rewards": "world",
    "optimizer.schedule": "cosine",
    "optimizer.ema_decay": "0.95",
    "trainer.micro_batch_size": "16",
    "trainer.num_threads": "1",
    "trainer.save_every": "10",
    "trainer.keep_checkpoints": "1",
    "evaluation.solver": "dpmpp_2m",
    "evaluation.num_steps": "16",  # where the base is as good as it gets; no method's rollouts but one have as many
    "evaluation.num_prompts": "480",
    "evaluation.micro_batch_size": "48",
    "evaluation.strict": "world_strict",
    "evaluation.rewards": f"[{', '.join(WATCHED)}]",
    "evaluation.measures": "ngrpo_lora.world.freedom:freedom",
    "evaluation.num_samples": "12",
}
"""Settings that all methods have in common; those of the command line are laid over them, a method's own over both."""

SEARCH = {"prompts.held_out": TRAINED, "evaluation.seed": "500000", "evaluation.num_prompts": "240"}
"""What the search judges by: captions of training scenes of the trained tasks, none that the tables are about."""

SEARCHED = 16
"""Iterations that a short run of the search has at least; else it has a quarter of the compute of a table's run."""

SEARCH_SEED, FIRST_SEED = 100, 0
PER_ITERATION = 100
"""Forward passes per sample that no method's iteration exceeds by much; Flow-GRPO's 25 steps of which 24 are trained
cost 97."""

MAX_BUDGET, MAX_SEEDS = 1e6, 100
"""What nobody waits for, so that a slip of the keys is told and not begun."""

EVALUATIONS = 6
"""About as many held-out evaluations has a run; each costs a few iterations."""


@dataclass(frozen=True)
class Profile:
    """How large a comparison is, unless the command line says otherwise.

    budget: forward passes per sample of each run.
    prompts: held-out prompts of each evaluation.
    """

    name: str
    budget: float
    search: bool
    seeds: int
    tables: tuple[int, ...]
    prompts: int


PROFILES = {
    "quick": Profile("quick", 300, False, 1, (1, 3), 48),
    "default": Profile("default", 4800, True, 1, (1, 3), 480),
    "full": Profile("full", 4800, True, 3, (1, 2, 3, 4, 5, 6, 7, 8), 480),
}
"""`full` goes on from what `default` has left in its folder; `quick` has runs of its own."""


@dataclass(frozen=True)
class Plan:
    """A comparison: what is compared, how long, and where."""

    output_dir: Path
    budget: float
    search: bool
    seeds: int
    tables: tuple[int, ...]
    chosen: tuple[str, ...]
    """Methods of Tables 1 and 8 that are compared, with their variants in the other tables."""
    common: Mapping[str, str]
    """Settings of all methods, by dotted key."""
    given: Given = field(default_factory=dict)
    """What an earlier comparison has found; its methods are not searched."""

    @property
    def equal_iterations(self) -> int:
        """The iteration up to which every run goes."""
        return max(1, int(self.budget / PER_ITERATION))

    @property
    def methods(self) -> tuple[Method, ...]:
        """The rows of all tables asked for, each method once."""
        found = {method.name: method for table in self.tables for method in methods.rows(table, self.chosen)}
        return tuple(found.values())

    @property
    def searched(self) -> tuple[Method, ...]:
        """The methods whose learning rate and knob the comparison needs."""
        wanted = {method.tuned_as for method in self.methods}
        return tuple(method for method in methods.ALL if method.name in wanted)


Tuned = Mapping[str, tuple[str, str]]
"""Learning rate and knob of a method, as text, by the method's name."""


@dataclass(frozen=True, eq=False)  # a configuration has no hash
class Job:
    """One training run: its folder below the output folder, and its configuration."""

    name: str
    method: str
    seed: int
    config: RunConfig
    cost: float
    """Forward passes per sample of an iteration, on average."""
    point: tuple[str, str]
    """Learning rate and knob."""
    whole: bool = True
    """Whether it is as long as a run of the tables; else a quarter as long."""

    @property
    def folder(self) -> Path:
        """The folder that the training run writes into."""
        return Path(self.config.output_dir)

    @property
    def work(self) -> float:
        """Forward passes of the whole run, its evaluations included."""
        rollout, trainer, evaluation = self.config.rollout, self.config.trainer, self.config.evaluation
        samples = rollout.prompts_per_iteration * rollout.group_size
        evaluations = 1 + -(-trainer.num_iterations // evaluation.every)
        drawn = evaluations * evaluation.num_prompts * self.config.evaluation_steps
        return trainer.num_iterations * self.cost * samples + drawn


def make_plan(
    output_dir: Path,
    profile: str = "default",
    budget: float | None = None,
    seeds: int | None = None,
    tables: tuple[int, ...] = (),
    names: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    device: str = "cpu",
    tuned_by: Path | None = None,
) -> Plan:
    """A checked plan; what is None or empty is the profile's.

    Args:
        names: methods of Tables 1 and 8; none are all.
        settings: `key=value` laid over what all methods have in common.
        tuned_by: `results.json` or `tuning.json` of an earlier comparison, whose winners are taken.
    Raises:
        ConfigError: an unknown method or table, a number out of its range, or settings that do not fit a method.
    """
    chosen, known = PROFILES[profile], methods.find(names)
    wanted = tuple(sorted(set(tables))) or chosen.tables
    if unknown := [table for table in wanted if table not in TABLES]:
        raise ConfigError(f"--table must be one of {', '.join(map(str, TABLES))}, got {unknown[0]}")
    if seeds is not None and not 1 <= seeds <= MAX_SEEDS:
        raise ConfigError(
            f"--seeds must be from 1 to {MAX_SEEDS}, got {seeds}; one seed gives intervals over prompts alone"
        )
    if budget is not None and not 0 < budget <= MAX_BUDGET:
        raise ConfigError(
            f"--budget must be above 0 and at most {MAX_BUDGET:,.0f} forward passes per sample, got {budget:g}; "
            "--quick has 300"
        )
    own = read_settings(settings)
    common = COMMON | {"evaluation.num_prompts": str(chosen.prompts), "model.device": device} | own
    given = {} if tuned_by is None else read_given(tuned_by)
    folder = folder_of(output_dir)
    plan = Plan(folder, budget or chosen.budget, chosen.search, seeds or chosen.seeds, wanted, known, common, given)
    check_free(plan, own)
    check(plan)
    return plan


def read_settings(settings: Iterable[str]) -> dict[str, str]:
    """Values by key, as text, of settings such as `lora.rank=8`.

    Raises:
        ConfigError: one is no key with a value on one line.
    """
    found = {}
    for text in settings:
        if (match := re.fullmatch(r"([\w.]+)=(.*)", text)) is None or len(text.splitlines()) > 1:
            raise ConfigError(
                f"a setting must look like key=value, got {text!r}; for example evaluation.num_prompts=96"
            )
        found[match[1]] = match[2]
    return found


def folder_of(output_dir: Path) -> Path:
    """The output folder, in which `$NAME` is what it is in the configurations of all runs.

    Raises:
        ConfigError: it names a variable that is not set.
    """
    try:
        return Path(expanded(str(output_dir)))
    except ValueError as error:
        raise ConfigError(f"--output-dir {error}") from None


def check_free(plan: Plan, keys: Iterable[str]) -> None:
    """Make sure that settings laid over all methods are none that the comparison or one of them sets for itself.

    Raises:
        ConfigError: one is.
    """
    own = {"seed", "output_dir", "resume", "optimizer.learning_rate", "trainer.num_iterations", "evaluation.every"}
    own |= {key for method in plan.methods for key in method.settings}
    for key in keys:
        if key in own or key.partition(".")[0] == "algorithm":
            raise ConfigError(
                f"{key} must be left to `ngrpo bench paper`, which sets it for every run; settings that all methods "
                "have in common can be given, such as evaluation.num_prompts=480"
            )
        if begun := [other for other in (*COMMON, *sorted(own)) if other.startswith(f"{key}.")]:
            raise ConfigError(f"{key} must be given key by key, such as {begun[0]}=..., and not as a whole")


def check(plan: Plan) -> None:
    """Make sure that there is something to compare, on prompts of every task, and that every configuration is valid.

    Raises:
        ConfigError: there is not, or it is not.
    """
    if plan.given and not any(method.name in plan.given for method in plan.searched):
        raise ConfigError(
            f"--tuned-by must be of a comparison of methods that are compared now, got one of {', '.join(plan.given)}; "
            "without it they are searched"
        )
    if not plan.methods:
        raise ConfigError(
            f"--method and --table must have a method in common, got {', '.join(plan.chosen)} and "
            f"{', '.join(map(str, plan.tables))}; Tables 4 to 7 are about {methods.BASELINE}"
        )
    for method in plan.methods:
        config = _first_config(plan, method)
        if config.evaluation.num_prompts < 12:
            raise ConfigError(
                f"evaluation.num_prompts must be at least 12, two of each task, got {config.evaluation.num_prompts}; "
                "intervals over fewer prompts say nothing"
            )


def _first_config(plan: Plan, method: Method) -> RunConfig:
    """The configuration of a method's first run, with the winner of an earlier comparison where it is given."""
    name = f"runs/{method.name}"
    config = _config(plan, method, name, FIRST_SEED, method.untuned)
    if method.tuned_as not in plan.given:
        return config
    try:
        return _config(plan, method, name, FIRST_SEED, point_of(plan.given[method.tuned_as]))
    except ConfigError as error:
        raise ConfigError(f"--tuned-by: {problem}" for problem in error.problems) from None


def _config(
    plan: Plan, method: Method, name: str, seed: int, point: tuple[str, str], extra: Mapping[str, str] | None = None
) -> RunConfig:
    """The configuration of a run: common settings, the method's own, and those of this run."""
    rate, knob = point
    own = {"optimizer.learning_rate": rate, method.knob: knob, "seed": str(seed)}
    values = {**plan.common, **method.settings, **own, **(extra or {})}
    settings = parse_settings("\n".join(f"{key}={value}" for key, value in values.items()))
    return parse_config({**settings, "output_dir": str(plan.output_dir / name)})


def points(method: Method) -> list[tuple[str, str]]:
    """All points that a method's search can reach: every learning rate with every value of its knob."""
    return [(rate, knob) for rate in LEARNING_RATES for knob in method.knob_values]


Length = Callable[[RunConfig, float], tuple[int, float]]
"""How many iterations a budget allows, and what one of them costs on average: `cost.length`."""


def search_job(plan: Plan, method: Method, point: tuple[str, str], length: Length, whole: bool = False) -> Job:
    """The run of the search that tries a point: a quarter as long as a run of the tables, or as long."""
    name = f"search/{method.name}/rate-{point[0]}-{method.knob.rpartition('.')[2]}-{point[1]}{'-whole' * whole}"
    config = _config(plan, method, name, SEARCH_SEED, point, SEARCH)
    budget, at_least = (plan.budget, plan.equal_iterations) if whole else (plan.budget / 4, SEARCHED)
    config, iterations, cost = _long(method, config, budget, at_least, length)
    return Job(name, method.name, SEARCH_SEED, _of_length(config, iterations, iterations), cost, point, whole)


def main_jobs(plan: Plan, tuned: Tuned, length: Length) -> list[Job]:
    """The runs of the tables, seed by seed, so that a comparison that is stopped has whole seeds."""
    return [job for seed in range(FIRST_SEED, FIRST_SEED + plan.seeds) for job in _seed_jobs(plan, tuned, length, seed)]


def _seed_jobs(plan: Plan, tuned: Tuned, length: Length, seed: int) -> Iterator[Job]:
    for method in plan.methods:
        point = tuned[method.tuned_as]
        name = f"runs/{method.name}/seed-{seed}"
        config = _config(plan, method, name, seed, point)
        config, iterations, cost = _long(method, config, plan.budget, plan.equal_iterations, length)
        every = evaluated_every(iterations, plan.equal_iterations)
        yield Job(name, method.name, seed, _of_length(config, iterations, every), cost, point)


def _long(
    method: Method, config: RunConfig, budget: float, at_least: int, length: Length
) -> tuple[RunConfig, int, float]:
    """The configuration with a window that fits the budget's iterations, their number, and what one costs."""
    iterations, cost = length(config, budget)
    if method.places:
        every = max(1, max(iterations, at_least) // method.places)
        algorithm = config.algorithm.model_copy(update={"window_every": every})
        config = config.model_copy(update={"algorithm": algorithm})
        iterations, cost = length(config, budget)
    return config, max(iterations, at_least), cost


def _of_length(config: RunConfig, iterations: int, every: int) -> RunConfig:
    """The configuration with so many iterations, and so many between evaluations."""
    trainer = config.trainer.model_copy(update={"num_iterations": iterations})
    evaluation = config.evaluation.model_copy(update={"every": every})
    return config.model_copy(update={"trainer": trainer, "evaluation": evaluation})


def evaluated_every(iterations: int, equal: int) -> int:
    """Iterations between evaluations: a divisor of `equal`, for about `EVALUATIONS` of them."""
    divisors = [every for every in range(1, equal + 1) if equal % every == 0]
    return next((every for every in divisors if iterations / every <= EVALUATIONS), equal)
