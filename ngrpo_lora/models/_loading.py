"""Loads the model family of a configuration on its device."""

from __future__ import annotations

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ngrpo_lora import registry
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.devices import resolve_device, resolve_dtype
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
    """The class of a model's family: `Family`, or another one of its file that is for the model's pipeline.

    Args:
        pipeline: the model's; None looks it up.
    Raises:
        UserError: no such model, or no family for it.
    """
    pipeline = pipeline or pipeline_of(config)
    module = registry.load(registry.MODELS, family_of_pipeline(config, pipeline))
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, BaseFamily))
    return next((kind for kind in kinds if vars(kind).get("pipeline_class") == pipeline), module.Family)
