"""Wan image-to-video against diffusers' own pipeline, on tiny models like Wan 2.1 I2V and Wan 2.2 I2V A14B."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refuse, run
from conftest import MakeConfig
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from family_checks import (
    PROMPTS,
    GivenSigmas,
    Recording,
    check_comparison,
    check_conditionings_on_disk,
    check_encoding_once,
    check_neighbours,
    check_sampling,
    check_targets,
    check_training,
    check_velocities,
    load,
    noise_of,
    picture,
    picture_prompts,
    record,
    stock,
)
from PIL import Image
from rounding import relative_error
from safetensors import safe_open
from transformers import UMT5EncoderModel
from video_checks import check_sampled_videos
from wan_parts import SMALL, make_first_frame_folder

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation.report.record import Record
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._blueprint import make_family, read_blueprint
from ngrpo_lora.planning.plan import make_plan
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.sampling.sampler import Sampler, draw
from ngrpo_lora.sampling.settings import drawing_settings
from ngrpo_lora.training.export import save_adapter
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

SIZE = {name: value for name, value in SMALL.items() if name != "max_sequence_length"}  # which diffusers fixes at 512
STEPS = 5  # of a pair two start at or above the boundary: 1, 0.923, 0.818, 0.667, 0.429
BOUNDARY = 0.9
SETTINGS = [f"model.{key}={value}" for key, value in SIZE.items()] + [f"rollout.num_steps={STEPS}"]
SETTINGS += ["algorithm.num_train_steps=2"]
RECOMMENDED: dict[str, dict[str, Any]] = {
    "single": {"guidance_scale": 5.0},
    "pair": {"guidance_scale": 3.5, "guidance_scale_2": 3.5},
}


pytestmark = pytest.mark.usefixtures("cleaning")


@pytest.fixture
def cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' pipeline cleans prompts as that of text-to-video does, where ftfy is missing too."""
    monkeypatch.setattr(pipeline_wan_i2v, "basic_clean", pipeline_wan.basic_clean)


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_first_frame_folder(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_first_frame_folder(tmp_path_factory.mktemp("pair"), BOUNDARY)


@pytest.fixture(params=RECOMMENDED)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def family(single: Path) -> BaseFamily:
    return load(single, **SIZE, negative_prompt="a blur")


@pytest.fixture
def edits(tmp_path: Path) -> list[Prompt]:
    return [Prompt(text, {}, picture(tmp_path, seed)) for seed, text in enumerate(PROMPTS)]


@pytest.fixture
def prompts(tmp_path: Path, edits: list[Prompt]) -> Path:
    return picture_prompts(tmp_path, edits)


def run_stock(pipeline: Any, family: BaseFamily, prompt: Prompt, **call: Any) -> Recording:
    pipeline.scheduler = GivenSigmas(family.sigmas(STEPS))
    assert prompt.source is not None
    size = family.config.height_px, family.config.width_px
    return record(
        pipeline,
        image=prompt.source.fitted(size[1], size[0]),
        prompt=prompt.text,
        latents=noise_of(family),
        num_inference_steps=STEPS,
        height=size[0],
        width=size[1],
        num_frames=family.num_frames,
        **call,
    )


# Drawing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "frames"),
    [({}, 5), ({}, 13), ({"guidance_scale": 1.0}, 5), ({"guidance_scale": 2.0, "guidance_scale_2": 7.0}, 5)],
)
@pytest.mark.parametrize("kind", RECOMMENDED)
def test_velocities_and_frames_are_those_of_diffusers(
    kind: str, settings: dict[str, Any], frames: int, request: pytest.FixtureRequest, edits: list[Prompt]
):
    folder = request.getfixturevalue(kind)
    if kind == "single":
        settings = {name: value for name, value in settings.items() if name != "guidance_scale_2"}
    family = load(folder, **dict(SIZE, num_frames=frames), **settings, negative_prompt="a blur")
    guided = RECOMMENDED[kind] if not settings else settings
    recording = run_stock(
        stock(folder, "WanImageToVideoPipeline"), family, edits[2], negative_prompt="a blur", **guided
    )
    assert len(recording.images) == frames
    assert family.guided == (guided["guidance_scale"] > 1)
    check_velocities(family, edits[2], recording)
    check_sampling(family, edits[2], recording)


