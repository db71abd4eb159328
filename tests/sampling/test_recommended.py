"""How a file wants to be drawn: as its header says, or its family's preset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import FinishedRun
from safetensors.torch import load_file, save_file

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.header import read_adapter
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.config import load_config
from ngrpo_lora.models._blueprint import make_family, read_blueprint
from ngrpo_lora.registry import MODELS, names
from ngrpo_lora.sampling.recommended import PRESETS, recommend


def test_a_run_recommends_what_it_trained_with(finished_run: FinishedRun):
    path = finished_run.output_dir / "adapter" / FILE_NAME
    found = recommend(path, "flux")
    assert (found.info, found.base, found.source) == (read_adapter(path), "embedded", "as in training")


def test_a_base_that_is_not_known_is_not_looked_up(finished_run: FinishedRun, tmp_path: Path):
    """Its shift is in the header: any model of the family has its schedule."""
    path = finished_run.output_dir / "adapter" / FILE_NAME
    own = json.loads(read_metadata(path)["ngrpo"])
    own["model"]["path"] = "/nowhere/my-finetune"
    changed = tmp_path / "changed.safetensors"
    save_file(load_file(path), changed, {"ngrpo": json.dumps(own)})
    found = recommend(changed, "flux")
    assert (found.info.model.path, found.base) == ("/nowhere/my-finetune", "black-forest-labs/FLUX.1-dev")
    assert found.info.rollout.shift == own["rollout"]["shift"]


@pytest.mark.parametrize("family", PRESETS)
def test_a_file_of_another_trainer_is_drawn_as_its_familys_preset(family: str, tmp_path: Path):
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    found, preset = recommend(path, family), load_config(PRESETS[family])
    assert (found.info.model, found.info.rollout) == (preset.model, preset.rollout)
    assert found.source == f"not in the file; those of the preset {PRESETS[family]}"
    kind = type(make_family(read_blueprint(found.info.model), found.info.model)).__mro__[1]
    assert kind.__module__ == f"ngrpo_lora.models.{family}"


def test_every_family_has_a_preset():
    assert sorted(PRESETS) == names(MODELS)
