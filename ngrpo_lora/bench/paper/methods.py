"""The methods that are compared, and the rows of the paper's tables, as data.

A method is what it sets in a configuration; all else is common to all (`plan.COMMON`). Settings are the ones that its
own paper or code gives (`config/algorithms/`), but for these:

- Neighbor GRPO has our temperature and old anchor (`temperature: auto`, `old_anchor: one_step`), which no search chose;
  the paper's, 1 and Algorithm 1 to the letter, are a row of Table 7;
- all have 48 pictures an iteration, and policy gradients four optimizer updates of them (published are 2 to 4);
- Flow-GRPO and its kin add no noise in their last step, which ends at sigma 0.25 here and would stay in the picture;
- DiffusionNFT has no pull to the base, of weight 1e-4, which would cost a sixth of its budget;
- a window moves through a run in as many places as in 300 iterations of its own code, however long the run is;
- learning rate and one more setting (the clip, or what stands for it) come from the same small search, in which each
  decays to nothing along a cosine, and the weights' average is what is judged, as Flow-GRPO's code averages its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ngrpo_lora import registry
from ngrpo_lora.errors import ConfigError

__all__ = ["ALL", "BASELINE", "METHODS", "TABLES", "WATCHED", "Method", "find", "rows"]

LEARNING_RATES = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
"""What a search can reach; it begins with the three in the middle."""
UPDATES = "4"

WATCHED = ("world_manifold",)
"""Scores that no method is trained on, beside the verifier's."""


@dataclass(frozen=True)
class Method:
    """A method that is compared: one row of a table, and what its runs set in a configuration.

    settings: values by dotted key, as text of YAML, laid over what is common to all methods.
    knob: the key that is searched after the learning rate, among `knob_values`.
    untuned: learning rate and knob without a search; the search tries all rates with this knob.
    like: the method whose search this one takes its values from, where it is a variant of it.
    places: in how many places a moving window stops during a run; 0 without one.
    """

    name: str
    label: str
    settings: dict[str, str] = field(hash=False)
    knob: str = "algorithm.clip_range"
    knob_values: tuple[str, ...] = ("1e-4", "1e-3")
    untuned: tuple[str, str] = ("1e-3", "1e-3")
    like: str | None = None
    places: int = 0

    @property
    def algorithm(self) -> str:
        """The name of the algorithm that this method configures."""
        return self.settings["algorithm.name"]

    @property
    def tuned_as(self) -> str:
        """The name of the method whose search gives its learning rate and knob."""
        return self.like or self.name


def _neighbor(name: str, label: str, solver: str, steps: int, anchors: int, trained: int, **more: str) -> Method:
    """Neighbor GRPO in one of the three regimes of the paper's Table 3."""
    settings = {
        "algorithm.name": "neighbor",
        "rollout.solver": solver,
        "rollout.num_steps": str(steps),
        "algorithm.num_anchors": str(anchors),
        "algorithm.num_train_steps": str(trained),
        "algorithm.updates_per_rollout": UPDATES,
        "algorithm.reuse_velocities": "true",  # as the others do
    }
    return Method(name, label, settings | _dotted(more))


