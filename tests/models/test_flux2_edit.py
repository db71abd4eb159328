"""Editing with FLUX.2 against diffusers' own pipelines, on the tiny models that draw from text too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_flux2_dev
import test_flux2_klein
import torch
from commands import refuse, run
from conftest import MakeConfig
from family_checks import (
    PROMPTS,
    Recording,
    check_another_size,
    check_comparison,
    check_half_precision,
    check_neighbours,
    check_sampling,
    check_training,
    check_velocities,
    load,
    noise_of,
    picture,
    record,
    stock,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation.comparison import Candidate, suiting
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._blueprint import make_family, read_blueprint
from ngrpo_lora.models._embeddings import EmbeddingCache
from ngrpo_lora.models._loading import family_class
from ngrpo_lora.planning.plan import make_plan
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.sampling.sampler import Sampler
from ngrpo_lora.sampling.settings import drawing_settings, editing
from ngrpo_lora.training.export import save_adapter
from ngrpo_lora.training.setup import prepare

SIZE: dict[str, Any] = {"height_px": 64, "width_px": 96, "max_sequence_length": 64}
SETTINGS: dict[str, Any] = {"edits": True, **SIZE}
WORDS = [f"model.{key}={value}" for key, value in SETTINGS.items()]
STEPS = 3

base, distilled, dev = test_flux2_klein.base, test_flux2_klein.distilled, test_flux2_dev.dev


@pytest.fixture(scope="session")
def family(base: Path) -> BaseFamily:
    return load(base, **SETTINGS)


@pytest.fixture
def edits(tmp_path: Path) -> list[Prompt]:
    return [Prompt(text, {}, picture(tmp_path, seed)) for seed, text in enumerate(PROMPTS)]


@pytest.fixture
def prompts(tmp_path: Path, edits: list[Prompt]) -> Path:
    rows = [{"prompt": edit.text, "source": f"{seed}.png"} for seed, edit in enumerate(edits)]
    (file := tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return file


def run_stock(pipeline: Any, family: BaseFamily, prompt: Prompt, steps: int = STEPS, **call: Any) -> Recording:
    def unpack(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(1, *family.latent_shape)

    assert prompt.source is not None
    height, width = family.config.height_px, family.config.width_px
    call = {"guidance_scale": family.settings["guidance_scale"], "height": height, "width": width} | call
    return record(
        pipeline,
        unpack,
        image=prompt.source.fitted(width, height),
        prompt=prompt.text,
        latents=noise_of(family),
        num_inference_steps=steps,
        max_sequence_length=family.settings["max_sequence_length"],
        **call,
    )


# Drawing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "guidance"), [("base", 1.0), ("base", None), ("distilled", None), ("dev", None), ("dev", 2.5)]
)
def test_velocities_and_pictures_are_those_of_diffusers(
    kind: str, guidance: float | None, request: pytest.FixtureRequest, edits: list[Prompt]
):
    folder, tokens = request.getfixturevalue(kind), 256 if kind == "dev" else 64
    family = load(folder, **SETTINGS | {"max_sequence_length": tokens}, guidance_scale=guidance)
    assert family.guided == (kind == "base" and guidance is None)
    recording = run_stock(stock(folder, family.pipeline_class), family, edits[0])
    check_velocities(family, edits[0], recording)
    check_sampling(family, edits[0], recording)
    text, other = (family.encode([edits[0]._replace(source=one.source)]) for one in edits[:2])
    first, second = (family.velocity(noise_of(family), 0.5, one) for one in (text, other))
    assert (first - second).abs().max() > 1e-4  # the source does something


def test_a_source_of_more_than_a_megapixel_is_shrunk_as_by_diffusers(distilled: Path, edits: list[Prompt]):
    family = load(distilled, **SETTINGS | {"height_px": 912, "width_px": 1184})
    text = family.encode(edits[:1])
    assert text.tensors["source_tokens"].shape[1] == (896 // 16) * (1166 // 16)
    recording = run_stock(stock(distilled, "Flux2KleinPipeline"), family, edits[0], steps=1)
    check_velocities(family, edits[0], recording)


def test_without_the_setting_the_same_model_draws_from_text(base: Path, family: BaseFamily):
    drawing = load(base, **SIZE)
    assert (type(drawing).__name__, type(family).__name__) == ("Family", "KleinEdit")
    assert (drawing.edits, family.edits) == (False, True)
    assert type(load(base, **SIZE, edits=False)) is type(drawing)
    assert (drawing.architecture, drawing.kohya_version) == (family.architecture, family.kohya_version)


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(family: BaseFamily, edits: list[Prompt]):
    check_neighbours(family, edits)


def test_it_computes_nearly_the_same_in_half_precision(base: Path, edits: list[Prompt]):
    check_half_precision(base, edits[0], **SETTINGS)


def test_a_loaded_model_can_be_asked_for_another_size(base: Path, edits: list[Prompt]):
    other = {"height_px": 128, "width_px": 64, "max_sequence_length": 48, "guidance_scale": 2.0}
    check_another_size(base, SETTINGS, SETTINGS | other | {"negative_prompt": "red"}, edits[0])


def test_the_size_of_an_edit_follows_the_shape_of_the_source(family: BaseFamily):
    large = family.with_settings(ModelConfig(height_px=1024, width_px=1024))
    for size, expected in (
        ((512, 512), (1024, 1024)),
        ((3000, 2000), (832, 1248)),
        ((100, 900), (2496, 416)),  # cut to 6 : 1
    ):
        assert large.edited_size(Image.new("RGB", size)) == expected
        assert large.with_settings(ModelConfig(height_px=expected[0], width_px=expected[1])).draws
    tiny = family.with_settings(ModelConfig(height_px=64, width_px=64))
    assert tiny.edited_size(Image.new("RGB", (9000, 32))) == (64, 144)


# Encoding -----------------------------------------------------------------------------------------------------------


def test_each_prompt_is_encoded_once_with_each_source_and_the_negative_one_once(
    family: BaseFamily, edits: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    again: Any = family.with_settings(family.config)
    encoded, encode_alone = [], again.encode_alone
    monkeypatch.setattr(again, "encode_alone", lambda prompt: encoded.append(prompt) or encode_alone(prompt))
    wanted = [edits[0], edits[0]._replace(source=edits[1].source), edits[0], edits[1]]
    first, second = again.encode(wanted), again.encode(wanted)
    assert encoded == [edits[0].text, "", edits[0].text, edits[1].text]
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name])
        assert torch.equal(tensor[0], tensor[2])
    assert not torch.equal(first.tensors["source_tokens"][0], first.tensors["source_tokens"][1])
    unguided = family.with_settings(family.config.model_copy(update={"guidance_scale": 1.0}))
    assert sorted(unguided.encode(wanted).tensors) == ["prompt_embeds", "source_tokens"]


def test_conditionings_on_disk_are_those_of_the_whole_model(
    base: Path, family: BaseFamily, edits: list[Prompt], tmp_path: Path
):
    cache = EmbeddingCache(tmp_path / "embeddings", family.config)
    alone = load(base, "text", **SETTINGS)
    assert alone.pipeline.transformer is None
    cache.fill(alone, edits)
    expected, found = family.encode(edits), cache.encode(edits, torch.device("cpu"))
    assert {name: t.shape for name, t in found.tensors.items()} == {n: t.shape for n, t in expected.tensors.items()}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert len(load_file(cache.file(edits[0]))) == 3


def test_a_plan_counts_the_tokens_of_the_source(
    base: Path, family: BaseFamily, edits: list[Prompt], make_config: MakeConfig, tmp_path: Path
):
    blank = make_family(read_blueprint(family.config), family.config)
    assert type(blank).__mro__[1].__name__ == "KleinEdit"
    text, real = blank.encode(["anything"]), family.encode(edits[:1])
    assert {name: t.shape for name, t in text.tensors.items()} == {name: t.shape for name, t in real.tensors.items()}
    assert blank.velocity(torch.zeros(1, *blank.latent_shape, device="meta"), 0.5, text).shape[1:] == blank.latent_shape
    own = [f"model.path={base}", *(f"model.{key}={value}" for key, value in SIZE.items()), "evaluation.strict=null"]
    drawn, edited = (make_plan(make_config(tmp_path, *own, f"model.edits={word}")) for word in ("null", "true"))
    tokens = 64 + 24, 64 + 24 + 24
    assert edited.flops_per_forward / drawn.flops_per_forward == pytest.approx(tokens[1] / tokens[0], rel=0.1)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "encoders"), [("base", "keep"), ("base", "cache"), ("distilled", "keep"), ("dev", "cache")]
)
def test_a_run_trains_the_lora_alone_and_diffusers_edits_the_same_with_it(
    kind: str,
    encoders: str,
    request: pytest.FixtureRequest,
    make_config: MakeConfig,
    tmp_path: Path,
    prompts: Path,
    edits: list[Prompt],
):
    folder = request.getfixturevalue(kind)
    tokens = ["model.max_sequence_length=256"] if kind == "dev" else []
    settings = [*WORDS, *tokens, f"model.text_encoders={encoders}", "lora.targets=attention+feed_forward"]
    check_training(make_config, folder, tmp_path, *settings, prompts=prompts)
    file = tmp_path / "run" / "adapter" / FILE_NAME
    own = json.loads(read_metadata(file)["ngrpo"])
    sampler = Sampler(drawing_settings(file, None), file)
    assert (own["family"], own["edits"]) == ("flux2_klein", True)
    assert own["pipeline"] == sampler.family.pipeline_class
    pipeline = stock(folder, own["pipeline"])
    pipeline.load_lora_weights(file)
    recording = run_stock(pipeline, sampler.family, edits[0])
    check_velocities(sampler.family, edits[0], recording)
    check_sampling(sampler.family, edits[0], recording)


# Drawing by the commands --------------------------------------------------------------------------------------------


def test_sample_edits_with_a_source_and_draws_without(base: Path, tmp_path: Path, edits: list[Prompt], prompts: Path):
    """The same model, and no word more than the picture."""
    one = ("sample", "--model", base, "--steps", 2, "--output")
    source, drawn = tmp_path / "0.png", {}
    for name, words in (("edited", ["--source", source]), ("drawn", [])):
        (path,) = run(*one, tmp_path / name, "--prompt", "make it red", *words)
        with Image.open(path) as file:
            drawn[name] = np.asarray(file.convert("RGB"))
            own = json.loads(file.text["ngrpo"])  # pyright: ignore[reportAttributeAccessIssue]
        assert own["model"]["edits"] == (True if words else None)
    assert (drawn["edited"].shape, drawn["drawn"].shape) == ((640, 1616, 3), (1024, 1024, 3))  # as the preset trains
    (again,) = run(*one, tmp_path / "again", "--like", tmp_path / "edited" / "000-make-it-red-seed0.png")
    assert np.array_equal(np.asarray(Image.open(again).convert("RGB")), drawn["edited"])
    sides = ("--height", 64, "--width", 64)
    sized = run(*one, tmp_path / "sized", "--prompts", prompts, "--num-prompts", 2, *sides)
    assert [Image.open(path).size for path in sized] == [(64, 64)] * 2


def test_a_model_that_was_loaded_to_draw_edits_where_there_is_a_source(base: Path, edits: list[Prompt]):
    """To the bit as if it had been loaded to edit, and it draws from text as before."""
    rollout = RolloutConfig(num_steps=2)
    words = [Prompt(edit.text) for edit in edits]
    loaded, whole = (
        Sampler(AdapterInfo(ModelConfig(path=str(base), dtype="float32", device="cpu", edits=edits_, **SIZE), rollout))
        for edits_ in (None, True)
    )
    before = [picture.tobytes() for picture in loaded(words, [0, 1, 2])]
    view = loaded.editing(edits)
    assert (view.family.edits, view.family.transformer is loaded.family.transformer) == (True, True)
    drawn, expected = ([picture.tobytes() for picture in one(edits, [0, 1, 2])] for one in (view, whole))
    assert drawn == expected != before
    assert [picture.tobytes() for picture in loaded(words, [0, 1, 2])] == before
    assert loaded.editing(words) is loaded
    assert view.editing(edits) is view


def test_a_comparison_draws_from_the_sources_of_its_prompts(family: BaseFamily, tmp_path: Path, edits: list[Prompt]):
    check_comparison(family, edits, tmp_path / "drawn")


def test_a_comparison_edits_where_prompts_have_sources(family: BaseFamily, edits: list[Prompt]):
    """Also by an adapter that was trained to draw from text."""
    drawing = family.config.model_copy(update={"edits": None})
    one = Candidate("base", None, AdapterInfo(drawing, RolloutConfig()))
    assert [found.info.model for found in suiting(edits, [one, one])] == [family.config] * 2
    assert suiting([Prompt("a red star")], [one]) == [one]
    with pytest.raises(ConfigError, match="--prompts must have a source picture with every prompt"):
        suiting([*edits, Prompt("a red star")], [one])


# What cannot be done ------------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read."""
    monkeypatch.setattr(BaseFamily, "load", lambda *args: pytest.fail("a model is loaded"))


