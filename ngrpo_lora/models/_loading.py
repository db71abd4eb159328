"""Loads the model family of a configuration on its device."""

from __future__ import annotations

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ngrpo_lora import registry
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.devices import resolve_device, resolve_dtype
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily, Fuse, Parts
from ngrpo_lora.models._index import family_of_pipeline, pipeline_of


def load_family(
    config: ModelConfig, parts: Parts = "all", base_is_sharded: bool = False, fuse: Fuse = None
) -> BaseFamily:
    """Load the model family of a configuration on its device, without the libraries' log lines and progress bars.

    The LoRA files of `model.fuse` are not read here: `adapters.fusing.load_fused` gives what adds them.

    Raises:
        UserError: no such model, no family for it, or it cannot be loaded.
    """
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    device = resolve_device(config.device)
    config = config.model_copy(update={"dtype": resolve_dtype(config.dtype, device)})
    return family_class(config)(config, device, parts, base_is_sharded, fuse)


def family_class(config: ModelConfig, pipeline: str | None = None) -> type[BaseFamily]:
    """The class of a model's family: of those for its pipeline the first, or the one that `model.edits` means.

    Args:
        pipeline: the model's; None looks it up.
    Raises:
        UserError: no such model, or no family for it, or it does not do what `model.edits` says.
    """
    pipeline = pipeline or pipeline_of(config)
    found = [kind for kind in family_classes(config, pipeline) if config.edits in (None, kind.edits)]
    if not found:
        said = [str(value).lower() for value in (not config.edits, config.edits)]
        raise UserError(
            f"model.edits must be {said[0]} or null for {config.path!r}, a {pipeline}, got {said[1]}; leave it out, or "
            "give FLUX.2, which both draws and edits"
        )
    return found[0]


def family_classes(config: ModelConfig, pipeline: str) -> list[type[BaseFamily]]:
    """The classes of a family's file that are for a pipeline, or `Family` where none names it; at least one.

    Raises:
        UserError: no family for the pipeline.
    """
    module = registry.load(registry.MODELS, family_of_pipeline(config, pipeline))
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, BaseFamily))
    return [kind for kind in kinds if getattr(kind, "pipeline_class", None) == pipeline] or [module.Family]
