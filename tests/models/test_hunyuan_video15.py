"""The HunyuanVideo 1.5 family against diffusers' `HunyuanVideo15Pipeline`, on a tiny model like that of 480p."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from diffusers import ClassifierFreeGuidance
from family_checks import (
    PROMPTS,
    check_another_size,
    check_half_precision,
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
from hunyuan_parts import SMALL, make_folder
from rounding import relative_error

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.header import read_adapter
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._index import family_of
from ngrpo_lora.sampling.sampler import Sampler, sample_images
from ngrpo_lora.training.run import Run

SIGN = 'a sign "red" and “a star”'  # with text that is to be seen


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="session")
def family(folder: Path) -> BaseFamily:
    return load(folder, **SMALL)


def call(family: BaseFamily, prompt: str, **changed: Any) -> dict[str, Any]:
    """Arguments of a stock pipeline for what the family draws."""
    size = {"height": family.config.height_px, "width": family.config.width_px, "num_frames": family.num_frames}
    negative = {"negative_prompt": family.config.negative_prompt}
    return {"prompt": prompt, "latents": noise_of(family), "num_inference_steps": 3} | negative | size | changed


def stock_with(folder: Path, guidance: float) -> Any:
    pipeline = stock(folder, "HunyuanVideo15Pipeline")
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance)
    pipeline.tokenizer_max_length = SMALL["max_sequence_length"]
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("prompt", [PROMPTS[2], SIGN])
def test_it_draws_as_diffusers_does_with_guidance_and_without(prompt: str, guidance: float, folder: Path):
    family = load(folder, **SMALL, guidance_scale=guidance, negative_prompt='a "blurred" star')
    recording = record(stock_with(folder, guidance), **call(family, prompt))
    assert len(recording.images) == 5
    check_velocities(family, prompt, recording)
    check_sampling(family, prompt, recording)


def test_the_family_and_what_is_recommended_are_the_models_own(folder: Path, tmp_path: Path):
    assert family_of(ModelConfig(path=str(folder))) == "hunyuan_video15"
    family = load(folder, height_px=32, width_px=64)
    assert family.settings == {"guidance_scale": 6.0, "max_sequence_length": 1000, "num_frames": 121}
    assert family.latent_shape == (4, 31, 2, 4)
    assert family.guided
    distilled = load(make_folder(tmp_path / "distilled", guidance_scale=1.0), **SMALL)
    assert distilled.settings["guidance_scale"] == 1.0
    assert not distilled.guided


def test_the_schedule_is_that_of_the_shift(family: BaseFamily):
    assert family.shift(8) == 5.0
    assert family.sigmas(2).tolist() == pytest.approx([1, 5 / 6, 0])  # 5 * 0.5 / (1 + 4 * 0.5)


def test_states_are_those_of_the_pipeline_without_padding(folder: Path, family: BaseFamily):
    """The drawn text is what stands in quotation marks of either kind; without any ByT5 adds no token."""
    pipeline = stock_with(folder, 1.0)
    for prompt, quoted in ((SIGN, 'Text "red". Text "a star". '), (PROMPTS[0], "")):
        with torch.no_grad():
            embeds, mask, glyphs, glyph_mask = pipeline.encode_prompt(prompt)
        ours = family.encode([prompt]).tensors
        assert torch.equal(ours["prompt_embeds"], embeds[mask.bool()][None])
        assert torch.equal(ours["glyph_prompt_embeds"], glyphs)
        assert ours["lengths"].tolist() == mask.sum(1).tolist()
        assert ours["glyph_lengths"].tolist() == glyph_mask.sum(1).tolist() == [len(quoted) + bool(quoted)]
        assert 0 < ours["lengths"] < SMALL["max_sequence_length"] == len(mask[0])


def test_a_long_prompt_is_cut_as_in_the_pipeline(folder: Path):
    family = load(folder, **dict(SMALL, max_sequence_length=16), guidance_scale=1.0)
    pipeline = stock_with(folder, 1.0)
    pipeline.tokenizer_max_length = 16
    assert family.encode(PROMPTS).tensors["lengths"].tolist() == [16] * 3
    check_velocities(family, PROMPTS[2], record(pipeline, **call(family, PROMPTS[2])))


def test_videos_do_not_depend_on_their_neighbours(family: BaseFamily):
    check_neighbours(family, [*PROMPTS, SIGN])


def test_gradients_of_prompts_of_different_lengths_are_finite_and_their_own(family: BaseFamily):
    text, latents = family.encode([PROMPTS[0], SIGN]), torch.cat([noise_of(family, seed) for seed in (0, 1)])
    latents.requires_grad_()
    together = torch.autograd.grad(family.velocity(latents, 0.5, text).square().sum(), latents)[0]
    for row in range(2):
        alone = latents[[row]].detach().requires_grad_()
        own = torch.autograd.grad(family.velocity(alone, 0.5, text[[row]]).square().sum(), alone)[0]
        assert relative_error(together[[row]], own) <= 1e-4


@pytest.mark.parametrize("frames", [2, 4, 7, 82])
def test_other_numbers_of_frames_are_refused(folder: Path, frames: int):
    rule = rf"num_frames must be 4 k \+ 1 .* for HunyuanVideo 1.5, got {frames}; the nearest are"
    with pytest.raises(UserError, match=rule):
        load(folder, **dict(SMALL, num_frames=frames))


def test_one_frame_is_a_picture(folder: Path):
    family = load(folder, **dict(SMALL, num_frames=1))
    assert family.latent_shape == (4, 1, 2, 4)
    (image,) = family.decode(noise_of(family))
    assert image.size == (64, 32)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"guidance_rescale": 0.5}, "guidance_rescale is 0.5"),
        ({"start": 0.2, "stop": 0.8}, "start is 0.2, stop is 0.8"),
        ({"use_original_formulation": True}, "use_original_formulation is True"),
        ({"enabled": False}, "enabled is False"),
        ({"_class_name": "SkipLayerGuidance"}, "_class_name is 'SkipLayerGuidance'"),
    ],
)
def test_a_guider_that_does_more_is_refused_before_weights_are_read(
    changed: dict[str, Any], said: str, folder: Path, tmp_path: Path
):
    for name in ("model_index.json", "guider/guider_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / name)
    file = tmp_path / "guider" / "guider_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=rf"for its guider, but {said}; give the plain one in guider/"):
        load(tmp_path, **SMALL)


def test_without_a_guider_it_is_refused_too(folder: Path, tmp_path: Path):
    index = json.loads((folder / "model_index.json").read_text())
    del index["guider"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"for its guider, but _class_name is None; give the plain one"):
        load(tmp_path, **SMALL)


def test_the_time_embedding_sees_a_timestep_that_was_not_rounded(folder: Path):
    check_half_precision(folder, SIGN, **SMALL)
    family = load(folder, **SMALL, dtype="bfloat16", guidance_scale=1.0)
    seen: list[torch.Tensor] = []
    embedding = family.transformer.time_embed
    embedding.time_proj.register_forward_hook(lambda module, given, sines: seen.append(sines))
    embedding.timestep_embedder.linear_1.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    family.velocity(noise_of(family), 0.3337, family.encode([SIGN]))
    exact = embedding.time_proj(torch.tensor([0.3337]) * 1000)
    assert torch.equal(seen[0], exact)
    assert torch.equal(seen[1], exact.bfloat16())
    assert not torch.equal(exact, embedding.time_proj(torch.tensor([333.7]).bfloat16()))


def test_lora_adapts_the_blocks_and_nothing_else(family: BaseFamily):
    streams = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_v_proj"}
    unused = {"attn.add_q_proj", "attn.to_add_out"}  # of the last block, whose prompt's states nothing reads
    attention = {f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in streams}
    attention |= {f"transformer_blocks.0.{layer}" for layer in unused}
    fed = {f"transformer_blocks.{block}.ff.{layer}" for block in range(2) for layer in ("net.0.proj", "net.2")}
    fed |= {f"transformer_blocks.0.ff_context.{layer}" for layer in ("net.0.proj", "net.2")}
    check_targets(family, attention, fed)


# Training


@pytest.fixture(scope="module")
def run(make_config: MakeConfig, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = [f"model.{key}={value}" for key, value in SMALL.items()]
    rewards = "rewards={train: jpeg, frames: 2}"
    targets = "lora.targets=attention+feed_forward"
    return check_training(make_config, folder, tmp_path_factory.mktemp("videos"), *settings, rewards, targets)


def test_it_trains_and_a_stock_transformer_loads_the_adapter(run: Run):
    assert run.family.guided
    assert run.family.num_frames == 5


def test_a_stock_pipeline_draws_with_the_adapter_as_ngrpo_sample_does(run: Run, folder: Path):
    """From the same noise: each frame to one step of 8 bits, far nearer than the base is."""
    file = run.output_dir / "adapter" / FILE_NAME
    family, steps = run.family, run.config.rollout.num_steps
    assert not hasattr(stock(folder, "HunyuanVideo15Pipeline"), "load_lora_weights")
    pipeline = stock_with(folder, 6.0)
    pipeline.transformer.load_lora_adapter(file.parent, weight_name=FILE_NAME)
    recording = record(pipeline, **call(family, SIGN, num_inference_steps=steps))
    sampler = Sampler(read_adapter(file), file)
    check_velocities(sampler.family, SIGN, recording)
    check_sampling(sampler.family, SIGN, recording)
    base = load(folder, **SMALL)
    first, sigma = recording.latents[0], recording.sigmas[0].item()
    assert relative_error(base.velocity(first, sigma, base.encode([SIGN])), recording.velocities[0]) > 1e-4


def test_adapters_are_weighed_and_taken_off(run: Run):
    """At strength 0 the base is drawn, at twice a half what is drawn at one."""
    file = run.output_dir / "adapter" / FILE_NAME
    sampler = Sampler(read_adapter(file), file)
    text, noise = sampler.family.encode([SIGN]), noise_of(sampler.family)

    def velocity(*adapters: tuple[Path, float]) -> torch.Tensor:
        sampler.use(adapters)
        with torch.no_grad():
            return sampler.family.velocity(noise, 0.5, text)

    whole, base = velocity((file, 1.0)), velocity()
    assert torch.equal(velocity((file, 0.0)), base)
    assert torch.equal(velocity((file, 0.5), (file, 0.5)), whole)
    assert relative_error(whole, base) > 1e-5
    sampler.remove_adapters()
    assert torch.equal(velocity(), base)
    assert len(sample_images(file, None, [SIGN], [3])) == 5


def test_a_loaded_model_can_be_asked_for_another_size(folder: Path):
    check_another_size(folder, SMALL, {"height_px": 64, "width_px": 32, "num_frames": 9, "guidance_scale": 1.0})
