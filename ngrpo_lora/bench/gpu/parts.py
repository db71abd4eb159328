"""What is measured, in which order, and with which configurations, as data.

Iterations are a quarter of the paper's group: 3 candidates, 1 anchor and 4 trained steps have the paper's 1.33 trained
passes a sample. All weights are random: neither time nor memory depends on what they are, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ngrpo_lora.bench.paper.methods import BASELINE, METHODS
from ngrpo_lora.config import RunConfig, parse_config, parse_settings

__all__ = ["Kind", "Part", "Row", "make_parts"]

Kind = Literal["iteration", "pace", "optimizer", "export", "tests"]
Settings = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One line of a part's table: what it is called, and the configuration that is measured."""

    label: str
    config: RunConfig


@dataclass(frozen=True)
class Part:
    """One table: rows that are measured alike, by one process where nothing goes wrong.

    allotted_s: seconds that are kept for it; it may also take what earlier parts have left of theirs.
    """

    name: str
    title: str
    kind: Kind
    allotted_s: float
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Scale:
    """The model that a device is measured with: its path, its usual size, and a smaller and a larger one, in pixels.

    swapped: how many blocks are kept in system memory, in turn.
    """

    path: str
    usual_px: int
    small_px: int
    large_px: int
    swapped: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes, the usual one first."""
        return self.usual_px, self.small_px, self.large_px


FLUX = Scale("black-forest-labs/FLUX.1-dev", 720, 512, 1024, (20, 57))
EMBEDDED = Scale("embedded", 64, 32, 96, (1, 2))

COMMON: Settings = {
    "model.text_encoders": "cache",  # there are none, and no plan may count them
    "rollout.solver": "dpmpp_2m",
    "rollout.num_steps": "8",
    "rollout.group_size": "3",
    "rollout.prompts_per_iteration": "1",
    "rollout.micro_batch_size": "1",
    "rewards": "jpeg",  # without a network of its own
    "lora.rank": "64",
    "trainer.micro_batch_size": "1",
    "trainer.gradient_checkpointing": "true",
    "evaluation.strict": "null",
}

QUARTER = {"algorithm.name": "neighbor", "algorithm.num_anchors": "1", "algorithm.num_train_steps": "4"}
NF4, INT8 = {"model.quantization": "nf4"}, {"model.quantization": "int8"}
FLOAT8, INT8_TORCHAO = {"model.quantization": "float8_torchao"}, {"model.quantization": "int8_torchao"}
QUANTISED: Mapping[str, Settings] = {"NF4": NF4, "INT8": INT8, "FP8, torchao": FLOAT8, "INT8, torchao": INT8_TORCHAO}
WHOLE = {"trainer.gradient_checkpointing": "false"}
FASTER: Mapping[str, Settings] = {
    "TF32": {"trainer.tf32": "true"},
    "compiled": {"model.compile": "true"},
    "compiled, FP8, torchao": {"model.compile": "true", **FLOAT8},
}
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit")
UPDATES = {"algorithm.updates_per_rollout": "2"}  # Dance's are of whole samples, of which there are three
SCALED = {BASELINE: {**QUARTER, **UPDATES}, "dance": UPDATES}
"""Methods whose iterations are timed side by side, and what makes them as small as the others here."""

BATCHES = ((3, 1), (3, 3), (12, 1), (12, 4), (12, 12))
"""Candidates of a group, and how many go through the model at once."""

Table = tuple[str, str, Kind, float, dict[str, Settings]]


def tables(scale: Scale) -> list[Table]:
    """Name, title, kind, allotted seconds and the rows' own settings of every part, the most valuable first."""
    usual, small, others = _sized(scale.usual_px), _sized(scale.small_px), scale.sizes[1:]
    methods = {method.label: {**method.settings, **SCALED[method.name]} for method in METHODS if method.name in SCALED}
    exported = {**small, "optimizer.learning_rate": "1e-2"}  # for an effect far above what 16 bits round
    whole: dict[str, Settings] = {f"{px} px": {**_sized(px), **WHOLE} for px in scale.sizes}
    quantised: dict[str, Settings] = {
        f"{name}, {px} px": {**_sized(px), **own} for px in others for name, own in QUANTISED.items()
    }
    swapped = {f"{count} blocks": {"model.swap_blocks": str(count)} for count in scale.swapped}
    batches = {
        f"{group} candidates, {size} at once": {
            "rollout.group_size": str(group),
            **QUARTER,
            "algorithm.num_anchors": str(group // 3),
            "rollout.micro_batch_size": str(size),
            "trainer.micro_batch_size": str(size),
        }
        for group, size in BATCHES
    }
    return [
        ("sizes", "An iteration by size", "iteration", 110, {f"{px} px": _sized(px) for px in scale.sizes}),
        ("methods", "Methods side by side", "pace", 60, _with(small, methods)),
        ("export", "The exported adapter in stock diffusers", "export", 40, {f"{scale.small_px} px": exported}),
        ("quantised", "An iteration of a quantised base", "iteration", 150, _with(usual, QUANTISED)),
        ("whole", "An iteration without gradient checkpointing", "iteration", 60, whole),
        ("optimizers", "A step of the adapter", "optimizer", 25, {n: {"optimizer.name": n} for n in OPTIMIZERS}),
        ("batches", "Group size and micro-batch", "pace", 75, _with(small, batches)),
        ("swapped", "An iteration with blocks in system memory", "iteration", 60, _with(usual, swapped)),
        ("faster", "An iteration with TF32, and of compiled blocks", "iteration", 85, _with(small, FASTER)),
        ("tests", "Tests that need a GPU", "tests", 55, {"pytest -m gpu": {}}),
        ("quantised-sizes", "An iteration of a quantised base, by size", "iteration", 180, quantised),
    ]


def _sized(size_px: int) -> Settings:
    return {"model.height_px": str(size_px), "model.width_px": str(size_px)}


def _with(common: Settings, rows: Mapping[str, Settings]) -> dict[str, Settings]:
    return {label: {**common, **own} for label, own in rows.items()}


def make_parts(device: str) -> tuple[Part, ...]:
    """All parts for a device: FLUX.1-dev's size on a GPU, the embedded model's on a CPU.

    Raises:
        ConfigError: a configuration cannot run.
    """
    scale = EMBEDDED if device == "cpu" else FLUX
    model = {"model.path": scale.path, "model.device": f"'{device}'"}
    return tuple(
        Part(name, title, kind, seconds, tuple(Row(label, _config({**model, **own})) for label, own in rows.items()))
        for name, title, kind, seconds, rows in tables(scale)
    )


def _config(settings: Settings) -> RunConfig:
    algorithm = {} if "algorithm.name" in settings else QUARTER
    values = {**COMMON, **algorithm, **settings}
    return parse_config(parse_settings("\n".join(f"{key}={value}" for key, value in values.items())))
