"""The sections of a run: what cannot change, and what follows from what."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ngrpo_lora.config import RunConfig, load_config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        RunConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        RunConfig().rollout.num_steps = 1  # type: ignore[misc]


def test_alpha_follows_the_rank_unless_given():
    assert load_config(None, ["lora.rank=8"]).lora.resolved_alpha == 8
    assert load_config(None, ["lora.rank=8", "lora.alpha=4.0"]).lora.resolved_alpha == 4


def test_the_flux_preset_has_the_papers_settings():
    config = load_config("flux")
    assert (config.model.height_px, config.model.guidance_scale) == (720, 3.5)
    assert (config.rollout.group_size, config.rollout.num_steps, config.rollout.solver) == (12, 8, "dpmpp_2m")
    algorithm = config.algorithm.model_dump()
    assert [algorithm[k] for k in ("num_anchors", "num_train_steps", "perturbation_strength")] == [4, 4, 0.3]