def test_the_source_is_seen_by_the_vae_and_by_clip(single: Path, pair: Path, edits: list[Prompt]):
    for folder, seen in ((single, ["condition", "image_embeds"]), (pair, ["condition"])):
        family = load(folder, **SIZE)
        text, other = (family.encode([edits[0]._replace(source=one.source)]) for one in edits[:2])
        assert sorted(text.tensors) == sorted([*seen, "negative_prompt_embeds", "prompt_embeds"])
        for name in seen:
            assert not torch.equal(text.tensors[name], other.tensors[name])
            mixed = type(text)(text.tensors | {name: other.tensors[name]})
            for sigma in (1.0, 0.5):
                first, second = (family.velocity(noise_of(family), sigma, one) for one in (text, mixed))
                assert (first - second).abs().max() > 1e-4


def test_the_condition_says_which_frames_are_given(family: BaseFamily, edits: list[Prompt]):
    condition = family.encode(edits[:1]).tensors["condition"]
    assert condition.shape == (1, 4 + 4, 2, 2, 4)
    assert (condition[:, :4, 0] == 1).all()
    assert not condition[:, :4, 1:].any()


def test_videos_do_not_depend_on_what_is_drawn_beside_them(folder: Path, edits: list[Prompt]):
    check_neighbours(load(folder, **SIZE, negative_prompt="a blur"), edits)


def test_in_half_precision_the_vae_and_clip_stay_whole(single: Path, edits: list[Prompt]):
    """diffusers keeps some layers of the transformer in float32 too."""
    half, full = (load(single, dtype=dtype, **SIZE) for dtype in ("bfloat16", "float32"))
    assert half.transformer.blocks[0].attn1.to_q.weight.dtype == half.encoders[0].dtype == torch.bfloat16
    assert half.vae.dtype == half.pipeline.image_encoder.dtype == torch.float32
    text = half.encode(edits[:1])
    assert {tensor.dtype for tensor in text.tensors.values()} == {torch.bfloat16}
    with torch.no_grad():
        velocities = [family.velocity(noise_of(family), 0.5, family.encode(edits[:1])) for family in (half, full)]
    assert relative_error(*velocities) <= 0.05
    assert len(half.decode(noise_of(half))) == 5


def test_what_is_recommended_is_that_of_the_model(single: Path, pair: Path):
    first, second = (load(folder, height_px=16, width_px=32) for folder in (single, pair))
    common = {"max_sequence_length": 512, "num_frames": 81}
    assert first.settings == common | {"guidance_scale": 5.0}
    assert second.settings == common | {"guidance_scale": 3.5, "guidance_scale_2": 3.5, "expert": "high_noise"}
    assert first.latent_shape == second.latent_shape == (4, 21, 2, 4)
    assert (first.architecture, second.architecture) == ("wan2.1-i2v", "wan2.2-i2v-a14b")


def test_the_size_of_a_video_is_that_of_the_model_cards(family: BaseFamily):
    large = family.with_settings(ModelConfig(height_px=480, width_px=832, num_frames=5))
    for size, expected in (
        ((832, 480), (480, 832)),
        ((1000, 1000), (624, 624)),
        ((480, 832), (832, 480)),
        ((3000, 2000), (512, 768)),
        ((4000, 32), (144, 2528)),  # cut to 16 : 1
        ((32, 90000), (2528, 144)),
    ):
        assert large.edited_size(Image.new("RGB", size)) == expected
        assert large.with_settings(ModelConfig(height_px=expected[0], width_px=expected[1], num_frames=5)).draws
    tiny = family.with_settings(ModelConfig(height_px=16, width_px=16, num_frames=5))
    assert tiny.edited_size(Image.new("RGB", (90000, 32))) == (16, 64)


# Encoding -----------------------------------------------------------------------------------------------------------