@pytest.mark.usefixtures("unread")
def test_prompts_that_do_not_go_with_the_setting_are_refused_before_a_model_is_loaded(
    base: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path
):
    common = [f"model.path={base}", "model.device=cpu", "evaluation.strict=null"]
    with_sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}"]
    drawing = r"prompts\.train must have no source pictures .* or FLUX\.2 with model\.edits=true"
    for edits in ("null", "false"):
        with pytest.raises(ConfigError, match=drawing):
            check_run(make_config(tmp_path / "run", *common, *with_sources, f"model.edits={edits}"))
    with pytest.raises(ConfigError, match=r"prompts\.train must have a source picture with every prompt"):
        check_run(make_config(tmp_path / "run", *common, "model.edits=true"))


@pytest.mark.usefixtures("unread")
def test_a_setting_that_the_model_cannot_follow_is_refused_before_it_is_loaded(make_config: MakeConfig, tmp_path: Path):
    drawing = "model.edits must be false or null for 'embedded', a FluxPipeline, got true; leave it out"
    with pytest.raises(UserError, match=re.escape(drawing)):
        prepare(make_config(tmp_path / "run", "model.edits=true"))
    assert drawing in refuse("train", "model.edits=true", f"output_dir={tmp_path / 'run'}")
    config = ModelConfig(path="embedded-edit", edits=False)
    with pytest.raises(UserError, match=r"must be true or null .* FluxKontextPipeline, got false; leave it out"):
        family_class(config)


