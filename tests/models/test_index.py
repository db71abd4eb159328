"""Which family a model belongs to, by the name of its pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ngrpo_lora import registry
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._index import edits_pictures, family_of, model_index, pipeline_classes
from ngrpo_lora.models._loading import family_class, family_classes


def folder_of(path: Path, pipeline: str) -> str:
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return str(path)


@pytest.mark.parametrize("family", registry.names(registry.MODELS))
def test_a_family_is_found_by_its_pipeline_which_is_read_and_not_imported(family: str, tmp_path: Path):
    module = registry.load(registry.MODELS, family)
    pipelines = pipeline_classes(family)
    assert module.Family.pipeline_class in pipelines
    for pipeline in pipelines:
        config = ModelConfig(path=folder_of(tmp_path, pipeline))
        assert family_of(config) == family_of(config.model_copy(update={"family": family})) == family
        assert family_class(config).pipeline_class == pipeline
        assert family_class(config).__module__ == module.__name__
        assert family_class(config).edits is edits_pictures(config)
        for kind in family_classes(config, pipeline):
            assert edits_pictures(config.model_copy(update={"edits": kind.edits})) is kind.edits


def test_the_embedded_model_is_flux():
    assert family_of(ModelConfig()) == "flux"


def test_a_pipeline_without_a_family_and_one_of_another_are_errors(tmp_path: Path):
    path = folder_of(tmp_path, "StableDiffusionPipeline")
    with pytest.raises(
        UserError, match=r"is a StableDiffusionPipeline, for which there is no family; there are .*flux"
    ):
        family_of(ModelConfig(path=path))
    with pytest.raises(UserError, match=r"model\.family=flux does not fit .* give another model\.path"):
        family_of(ModelConfig(path=path, family="flux"))
    with pytest.raises(UserError, match=r"model\.family=sd3 does not fit .* give model\.family=flux or auto"):
        family_of(ModelConfig(path=folder_of(tmp_path, "FluxPipeline"), family="sd3"))


def test_a_folder_without_an_index_is_no_model(tmp_path: Path):
    with pytest.raises(UserError, match=r"must be a diffusers folder, but .* holds no model_index\.json"):
        model_index(str(tmp_path))