def test_each_prompt_is_encoded_once_with_each_source_and_the_negative_one_once(
    family: BaseFamily, edits: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    check_encoding_once(family, edits, "a blur", monkeypatch)
    unguided = family.with_settings(family.config.model_copy(update={"guidance_scale": 1.0}))
    assert sorted(unguided.encode(edits).tensors) == ["condition", "image_embeds", "prompt_embeds"]


def test_conditionings_on_disk_are_those_of_the_whole_model(folder: Path, edits: list[Prompt], tmp_path: Path):
    family = load(folder, **SIZE, negative_prompt="a blur")
    alone = load(folder, "text", **SIZE, negative_prompt="a blur")
    assert (alone.pipeline.transformer, alone.pipeline.transformer_2) == (None, None)
    others = ({"width_px": 64}, {"guidance_scale": 1.0}, {"negative_prompt": ""}, {"num_frames": 9})
    check_conditionings_on_disk(family, alone, edits, tmp_path / "embeddings", others)


def test_a_loaded_model_can_be_asked_for_another_size_and_length(single: Path, edits: list[Prompt]):
    other = dict(SIZE, height_px=32, width_px=16, num_frames=9)

    def drawn(family: BaseFamily) -> list[bytes]:
        return [f.tobytes() for f in draw(family, family.encode(edits[:1]), [5], "dpmpp_2m", family.sigmas(3))]

    loaded, wanted = load(single, **SIZE), load(single, **other)
    before = drawn(loaded)
    assert drawn(loaded.with_settings(wanted.config)) == drawn(wanted)
    assert drawn(loaded) == before


def test_a_plan_counts_the_condition(folder: Path, edits: list[Prompt]):
    config = ModelConfig(path=str(folder), device="cpu", **SIZE)
    blank, family = make_family(read_blueprint(config), config), load(folder, **SIZE)
    assert type(blank).__mro__[1].__name__ == "ImageToVideo"
    text, real = blank.encode(["anything"]).tensors, family.encode(edits[:1]).tensors
    assert text.keys() == real.keys()
    for name in text.keys() - {"image_embeds"}:
        assert text[name].shape == real[name].shape
    assert "image_embeds" not in text or text["image_embeds"].shape == (1, 257, 16)
    velocity = blank.velocity(torch.zeros(1, *blank.latent_shape, device="meta"), 0.5, blank.encode(["anything"]))
    assert velocity.shape[1:] == blank.latent_shape


def test_a_plan_counts_the_vae_and_clip_in_float32(
    single: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path
):
    """As they are loaded, whatever the number type of the model."""
    sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null"]
    config = make_config(tmp_path / "run", *sources, f"model.path={single}", *SETTINGS, "model.dtype=bfloat16")
    plan = make_plan(config)
    whole = load(single, **SIZE)
    assert plan.gpu["rollout"]["VAE"] == sum(tensor.nbytes for tensor in whole.vae.state_dict().values())
    counts = plan.parameters
    assert plan.gpu["encode"]["text encoders"] == 2 * counts["text_encoder"] + 4 * counts["image_encoder"]


# Runs ---------------------------------------------------------------------------------------------------------------


def test_lora_adapts_what_attends_to_the_source_too(single: Path, pair: Path):
    both = [f"{part}.{layer}" for part in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    seen = ["attn2.add_k_proj", "attn2.add_v_proj"]
    forward = {f"blocks.{i}.ffn.{layer}" for i in range(2) for layer in ("net.0.proj", "net.2")}
    for folder, layers in ((single, both + seen), (pair, both)):
        check_targets(load(folder, **SIZE), {f"blocks.{i}.{layer}" for i in range(2) for layer in layers}, forward)


@pytest.mark.parametrize(
    ("kind", "expert", "encoders"),
    [
        ("single", None, "keep"),
        ("single", None, "cache"),
        ("pair", "high_noise", "cache"),
        ("pair", "low_noise", "keep"),
    ],
)
def test_a_run_trains_the_lora_alone_and_diffusers_draws_the_same_with_it(
    kind: str,
    expert: str | None,
    encoders: str,
    request: pytest.FixtureRequest,
    make_config: MakeConfig,
    tmp_path: Path,
    prompts: Path,
    edits: list[Prompt],
):
    folder: Path = request.getfixturevalue(kind)
    settings = [*SETTINGS, f"model.text_encoders={encoders}", f"model.expert={expert or 'null'}"]
    targets = "lora.targets=attention+feed_forward"
    trained = check_training(make_config, folder, tmp_path, *settings, targets, prompts=prompts)
    file = tmp_path / "run" / "adapter" / FILE_NAME
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    own = json.loads(header["ngrpo"])
    assert (own["family"], own["edits"], own["pipeline"]) == ("wan", True, "WanImageToVideoPipeline")
    assert header["modelspec.architecture"] == f"{trained.family.architecture}/lora"
    if encoders == "cache":
        return
    sampler, pipeline = Sampler(drawing_settings(file, None), file), stock(folder, "WanImageToVideoPipeline")
    pipeline.load_lora_weights(str(file), **({"load_into_transformer_2": True} if expert == "low_noise" else {}))
    recording = run_stock(pipeline, sampler.family, edits[0], **RECOMMENDED[kind])
    check_velocities(sampler.family, edits[0], recording)
    check_sampling(sampler.family, edits[0], recording)


def test_rewards_and_the_grid_see_frames_beside_the_source(
    single: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path, edits: list[Prompt]
):
    """The source as the model takes it, of as many pixels as each frame."""
    (seen := tmp_path / "seen.py").write_text(
        "def score(images, prompts, metadata):\n"
        "    assert all(row['source'].size == image.size == (32, 16) for image, row in zip(images, metadata))\n"
        "    return [float(sum(image.tobytes())) for image in images]\n"
    )
    sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null", "model.device=cpu"]
    rewards = f"rewards={{train: [preservation, motion, '{seen}:score'], frames: 2}}"
    made = make_config(tmp_path / "run", *sources, f"model.path={single}", *SETTINGS, rewards)
    finished = prepare(made)
    complete(finished)
    metrics = read_metrics(finished.output_dir / "metrics.jsonl")[-1]
    assert metrics["rollout/failed_share"] == 0
    assert 0 < metrics["eval/preservation_mean"] < 1
    shown = Record.read(finished.output_dir, finished.config, is_running=False).shown
    by_text = {edit.text: edit.source for edit in edits}
    for one in shown:
        assert one.source is not None
        source = by_text[one.prompt]
        assert source is not None
        with Image.open(one.source) as kept:
            assert kept.tobytes() == source.fitted(32, 16).tobytes()
    assert len(shown) == len(finished.held_out)


# Drawing by the commands --------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(single: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path) -> Path:
    """An adapter that has an effect, without a run."""
    sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null", "model.device=cpu"]
    made = prepare(make_config(tmp_path / "run", *sources, f"model.path={single}", *SETTINGS))
    for name, weight in made.lora_step.parameters.items():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    save_adapter(tmp_path / "adapter.safetensors", made.family, made.config)
    return tmp_path / "adapter.safetensors"


def test_a_video_says_what_it_starts_from_and_like_draws_it_again(adapter: Path, tmp_path: Path, prompts: Path):
    drawn = check_sampled_videos(adapter, tmp_path, prompts, tmp_path, (32, 16))
    assert len(set(drawn)) == 5


def test_a_comparison_draws_from_the_sources_of_its_prompts(family: BaseFamily, tmp_path: Path, edits: list[Prompt]):
    check_comparison(family, edits, tmp_path / "drawn")


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_the_adapter_is_read_back_from_other_names(form: str, adapter: Path, tmp_path: Path, edits: list[Prompt]):
    output = tmp_path / f"{form}.safetensors"
    run("export", adapter, "--format", form, "--output", output)
    velocities = []
    for file in (adapter, output):
        sampler = Sampler(drawing_settings(adapter, None), file)
        with torch.no_grad():
            text = sampler.family.encode(edits[:1])
            velocities.append(sampler.family.velocity(noise_of(sampler.family), 0.5, text))
    assert relative_error(*velocities) <= 1e-5


# What cannot be drawn -----------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read."""
    for kind in (AutoencoderKLWan, WanTransformer3DModel, UMT5EncoderModel):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights are read"))


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    """A copy of a model with other values in one of its JSON files."""
    path = shutil.copytree(folder, to) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("file", "values", "rule"),
    [
        (
            "model_index.json",
            {"expand_timesteps": True},
            "but expand_timesteps in its model_index.json is true, as of",
        ),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "but pos_embed_seq_len of its transformer is 514: it"),
        ("model_index.json", {"image_encoder": [None, None]}, "and it has no image_encoder; copy image_encoder/"),
    ],
)
@pytest.mark.parametrize("parts", ["all", "text", "image"])
def test_a_model_that_takes_no_first_frame_alone_is_refused_unread(
    file: str, values: dict[str, Any], rule: str, parts: Any, single: Path, tmp_path: Path
):
    other = changed(single, tmp_path / "other", file, **values)
    with pytest.raises(UserError, match=rf"must be a model that is drawn from a first frame as .*{rule}"):
        load(other, parts, **SIZE)


