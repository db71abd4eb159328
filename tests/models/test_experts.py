"""Wan 2.2 A14B, whose two transformers share the noise levels, on tiny models, against diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    check_training,
    check_velocities,
    load,
    noise_of,
    record,
    stock,
)
from safetensors.torch import load_file, save_file
from torch import nn
from wan_parts import SMALL, make_folder

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.fusing import load_fused
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.algorithms._opening import open_algorithm
from ngrpo_lora.config import ModelConfig, load_config
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._experts import steps_of
from ngrpo_lora.planning.plan import make_plan
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.sampling.sampler import Sampler
from ngrpo_lora.sampling.settings import drawing_settings
from ngrpo_lora.training.export import save_adapter
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.types import RewardBatch

STEPS = 5  # of which two start at or above the boundary: 1, 0.923, 0.818, 0.667, 0.429
SETTINGS = [f"model.{key}={value}" for key, value in SMALL.items()]
ROLLOUT = [f"rollout.num_steps={STEPS}", "algorithm.num_train_steps=2"]
EXPERTS = ("high_noise", "low_noise")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pair"), boundary=0.875)


def run_stock(pipeline: Any, family: Any, prompt: str = PROMPTS[2], noise: Any = None, **call: Any) -> Recording:
    pipeline.scheduler = GivenSigmas(family.sigmas(STEPS))
    return record(
        pipeline,
        prompt=prompt,
        latents=noise_of(family) if noise is None else noise,
        num_inference_steps=STEPS,
        height=family.config.height_px,
        width=family.config.width_px,
        num_frames=5,
        max_sequence_length=64,
        **call,
    )


# Drawing


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),  # what the model recommends
        ({"guidance_scale": 6.0}, {"guidance_scale": 6.0}),  # one for both
        ({"guidance_scale": 2.0, "guidance_scale_2": 7.0}, {"guidance_scale": 2.0, "guidance_scale_2": 7.0}),
        ({"guidance_scale": 1.0, "guidance_scale_2": 7.0}, {"guidance_scale": 1.0, "guidance_scale_2": 7.0}),
    ],
)
@pytest.mark.parametrize("expert", EXPERTS)
def test_both_transformers_draw_as_in_diffusers(pair: Path, ours: dict[str, float], theirs: Any, expert: str):
    family = load(pair, **SMALL, **ours, expert=expert, negative_prompt="a blurred star")
    recording = run_stock(stock(pair, "WanPipeline"), family, negative_prompt="a blurred star", **theirs)
    assert family.guided == (theirs["guidance_scale"] > 1)
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_videos_do_not_depend_on_their_neighbours_whichever_transformer_draws_these(pair: Path):
    check_neighbours(load(pair, **SMALL))  # at noise levels of both


def test_a_loaded_model_can_be_asked_for_other_guidance(pair: Path):
    other = {"height_px": 32, "width_px": 16, "num_frames": 9, "guidance_scale": 2.0, "guidance_scale_2": 5.0}
    check_another_size(pair, SMALL, dict(SMALL, **other))


def test_the_settings_say_what_is_recommended(pair: Path):
    family = load(pair, height_px=16, width_px=32)
    recommended = {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "expert": "high_noise"}
    assert family.settings == {"max_sequence_length": 512, "num_frames": 81} | recommended
    assert family.architecture == "wan2.2-t2v-a14b"


def test_a_level_at_the_boundary_is_high_noise():
    """As in diffusers, which compares 1000 times both: 0.9 in float32 is below 0.9, and 1000 times it is 900."""
    assert steps_of("high_noise", flow_sigmas(8), 0.875) == range(2)
    assert steps_of("low_noise", flow_sigmas(8), 0.875) == range(2, 8)
    assert steps_of("high_noise", flow_sigmas(10), 0.9) == range(2)


# Training


@pytest.fixture(scope="module", params=EXPERTS)
def run(request: Any, make_config: MakeConfig, pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the adapter of one transformer; stock diffusers has loaded it into that one."""
    return check_training(
        make_config, pair, tmp_path_factory.mktemp("run"), *SETTINGS, f"model.expert={request.param}", *ROLLOUT
    )


def test_stock_diffusers_draws_the_same_frames_with_the_adapter(run: Run, pair: Path):
    file = run.output_dir / "adapter" / FILE_NAME
    own = json.loads(read_metadata(file)["ngrpo"])["model"]
    assert (own["expert"], own["guidance_scale"], own["guidance_scale_2"]) == (run.family.expert, 4.0, 3.0)
    sampler, pipeline = Sampler(drawing_settings(file, None), file), stock(pair, "WanPipeline")
    pipeline.load_lora_weights(str(file), load_into_transformer_2=run.family.expert == "low_noise")
    recording = run_stock(pipeline, sampler.family, guidance_scale=4.0, guidance_scale_2=3.0)
    check_velocities(sampler.family, PROMPTS[2], recording)
    check_sampling(sampler.family, PROMPTS[2], recording)


