"""HunyuanVideo 1.5 from a first frame against diffusers' own pipeline, on a tiny model like that of 480p."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refuse
from conftest import MakeConfig
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    HunyuanVideo15Transformer3DModel,
)
from family_checks import (
    PROMPTS,
    GivenSigmas,
    Recording,
    check_another_size,
    check_comparison,
    check_conditionings_on_disk,
    check_encoding_once,
    check_half_precision,
    check_neighbours,
    check_sampling,
    check_training,
    check_velocities,
    load,
    noise_of,
    picture,
    picture_prompts,
    record,
    stock,
)
from hunyuan_parts import SMALL, make_first_frame_folder
from PIL import Image
from rounding import relative_error
from safetensors import safe_open
from video_checks import check_sampled_videos

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._blueprint import make_family, read_blueprint
from ngrpo_lora.models._index import family_of
from ngrpo_lora.planning.plan import make_plan
from ngrpo_lora.planning.sketch import Sketch
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.sampling.sampler import Sampler
from ngrpo_lora.sampling.settings import drawing_settings
from ngrpo_lora.training.run import Run

PIPELINE = "HunyuanVideo15ImageToVideoPipeline"
TEXTS = [PROMPTS[0], 'a sign "red" and “a star”', PROMPTS[2]]
NEGATIVE = 'a "blurred" star'
OF_TEXT = ["glyph_lengths", "glyph_prompt_embeds", "lengths", "prompt_embeds"]
OF_SOURCE = ["condition", "image_embeds"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_first_frame_folder(tmp_path_factory.mktemp("hunyuan_first_frame"))


@pytest.fixture(scope="session")
def family(folder: Path) -> BaseFamily:
    return load(folder, **SMALL, negative_prompt=NEGATIVE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures and prompts lie."""
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def edits(place: Path) -> list[Prompt]:
    return [Prompt(text, {}, picture(place, seed)) for seed, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def prompts(place: Path, edits: list[Prompt]) -> Path:
    return picture_prompts(place, edits)


def stock_with(folder: Path, guidance: float) -> Any:
    pipeline = stock(folder, PIPELINE)
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance)
    pipeline.tokenizer_max_length = SMALL["max_sequence_length"]
    return pipeline


def run_stock(pipeline: Any, family: BaseFamily, prompt: Prompt, steps: int = 3) -> Recording:
    """A picture of the size of the video, which the pipeline finds by its own rule, at the family's noise levels."""
    assert prompt.source is not None
    pipeline.scheduler = GivenSigmas(family.sigmas(steps))
    return record(
        pipeline,
        image=prompt.source.fitted(family.config.width_px, family.config.height_px),
        prompt=prompt.text,
        negative_prompt=family.config.negative_prompt,
        latents=noise_of(family),
        num_inference_steps=steps,
        num_frames=family.num_frames,
    )


# Drawing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [5, 13])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("row", [1, 2])  # with text that is to be seen, and without
def test_velocities_and_frames_are_those_of_diffusers(
    row: int, guidance: float, frames: int, folder: Path, edits: list[Prompt]
):
    settings = dict(SMALL, num_frames=frames, guidance_scale=guidance, negative_prompt=NEGATIVE)
    family = load(folder, **settings)
    recording = run_stock(stock_with(folder, guidance), family, edits[row])
    assert len(recording.images) == frames
    assert family.guided == (guidance > 1)
    check_velocities(family, edits[row], recording)
    check_sampling(family, edits[row], recording)


def test_the_source_is_seen_by_the_vae_and_by_siglip(family: BaseFamily, edits: list[Prompt]):
    text, other = (family.encode([edits[0]._replace(source=one.source)]) for one in edits[:2])
    assert sorted(text.tensors) == sorted([*OF_SOURCE, *OF_TEXT, *(f"negative_{name}" for name in OF_TEXT)])
    for name in OF_SOURCE:
        assert not torch.equal(text.tensors[name], other.tensors[name])
        mixed = type(text)(text.tensors | {name: other.tensors[name]})
        with torch.no_grad():
            first, second = (family.velocity(noise_of(family), 0.5, one) for one in (text, mixed))
        assert (first - second).abs().max() > 1e-5
    for name in (*OF_TEXT, *(f"negative_{name}" for name in OF_TEXT)):
        assert torch.equal(text.tensors[name], other.tensors[name])