def _dotted(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings by dotted key, of keywords in which `__` stands for a dot."""
    return {key.replace("__", "."): value for key, value in settings.items()}


def _stochastic(name: str, label: str, algorithm: str, steps: int, **settings: str) -> Method:
    """A method whose rollouts have stochastic steps."""
    common = {"algorithm.name": algorithm, "rollout.num_steps": str(steps), "algorithm.updates_per_rollout": UPDATES}
    return Method(name, label, common | _dotted(settings))


def _nft(name: str, label: str, steps: str, **more: str) -> Method:
    """DiffusionNFT with its noise levels in every sample's loss, or some of them."""
    settings = {
        "algorithm.name": "nft",
        "rollout.solver": "dpmpp_2m",
        "rollout.num_steps": steps,
        "algorithm.updates_per_rollout": "2",
        "algorithm.reference_weight": "0",
    }
    knobs = ("0.1", "1.0")
    return Method(name, label, settings | _dotted(more), "algorithm.mixture", knobs, untuned=("1e-3", "1.0"))


QUIET = {"algorithm__noise_last_step": "false"}
ABLATION = {"algorithm__perturbation_strength": "0.5"}
REFERENCE = {"algorithm__reference_weight": "0.1", "algorithm__reference_distance": "velocity"}
CPS = QUIET | {"algorithm__step": "cps", "algorithm__eta": "0.8"}

BASELINE = "neighbor-dpmpp-8"
"""The method that the others are compared with in pairs, and whose variants Tables 4 to 7 are about."""

METHODS = (
    _neighbor("neighbor-ddim-25", "Neighbor GRPO, DDIM 25", "euler", 25, 12, 4),
    _neighbor("neighbor-dpmpp-16", "Neighbor GRPO, DPM++ 16", "dpmpp_2m", 16, 4, 9),
    _neighbor(BASELINE, "Neighbor GRPO, DPM++ 8", "dpmpp_2m", 8, 4, 4),
    _neighbor(  # not the paper's: what our demo adds, for its share of the budget
        "neighbor-held", "Neighbor GRPO, DPM++ 8, held to the base", "dpmpp_2m", 8, 4, 4, **ABLATION, **REFERENCE
    ),
    _stochastic("flow-grpo", "Flow-GRPO", "flow_grpo", 10, **QUIET),
    replace(
        _stochastic("flow-cps", "Flow-CPS", "flow_grpo", 10, **CPS),
        knob_values=("1e-5", "1e-4"),
        untuned=("1e-3", "1e-5"),
    ),
    replace(
        _stochastic("flow-cps-3", "Flow-CPS, 3 trained steps", "flow_grpo", 10, **CPS, algorithm__num_train_steps="3"),
        knob_values=("1e-5", "1e-4"),
        untuned=("1e-3", "1e-5"),
    ),
    replace(
        _stochastic("grpo-guard", "GRPO-Guard", "flow_grpo", 10, **QUIET, algorithm__guard="true"),
        knob_values=("4e-6", "1e-4"),  # its ratios are on another scale
        untuned=("1e-3", "4e-6"),
    ),
    _stochastic("dance", "DanceGRPO, 25 steps", "dance", 25),
    _stochastic("dance-16", "DanceGRPO, 16 steps", "dance", 16),
    replace(_stochastic("mix", "MixGRPO", "mix", 25), places=12),
    replace(_stochastic("mix-flash", "MixGRPO-Flash", "mix_flash", 25, algorithm__rest_ratio="0.4"), places=12),
    _stochastic(
        "mix-flash-frozen", "MixGRPO-Flash*", "mix_flash", 25, algorithm__rest_ratio="0.2", algorithm__window="frozen"
    ),
    Method(
        "branch",
        "BranchGRPO",
        {
            "algorithm.name": "branch",
            "rollout.num_steps": "20",
            "rollout.group_size": "16",
            "rollout.prompts_per_iteration": "3",  # 48 pictures an iteration, as the others
            "algorithm.updates_per_rollout": UPDATES,
        },
    ),
    _nft("nft", "DiffusionNFT", "10"),
    _nft("nft-2", "DiffusionNFT, 8 steps, 2 levels", "8", algorithm__num_train_steps="2"),  # nearly as short as ours
    Method(
        "best-of-n",
        "best-of-N fine-tuning",
        {
            "algorithm.name": "best_of_n",
            "rollout.solver": "dpmpp_2m",
            "rollout.num_steps": "8",
            "algorithm.updates_per_rollout": "1",
        },
        knob="algorithm.num_best",
        knob_values=("1", "3"),
        untuned=("1e-3", "1"),
    ),
)


def _variant(name: str, label: str, of: str = BASELINE, **settings: str) -> Method:
    """A method with other settings, and the learning rate and knob that were found for it."""
    method = next(one for one in METHODS if one.name == of)
    changed = method.settings | _dotted(settings)
    return replace(method, name=name, label=label, settings=changed, like=of)


VIVID = "ngrpo_lora.bench.paper.vividness:score"
HACKED = {"rewards": VIVID, "evaluation__rewards": f"[world, {', '.join(WATCHED)}]"}

HACKABLE = (
    _variant("vivid-dance", "DanceGRPO", of="dance", **HACKED),
    _variant("vivid-mix", "MixGRPO", of="mix", **HACKED),
    _variant("vivid-branch", "BranchGRPO", of="branch", **HACKED),
    _variant("vivid-p-2", "Neighbor GRPO, p = 2", **HACKED),
    _variant("vivid-p-0.8", "Neighbor GRPO, p = 0.8", **HACKED, algorithm__advantage_p="0.8"),
    _variant("vivid-reference", "Neighbor GRPO, reference 0.5", **HACKED, algorithm__reference_weight="0.5"),
    _variant("vivid-world", "Neighbor GRPO, vividness + world", **HACKED | {"rewards": f"['{VIVID}', world]"}),
)

CENTRE = _variant("ablation-centre", "", **ABLATION)
"""What Tables 4 to 7 vary: (sigma, B, p) = (0.5, 4, 2), as in the paper."""

RADII = (
    _variant("radius-1.0", "1.0", algorithm__perturbation_strength="1.0"),
    replace(CENTRE, label="0.5"),
    replace(next(one for one in METHODS if one.name == BASELINE), label="0.3"),  # has this radius
    _variant("radius-0.1", "0.1", algorithm__perturbation_strength="0.1"),
)
ANCHORS = tuple(
    replace(CENTRE, label="4")
    if number == "4"
    else _variant(f"anchors-{number}", number, **ABLATION, algorithm__num_anchors=number)
    for number in ("1", "2", "4", "8", "12")
)
POWERS = tuple(
    replace(CENTRE, label="2 (GRPO)")
    if power == "2"
    else _variant(f"p-{power}", power, **ABLATION, algorithm__advantage_p=power)
    for power in ("2", "1", "0.8", "0.5")
)

CHANGES = (
    replace(CENTRE, label="as in Table 4, radius 0.5"),
    _variant("clean", "distance between clean predictions", **ABLATION, algorithm__distance="clean"),
    _variant("literal", "Algorithm 1 to the letter: the rollout's own old anchor, temperature 1", **ABLATION,
             algorithm__old_anchor="rollout", algorithm__temperature="1.0"),
    _variant("one-update", "one update a rollout", **ABLATION, algorithm__updates_per_rollout="1"),
    _variant("sixteen-updates", "sixteen updates a rollout", **ABLATION, algorithm__updates_per_rollout="16"),
    _variant("batch", "rewards scaled by the batch", **ABLATION, algorithm__scale_rewards="batch"),
    _variant("pairs", "neighbours in antithetic pairs", **ABLATION, algorithm__antithetic_pairs="true"),
    _variant("early", "the first five of eight steps", **ABLATION, algorithm__train_window="5"),
    _variant("held", "a pull to the base, velocities, 0.1", **ABLATION, **REFERENCE),
    _variant("held-early", "the pull, and the first five steps", **ABLATION, **REFERENCE, algorithm__train_window="5"),
)  # fmt: skip

FOUR_STEPS = {
    "model.fuse": "embedded-turbo",
    "rollout.solver": "euler",
    "rollout.num_steps": "4",
    "evaluation.solver": "euler",
    "evaluation.num_steps": "4",
    "evaluation.measures": "[ngrpo_lora.world.freedom:freedom, ngrpo_lora.world.sharpness:sharpness]",
}


def _distilled(name: str, of: str, **settings: str) -> Method:
    """A method on the model that is distilled into four steps, with a search of its own."""
    method = next(one for one in METHODS if one.name == of)
    label = method.label.partition(",")[0] + (", held to the base" if of == "neighbor-held" else "")
    return replace(method, name=name, label=label, settings=method.settings | FOUR_STEPS | _dotted(settings))


DISTILLED = (
    _distilled("turbo-neighbor", BASELINE, algorithm__num_train_steps="2"),  # half of the steps, as of eight
    _distilled("turbo-held", "neighbor-held", algorithm__num_train_steps="2"),
    _distilled("turbo-flow-grpo", "flow-grpo"),
    _distilled("turbo-flow-cps", "flow-cps"),
    _distilled("turbo-dance", "dance"),
    _distilled("turbo-nft", "nft"),
)

ALL = (*METHODS, *DISTILLED)
"""The methods that are searched, by whose names `--method` chooses."""

TABLES: dict[int, tuple[Method, ...]] = {
    1: METHODS, 2: HACKABLE, 3: METHODS, 4: RADII, 5: ANCHORS, 6: POWERS, 7: CHANGES, 8: DISTILLED
}  # fmt: skip
"""The rows of the paper's tables by number; Tables 7 and 8 are ours: what may be changed of Neighbor GRPO, one by one,
and what becomes of a model that is distilled into four steps."""


def rows(table: int, chosen: tuple[str, ...]) -> tuple[Method, ...]:
    """The rows of a table that are `chosen` methods, or variants of them."""
    return tuple(method for method in TABLES[table] if method.tuned_as in chosen)


def find(names: tuple[str, ...]) -> tuple[str, ...]:
    """Check names of methods of Tables 1 and 8; none are all of them.

    Raises:
        ConfigError: there is no such method; the nearest one is named.
    """
    known = [method.name for method in ALL]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--method must be one of {', '.join(known)}, got {name!r}{registry.nearest(name, known)}"
            )
    return tuple(name for name in known if name in names or not names)
