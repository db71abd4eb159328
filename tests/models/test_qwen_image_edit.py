"""Qwen-Image-Edit and its successors against diffusers' own pipelines, on a model of two blocks.

Its VAE makes pictures smaller by 16, so that a source of a million pixels, as diffusers scales it, has 1024 tokens.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import qwen_parts
import torch
from commands import refuse, run
from conftest import MakeConfig
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from diffusers.utils import dynamic_modules_utils
from family_checks import (
    PROMPTS,
    check_comparison,
    check_half_precision,
    check_neighbours,
    check_sampling,
    check_training,
    check_velocities,
    load,
    model_folder,
    noise_of,
    picture,
    qwen_tokenizer,
    record,
    stock,
)
from PIL import Image
from qwen_parts import SCHEDULE
from safetensors import safe_open
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.bench.bare import measure_bare
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models import qwen_image
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._blueprint import make_family, read_blueprint
from ngrpo_lora.models._embeddings import EmbeddingCache
from ngrpo_lora.models._qwen_vl import PictureProcessor
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.sampling.sampler import draw

SIZE: dict[str, Any] = {"height_px": 64, "width_px": 96}
STEPS = 3
PIPELINES = {"QwenImageEditPipeline": False, "QwenImageEditPlusPipeline": True}
"""By pipeline, whether the transformer sees sources as if they had no noise, as that of 2511 does."""


def tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with the tokens between which pictures stand."""
    made = qwen_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in SPECIAL]})
    return made


SPECIAL = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]