def test_the_condition_and_the_states_are_those_of_the_pipeline(folder: Path, family: BaseFamily, edits: list[Prompt]):
    source = edits[0].source
    assert source is not None
    pipeline, fitted, noise = stock_with(folder, 1.0), source.fitted(64, 32), noise_of(family)
    with torch.no_grad():
        frames, mask = pipeline.prepare_cond_latents_and_mask(
            noise, fitted, batch_size=1, height=32, width=64, dtype=noise.dtype, device=noise.device
        )
        states = pipeline.encode_image(fitted, 1, noise.device, noise.dtype)
    found = family.encode(edits[:1]).tensors
    assert torch.equal(found["condition"], torch.cat([frames, mask], 1))
    assert found["condition"].shape == (1, 4 + 1, 2, 2, 4)
    assert (found["condition"][:, 4, 0] == 1).all()
    assert found["condition"][:, :4, 0].any()
    assert not found["condition"][:, :, 1:].any()
    assert torch.equal(found["image_embeds"], states)
    assert states.shape == (1, 729, 8)


def test_videos_do_not_depend_on_what_is_drawn_beside_them(family: BaseFamily, edits: list[Prompt]):
    check_neighbours(family, edits)


def test_in_half_precision_it_computes_nearly_the_same(folder: Path, edits: list[Prompt]):
    check_half_precision(folder, edits[1], **SMALL)
    half = load(folder, **SMALL, dtype="bfloat16")
    text = half.encode(edits[:1]).tensors
    assert {one.dtype for name, one in text.items() if not name.endswith("lengths")} == {torch.bfloat16}


def test_the_family_and_what_is_recommended_are_the_models_own(folder: Path, tmp_path: Path):
    assert family_of(ModelConfig(path=str(folder))) == "hunyuan_video15"
    family = load(folder, height_px=32, width_px=64)
    assert type(family).__name__ == "ImageToVideo"
    assert family.settings == {"guidance_scale": 6.0, "max_sequence_length": 1000, "num_frames": 121}
    assert (family.latent_shape, family.architecture) == ((4, 31, 2, 4), "hunyuan-video-1.5-i2v")
    distilled = load(make_first_frame_folder(tmp_path / "distilled", guidance_scale=1.0), **SMALL)
    assert not distilled.guided
    source = picture(tmp_path, 0)
    assert sorted(distilled.encode([Prompt("a red star", {}, source)]).tensors) == sorted([*OF_SOURCE, *OF_TEXT])


def test_size_and_noise_levels_are_by_the_pipelines_own_rules(folder: Path, family: BaseFamily, edits: list[Prompt]):
    large = family.with_settings(ModelConfig(height_px=640, width_px=640, num_frames=5))
    for size, expected in (
        ((848, 480), (480, 848)),
        ((1000, 1000), (640, 640)),
        ((480, 848), (832, 480)),  # 1.76667, as it is rounded there, is more than 848 / 480
        ((3000, 2000), (512, 768)),
        ((4000, 32), (320, 1280)),  # cut to 4 : 1
        ((32, 90000), (1280, 320)),
    ):
        assert large.edited_size(Image.new("RGB", size)) == expected
        assert large.with_settings(ModelConfig(height_px=expected[0], width_px=expected[1], num_frames=5)).draws
    square = family.with_settings(ModelConfig(height_px=48, width_px=48, num_frames=5))
    assert edits[0].source is not None
    pipeline, shown = stock_with(folder, 1.0), edits[0].source.load()
    drawn = pipeline(image=shown, prompt="a", num_frames=5, num_inference_steps=3, output_type="pil")
    assert drawn.frames[0][0].size[::-1] == square.edited_size(shown) == (32, 64)
    torch.testing.assert_close(square.sigmas(3), pipeline.scheduler.sigmas, rtol=1e-6, atol=1e-7)


