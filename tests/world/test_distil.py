"""The script that makes the embedded model from a larger one: its schedule, and all of it once with a few steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from ngrpo_lora.world import distil
from ngrpo_lora.world._parts import Flow
from ngrpo_lora.world.distil import (
    MAX_TOKENS,
    STAGES,
    ask_along,
    learning_rate_factor,
    load_targets,
    main,
    make_student,
)
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
    counts = {"scenes": 100, "vae-steps": 2, "flow-steps": 2, "trajectories": 100, "refine-steps": 2}
    steps = [word for name, count in counts.items() for word in (f"--{name}", str(count))]

    def run(output_dir: Path, *more: str) -> None:
        folders = ["--teacher", str(EMBEDDED), "--work-dir", str(tmp_path / "work"), "--output-dir", str(output_dir)]
        monkeypatch.setattr(sys, "argv", ["distil", *folders, *steps, *more])
        main()

    run(tmp_path / "first", "--only", "vae")
    assert not (tmp_path / "first").exists()
    run(tmp_path / "first")
    assert sorted(path.stem for path in (tmp_path / "work").glob("*.safetensors")) == sorted(STAGES)
    for name, each in {"targets": 3 * 100, "own": 3 * 100}.items():
        targets = load_targets(tmp_path / "work" / f"{name}.safetensors")
        assert len(targets.noised) == len(targets.sigma) == len(targets.velocity) == len(targets.captions) == each
    pipeline = FluxPipeline.from_pretrained(tmp_path / "first", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red star", height=64, width=64, num_inference_steps=2, max_sequence_length=MAX_TOKENS).images
    assert images[0].size == (64, 64)
    run(tmp_path / "second")  # from the files of the stages
    again = FluxPipeline.from_pretrained(tmp_path / "second", dtype=torch.float32)
    for name, weight in pipeline.transformer.state_dict().items():
        assert torch.equal(weight, again.transformer.state_dict()[name])


def test_the_teacher_is_asked_where_the_student_goes(tmp_path: Path):
    pipeline = FluxPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    torch.manual_seed(0)
    student = make_student(pipeline).eval()
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Teacher(Flow):
        def forward(self, packed: torch.Tensor, sigma: torch.Tensor, *ids: torch.Tensor) -> torch.Tensor:
            asked.append((packed, sigma, velocity := super().forward(packed, sigma, *ids)))
            return velocity

    teacher = Teacher(
        pipeline.transformer,
        (pipeline.text_encoder, pipeline.text_encoder_2),
        (pipeline.tokenizer, pipeline.tokenizer_2),
    )
    targets = ask_along(tmp_path / "own.safetensors", teacher, student, 100)
    for kept, told in zip(targets[:3], map(torch.cat, zip(*asked, strict=True)), strict=True):
        assert torch.allclose(kept.float(), told, atol=2e-2)
    noisy, latents = asked[0][1] == 1.0, asked[0][0]
    assert noisy.all()
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)
    # Each is asked at three of its latents, and no two of these are one.
    assert all(targets.captions.count(caption) >= 3 for caption in set(targets.captions))
    assert len(set(targets.sigma.tolist())) == len(asked)
