"""The section of the configuration that names experiment trackers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from ngrpo_lora.config.section import Section, listed
from ngrpo_lora.config.words import settled

__all__ = ["TrackerConfig", "TrackerEntries"]

OWN = ("project", "name", "id", "resume", "dir", "logging_dir", "run_name")
"""What the run itself tells a tracker."""


class TrackerConfig(Section, frozen=True):
    """A tracker that the run's metrics, settings and sample grids are sent to."""

    name: Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "swanlab", "aim", "dvclive"] = (
        Field(description="The tracker, by accelerate's name.")
    )
    project: str = Field(default="ngrpo-lora", min_length=1, description="Under which the run is found there.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of the tracker's own start, such as wandb's {entity: me, tags: [flux]}.",
    )

    @field_validator("options")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [key for key in OWN if key in value]:
            raise ValueError(
                f"must leave {', '.join(taken)} to the run, which names itself by its output_dir; `project` has a key "
                "of its own"
            )
        return settled(value)


def entries(value: Any) -> Any:
    """Expand a name to a list of one tracker, and names in a list to mappings."""
    found = [] if value is None else listed(value)
    return [{"name": one} if isinstance(one, str) else one for one in found] if isinstance(found, list) else found


def distinct(value: tuple[TrackerConfig, ...]) -> tuple[TrackerConfig, ...]:
    """Refuse a tracker that is named twice."""
    names = [tracker.name for tracker in value]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"must name each tracker once, got {', '.join(sorted(twice))} several times")
    return value


TrackerEntries = Annotated[tuple[TrackerConfig, ...], BeforeValidator(entries), AfterValidator(distinct)]