# Encoding -----------------------------------------------------------------------------------------------------------


def test_each_prompt_is_encoded_once_with_each_source_and_the_negative_one_once(
    family: BaseFamily, edits: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    check_encoding_once(family, edits, NEGATIVE, monkeypatch)


def test_conditionings_on_disk_are_those_of_the_whole_model(
    folder: Path, family: BaseFamily, edits: list[Prompt], tmp_path: Path
):
    alone = load(folder, "text", **SMALL, negative_prompt=NEGATIVE)
    assert alone.pipeline.transformer is None
    others = ({"width_px": 32}, {"guidance_scale": 1.0}, {"negative_prompt": ""}, {"num_frames": 9})
    check_conditionings_on_disk(family, alone, edits, tmp_path / "embeddings", others)
    assert alone.pipeline.image_encoder is None  # when all are encoded


def test_a_loaded_model_can_be_asked_for_another_size_and_length(folder: Path, edits: list[Prompt]):
    other = {"height_px": 64, "width_px": 32, "num_frames": 9, "guidance_scale": 1.0}
    check_another_size(folder, SMALL, other, edits[1])


def test_a_plan_counts_the_condition_and_what_siglip_sees(folder: Path, edits: list[Prompt]):
    config = ModelConfig(path=str(folder), device="cpu", dtype="float32", **SMALL)
    blueprint = read_blueprint(config)
    blank, family = make_family(blueprint, config), load(folder, **SMALL)
    assert type(blank).__mro__[1].__name__ == "ImageToVideo"
    text, real = blank.encode(["anything"]).tensors, family.encode(edits[:1]).tensors
    assert text.keys() == real.keys()
    for name in OF_SOURCE:
        assert text[name].shape == real[name].shape
    assert text["negative_lengths"].tolist() == text["lengths"].tolist() == [SMALL["max_sequence_length"]]


def test_a_plan_counts_siglip_and_the_passes_of_all_tokens(
    folder: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path
):
    settings = [f"model.{key}={value}" for key, value in SMALL.items()]
    config = make_config(tmp_path / "run", *sources(prompts), f"model.path={folder}", *settings, "model.dtype=bfloat16")
    counts = (plan := make_plan(config)).parameters
    parts = ("text_encoder", "text_encoder_2", "image_encoder")
    siglip = load(folder, **SMALL).pipeline.image_encoder
    assert counts["image_encoder"] == sum(weight.numel() for weight in siglip.parameters())
    assert plan.gpu["encode"]["text encoders"] == 2 * sum(counts[name] for name in parts)
    seen, unseen = (Sketch(read_blueprint(config.model), config.model, config.lora) for _ in range(2))
    unseen.family.pipeline.vision_num_semantic_tokens = 0
    with_states, without = seen.velocity(1), unseen.velocity(1)
    assert with_states.peak > 2 * without.peak  # of 1057 tokens and of 328
    assert with_states.flops > without.flops


# Runs ---------------------------------------------------------------------------------------------------------------


def sources(prompts: Path) -> list[str]:
    return [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null", "model.device=cpu"]


@pytest.fixture(scope="module", params=["keep", "cache"])
def trained(
    request: pytest.FixtureRequest,
    make_config: MakeConfig,
    folder: Path,
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    settings = [f"model.{key}={value}" for key, value in SMALL.items()] + [f"model.text_encoders={request.param}"]
    settings += ["rewards={train: jpeg, frames: 2}", "lora.targets=attention+feed_forward"]
    place = tmp_path_factory.mktemp(request.param)
    return check_training(make_config, folder, place, *settings, prompts=prompts)


def test_a_run_trains_the_lora_alone_and_diffusers_draws_the_same_with_it(
    trained: Run, folder: Path, edits: list[Prompt]
):
    file = trained.output_dir / "adapter" / FILE_NAME
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    own = json.loads(header["ngrpo"])
    assert (own["family"], own["edits"], own["pipeline"]) == ("hunyuan_video15", True, PIPELINE)
    assert header["modelspec.architecture"] == "hunyuan-video-1.5-i2v/lora"
    sampler, pipeline = Sampler(drawing_settings(file, None), file), stock_with(folder, 6.0)
    pipeline.transformer.load_lora_adapter(file.parent, weight_name=FILE_NAME)
    recording = run_stock(pipeline, sampler.family, edits[1], trained.config.rollout.num_steps)
    check_velocities(sampler.family, edits[1], recording)
    check_sampling(sampler.family, edits[1], recording)
    base = load(folder, **SMALL)
    first, sigma = recording.latents[0], recording.sigmas[0].item()
    with torch.no_grad():
        assert relative_error(base.velocity(first, sigma, base.encode(edits[1:2])), recording.velocities[0]) > 1e-4


def test_lora_adapts_the_same_layers_as_from_text(trained: Run):
    adapted = {name.partition(".lora_A")[0] for name in lora.parameters(trained.family.transformer)}
    assert not any("image_embedder" in name or "refiner" in name for name in adapted)
    assert "transformer_blocks.0.attn.add_k_proj" in adapted


# Drawing by the commands --------------------------------------------------------------------------------------------


def test_a_video_says_what_it_starts_from_and_like_draws_it_again(
    trained: Run, tmp_path: Path, place: Path, prompts: Path
):
    check_sampled_videos(trained.output_dir / "adapter" / FILE_NAME, place, prompts, tmp_path, (64, 32))


def test_a_comparison_draws_from_the_sources_of_its_prompts(family: BaseFamily, tmp_path: Path, edits: list[Prompt]):
    check_comparison(family, edits, tmp_path / "drawn")


# What cannot be drawn -----------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read."""
    for kind in (AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights are read"))


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    """A copy of a model with other values in one of its JSON files."""
    path = shutil.copytree(folder, to) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_frames": 6}, r"num_frames must be 4 k \+ 1 .* for HunyuanVideo 1.5, got 6; the nearest are 5 and 9"),
    ({"num_frames": 1}, r"num_frames must be 5 or more for .*, whose first frame is the source picture, got 1; give"),
]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("settings", "rule"), REFUSED)
def test_settings_that_do_not_go_with_a_first_frame_are_refused_unread(
    settings: dict[str, Any], rule: str, folder: Path
):
    with pytest.raises(UserError, match=rule):
        load(folder, **SMALL | settings)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        *REFUSED,
        ({"height_px": 40}, r"height_px must be a multiple of 16 for this model, got 40"),
        ({"width_px": 72}, r"width_px must be a multiple of 16 for this model, got 72"),
    ],
)
def test_a_loaded_model_refuses_them_too(settings: dict[str, Any], rule: str, family: BaseFamily):
    with pytest.raises(UserError, match=rule):
        family.with_settings(family.config.model_copy(update=settings))


