"""Finds the family of a model by the small `model_index.json` that every diffusers model has, or that we know."""

from __future__ import annotations

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

from ngrpo_lora import models, registry
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.config.presets import check_model
from ngrpo_lora.downloads import download, hub_errors
from ngrpo_lora.errors import UserError
from ngrpo_lora.world import MODELS

__all__ = ["architectures", "edits_pictures", "family_of", "known_pipeline", "model_index", "model_json", "pipeline_of"]

INDEX = "model_index.json"
EDITING = (
    "FluxKontextPipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "WanImageToVideoPipeline",
)
"""Pipelines of the models that always start from a picture; those of FLUX.2 do with `model.edits`."""
ARCHITECTURES = Path(__file__).parent / "architectures.yaml"


def family_of(config: ModelConfig) -> str:
    """The name of the family: `model.family`, or for `auto` the one whose pipeline the model names.

    Raises:
        UserError: no such model, no access to it, or no family for its pipeline.
    """
    return family_of_pipeline(config, pipeline_of(config))


def pipeline_of(config: ModelConfig) -> str:
    """The name of the diffusers pipeline that a model is made for; otherwise as `family_of`."""
    return str(model_index(str(MODELS.get(config.path, config.path)), config.revision).get("_class_name"))


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """The parts of the models that the package knows, by their Hub ids."""
    return yaml.safe_load(ARCHITECTURES.read_text(encoding="utf-8"))["models"]


def known_pipeline(config: ModelConfig) -> str:
    """The name of the pipeline that a model is made for; of one that the package knows nothing is looked up.

    Raises:
        UserError: as `pipeline_of`.
    """
    known = architectures().get(config.path)
    return pipeline_of(config) if known is None else known["pipeline"]


def edits_pictures(config: ModelConfig, pipeline: str | None = None) -> bool:
    """Whether a model edits pictures, without importing its family; otherwise as `family_of`.

    A family's class says so too (`edits`), and `family_class` holds it against `model.edits`.

    Args:
        pipeline: the model's; None looks it up.
    """
    return bool(config.edits) or (pipeline or known_pipeline(config)) in EDITING


def family_of_pipeline(config: ModelConfig, pipeline: str) -> str:
    """The name of the family of a model whose pipeline class is known; otherwise as `family_of`.

    Raises:
        UserError: no family for it, or `model.family` is another one.
    """
    known = {kind: name for name in registry.names(registry.MODELS) for kind in pipeline_classes(name)}
    if config.family == "auto":
        if pipeline not in known:
            raise UserError(
                f"model.path {config.path!r} is a {pipeline}, for which there is no family; there are "
                f"{', '.join(f'{family} ({kind})' for kind, family in sorted(known.items()))}"
            )
        return known[pipeline]
    if config.family in known.values() and known.get(pipeline) != config.family:
        right = f"model.family={known[pipeline]} or auto" if pipeline in known else "another model.path"
        raise UserError(
            f"model.family={config.family} does not fit model.path {config.path!r}, a {pipeline}; give {right}"
        )
    return config.family


def pipeline_classes(name: str) -> list[str]:
    """Every `pipeline_class` that a family's file assigns; the file is parsed and not imported."""
    (path,) = (folder / f"{name}.py" for folder in map(Path, models.__path__) if (folder / f"{name}.py").is_file())
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assigned = (node for node in nodes if isinstance(node, ast.Assign))
    return [ast.literal_eval(one.value) for one in assigned if getattr(one.targets[0], "id", None) == "pipeline_class"]


def model_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """Contents of the `model_index.json` of a folder or of a model on the Hub.

    Raises:
        UserError: there is none, or it cannot be had: no such model, gated, no network.
    """
    return model_json(path, INDEX, revision)


def model_json(path: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """Contents of a small JSON file of a diffusers folder or of a model on the Hub.

    Raises:
        UserError: there is none, or it cannot be had.
    """
    file = Path(path) / name
    if not Path(path).is_dir():
        file = Path(hub_file(path, name, revision))
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.path must be a diffusers folder, but {path!r} holds no {name}") from None
    except ValueError as error:
        raise UserError(f"model.path {path!r}: {name} is no JSON: {error}") from None


def hub_file(repo: str, name: str, revision: str | None = None) -> str:
    """Path of a small file of a model on the Hub, downloaded or from the cache.

    Raises:
        UserError: the file cannot be had; the message says why and what to do.
    """
    check_model(repo)
    what = f"model.path {repo!r}"
    with hub_errors(what, repo, "a local folder"):
        try:
            return download(repo, name, revision=revision)
        except RevisionNotFoundError:
            raise UserError(
                f"{what} has no revision {revision!r}; drop model.revision or give a branch, tag or commit"
            ) from None
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise UserError(
                f"{what} holds no {name}: it is no diffusers model; give the repository in diffusers format"
            ) from None
