"""The Wan family against diffusers' `WanPipeline`, on tiny models like Wan 2.1 and Wan 2.2 TI2V; videos in training."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from family_checks import (
    PROMPTS,
    GivenSigmas,
    Recording,
    check_another_size,
    check_neighbours,
    check_sampling,
    check_targets,
    check_training,
    check_velocities,
    load,
    noise_of,
    record,
    stock,
)
from PIL import Image, ImageSequence
from typer.testing import CliRunner
from wan_parts import LARGE, SMALL, make_folder

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.cli import app
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation.report.page import write_report
from ngrpo_lora.evaluation.report.record import Record
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.records.pictures import Picture, read_png_text
from ngrpo_lora.reports.grids import save_grid
from ngrpo_lora.sampling.sampler import draw, sample_images
from ngrpo_lora.training.rewarding import collect, mean_of_frames, samples
from ngrpo_lora.training.rollouts import decode, roll_out
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

SETTINGS = [f"model.{key}={value}" for key, value in SMALL.items()]

# Redness; its calls are written down, and what `broken` says of the images of a group, counted from 0, has no score.
REDNESS = """
import json
from pathlib import Path

import numpy as np

def group(images, prompt, metadata):
    redness = [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(redness) + "\\n")
    return redness

def broken(images, prompt, metadata):
    return [float("nan") if i == 3 else redness for i, redness in enumerate(group(images, prompt, metadata))]
"""


@pytest.fixture(scope="session")
def wan21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("wan21"), second=False)


@pytest.fixture(scope="session")
def wan22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("wan22"), second=True)


@pytest.fixture(scope="session")
def family(wan21: Path) -> BaseFamily:
    return load(wan21, **SMALL)


def run_stock(folder: Path, family: BaseFamily, guidance: float) -> Recording:
    pipeline = stock(folder, "WanPipeline")
    pipeline.scheduler = GivenSigmas(family.sigmas(3))
    return record(
        pipeline,
        prompt=PROMPTS[2],
        negative_prompt="a blurred star",
        latents=noise_of(family),
        num_inference_steps=3,
        guidance_scale=guidance,
        height=family.config.height_px,
        width=family.config.width_px,
        num_frames=5,
        max_sequence_length=64,
    )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_wan21_draws_as_diffusers_does_with_guidance_and_without(wan21: Path, guidance: float):
    family = load(wan21, **SMALL, guidance_scale=guidance, negative_prompt="a blurred star")
    recording = run_stock(wan21, family, guidance)
    assert len(recording.images) == 5
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_wan22_needs_no_timestep_for_every_token(wan22: Path):
    family = load(wan22, **LARGE, negative_prompt="a blurred star")
    recording = run_stock(wan22, family, 5.0)
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_what_is_recommended_is_that_of_the_model(wan21: Path, wan22: Path):
    first, second = load(wan21, height_px=16, width_px=32), load(wan22, height_px=32, width_px=64)
    assert first.settings == {"guidance_scale": 5.0, "max_sequence_length": 512, "num_frames": 81}
    assert second.settings == {"guidance_scale": 5.0, "max_sequence_length": 512, "num_frames": 121}
    assert (first.latent_shape, second.latent_shape) == ((4, 21, 2, 4), (4, 31, 2, 4))
    assert (first.architecture, second.architecture) == ("wan2.1", "wan2.2-ti2v-5b")


def test_the_schedule_is_that_of_the_flow_shift(family: BaseFamily):
    """diffusers' UniPC starts at 1 - 1e-6, and heads for 0.001 before it ends at 0."""
    scheduler = family.pipeline.scheduler
    scheduler.set_timesteps(6)
    torch.testing.assert_close(family.sigmas(6), scheduler.sigmas, rtol=0, atol=2e-3)
    assert family.shift(6) == 3.0
    assert family.sigmas(6)[3] == 0.75  # 3 * 0.5 / (1 + 2 * 0.5)


def test_videos_do_not_depend_on_their_neighbours(family: BaseFamily):
    check_neighbours(family)


@pytest.mark.parametrize("frames", [2, 4, 7, 82])
def test_other_numbers_of_frames_are_refused(wan21: Path, frames: int):
    with pytest.raises(UserError, match=rf"num_frames must be 4 k \+ 1 .* for Wan, got {frames}; the nearest are"):
        load(wan21, **dict(SMALL, num_frames=frames))


def test_one_frame_is_a_picture(wan21: Path):
    family = load(wan21, **dict(SMALL, num_frames=1))
    assert family.latent_shape == (4, 1, 2, 4)
    (image,) = family.decode(noise_of(family))
    assert image.size == (32, 16)


