"""The script that makes the embedded model from a larger one: its schedule, and all of it once with a few steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from ngrpo_lora.world import distil
from ngrpo_lora.world.distil import MAX_TOKENS, learning_rate_factor, main
from ngrpo_lora.world.scenes import TASKS, TEMPLATES, all_scenes

EMBEDDED = Path(distil.__file__).parent / "model"


def test_the_rate_rises_and_falls_to_zero():
    rates = [learning_rate_factor(step, 1100) for step in range(1100)]
    assert rates[0] == 1 / 100
    assert rates[100] == 1.0
    assert rates[600] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 1000)


def test_no_caption_of_the_world_is_cut():
    pipeline = FluxPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    captions = sorted(
        {text.format(scene.caption) for task in TASKS for scene in all_scenes(task) for text in TEMPLATES}
    )
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        assert max(map(len, tokenizer(captions).input_ids)) <= MAX_TOKENS
        assert tokenizer.model_max_length == MAX_TOKENS


def test_a_few_steps_of_every_stage_make_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps = ["--scenes", "100", "--vae-steps", "2", "--flow-steps", "2"]

    def run(output_dir: Path, *more: str) -> None:
        folders = ["--teacher", str(EMBEDDED), "--work-dir", str(tmp_path / "work"), "--output-dir", str(output_dir)]
        monkeypatch.setattr(sys, "argv", ["distil", *folders, *steps, *more])
        main()

    run(tmp_path / "first", "--only", "vae")
    assert not (tmp_path / "first").exists()
    run(tmp_path / "first")
    pipeline = FluxPipeline.from_pretrained(tmp_path / "first", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red star", height=64, width=64, num_inference_steps=2, max_sequence_length=MAX_TOKENS).images
    assert images[0].size == (64, 64)
    run(tmp_path / "second")  # from the files of the stages
    again = FluxPipeline.from_pretrained(tmp_path / "second", dtype=torch.float32)
    for name, weight in pipeline.transformer.state_dict().items():
        assert torch.equal(weight, again.transformer.state_dict()[name])