def test_a_source_sets_a_model_to_edit_that_could_do_either(base: Path, edits: list[Prompt]):
    for path, said, prompts, expected in (
        (str(base), None, edits, True),
        (str(base), None, [Prompt("a red star")], None),
        (str(base), False, edits, False),
        ("embedded", None, edits, None),
        ("embedded-edit", None, edits, None),
    ):
        info = AdapterInfo(ModelConfig(path=path, edits=said), RolloutConfig())
        assert editing(info, prompts).model.edits is expected


def test_sizes_that_diffusers_takes_no_source_of_are_refused(base: Path, family: BaseFamily):
    for height, width in ((48, 96), (64, 528)):
        with pytest.raises(UserError, match=f"at least 64 and at most 8 : 1 .*, got {height} and {width}; diffusers"):
            family.with_settings(ModelConfig(height_px=height, width_px=width))
        assert load(base, **SIZE | {"height_px": height, "width_px": width}).latent_shape


def test_a_prompt_without_a_picture_is_refused(family: BaseFamily):
    with pytest.raises(ConfigError, match="must have a source picture, but 'a red star' has none"):
        family.encode(["a red star"])


def test_sample_says_that_an_adapter_which_edits_needs_a_source(
    base: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path
):
    own = [f"model.path={base}", *WORDS, f"prompts.train={prompts}", f"prompts.held_out={prompts}"]
    made = prepare(make_config(tmp_path / "run", *own, "model.device=cpu", "evaluation.strict=null"))
    save_adapter(tmp_path / "adapter.safetensors", made.family, made.config)
    one = ("sample", "--adapter", tmp_path / "adapter.safetensors", "--prompt", "a", "--output", tmp_path / "drawn")
    assert "--prompt must have a source picture with every prompt" in refuse(*one)
    (path,) = run(*one, "--source", tmp_path / "0.png", "--steps", 2)
    assert Image.open(path).size == (112, 64)