def test_steps_of_the_chosen_transformer_alone_are_trained(run: Run, tmp_path: Path):
    again = prepare(run.config.model_copy(update={"output_dir": str(tmp_path / "again")}))
    seen: list[tuple[bool, bool, float]] = []

    def see(own: bool) -> Any:
        return lambda _, __, inputs: seen.extend((own, torch.is_grad_enabled(), t) for t in inputs["timestep"].tolist())

    for transformer, own in zip(again.family.transformers, (True, False), strict=True):
        transformer.register_forward_pre_hook(see(own), with_kwargs=True)
    complete(again)
    high = again.family.expert == "high_noise"
    levels = [1000 * level for level in again.schedule.sigmas[:-1].tolist()]
    trained = [time for own, gradient, time in seen if gradient and own]
    assert {round(time) for time in trained} <= {round(level) for level in levels if (level >= 875) == high}
    assert len(trained) == 2 * 2 * 2 * 2 * 2  # iterations, groups, anchors, steps, passes
    assert not [1 for own, gradient, _ in seen if gradient and not own]
    assert {(time >= 875) == high for own, _, time in seen if own} == {True}
    assert {(time >= 875) == high for own, _, time in seen if not own} == {False}
    counted = read_metrics(again.output_dir / "metrics.jsonl")[-1]
    # Five steps in two passes, and one of two updates has old velocities computed anew.
    assert counted["nfe/old_per_sample"] == pytest.approx(10 + 8 / 6)
    assert counted["nfe/theta_per_sample"] == pytest.approx(16 / 6)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (["algorithm=flow_grpo", "algorithm.updates_per_rollout=1"], None),
        (["algorithm=mix", "algorithm.window_size=1"], None),
        (["algorithm=nft"], None),
        (["algorithm=dance"], None),
        (["algorithm.num_train_steps=3"], r"algorithm.num_train_steps wants 3 or more .* but 2 of the 5 steps can be"),
        (
            ["algorithm.train_window=3", "algorithm.num_train_steps=2"],
            "algorithm.train_window wants 3",
        ),
        (["algorithm=mix", "algorithm.window_size=3"], r"algorithm.window_size wants 3 or more steps to train, but 2"),
        (["algorithm=flow_grpo", "algorithm.num_train_steps=3"], r"algorithm.num_train_steps wants 3 or more steps"),
        (["algorithm=branch", "rollout.group_size=4"], r"algorithm.name=branch trains all 5 steps .* draws 2 of them"),
        (["algorithm=best_of_n"], r"algorithm.name=best_of_n trains all 5 steps .* but model.expert draws 2 of them"),
    ],
)
def test_every_algorithm_trains_the_steps_that_there_are_or_says_why_not(
    make_config: MakeConfig, tmp_path: Path, settings: list[str], rule: str | None
):
    config, steps = load_config(None, [*ROLLOUT[:1], *settings]), range(2)
    if rule is not None:
        with pytest.raises(ConfigError, match=rule):
            open_algorithm(config, steps)
        return
    for steps in (range(2), range(2, 5)):
        algorithm, schedule = open_algorithm(config, steps), Schedule(flow_sigmas(STEPS, 3.0), 3.0)
        (rollout,) = algorithm.rollout(lambda x, sigma: torch.zeros_like(x), schedule, (1, 1, 1), [0], 0)
        count = config.rollout.prompts_per_iteration, config.rollout.group_size
        rewards = torch.rand(count, dtype=torch.float64)
        batch = RewardBatch(rewards, torch.ones(count, dtype=torch.bool), {})
        updates = algorithm.updates(algorithm.advantages(batch), 0, 0)
        levels = {rollout.sigmas[t.step].item() for update in updates for t in update}
        assert levels
        assert levels <= set(schedule.sigmas[steps.start : steps.stop].tolist())


