"""The section of trackers: short forms, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngrpo_lora.config import ConfigError, dump_config, load_config
from ngrpo_lora.config.tracking import TrackerConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("null", ()),
        ("[]", ()),
        ("tensorboard", (TrackerConfig(name="tensorboard"),)),
        ("[wandb, mlflow]", (TrackerConfig(name="wandb"), TrackerConfig(name="mlflow"))),
        (
            "{name: trackio, project: flux, options: {space_id: me/board}}",
            (TrackerConfig(name="trackio", project="flux", options={"space_id": "me/board"}),),
        ),
    ],
)
def test_a_name_a_mapping_or_a_list_of_them(text: str, expected: tuple[TrackerConfig, ...]):
    assert load_config(None, [f"tracking={text}"]).tracking == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[wandb, {name: wandb}]", "tracking must name each tracker once, got wandb several times"),
        ("{name: wandb, options: {resume: must, dir: x}}", "tracking.0.options must leave resume, dir to the run"),
        ("{project: x}", "tracking.0.name must be given"),
        ("{name: wandb, project: ''}", "tracking.0.project must not be empty"),
        ("7", "tracking must be a list, got 7"),
    ],
)
def test_what_no_tracker_can_take_is_refused(text: str, message: str):
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"tracking={text}"])
    assert message in str(error.value)


def test_it_is_written_as_it_is_read(tmp_path: Path):
    config = load_config(None, ["tracking=[tensorboard, {name: wandb, options: {tags: [a, b]}}]"])
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config
