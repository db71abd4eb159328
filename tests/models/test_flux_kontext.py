"""FLUX.1-Kontext against diffusers' own pipeline, on a transformer of two blocks beside the embedded model's parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refuse, run
from conftest import MakeConfig
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from family_checks import (
    PROMPTS,
    check_neighbours,
    check_sampling,
    check_training,
    check_velocities,
    load,
    model_folder,
    noise_of,
    picture,
    record,
    stock,
)
from PIL import Image
from safetensors.torch import load_file

from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation import comparison
from ngrpo_lora.evaluation.report.record import Record
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._blueprint import make_family, read_blueprint
from ngrpo_lora.models._embeddings import EmbeddingCache
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.prompts.files import Prompt, read_prompts
from ngrpo_lora.sampling.sampler import draw
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.world import EMBEDDED

SIZE: dict[str, Any] = {"height_px": 32, "width_px": 48}
STEPS = 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    parts: dict[str, Any] = FluxPipeline.from_pretrained(EMBEDDED).components
    small = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    transformer: Any = FluxTransformer2DModel.from_config(dict(parts["transformer"].config) | small)
    return model_folder(FluxKontextPipeline(**parts | {"transformer": transformer}), tmp_path_factory.mktemp("kontext"))


@pytest.fixture(scope="session")
def family(folder: Path) -> BaseFamily:
    return load(folder, **SIZE)


@pytest.fixture
def edits(tmp_path: Path) -> list[Prompt]:
    return [Prompt(text, {}, picture(tmp_path, seed)) for seed, text in enumerate(PROMPTS)]


@pytest.mark.parametrize("guidance_scale", [None, 4.0])
def test_velocities_and_pictures_are_those_of_diffusers(
    guidance_scale: float | None, folder: Path, edits: list[Prompt]
):
    family = load(folder, **SIZE, guidance_scale=guidance_scale)
    pipeline, noise = stock(folder, "FluxKontextPipeline", dtype=torch.float32), noise_of(family)
    assert edits[0].source is not None
    recording = record(
        pipeline,
        lambda packed: pipeline._unpack_latents(packed, 32, 48, pipeline.vae_scale_factor),
        image=edits[0].source.fitted(48, 32),
        prompt=edits[0].text,
        latents=pipeline._pack_latents(noise, *noise.shape),
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale or 2.5,
        max_sequence_length=family.settings["max_sequence_length"],
        height=32,
        width=48,
        max_area=32 * 48,
        _auto_resize=False,
    )
    check_velocities(family, edits[0], recording)
    check_sampling(family, edits[0], recording)
    text, other = (family.encode([edits[0]._replace(source=one.source)]) for one in edits[:2])
    first, second = (family.velocity(noise, 0.5, one) for one in (text, other))
    assert (first - second).abs().max() > 1e-4  # the source does something


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(family: BaseFamily, edits: list[Prompt]):
    check_neighbours(family, edits)


def test_each_prompt_is_encoded_once_with_each_source(
    family: BaseFamily, edits: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    again, encoded = load_again(family), []
    encode_edit = again.encode_edit

    def count(prompt: str, source: Image.Image) -> Any:
        encoded.append((prompt, source.size))
        return encode_edit(prompt, source)

    monkeypatch.setattr(again, "encode_edit", count)
    wanted = [edits[0], edits[0]._replace(source=edits[1].source), edits[0], edits[1]]
    first, second = again.encode(wanted), again.encode(wanted)
    assert encoded == [(edits[0].text, (48, 32)), (edits[0].text, (48, 32)), (edits[1].text, (48, 32))]
    tokens = first.tensors["source_tokens"]
    assert torch.equal(tokens, second.tensors["source_tokens"])
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[1], tokens[3])
    assert not torch.equal(tokens[0], tokens[1])


def load_again(family: BaseFamily) -> BaseFamily:
    """A view of a family that has met no prompt."""
    return family.with_settings(family.config)


def test_conditionings_on_disk_are_those_of_the_whole_model(
    folder: Path, family: BaseFamily, edits: list[Prompt], tmp_path: Path
):
    cache = EmbeddingCache(tmp_path / "embeddings", family.config)
    cache.fill(load(folder, "text", **SIZE), edits)
    expected, found = family.encode(edits), cache.encode(edits, torch.device("cpu"))
    assert {name: t.shape for name, t in found.tensors.items()} == {n: t.shape for n, t in expected.tensors.items()}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert len(load_file(cache.file(edits[0]))) == 3
    another = EmbeddingCache(tmp_path / "embeddings", family.config.model_copy(update={"width_px": 64}))
    assert another.missing(edits) == edits


def test_the_size_of_an_edit_is_kontexts_for_the_shape_of_the_source(folder: Path, family: BaseFamily):
    large = family.with_settings(ModelConfig(height_px=1024, width_px=1024))
    for size, expected in (((512, 512), (1024, 1024)), ((3000, 2000), (832, 1248)), ((100, 900), (1568, 672))):
        assert large.edited_size(Image.new("RGB", size)) == expected
    half = family.with_settings(ModelConfig(height_px=512, width_px=512))
    assert half.edited_size(Image.new("RGB", (3000, 2000))) == (416, 624)


def test_a_prompt_without_a_picture_is_refused(family: BaseFamily):
    with pytest.raises(ConfigError, match="must have a source picture, but 'a red star' has none"):
        family.encode(["a red star"])


def test_a_plan_counts_the_tokens_of_the_source(folder: Path):
    config = ModelConfig(path=str(folder), device="cpu", **SIZE)
    blank = make_family(read_blueprint(config), config)
    assert type(blank).__mro__[1].__name__ == "Kontext"
    text = blank.encode(["anything"])
    assert text.tensors["source_tokens"].shape == (1, 6, blank.transformer.config.in_channels)
    assert blank.velocity(torch.zeros(1, *blank.latent_shape, device="meta"), 0.5, text).shape[1:] == blank.latent_shape


@pytest.fixture
def prompts(tmp_path: Path, edits: list[Prompt]) -> Path:
    rows = [{"prompt": edit.text, "source": f"{seed}.png"} for seed, edit in enumerate(edits)]
    (file := tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("encoders", ["keep", "cache"])
def test_a_run_trains_the_lora_alone_and_diffusers_loads_it(
    encoders: str, folder: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path
):
    settings = [f"model.{key}={value}" for key, value in SIZE.items()]
    check_training(make_config, folder, tmp_path, *settings, f"model.text_encoders={encoders}", prompts=prompts)


def test_pictures_are_checked_before_a_model_is_loaded(
    folder: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(BaseFamily, "load", lambda *args: pytest.fail("a model is loaded"))
    sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null", "model.device=cpu"]
    with pytest.raises(ConfigError, match=r"prompts\.train must have no source pictures for 'embedded'"):
        check_run(make_config(tmp_path / "run", *sources))
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"prompts\.train must have readable source pictures, but '1\.png' \(line 2"):
        check_run(make_config(tmp_path / "run", *sources, f"model.path={folder}"))
    with pytest.raises(ConfigError, match=r"prompts\.train must have a source picture with every prompt"):
        check_run(make_config(tmp_path / "run", *sources, "prompts.train=world:train", f"model.path={folder}"))


# Drawing ------------------------------------------------------------------------------------------------------------


def drawing(folder: Path, output: Path, *words: object) -> list[str]:
    """What `ngrpo sample` says of two steps by this model."""
    return run("sample", "--model", folder, "--steps", 2, "--output", output, *words)


def test_a_picture_says_what_it_was_edited_from_and_like_edits_it_again(
    folder: Path, tmp_path: Path, edits: list[Prompt], prompts: Path
):
    source = tmp_path / "0.png"
    (first,) = drawing(folder, tmp_path / "first", "--prompt", "make it red", "--source", source)
    with Image.open(first) as file:
        assert file.size == (1104, 480)  # of the area of the preset's 720 x 720, in the shape of Kontext's 1568 x 672
        said = json.loads(file.text["ngrpo"])["source"]  # pyright: ignore[reportAttributeAccessIssue]
        drawn = np.asarray(file.convert("RGB"))
    assert said == {"name": str(source), "file": str(source), "sha256": edits[0].source and edits[0].source.digest}
    for words, alike in (([], True), (["--source", tmp_path / "1.png"], False), (["--prompt", "make it blue"], False)):
        (again,) = drawing(folder, tmp_path / "again", "--like", first, *words)
        assert np.array_equal(np.asarray(Image.open(again).convert("RGB")), drawn) == alike
    sides = ("--height", 32, "--width", 48)
    sized = drawing(folder, tmp_path / "sized", "--prompts", prompts, "--num-prompts", 2, *sides)
    assert [Image.open(path).size for path in sized] == [(48, 32)] * 2
    one = ("sample", "--model", folder, "--like", first, "--output", tmp_path / "again")
    picture(tmp_path, 5).content.rename(source)  # pyright: ignore[reportAttributeAccessIssue]
    assert f"was edited from {str(source)!r}, which has changed since; give the picture with --source" in refuse(*one)
    source.unlink()
    assert f"was edited from {str(source)!r}, which is not there any more" in refuse(*one)


def test_a_command_that_draws_checks_pictures_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BaseFamily, "load", lambda *args: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    one = ("sample", "--prompt", "make it red")
    assert "--prompt must have a source picture with every prompt" in refuse(*one, "--model", folder)
    gone = refuse(*one, "--model", folder, "--source", "gone.png")
    assert "--source must be a readable picture, but 'gone.png' is no file" in gone
    picture(tmp_path, 3)
    assert "--source must not be empty; name the picture to edit" in refuse(*one, "--model", folder, "--source", " ")
    url = (tmp_path / "gone.png").as_uri()
    gone = refuse(*one, "--model", folder, "--source", url)
    assert f"'{url}' is no file ('{tmp_path / 'gone.png'}')" in gone
    assert {path.name for path in tmp_path.iterdir()} == {"3.png"}  # and no empty folder
    none = refuse(*one, "--model", "embedded", "--source", "3.png")
    assert "--prompt must have no source pictures for 'embedded', which edits none" in none


def test_the_pipeline_draws_the_trainers_edits(folder: Path, tmp_path: Path, edits: list[Prompt]):
    file = str(Path(__file__).parents[2] / "pipelines" / "flux_kontext.py")
    pipeline: Any = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=file, trust_remote_code=True, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    assert edits[0].source is not None
    source, size = edits[0].source.load(), {"height": 32, "width": 48}
    settings = {"num_inference_steps": 4, "guidance_scale": 2.5, "max_sequence_length": 32}
    (drawn,) = pipeline(prompt=edits[0].text, image=source, seeds=7, **size, **settings).images
    family = load(folder, **SIZE, max_sequence_length=32)
    (expected,) = draw(family, family.encode(edits[:1]), [7], "dpmpp_2m", family.sigmas(4))
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    group = pipeline(prompt=edits[0].text, image=source, seeds=7, neighbors=2, perturbation_strength=0.5, **size).images
    assert [image.size for image in group] == [(48, 32)] * 2
    for area in (1024 * 1024, 512 * 512):
        side = round(area**0.5)
        sized = family.with_settings(ModelConfig(height_px=side, width_px=side))
        assert pipeline.edited_size(source, area) == sized.edited_size(source)
    for wrong, why in (
        ({}, "the picture to edit"),
        ({"image": [source] * 2}, "as many"),
        ({"image": "a.png"}, "of PIL"),
    ):
        with pytest.raises(ValueError, match=why):
            pipeline(prompt="a", seeds=1, **size, **wrong)
    with pytest.raises(ValueError, match="this model edits: leave it out"):
        pipeline(prompt="a", seeds=1, image=source, strength=0.5, **size)


def test_a_comparison_draws_from_the_sources_of_its_prompts(
    folder: Path, family: BaseFamily, tmp_path: Path, edits: list[Prompt], prompts: Path
):
    info = AdapterInfo(family.config, RolloutConfig(num_steps=2))
    base, wanted = comparison.Candidate("base", None, info), [edits[0], edits[0]._replace(source=edits[1].source)]
    assert comparison.suiting(wanted, [base]) == [base]
    with pytest.raises(ConfigError, match="--prompts must have a source picture with every prompt"):
        comparison.suiting([Prompt("a red star")], [base])
    pictures = comparison.draw(base, wanted, [7, 7], tmp_path / "drawn")
    sigmas = family.sigmas(2)
    for prompt, drawn in zip(wanted, pictures, strict=True):
        (expected,) = draw(family, family.encode([prompt]), [7], "dpmpp_2m", sigmas)
        assert np.array_equal(np.asarray(drawn.load()), np.asarray(expected))
        assert prompt.source is not None
        assert drawn.metadata["source"].tobytes() == prompt.source.fitted(48, 32).tobytes()
    before = [picture.path.stat().st_mtime_ns for picture in pictures]
    again = comparison.draw(base, [wanted[0], edits[2]._replace(text=wanted[1].text)], [7, 7], tmp_path / "drawn")
    kept = [picture.path.stat().st_mtime_ns == time for picture, time in zip(again, before, strict=True)]
    assert kept == [True, False]  # the second is now edited from another picture
    rows = [{"prompt": "a red star", "source": f"{seed}.png"} for seed in range(2)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    assert len(comparison.distinct_prompts(str(prompts), 5, 0)) == 2


# Rewards ------------------------------------------------------------------------------------------------------------


def test_rewards_see_the_source_as_the_model_does(folder: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path):
    """The real preservation beside a function that keeps what it was given."""
    (seen := tmp_path / "seen.py").write_text(
        "import json, pathlib\n"
        "def score(images, prompts, metadata):\n"
        f"    with open({str(tmp_path / 'seen.jsonl')!r}, 'a') as file:\n"
        "        for image, prompt, row in zip(images, prompts, metadata):\n"
        "            pixels = row['source'].tobytes().hex()\n"
        "            print(json.dumps([prompt, row['source'].size, image.size, pixels]), file=file)\n"
        "    return [0.0] * len(images)\n"
    )
    sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null", "model.device=cpu"]
    settings = [f"model.{key}={value}" for key, value in SIZE.items()] + [f"model.path={folder}"]
    rewards = f"rewards=[preservation, {{name: '{seen}:score'}}]"
    run = prepare(make_config(tmp_path / "run", *sources, *settings, rewards, "trainer.num_iterations=1"))
    complete(run)
    rows = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    edits = {prompt.text: prompt for prompt in read_prompts(str(prompts)).prompts}
    assert len(rows) >= 8 + 2 * 2
    for text, source_size, size, pixels in rows:
        source = edits[text].source
        assert source is not None
        assert source_size == size == [48, 32]
        assert pixels == source.fitted(48, 32).tobytes().hex()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < metrics[-1]["eval/preservation_mean"] < 1
    record = Record.read(tmp_path / "run", run.config, is_running=False)
    assert len(record.shown) == 2
    for shown in record.shown:
        assert shown.source is not None
        with Image.open(shown.source) as kept:
            source = edits[shown.prompt].source
            assert source is not None
            assert kept.tobytes() == source.fitted(48, 32).tobytes()