def test_what_cannot_be_trained_is_refused_before_the_model_is_loaded(
    make_config: MakeConfig, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ngrpo_lora.training.setup.load_model", lambda *_: pytest.fail("it was loaded"))
    few = ["rollout.num_steps=2", "rollout.shift=12", "algorithm.num_train_steps=1"]
    low, single = "model.expert=low_noise", "must be null for 'embedded', which has one transformer"
    for model, settings, rule in (
        (pair, [low, *few], r"model.expert=low_noise must draw at least one of the steps, but .* draws all 2"),
        (pair, [low, "algorithm.num_train_steps=3"], "algorithm.num_train_steps wants 3 or more steps to train, but 2"),
        ("embedded", [low], f"model.expert {single}"),
        ("embedded", ["model.guidance_scale_2=3"], f"model.guidance_scale_2 {single}"),
    ):
        with pytest.raises(ConfigError, match=rule):
            prepare(make_config(tmp_path / "run", f"model.path={model}", "evaluation.strict=null", *settings))


# Adapters of both


@pytest.fixture(scope="module")
def files(make_config: MakeConfig, pair: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An adapter with an effect for each transformer, under names that do not say for which."""
    folder, files = tmp_path_factory.mktemp("files"), []
    for number, expert in enumerate(EXPERTS):
        settings = [f"model.path={pair}", f"model.expert={expert}", "evaluation.strict=null", *SETTINGS, *ROLLOUT]
        run = prepare(make_config(folder / str(number), *settings))
        for name, weight in run.lora_step.parameters.items():
            if "lora_B" in name:
                weight.data.normal_(std=0.3)
        files.append(folder / f"{number}.safetensors")
        save_adapter(files[-1], run.family, run.config)
    return files


def test_both_adapters_draw_together_each_on_its_own_transformer(pair: Path, files: list[Path]):
    sampler, pipeline = Sampler(drawing_settings(files[0], None)), stock(pair, "WanPipeline")
    guidance = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    sampler.use([(files[0], 1.0), (files[1], 0.5)])
    pipeline.load_lora_weights(str(files[0]), adapter_name="high")
    pipeline.load_lora_weights(str(files[1]), adapter_name="low", load_into_transformer_2=True)
    pipeline.set_adapters(["high", "low"], [1.0, 0.5])
    check_velocities(sampler.family, PROMPTS[2], run_stock(pipeline, sampler.family, **guidance))
    sampler.use([(files[1], 1.0)])
    pipeline.set_adapters("low")
    check_velocities(sampler.family, PROMPTS[2], run_stock(pipeline, sampler.family, **guidance))
    sampler.use([])
    check_velocities(sampler.family, PROMPTS[2], run_stock(stock(pair, "WanPipeline"), sampler.family, **guidance))


def test_a_file_is_fused_into_the_transformer_that_its_header_or_its_name_says(
    pair: Path, files: list[Path], tmp_path: Path
):
    tensors = load_file(files[1])
    for name in ("mine_low_noise", "mine-high-noise", "mine"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    base = load(pair, **SMALL)

    def changed(file: Path) -> list[str]:
        family = load_fused(ModelConfig(path=str(pair), device="cpu", fuse={str(file): 1.0}, **SMALL))
        both = zip(EXPERTS, family.transformers, base.transformers, strict=True)
        return [expert for expert, one, other in both if not same(one, other)]

    assert [changed(file) for file in files] == [["high_noise"], ["low_noise"]]
    assert changed(tmp_path / "mine_low_noise.safetensors") == ["low_noise"]
    assert changed(tmp_path / "mine-high-noise.safetensors") == ["high_noise"]
    with pytest.raises(UserError, match=r"mine.safetensors' must say which of the two transformers it is for, but"):
        changed(tmp_path / "mine.safetensors")


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_a_run_starts_from_an_adapter_of_its_own_transformer_alone(
    make_config: MakeConfig, pair: Path, files: list[Path], tmp_path: Path
):
    settings = [f"model.path={pair}", "model.expert=low_noise", "evaluation.strict=null", *SETTINGS, *ROLLOUT]
    prepare(make_config(tmp_path / "run", *settings, f"lora.init_from={files[1]}"))
    with pytest.raises(ConfigError, match=r"lora.init_from '.*0.safetensors' is for high_noise, got model.expert=low"):
        prepare(make_config(tmp_path / "run", *settings, f"lora.init_from={files[0]}"))


# Memory


def test_blocks_of_both_transformers_wait_in_system_memory(pair: Path):
    whole, swapped = load(pair, **SMALL), load(pair, **SMALL, swap_blocks=2)
    text, latents = whole.encode(PROMPTS[:1]), noise_of(whole)
    swapped.encode(PROMPTS[:1])  # the negative prompt
    for sigma in (1.0, 0.5):
        with torch.no_grad():
            assert torch.equal(swapped.velocity(latents, sigma, text), whole.velocity(latents, sigma, text))


def test_a_plan_counts_both_transformers(make_config: MakeConfig, pair: Path, tmp_path: Path):
    single = tmp_path / "single"
    make_folder(single)
    plans = [
        make_plan(make_config(tmp_path / "run", f"model.path={path}", *SETTINGS, *ROLLOUT)) for path in (single, pair)
    ]
    assert plans[1].parameters["transformer_2"] == plans[1].parameters["transformer"]
    assert plans[1].gpu["update"]["transformer"] == 2 * plans[0].gpu["update"]["transformer"]
    assert plans[1].evaluations == plans[0].evaluations
    with pytest.raises(ConfigError, match="model.expert must be null"):
        make_plan(make_config(tmp_path / "run", f"model.path={single}", *SETTINGS, "model.expert=low_noise"))