def processor(folder: Path) -> Qwen2VLProcessor:
    """transformers' own, which asks for a part for videos, and thereby for torchvision, in one check alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2VLProcessor, "check_argument_for_proper_class", lambda self, name, argument: None)
        images = Qwen2VLImageProcessorPil.from_pretrained(folder, subfolder="processor")
        return Qwen2VLProcessor(images, Qwen2Tokenizer.from_pretrained(folder, subfolder="tokenizer"))


@pytest.fixture(scope="session", params=PIPELINES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    numbers = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL[2:4]}
    numbers |= {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    path = tmp_path_factory.mktemp(request.param)
    pipeline = getattr(diffusers, request.param)(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        vae=qwen_parts.vae(False, True, True, False, base_dim=4),
        text_encoder=qwen_parts.text_encoder(len(words), **numbers),
        tokenizer=words,
        processor=None,
        transformer=qwen_parts.transformer(zero_cond_t=PIPELINES[request.param]),
    )
    model_folder(pipeline, path)
    # A picture of few patches takes little time.
    for part in (words, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=168 * 168)):
        part.save_pretrained(path / "processor")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"processor": ["transformers", "Qwen2VLProcessor"]}))
    return path


@pytest.fixture
def edits(tmp_path: Path) -> list[Prompt]:
    return [Prompt(text, {}, picture(tmp_path, seed)) for seed, text in enumerate(PROMPTS)]


def of_diffusers(folder: Path, family: BaseFamily) -> Any:
    """The stock pipeline of a folder, with a processor that needs no torchvision."""
    return stock(folder, family.pipeline_class, dtype=torch.float32, processor=processor(folder))


@pytest.mark.parametrize(("guidance_scale", "negative_prompt"), [(None, "a blur"), (1.0, "")])
def test_velocities_and_pictures_are_those_of_diffusers(
    guidance_scale: float | None, negative_prompt: str, folder: Path, edits: list[Prompt]
):
    family: Any = load(folder, **SIZE, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    pipeline, noise = of_diffusers(folder, family), noise_of(family)
    assert edits[0].source is not None
    assert family.source_size == (1248, 832)
    recording = record(
        pipeline,
        lambda packed: pipeline._unpack_latents(packed, 64, 96, pipeline.vae_scale_factor)[:, :, 0],
        image=edits[0].source.fitted(1248, 832),
        prompt=edits[0].text,
        negative_prompt=None if guidance_scale else negative_prompt,
        true_cfg_scale=guidance_scale or 4.0,
        latents=pipeline._pack_latents(noise, *noise.shape),
        num_inference_steps=STEPS,
        height=64,
        width=96,
    )
    check_velocities(family, edits[0], recording)
    check_sampling(family, edits[0], recording)
    text, other = (family.encode([edits[0]._replace(source=one.source)]) for one in edits[:2])
    for name in text.tensors:  # the picture is seen beside both prompts
        assert torch.equal(text.tensors[name], other.tensors[name]) == name.endswith("lengths")


# All that follows has smaller sources, which take less time. ----------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_image.Edit, "source_area", 128 * 128)


@pytest.fixture
def family(folder: Path, small: None) -> Any:
    return load(folder, **SIZE, negative_prompt="a blur")


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(family: BaseFamily, edits: list[Prompt]):
    check_neighbours(family, edits)


@pytest.mark.usefixtures("small")
def test_half_precision_is_inside_the_model_only(folder: Path, edits: list[Prompt]):
    check_half_precision(folder, edits[0], **SIZE)


def test_a_text_is_cut_to_its_tokens_and_the_picture_is_not(family: Any, edits: list[Prompt]):
    short = family.with_settings(family.config.model_copy(update={"max_sequence_length": 250}))
    whole, cut = family.encode(edits).tensors, short.encode(edits).tensors
    for names in (("prompt_embeds", "lengths"), ("negative_prompt_embeds", "negative_lengths")):
        states, lengths = names
        assert int(whole[lengths].min()) > family.picture_tokens + 250
        assert set(cut[lengths].tolist()) == {family.picture_tokens + 250}
        assert torch.equal(cut[states], whole[states][:, : family.picture_tokens + 250])


def test_both_prompts_are_encoded_once_with_each_source(
    family: Any, edits: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    encoded, encode_beside = [], family.encode_beside
    monkeypatch.setattr(
        family, "encode_beside", lambda seen, prompt: encoded.append(prompt) or encode_beside(seen, prompt)
    )
    wanted = [edits[0], edits[0]._replace(source=edits[1].source), edits[0], edits[1]]
    first, second = family.encode(wanted), family.encode(wanted)
    assert encoded == [edits[0].text, "a blur", edits[0].text, "a blur", edits[1].text, "a blur"]
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name])
        assert torch.equal(tensor[0], tensor[2])
    for name in ("prompt_embeds", "negative_prompt_embeds", "source_tokens"):
        assert not torch.equal(first.tensors[name][0], first.tensors[name][1])
    unguided = family.with_settings(family.config.model_copy(update={"guidance_scale": 1.0}))
    assert sorted(unguided.encode(wanted).tensors) == ["lengths", "prompt_embeds", "source_tokens"]


def test_conditionings_on_disk_are_those_of_the_whole_model(
    folder: Path, family: BaseFamily, edits: list[Prompt], tmp_path: Path
):
    cache = EmbeddingCache(tmp_path / "embeddings", family.config)
    cache.fill(load(folder, "text", **SIZE, negative_prompt="a blur"), edits)
    expected, found = family.encode(edits), cache.encode(edits, torch.device("cpu"))
    assert {name: t.shape for name, t in found.tensors.items()} == {n: t.shape for n, t in expected.tensors.items()}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    for other in ({"width_px": 64}, {"guidance_scale": 1.0}, {"negative_prompt": ""}):
        another = EmbeddingCache(tmp_path / "embeddings", family.config.model_copy(update=other))
        assert another.missing(edits) == edits


# Sizes --------------------------------------------------------------------------------------------------------------


def test_the_size_of_an_edit_is_that_of_diffusers(folder: Path):
    family = load(folder, **SIZE)
    large, half = (family.with_settings(ModelConfig(height_px=side, width_px=side)) for side in (1024, 512))
    for size, expected in (((512, 512), (1024, 1024)), ((3000, 2000), (832, 1248)), ((40, 100), (1632, 640))):
        assert large.edited_size(Image.new("RGB", size)) == expected
        assert expected == calculate_dimensions(2**20, size[0] / size[1])[1::-1]
    assert half.edited_size(Image.new("RGB", (3000, 2000))) == (416, 640)
    for size, expected in (((4000, 32), (256, 4096)), ((32, 90000), (4096, 256))):  # cut to 16 : 1
        assert large.edited_size(Image.new("RGB", size)) == expected
    assert family.edited_size(Image.new("RGB", (4000, 32))) == (32, 320)
    for side in range(16, 1025, 16):  # whatever is configured, a strip is drawn
        sized = family.with_settings(ModelConfig(height_px=side, width_px=side))
        height, width = sized.edited_size(Image.new("RGB", (9000, 32)))
        assert sized.with_settings(ModelConfig(height_px=height, width_px=width)).draws


def test_diffusers_keeps_a_source_as_it_is_given(folder: Path):
    family = load(folder, **SIZE)
    for width in range(64, 1025, 48):
        for height in range(max(64, width // 16 // 16 * 16 + 16), 1025, 48):
            sized = family.with_settings(ModelConfig(height_px=height, width_px=width))
            source = sized.source_size
            assert calculate_dimensions(2**20, source[0] / source[1]) == source
            assert 0.9 < source[0] * source[1] / 2**20 < 1.1
            assert max(sized.seen_size) < 200 * min(sized.seen_size)  # or Qwen2.5-VL would not take it


def test_a_strip_is_refused(family: BaseFamily):
    for height, width in ((32, 1056), (1056, 32)):
        with pytest.raises(UserError, match=r"must be at most 32 : 1 for this model, got \d+ and \d+; make"):
            family.with_settings(ModelConfig(height_px=height, width_px=width))
    assert family.with_settings(ModelConfig(height_px=32, width_px=1024)).latent_shape == (4, 2, 64)


# Reading ------------------------------------------------------------------------------------------------------------


def test_texts_with_pictures_are_read_as_transformers_does(folder: Path):
    """The same tokens and patches, to the bit, in the templates of both pipelines."""
    theirs: Any = processor(folder)
    ours = PictureProcessor(theirs.tokenizer, theirs.image_processor)
    for size in ((100, 40), (28, 28), (57, 333), (640, 480)):
        image = Image.effect_noise(size, 50).convert("RGB")
        for template in ("{}<|vision_start|><|image_pad|><|vision_end|>{}", "{}Picture 1: <|image_pad|>{}"):
            text = [template.format("<|im_start|>system\nDescribe.", "Make it {red}, 让它变红<|im_end|>")]
            expected = theirs(text=text, images=[image], padding=True, return_tensors="pt")
            found = ours(text=text, images=[image], padding=True, return_tensors="pt")
            assert {**found}.keys() == {**expected}.keys() - {"mm_token_type_ids"}
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name])
            tokens = (found["input_ids"] == theirs.image_token_id).sum()
            assert tokens == ours.picture_tokens(*size) > 0


def test_a_prompt_with_the_token_of_a_picture_is_refused(family: BaseFamily, edits: list[Prompt]):
    rule = r"must not hold <\|image_pad\|>, which stands for its source; take it out of 'a <\|image_pad\|>'"
    with pytest.raises(ConfigError, match=rule):
        family.encode([edits[0]._replace(text="a <|image_pad|>")])
    negative = family.with_settings(family.config.model_copy(update={"negative_prompt": "a <|image_pad|>"}))
    with pytest.raises(ConfigError, match=rule):
        negative.encode(edits[:1])


def test_a_prompt_without_a_picture_is_refused(family: BaseFamily):
    with pytest.raises(ConfigError, match="must have a source picture, but 'a red star' has none"):
        family.encode(["a red star"])


def test_a_model_without_the_settings_of_its_processor_is_refused(folder: Path, tmp_path: Path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    for change in (lambda path: path.write_text("{"), Path.unlink):
        change(broken / "processor" / "preprocessor_config.json")
        with pytest.raises(UserError, match=r"must have the settings of its image processor in processor/"):
            load(broken, **SIZE)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path, edits: list[Prompt]) -> Path:
    rows = [{"prompt": edit.text, "source": f"{seed}.png"} for seed, edit in enumerate(edits)]
    (file := tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("encoders", ["keep", "cache"])
def test_a_run_trains_the_lora_alone_and_diffusers_loads_it(
    encoders: str, folder: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path
):
    settings = [f"model.{key}={value}" for key, value in SIZE.items()] + [f"model.text_encoders={encoders}"]
    targets = "lora.targets=attention+feed_forward"
    run = check_training(
        make_config, folder, tmp_path, *settings, targets, prompts=prompts, processor=processor(folder)
    )
    with safe_open(tmp_path / "run" / "adapter" / FILE_NAME, "pt") as file:
        header = file.metadata()
    own = json.loads(header["ngrpo"])
    assert (own["family"], own["edits"], own["pipeline"]) == ("qwen_image", True, run.family.pipeline_class)
    assert header["modelspec.architecture"] == f"{run.family.architecture}/lora"


@pytest.mark.usefixtures("small")
def test_an_iteration_is_timed_beside_its_bare_calls(
    folder: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    encoded, encode_edit = [], qwen_image.Edit.encode_edit
    monkeypatch.setattr(
        qwen_image.Edit, "encode_edit", lambda self, *of: encoded.append(of[0]) or encode_edit(self, *of)
    )
    settings = [f"model.{key}={value}" for key, value in SIZE.items()] + [f"model.path={folder}", "model.device=cpu"]
    sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null"]
    found = measure_bare(make_config(tmp_path / "run", *settings, *sources, "rollout.group_size=2"), 1)
    assert found.iteration.keys() == found.calls.keys()
    assert len(encoded) == 2 * len(PROMPTS)  # once for the trainer, once as a bare call


def test_pictures_are_checked_before_a_model_is_loaded(
    folder: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(BaseFamily, "load", lambda *args: pytest.fail("a model is loaded"))
    sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null", "model.device=cpu"]
    made = [tmp_path / "run", *sources, f"model.path={folder}"]
    with pytest.raises(ConfigError, match=r"prompts\.train must have a source picture with every prompt"):
        check_run(make_config(*made, "prompts.train=world:train"))
    for content, why in ((b"", "is empty"), (b"no picture", "is no picture"), (None, "is no file")):
        (tmp_path / "1.png").unlink() if content is None else (tmp_path / "1.png").write_bytes(content)
        message = rf"prompts\.train must have readable source pictures, but '1\.png'.*{why}"
        with pytest.raises(ConfigError, match=message):
            check_run(make_config(*made))


def test_a_plan_counts_the_tokens_of_the_source(folder: Path):
    config = ModelConfig(path=str(folder), device="cpu", **SIZE)
    blank: Any = make_family(read_blueprint(config), config)
    text = blank.encode(["anything"])
    assert text.tensors["source_tokens"].shape == (1, 26 * 39, blank.transformer.config.in_channels)
    seen = {"QwenImageEditPipeline": 30 * 45, "QwenImageEditPlusPipeline": 11 * 17}[blank.pipeline_class]
    assert blank.picture_tokens == seen
    for name in ("", "negative_"):
        assert text.tensors[f"{name}prompt_embeds"].shape[1] == text.tensors[f"{name}lengths"].item() == seen + 512
    assert blank.velocity(torch.zeros(1, *blank.latent_shape, device="meta"), 0.5, text).shape[1:] == blank.latent_shape


# Drawing ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_a_picture_says_what_it_was_edited_from_and_like_edits_it_again(folder: Path, tmp_path: Path, prompts: Path):
    source, two = tmp_path / "0.png", ("sample", "--model", folder, "--steps", 2, "--output")
    (first,) = run(*two, tmp_path / "first", "--prompt", "make it red", "--source", source)
    with Image.open(first) as file:
        assert file.size == (1632, 640)  # of the area of the preset's 1024 x 1024, in the shape of 100 x 40
        assert json.loads(file.text["ngrpo"])["source"]["name"] == str(source)  # pyright: ignore[reportAttributeAccessIssue]
        drawn = np.asarray(file.convert("RGB"))
    for words, alike in (([], True), (["--source", tmp_path / "1.png"], False)):
        (again,) = run(*two, tmp_path / "again", "--like", first, *words)
        assert np.array_equal(np.asarray(Image.open(again).convert("RGB")), drawn) == alike
    sides = ("--height", 64, "--width", 32)
    sized = run(*two, tmp_path / "sized", "--prompts", prompts, "--num-prompts", 2, *sides)
    assert [Image.open(path).size for path in sized] == [(32, 64)] * 2


def test_a_command_that_draws_checks_pictures_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BaseFamily, "load", lambda *args: pytest.fail("a model is loaded"))
    one = ("sample", "--prompt", "make it red", "--model", folder)
    assert "--prompt must have a source picture with every prompt" in refuse(*one)
    assert "--source must be a readable picture, but 'gone.png' is no file" in refuse(*one, "--source", "gone.png")


def test_a_comparison_draws_from_the_sources_of_its_prompts(family: BaseFamily, tmp_path: Path, edits: list[Prompt]):
    check_comparison(family, edits, tmp_path / "drawn")


def test_the_pipeline_draws_the_trainers_edits(
    folder: Path, edits: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Modules that another test has left in its own folder would be found first.
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not Path(place, "diffusers_modules").is_dir()])
    for module in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, module)
    family: Any = load(folder, **SIZE, max_sequence_length=250, negative_prompt="a blur")
    name = {"QwenImageEditPipeline": "qwen_image_edit", "QwenImageEditPlusPipeline": "qwen_image_edit_plus"}
    file = str(Path(__file__).parents[2] / "pipelines" / f"{name[family.pipeline_class]}.py")
    pipeline: Any = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=file, trust_remote_code=True, dtype=torch.float32, processor=processor(folder)
    )
    pipeline.set_progress_bar_config(disable=True)
    encoded = []
    pipeline.text_encoder.register_forward_pre_hook(lambda *args: encoded.append(1))
    assert edits[0].source is not None
    source = edits[0].source.load()
    settings = {"negative_prompt": "a blur", "num_inference_steps": 2, "height": 64, "width": 96}
    settings |= {"max_sequence_length": 250}
    drawn = pipeline(prompt=edits[0].text, image=source, seeds=[7, 8], **settings).images
    assert len(encoded) == 2  # both prompts once
    expected = draw(family, family.encode([edits[0]] * 2), [7, 8], "dpmpp_2m", family.sigmas(2))
    for one, other in zip(drawn, expected, strict=True):  # diffusers adds up the norms of tokens in another order
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1
    for size in ((512, 512), (3000, 2000), (100, 900), (4000, 32)):
        image = Image.new("RGB", size)
        for area in (1024 * 1024, 512 * 512):
            side = round(area**0.5)
            sized = family.with_settings(ModelConfig(height_px=side, width_px=side))
            assert pipeline.edited_size(image, area) == sized.edited_size(image)
    for width, height in ((1024, 1024), (96, 64), (1248, 832), (512, 32), (272, 720)):
        sized = family.with_settings(ModelConfig(height_px=height, width_px=width))
        assert pipeline.source_size(width, height) == sized.source_size