@pytest.mark.parametrize(
    ("file", "values", "rule"),
    [
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps in its"),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "pos_embed_seq_len of its"),
    ],
)
def test_a_model_without_its_weights_is_refused_as_loading_it_is(
    file: str, values: dict[str, Any], rule: str, single: Path, tmp_path: Path
):
    other = ModelConfig(path=str(changed(single, tmp_path / "other", file, **values)), dtype="float32", **SIZE)
    with pytest.raises(UserError, match=rf"must be a model that is drawn from a first frame as .*but {rule}"):
        make_family(read_blueprint(other), other)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"num_frames": 6}, r"num_frames must be 4 k \+ 1 .* for Wan, got 6; the nearest are 5 and 9"),
        (
            {"num_frames": 1},
            r"num_frames must be 5 or more for .*, whose first frame is the source picture, got 1; give",
        ),
        ({"max_sequence_length": 64}, r"max_sequence_length must be 512 for .*, got 64; leave it out"),
    ],
)
def test_settings_that_do_not_go_with_a_first_frame_are_refused_unread(
    settings: dict[str, Any], rule: str, single: Path
):
    with pytest.raises(UserError, match=rule):
        load(single, **dict(SIZE, **settings))


def test_a_loaded_model_refuses_them_too(family: BaseFamily):
    for settings, rule in (({"num_frames": 1}, "5 or more"), ({"max_sequence_length": 64}, "must be 512")):
        with pytest.raises(UserError, match=rule):
            family.with_settings(family.config.model_copy(update=settings))