@pytest.mark.usefixtures("unread")
def test_a_model_of_two_times_is_refused_unread_and_by_a_plan(folder: Path, tmp_path: Path):
    other = changed(folder, tmp_path / "other", "transformer/config.json", use_meanflow=True)
    rule = "must be a model that is given the time of a step alone, but use_meanflow of its transformer is true"
    for parts in ("all", "text", "image"):
        with pytest.raises(UserError, match=rule):
            load(other, parts, **SMALL)
    config = ModelConfig(path=str(other), dtype="float32", **SMALL)
    with pytest.raises(UserError, match=rule):
        make_family(read_blueprint(config), config)


@pytest.mark.usefixtures("unread")
def test_a_model_without_siglip_is_refused_unread(folder: Path, tmp_path: Path):
    other = changed(folder, tmp_path / "other", "model_index.json", image_encoder=[None, None])
    with pytest.raises(UserError, match="must have SigLIP, whose states .* but it has no image_encoder; copy"):
        load(other, **SMALL)


def test_a_prompt_without_a_picture_is_refused(family: BaseFamily, folder: Path):
    with pytest.raises(ConfigError, match="must have a source picture, but 'a red star' has none"):
        family.encode(["a red star"])
    one = ("sample", "--prompt", "a red star", "--model", folder)
    assert "--prompt must have a source picture with every prompt" in refuse(*one)
