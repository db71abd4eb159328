"""Sizes that a model does not draw, and broken files, are known before weights are read, or said in words."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import pytest
import test_flux2_klein
from family_checks import load

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._sizes import check_size
from ngrpo_lora.models.sana import Family

distilled = test_flux2_klein.distilled


def test_both_sides_are_multiples():
    check_size(ModelConfig(height_px=64, width_px=96), 32)
    for height, width, side in ((80, 64, "height_px"), (64, 80, "width_px")):
        with pytest.raises(UserError, match=f"model.{side} must be a multiple of 32 for this model, got 80"):
            check_size(ModelConfig(height_px=height, width_px=width), 32)


def test_a_size_that_no_model_of_a_family_draws_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(UserError, match=r"model\.height_px must be a multiple of 32 for this model, got 48"):
        Family(ModelConfig(path="a/b", height_px=48, dtype="float32"), "cpu")


def test_a_source_of_a_size_that_is_not_taken_is_refused_before_weights_are_read(
    distilled: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(UserError, match=r"got 64 and 1024; .* so give both \(--height and --width\)"):
        load(distilled, edits=True, height_px=64, width_px=1024)


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_weights_that_are_cut_off_are_one_message_whatever_part_they_are_of(part: str, distilled: Path, tmp_path: Path):
    folder = shutil.copytree(distilled, tmp_path / "cut")
    (file,) = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"could not be loaded as a Flux2KleinPipeline: .*[^.]; files that are broken"):
        load(folder, height_px=64, width_px=64)
