"""Checks adapters against a model, and beside each other, before anything of the model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from ngrpo_lora.adapters.bases import warn_of_bases, warn_of_use
from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.adapters.layers import NAMES
from ngrpo_lora.adapters.reading import check_fits, read_adapter_file
from ngrpo_lora.adapters.report import header_value, mapping
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.models._blueprint import bare_transformer
from ngrpo_lora.models._index import family_of_pipeline, known_pipeline
from ngrpo_lora.records.files import digest

__all__ = ["check_adapters"]

log = logging.getLogger(__name__)


def check_adapters(model: ModelConfig, adapters: Iterable[Path]) -> None:
    """Check that LoRA files fit a model, by its configuration alone, and say where they were trained on another base.

    Raises:
        UserError: a file holds no LoRA, or one of another model; or there is no such model.
    """
    paths = [*dict.fromkeys(adapters)]
    if not paths or (family := family_of_pipeline(model, known_pipeline(model))) not in NAMES:
        return
    transformer = bare_transformer(model)
    files = [read_adapter_file(path, family) for path in paths]
    taken = {name: digest(find_adapter(name, "model.fuse")) for name in model.fuse}
    for file in files:
        check_fits(file, transformer, family)
        fused = mapping(header_value(file.metadata, "ngrpo", {}), "fused")
        for name in (name for name, sha256 in taken.items() if fused.get(name, sha256) != sha256):
            what = "what follows is drawn with the file as it is now"
            log.warning("model.fuse (%s) has changed since adapter %s was trained: %s", name, file.path, what)
    if not warn_of_bases(files):
        warn_of_use(files, model.path, model.fuse, "draw with the settings of the run that trained it")
    for path in paths:
        own = digest(path)
        for name in (name for name, sha256 in taken.items() if sha256 == own):
            twice = "is in the base already (model.fuse: %s), and counts twice; leave it out"
            log.warning(f"adapter %s {twice}", path, name)
