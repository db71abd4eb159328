"""Whether the LoRA files that a run starts from fit its model, layer by layer, before its weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator

from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.world import ADAPTERS

__all__ = ["unfitting"]

EMBEDDED = "embedded"  # the model that the package's adapters are for


def unfitting(config: RunConfig) -> Iterator[str]:
    """Say which files of `model.fuse` and `lora.init_from` the run would refuse once its model is there.

    The model is made from its small JSON files, without weights, and the run's own checks are done on it. A resumed run
    does not read `lora.init_from`. Of a model whose files cannot be had nothing is said; its loading says that.
    """
    initial = config.lora.init_from if config.resume is None else None
    own = config.model.path == EMBEDDED and all(name in ADAPTERS for name in config.model.fuse)  # which fits
    if initial is None and (own or not config.model.fuse):
        return

    from ngrpo_lora.adapters import lora
    from ngrpo_lora.adapters.finding import find_adapter
    from ngrpo_lora.adapters.loading import expert_of, read_fitting, read_initial
    from ngrpo_lora.models._blueprint import make_family, read_blueprint  # diffusers is slow to import

    try:
        blueprint = read_blueprint(config.model)
        family = make_family(blueprint, config.model.model_copy(update={"dtype": "float32"}))
    except UserError:
        return
    for name in config.model.fuse:
        try:
            expert_of(read_fitting(family, find_adapter(name, "model.fuse"), tell=False), family)
        except UserError as error:
            yield _of("model.fuse", error)
    if initial is None:
        return
    try:
        file = read_initial(family, initial, tell=False)
        suffixes, excluded = family.lora_targets(config.lora.targets)
        lora.inject(family.transformer, config.lora, suffixes, excluded, seed=0)
        lora.start_from(family.transformer, file, excluded)
    except UserError as error:
        yield _of("lora.init_from", error)


def _of(key: str, error: UserError) -> str:
    """The message of a check, after the key that it is of."""
    return str(error) if str(error).startswith(("model.", "lora.")) else f"{key}: {error}"