def test_a_pair_takes_prompts_of_any_length_as_it_has_no_clip(pair: Path):
    assert load(pair, **SMALL).settings["max_sequence_length"] == 64


def test_clip_is_left_where_the_transformer_takes_none_of_its_states(single: Path, pair: Path, tmp_path: Path):
    other = shutil.copytree(pair, tmp_path / "other")
    index = json.loads((single / "model_index.json").read_text())
    for part in ("image_encoder", "image_processor"):
        shutil.copytree(single / part, other / part)
    changed(other, tmp_path / "more", "model_index.json", **{n: index[n] for n in ("image_encoder", "image_processor")})
    assert load(tmp_path / "more", **SIZE).pipeline.image_encoder is None


def test_pictures_are_checked_before_a_model_is_loaded(
    single: Path, make_config: MakeConfig, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(BaseFamily, "load", lambda *args: pytest.fail("a model is loaded"))
    sources = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", "evaluation.strict=null", "model.device=cpu"]
    made = [tmp_path / "run", *sources, f"model.path={single}", *SETTINGS]
    with pytest.raises(ConfigError, match=r"prompts\.train must have a source picture with every prompt"):
        check_run(make_config(*made, "prompts.train=world:train"))
    small = io.BytesIO()
    Image.new("RGB", (31, 400)).save(small, "PNG")
    for content, why in (
        (b"", "is empty"),
        (b"no picture", "is no picture"),
        (small.getvalue(), "is 31 x 400 px, below 32 px a side"),
        (None, "is no file"),
    ):
        (tmp_path / "1.png").unlink() if content is None else (tmp_path / "1.png").write_bytes(content)
        message = rf"prompts\.train must have readable source pictures, but '1\.png'.*{why}"
        with pytest.raises(ConfigError, match=message):
            check_run(make_config(*made))
    one = ("sample", "--prompt", "a red star", "--model", single)
    assert "--prompt must have a source picture with every prompt" in refuse(*one)
    assert "--source must be a readable picture, but 'gone.png' is no file" in refuse(*one, "--source", "gone.png")


def test_a_prompt_without_a_picture_is_refused(family: BaseFamily):
    with pytest.raises(ConfigError, match="must have a source picture, but 'a red star' has none"):
        family.encode(["a red star"])