def test_sizes_are_multiples_of_a_patch(wan22: Path):
    with pytest.raises(UserError, match=r"model.height_px must be a multiple of 32 for this model, got 16"):
        load(wan22, **SMALL)


def test_lora_adapts_the_blocks_and_nothing_else(family: BaseFamily):
    layers = [f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in family.attention]
    assert len(layers) == 8
    attention = {f"blocks.{block}.{layer}" for block in range(2) for layer in layers}
    check_targets(family, attention, {f"blocks.{i}.ffn.{layer}" for i in range(2) for layer in ("net.0.proj", "net.2")})


# Videos in training


@pytest.fixture(scope="module")
def run(make_config: MakeConfig, wan21: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run, two of whose five frames are scored, groups of three samples as a whole."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "redness.py").write_text(REDNESS)
    rewards = f"rewards={{train: '{folder / 'redness.py'}:group', frames: 2}}"
    return check_training(make_config, wan21, folder, *SETTINGS, rewards, "lora.targets=attention+feed_forward")


def test_it_trains_and_a_stock_pipeline_draws_with_the_adapter(run: Run):
    assert run.family.guided
    assert run.family.num_frames == 5


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [2]), (2, [1, 3]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_scored_frames_are_evenly_spaced(run: Run, count: int, chosen: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        run,
        "config",
        run.config.model_copy(update={"rewards": run.config.rewards.model_copy(update={"frames": count})}),
    )
    videos = [Image.new("RGB", (4, 4), (sample, frame, 0)) for sample in range(3) for frame in range(5)]
    seen_by_rewards = samples(run, [Prompt("a star", {"row": row}) for row in range(3)], videos)
    seen = [image.getpixel((0, 0)) for image in seen_by_rewards.images]
    assert seen == [(sample, frame, 0) for sample in range(3) for frame in chosen]
    assert [metadata["row"] for metadata in seen_by_rewards.metadata] == [row for row in range(3) for _ in chosen]
    assert seen_by_rewards.group_size == len(seen)
    scores = torch.tensor([[float(frame) for frame in chosen]] * 3, dtype=torch.float64) + torch.arange(3)[:, None]
    torch.testing.assert_close(mean_of_frames(run, scores.flatten()), scores.mean(1))


def test_a_whole_group_is_scored_with_all_its_frames_and_a_sample_has_their_mean(run: Run):
    """Of each of two iterations two groups of 3 samples; two frames each. An evaluation's groups are single videos."""
    calls = [json.loads(line) for line in (run.output_dir.parent / "redness.jsonl").open()]
    groups = [call for call in calls if len(call) > 2]
    assert [len(call) for call in groups] == [6] * 4
    assert {len(call) for call in calls} == {2, 6}
    for iteration, metrics in enumerate(read_metrics(run.output_dir / "metrics.jsonl")[1:]):
        of_both = np.array(groups[2 * iteration : 2 * iteration + 2])
        assert metrics["rollout/reward_mean"] == pytest.approx(of_both.mean(), rel=1e-9)


def test_the_grid_shows_middle_frames(run: Run, wan21: Path, tmp_path: Path):
    base, texts = load(wan21, **SMALL), [prompt.text for prompt in run.held_out]
    seeds = [run.config.evaluation.seed + i for i in range(len(texts))]
    videos = draw(base, base.encode(texts), seeds, run.config.rollout.solver, run.schedule.sigmas)
    save_grid(tmp_path / "grid.png", videos[2::5], texts)
    with (
        Image.open(tmp_path / "grid.png") as expected,
        Image.open(run.output_dir / "samples" / "000000.png") as grid,
    ):
        assert expected.tobytes() == grid.tobytes()


def test_the_report_shows_clips(run: Run, tmp_path: Path):
    """Of the first evaluation and the last, each as long as its video, and the middle frame beside it."""
    for part in ("first", "last"):
        with Image.open(run.output_dir / "samples" / part / "0.webp") as clip:
            assert (clip.size, getattr(clip, "n_frames", 1), clip.info["loop"]) == ((32, 16), 5, 0)
            clip.seek(2)
            middle = np.asarray(clip.convert("RGB")).astype(int)
        with Image.open(run.output_dir / "samples" / part / "0.png") as frame:
            assert np.abs(np.asarray(frame.convert("RGB")) - middle).mean() < 20  # WebP loses some
    page = write_report([Record.read(run.output_dir, run.config, False)], tmp_path / "report.html").read_text()
    clips = [base64.b64decode(text) for text in re.findall(r"data:image/webp;base64,([\w+/=]+)", page)]
    lengths = [getattr(Image.open(io.BytesIO(clip)), "n_frames", 1) for clip in clips]
    assert lengths.count(5) == 2 * len(run.held_out)


def test_motion_is_seen_in_all_frames_beside_rewards_of_some(make_config: MakeConfig, wan21: Path, tmp_path: Path):
    """A function of videos is given five frames of each sample, and its score is the sample's."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "mine.py").write_text(
        "def length(video, prompt, metadata):\n    return len(video) + video[0].getpixel((0, 0))[0] / 1000\n"
    )
    sources = [f"prompts.{key}={tmp_path / 'prompts.txt'}" for key in ("train", "held_out")]
    rewards = f"rewards={{train: ['jpeg', 'motion', '{tmp_path / 'mine.py'}:length'], frames: 2}}"
    model = [f"model.path={wan21}", "evaluation.strict=null", *SETTINGS]
    run = prepare(make_config(tmp_path / "run", *model, *sources, rewards))
    complete(run)
    metrics = read_metrics(run.output_dir / "metrics.jsonl")[-1]
    assert 0 <= metrics["rollout/motion_mean"] <= 1
    assert 5 < metrics["rollout/length_mean"] < 6
    assert metrics["rollout/failed_share"] == 0
    with pytest.raises(
        ConfigError, match=r"reward motion is of videos, but model.path 'embedded' draws single pictures"
    ):
        prepare(make_config(tmp_path / "pictures", "rewards=motion", "evaluation.strict=null"))


def test_a_frame_without_a_score_masks_its_video(make_config: MakeConfig, wan21: Path, tmp_path: Path):
    """The fourth of a group's frames is the second of its second sample."""
    (tmp_path / "redness.py").write_text(REDNESS)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run = prepare(
        make_config(
            tmp_path / "run",
            f"model.path={wan21}",
            f"prompts.train={tmp_path / 'prompts.txt'}",
            f"prompts.held_out={tmp_path / 'prompts.txt'}",
            "evaluation.strict=null",
            f"rewards={{train: '{tmp_path / 'redness.py'}:broken', frames: 2}}",
            "rollout.group_size=3",
            "trainer.num_iterations=1",
            *SETTINGS,
        )
    )
    text = run.family.encode([PROMPTS[0]])
    (rollout,) = roll_out(run, text)
    seen_by_rewards = samples(run, [Prompt(PROMPTS[0], {})] * 3, decode(run, rollout))
    batch = collect(run, [rollout], [run.scorer.submit(seen_by_rewards)])
    assert batch.valid.tolist() == [[True, False, True]]
    calls = [json.loads(line) for line in (tmp_path / "redness.jsonl").open()]
    means = np.array(calls).reshape(3, 2).mean(1)
    (scores,) = batch.scores.values()
    np.testing.assert_allclose(scores[0].numpy()[[0, 2]], means[[0, 2]])
    assert scores[0, 1].isnan()


# Videos on disk


def command(*words: object) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def adapter(run: Run) -> Path:
    return run.output_dir / "adapter" / FILE_NAME


def test_sample_writes_an_animated_png_per_seed_of_which_score_sees_the_middle(adapter: Path, tmp_path: Path):
    command("sample", "--adapter", adapter, "-p", PROMPTS[0], "--seed", 7, "--num-images", 2, "--output", tmp_path)
    drawn = sample_images(adapter, None, PROMPTS[:1], [7, 8])
    assert len(drawn) == 10
    for seed, video in ((7, drawn[:5]), (8, drawn[5:])):
        path = tmp_path / f"000-a-red-star-seed{seed}.png"
        assert {"prompt": PROMPTS[0], "seed": str(seed)}.items() <= read_png_text(path).items()
        with Image.open(path) as file:
            assert file.info["duration"] == 62.5  # ms
            frames = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(file)]
        assert frames == [frame.tobytes() for frame in video]
        assert Picture(path).load().tobytes() == video[2].tobytes()


def test_compare_draws_middle_frames(run: Run, adapter: Path, tmp_path: Path):
    folder = run.output_dir.parent
    words = ["-r", f"{folder / 'redness.py'}:group", "--prompts", folder / "prompts.txt", "--num-prompts", 2]
    command("compare", adapter, *words, "--seeds", 1, "--seed", 7, "--output", tmp_path)
    for number in range(2):
        with Image.open(tmp_path / "images" / "run" / f"{number:03d}-{7 + number}.png") as picture:
            expected = sample_images(adapter, None, [picture.info["prompt"]], [7 + number])[2]
            assert picture.tobytes() == expected.tobytes()


def test_a_loaded_model_can_be_asked_for_another_size(wan21: Path):
    check_another_size(wan21, SMALL, {"height_px": 32, "width_px": 16, "num_frames": 9, "guidance_scale": 1.0})
    with pytest.raises(UserError, match=r"num_frames must be 4 k \+ 1"):
        load(wan21, **SMALL).with_settings(load(wan21, **SMALL).config.model_copy(update={"num_frames": 6}))
