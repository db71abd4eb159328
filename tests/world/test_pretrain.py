"""The script that makes the embedded model: what the encoders are taught, and all of it once with a few steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from ngrpo_lora.world.pretrain import FIELDS, learning_rate_factor, main, make_optimizers, make_transformer, promises
from ngrpo_lora.world.scenes import COLORS, RELATIONS, SHAPES, TASKS, all_scenes, parse

ANY_COLOR, NOWHERE = len(COLORS), len(RELATIONS)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a star", [("star", ANY_COLOR, 0, NOWHERE)]),
        ("three crosses", [("cross", ANY_COLOR, 2, NOWHERE)]),
        ("a red heart", [("heart", 0, 0, NOWHERE)]),
        ("a star left of a cross", [("star", ANY_COLOR, 0, 0), ("cross", ANY_COLOR, 0, 1)]),
        ("a star below a cross", [("star", ANY_COLOR, 0, 3), ("cross", ANY_COLOR, 0, 2)]),
        ("a purple star and a red cross", [("star", 5, 0, NOWHERE), ("cross", 0, 0, NOWHERE)]),
    ],
)
def test_every_noun_promises_shape_color_number_and_side(caption: str, expected: list[tuple[str, int, int, int]]):
    assert promises(parse(caption)) == [(SHAPES.index(shape), *rest) for shape, *rest in expected]


@pytest.mark.parametrize("task", TASKS)
def test_promises_fit_their_fields(task):
    for scene in all_scenes(task):
        assert all(0 <= value < size for noun in promises(scene) for value, size in zip(noun, FIELDS, strict=True))


def test_the_rate_rises_stays_and_falls_to_zero():
    rates = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert rates[0] == 1 / 200
    assert rates[199:500] == [1.0] * 301
    assert rates[750] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 500)


def test_every_parameter_has_one_optimizer():
    transformer = make_transformer()
    found = [p for o in make_optimizers(transformer, 1e-3) for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in transformer.parameters()}
    assert len(found) == len(list(transformer.parameters()))


def test_a_few_steps_of_every_stage_make_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps = ["--vae-steps", "2", "--scenes", "250", "--read-steps", "2", "--flow-steps", "2"]

    def made(output_dir: Path) -> FluxPipeline:
        folders = ["--work-dir", str(tmp_path / "work"), "--output-dir", str(output_dir)]
        monkeypatch.setattr(sys, "argv", ["pretrain", *folders, *steps])
        main()
        return FluxPipeline.from_pretrained(output_dir, dtype=torch.float32)

    pipeline = made(tmp_path / "first")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red star", height=64, width=64, num_inference_steps=2, max_sequence_length=16).images
    assert images[0].size == (64, 64)
    again = made(tmp_path / "second")  # from the files of the stages
    for name, weight in pipeline.transformer.state_dict().items():
        assert torch.equal(weight, again.transformer.state_dict()[name])
