"""Checks adapters against a model, and beside each other, before anything of the model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from ngrpo_lora.adapters.bases import warn_of_bases, warn_of_use
from ngrpo_lora.adapters.contents import (
    contents,
    counted_twice,
    fused_digests,
    merged_before,
    names_within,
    strengths,
    taken_in,
)
from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.adapters.layers import NAMES
from ngrpo_lora.adapters.reading import AdapterFile, check_fits, read_adapter_file
from ngrpo_lora.adapters.report import header_value
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.models._blueprint import bare_transformer
from ngrpo_lora.models._index import family_of_pipeline, known_pipeline

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
    inside = {name: contents(find_adapter(name, "model.fuse")) for name in model.fuse}
    taken = {name: next(iter(held)) for name, held in inside.items()}
    for file in files:
        check_fits(file, transformer, family)
        fused = fused_digests(file.metadata)
        for name in (name for name, sha256 in taken.items() if fused.get(name, sha256) != sha256):
            what = "what follows is drawn with the file as it is now"
            log.warning("model.fuse (%s) has changed since adapter %s was trained: %s", name, file.path, what)
    if not warn_of_bases(files):
        remedy = "draw with the settings of the run that trained it"
        warn_of_use(files, model.path, model.fuse, taken_in(model, inside), remedy)
    for name, other in counted_twice(inside):
        log.warning("model.fuse (%s) is in model.fuse (%s) too, and counts twice", name, other)
    _warn_of_doubles(model, files, taken)


def _warn_of_doubles(model: ModelConfig, files: Iterable[AdapterFile], taken: Mapping[str, str]) -> None:
    """Say what of adapters their base holds already, and what it needs not take in as it holds that.

    Args:
        taken: digests of the files of `model.fuse`, by their names there.
    """
    held = strengths(merged_before(model.path))
    places = {sha256: f"model.fuse: {name}" for name, sha256 in taken.items()}
    places |= {sha256: f"merged into {model.path}" for sha256 in held}
    unneeded: dict[str, str] = {}
    for file in files:
        own, *merged = contents(file.path)
        names = names_within(header_value(file.metadata, "ngrpo_merged", []))
        if own in places:
            twice = "is in the base already (%s), and counts twice; leave it out"
            log.warning(f"adapter %s {twice}", file.path, places[own])
        for sha256 in (one for one in merged if one in places):
            twice = "holds %s, which is in the base already (%s), and counts twice; draw on a base without it"
            log.warning(f"adapter %s {twice}", file.path, names[sha256], places[sha256])
        fused = fused_digests(file.metadata)
        unneeded |= {sha256: name for name, sha256 in fused.items() if name not in model.fuse and sha256 in held}
    for name in unneeded.values():
        log.warning("model.fuse (%s) is left out, as %s has it in its weights", name, model.path)
