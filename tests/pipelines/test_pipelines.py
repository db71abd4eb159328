"""The pipelines as a user gets them, by `custom_pipeline`, against the trainer and diffusers' own."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import FinishedRun, MakeConfig
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, FluxPipeline
from diffusers.utils import dynamic_modules_utils
from hub_server import HubServer, Repository
from PIL import Image
from rounding import relative_error, with_rounding
from safetensors.torch import load_file, save_file
from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.header import read_adapter
from ngrpo_lora.adapters.loading import load_adapter
from ngrpo_lora.adapters.reading import read_adapter_file, read_metadata
from ngrpo_lora.adapters.writing import Format, convert, save_tensors
from ngrpo_lora.equations.solvers import SOLVERS
from ngrpo_lora.hub.pipeline_file import PIPELINE, SCHEDULER, has_pipeline, pipeline_file, scheduler_file
from ngrpo_lora.hub.usage import diffusers_usage, read_pushed
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.pictures import SourcePicture
from ngrpo_lora.records.pictures import read_png_text
from ngrpo_lora.sampling.sampler import Sampler, sample_images, solve
from ngrpo_lora.sampling.settings import drawing_settings
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.training.rollouts import roll_out
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.world import EMBEDDED

sys.path.append(str(Path(__file__).parents[1] / "models"))

import family_checks
import hunyuan_parts
import test_flux2_dev
import test_flux2_edit
import test_flux2_klein
import test_flux_kontext
import test_qwen_image
import test_sana
import test_sd3
import test_wan
import test_wan_first_frame
import test_z_image
from family_checks import check_sampling, load, noise_of, record, stock
from wan_parts import make_first_frame_folder

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red star", "two blue circles"]
LONG = "a photo of a heart above a cross, at dusk"
FAMILIES = ["flux", "flux2_klein", "sd3", "qwen_image", "z_image"]
FROM_IMAGE = ["flux", "sd3", "qwen_image", "z_image"]  # FLUX.2 edits it

sd3_folder, qwen_image_folder, z_image_folder = test_sd3.folder, test_qwen_image.folder, test_z_image.folder
flux2_klein_folder, dev_folder = test_flux2_klein.base, test_flux2_dev.dev
kontext_folder = test_flux_kontext.folder
sana_folder, cleaning = test_sana.folder, test_wan_first_frame.cleaning


@pytest.fixture(scope="session", autouse=True)
def _module_cache(tmp_path_factory: pytest.TempPathFactory):
    """diffusers copies custom pipelines there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@dataclass(frozen=True)
class Case:
    """A base, an adapter trained on it, and the same in our pipeline, the stock one and the trainer's family."""

    name: str
    base: Path
    adapter: Path
    ours: Any
    stock: Any
    family: BaseFamily

    def unpack(self, latents: Tensor) -> Tensor:
        """The stock pipeline's latents in the family's shape."""
        if self.ours.packs_latents:
            size, scale = self.family.config, self.ours.vae_scale_factor
            latents = self.ours._unpack_latents(latents, size.height_px, size.width_px, scale)
        if self.name == "flux2_klein":  # whose pipeline undoes the batch norm
            norm = self.family.vae.bn
            std = (norm.running_var + norm.eps).sqrt().view(-1, 1, 1)
            latents = (self.ours._patchify_latents(latents) - norm.running_mean.view(-1, 1, 1)) / std
        return latents.reshape(-1, *self.family.latent_shape)

    @property
    def call(self) -> dict[str, Any]:
        """What the adapter says, as a caller of the stock pipeline has to."""
        info, settings = read_adapter(self.adapter), self.family.settings
        call: dict[str, Any] = {"num_inference_steps": info.rollout.num_steps, "output_type": "latent"}
        call |= {"height": info.model.height_px, "width": info.model.width_px}
        call |= {"max_sequence_length": settings["max_sequence_length"]}
        call[self.ours.guided_by] = settings["guidance_scale"]
        if self.name == "flux2_klein":
            embeds, _ = self.stock.encode_prompt(
                info.model.negative_prompt, max_sequence_length=call["max_sequence_length"]
            )
            return call | {"negative_prompt_embeds": embeds}
        return call | ({} if self.name == "flux" else {"negative_prompt": info.model.negative_prompt})


def run_code(code: str, folder: Path) -> dict[str, Any]:
    """What a script's names are after it."""
    (script := folder / "script.py").write_text(code, encoding="utf-8")
    return runpy.run_path(str(script))


def open_pipeline(base: Path, file: str, **options: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=file, trust_remote_code=True, dtype=torch.float32, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def exact(pipeline: Any, ours: Any, **changes: Any) -> Any:
    """A stock pipeline with the exact scheduler: one line of a user."""
    pipeline.scheduler = ours.scheduler_class.from_config(pipeline.scheduler.config, **changes)
    return pipeline


def make_case(name: str, base: Path, adapter: Path) -> Case:
    ours = open_pipeline(base, str(ROOT / "pipelines" / f"{name}.py"))
    ours.load_lora_weights(adapter, adapter_name="default")
    info = read_adapter(adapter)
    family = load_family(info.model.model_copy(update={"device": "cpu"}))
    load_adapter(family, str(adapter), 1.0)
    other = exact(stock(base, family.pipeline_class, dtype=torch.float32), ours)
    other.load_lora_weights(adapter)
    return Case(name, base, adapter, ours, other, family)


@pytest.fixture(scope="session")
def flux(finished_run: FinishedRun) -> Case:
    return make_case("flux", EMBEDDED, finished_run.output_dir / "adapter" / FILE_NAME)


@pytest.fixture(scope="session")
def get_case(
    flux: Case, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], Case]:
    """By name; the adapters of the other families are of two iterations."""
    cases = {"flux": flux}
    settings = {
        "flux2_klein": test_flux2_klein.SIZE | {"negative_prompt": "'blurry'"},
        "sd3": {"height_px": 32, "width_px": 32},
        "qwen_image": {"height_px": 32, "width_px": 48, "negative_prompt": "'blurry'"},
        "z_image": {"height_px": 32, "width_px": 48},
    }

    def train(name: str) -> Case:
        base, output = request.getfixturevalue(f"{name}_folder"), tmp_path_factory.mktemp(name)
        prompts = output / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        config = make_config(
            output,
            *(f"model.{key}={value}" for key, value in settings[name].items()),
            *(f"{key}={value}" for key, value in {"prompts.train": prompts, "prompts.held_out": prompts}.items()),
            *(f"model.path={base}", "model.device=cpu", "evaluation.strict=null"),
            *("rollout.group_size=2", "algorithm.num_anchors=1", "algorithm.updates_per_rollout=1", "lora.alpha=8"),
        )
        complete(prepare(config))
        return make_case(name, base, output / "adapter" / FILE_NAME)

    def get(name: str) -> Case:
        if name not in cases:
            cases[name] = train(name)
        return cases[name]

    return get


@pytest.fixture(params=FAMILIES)
def case(get_case: Callable[[str], Case], request: pytest.FixtureRequest) -> Case:
    return get_case(request.param)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def latents_of(pipeline: Any, **call: Any) -> Tensor:
    return pipeline(**{"prompt": PROMPTS[0], "seeds": 7, "output_type": "latent", **call}).images


@torch.no_grad()
def trained_latents(family: BaseFamily, noise: Tensor, num_steps: int = 4) -> Tensor:
    text = family.encode(PROMPTS[:1])
    return SOLVERS["dpmpp_2m"](lambda x, sigma: family.velocity(x, sigma, text), noise, family.sigmas(num_steps))[-1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The Hub that this process's client knows."""
    constants = huggingface_hub.constants
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


# The trainer's pictures ---------------------------------------------------------------------------------------------


def test_latents_are_the_trainers_in_ours_and_in_the_stock_pipeline_with_the_scheduler(case: Case):
    noise = noise_of(case.family, 7)
    expected, rounding = with_rounding(case.family.transformer, lambda: trained_latents(case.family, noise))
    ours = latents_of(case.ours)
    packed = case.ours._packed(noise)
    theirs = case.stock(prompt=PROMPTS[0], latents=packed, **case.call).images
    assert torch.equal(ours, theirs)
    if case.name == "flux":
        assert torch.equal(case.unpack(ours), expected)
    else:  # both passes of guidance in one batch, or norms summed in another order
        assert relative_error(case.unpack(ours), expected) <= rounding


def test_pictures_are_those_of_ngrpo_sample(case: Case):
    prompts, seeds = [PROMPTS[0], LONG], [3, 4] if case.name == "flux" else [3]
    expected = pixels(sample_images(case.adapter, None, prompts, seeds))
    actual = pixels(case.ours(prompts, seeds=seeds).images)
    assert expected.std() > 1
    assert np.abs(actual - expected).max() <= (0 if case.name == "flux" else 1)


def test_pictures_are_those_that_the_run_was_evaluated_with(case: Case):
    shown = sorted((case.adapter.parents[1] / "samples" / "last").glob("*.png"))
    assert shown
    for path in shown:
        text = read_png_text(path)
        (image,) = case.ours(text["prompt"], seeds=int(text["seed"])).images
        assert np.abs(pixels([image]) - pixels([Image.open(path)])).max() <= 1


def test_without_the_adapters_settings_other_pictures_are_drawn(case: Case):
    """What a stock pipeline does on its own: other steps, another solver."""
    theirs = case.stock(
        prompt=PROMPTS[0], latents=case.ours._packed(noise_of(case.family, 7)), **case.call | {"num_inference_steps": 8}
    )
    assert relative_error(theirs.images, latents_of(case.ours)) > 1e-3
    assert relative_error(latents_of(case.ours, solver="euler"), latents_of(case.ours)) > 1e-4


@dataclass(frozen=True)
class Other:
    """A family without a pipeline here: its base, and settings of the model."""

    base: Path
    settings: dict[str, Any]
    call: dict[str, Any]
    """What the stock pipeline has to be told beside them."""
    source: SourcePicture | None = None
    """What is edited, or what a video starts from."""


@pytest.fixture(params=["hunyuan_video15", "hunyuan_first_frame", "sana", "wan", "wan_first_frame"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Other:
    if request.param == "sana":
        base, size = request.getfixturevalue("sana_folder"), {"height_px": 32, "width_px": 32}
        times = [0.999 * (1 - step / 4) for step in range(4)]  # Sana's begin below 1
        return Other(base, size | {"guidance_scale": 4.5}, {"use_resolution_binning": False, "sigmas": times})
    folder = tmp_path_factory.mktemp(request.param)
    hunyuan_size = {key: value for key, value in hunyuan_parts.SMALL.items() if key != "max_sequence_length"}
    if request.param == "hunyuan_video15":
        return Other(hunyuan_parts.make_folder(folder), hunyuan_size, {"num_frames": 5})
    if request.param == "hunyuan_first_frame":
        source = family_checks.picture(tmp_path_factory.mktemp("source"), 3)
        settings = hunyuan_size | {"width_px": 32}  # where the pipeline's own size is 48 x 48
        call = {"num_frames": 5, "image": source.fitted(32, 32)}
        return Other(hunyuan_parts.make_first_frame_folder(folder), settings, call, source)
    if request.param == "wan":
        settings = dict(test_wan.SMALL, guidance_scale=5.0)
        return Other(test_wan.make_folder(folder, second=False), settings, {"num_frames": 5})
    request.getfixturevalue("cleaning")
    source = family_checks.picture(tmp_path_factory.mktemp("source"), 3)
    call = {"num_frames": 5, "image": source.fitted(32, 16)}
    return Other(make_first_frame_folder(folder), test_wan_first_frame.SIZE | {"guidance_scale": 5.0}, call, source)


def test_the_scheduler_drops_into_other_pipelines(other: Other, flux: Case):
    family = load(other.base, **other.settings)
    known = {name: family.settings[name] for name in ("guidance_scale", "max_sequence_length")}
    size = {"height": other.settings["height_px"], "width": other.settings["width_px"]}
    pipeline = stock(other.base, family.pipeline_class)
    if family.pipeline_class.startswith("HunyuanVideo15"):  # whose guider and tokenizer have the settings
        known = {}
        if family.edits:  # and whose first picture the size
            size, pipeline.target_size = {}, 32
    recording = record(
        exact(pipeline, flux.ours),
        lambda x: x.transpose(1, 2).reshape(1, *family.latent_shape) if x.ndim == 3 else x,
        prompt=LONG,
        latents=noise_of(family),
        num_inference_steps=4,
        **size,
        **known,
        **other.call,
    )
    check_sampling(family, Prompt(LONG, {}, other.source), recording, "dpmpp_2m")


def push(other: Other, solver: str, make_config: MakeConfig, folder: Path, hub: HubServer) -> Path:
    """Train an adapter and put it into the repository owner/name, with what goes beside it; the adapter's file."""
    rows = [{"prompt": prompt} | ({"source": "picture.png"} if other.source else {}) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if other.source is not None:
        (folder / "picture.png").write_bytes(other.source.read())
    settings = {f"model.{key}": value for key, value in other.settings.items()}
    settings |= dict.fromkeys(("prompts.train", "prompts.held_out"), folder / "prompts.jsonl")
    settings |= {"model.path": other.base, "model.device": "cpu", "evaluation.strict": "null", "lora.alpha": 8}
    settings |= {"rollout.solver": solver, "rollout.shift": 2.5, "trainer.num_iterations": 1}
    settings |= {"rollout.group_size": 2, "algorithm.num_anchors": 1, "algorithm.updates_per_rollout": 1}
    complete(prepare(make_config(folder / "run", *(f"{key}={value}" for key, value in settings.items()))))
    adapter = folder / "run" / "adapter" / FILE_NAME
    hub.repositories["owner/name"] = Repository()
    name, files = read_pushed(adapter).pipeline, hub.files("owner/name")
    files[FILE_NAME] = adapter.read_bytes()
    file, source = (PIPELINE, pipeline_file(name)) if has_pipeline(name) else (SCHEDULER, scheduler_file())
    files[file] = source.encode()
    return adapter


def run_card(adapter: Path, base: Path, folder: Path) -> dict[str, Any]:
    """What the code of an adapter's card leaves; word for word, but for the GPU, in a folder where it finds all."""
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / base.name).symlink_to(base)
    code = diffusers_usage("owner/name", None, read_pushed(adapter), LONG, 7)
    return run_code(code.replace('.to("cuda")', ""), folder)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler"])
def test_the_cards_snippet_of_other_families_draws_the_trainers_picture(
    solver: str, other: Other, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer
):
    adapter = push(other, solver, make_config, tmp_path, hub)
    monkeypatch.chdir(tmp_path)
    names = run_card(adapter, other.base, tmp_path)
    expected = pixels(sample_images(adapter, None, [Prompt(LONG, {}, other.source)], [7]))
    sigmas, scheduler = load(other.base, **other.settings).sigmas(4, 2.5), names["pipeline"].scheduler
    torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=0, atol=2e-6)  # Sana's times are written in six digits
    assert scheduler.config.solver_order == {"dpmpp_2m": 2, "euler": 1}[solver]
    drawn = [np.asarray(names["image"])] if "image" in names else (names["video"] * 255).round()
    assert expected.std() > 1
    assert np.abs(np.stack(drawn).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["flux_kontext", "flux2_klein", "flux2"])
def test_the_cards_snippet_of_an_edit_draws_the_trainers_picture(
    name: str,
    request: pytest.FixtureRequest,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub: HubServer,
):
    """The prompt comes first, and the picture is drawn at the size that suits its source."""
    base, settings = {
        "flux_kontext": ("kontext_folder", test_flux_kontext.SIZE),
        "flux2_klein": ("flux2_klein_folder", test_flux2_edit.SETTINGS | {"negative_prompt": "'blurry'"}),
        "flux2": ("dev_folder", test_flux2_edit.SETTINGS | {"max_sequence_length": 256}),
    }[name]
    source = family_checks.picture(tmp_path, 3)
    edit = Other(request.getfixturevalue(base), settings, {}, source)
    adapter = push(edit, "dpmpp_2m", make_config, tmp_path, hub)
    assert read_pushed(adapter).pipeline == name
    monkeypatch.chdir(tmp_path)
    drawn = pixels([run_card(adapter, edit.base, tmp_path)["image"]])
    prompt = Prompt(LONG, {}, source)
    expected = pixels([*Sampler(drawing_settings(adapter, None, "cpu"), adapter).following(prompt)([prompt], [7])])
    assert drawn.shape == expected.shape
    assert expected.std() > 1
    assert np.abs(drawn - expected).max() <= 1


# One picture, one seed ----------------------------------------------------------------------------------------------


def test_a_picture_is_the_same_to_the_bit_whatever_is_drawn_with_it(case: Case):
    prompts = [PROMPTS[0], LONG]
    together = latents_of(case.ours, prompt=prompts, seeds=[5, 9])
    assert len(together) == 4
    for row, (prompt, seed) in enumerate((prompt, seed) for prompt in prompts for seed in (5, 9)):
        assert torch.equal(together[[row]], latents_of(case.ours, prompt=prompt, seeds=seed))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 9) * 2]
    by_generator = case.ours(prompts, generator=generators, num_images_per_prompt=2, output_type="latent").images
    assert torch.equal(by_generator, together)


def test_one_generator_draws_the_noises_that_the_stock_pipeline_draws(flux: Case):
    call = flux.call | {"prompt": PROMPTS, "num_images_per_prompt": 2}

    def drawn(pipeline: Any) -> Tensor:
        return pipeline(**call, generator=torch.Generator().manual_seed(3)).images

    ours, rounding = with_rounding(flux.ours.transformer, lambda: drawn(flux.ours))
    assert relative_error(drawn(flux.stock), ours) <= rounding
    torch.manual_seed(3)
    assert torch.equal(flux.ours(**call).images, ours)


def test_neighbours_have_the_noises_and_the_pictures_of_a_training_group(flux: Case, finished_run: FinishedRun):
    run = finished_run.run
    seed = derive_seed(run.config.seed, "rollout", run.iteration, 0)
    module = sys.modules[type(flux.ours).__mro__[1].__module__]
    shape = run.family.latent_shape
    noises = torch.cat(module.seeded_noises((1, *shape), seed, 4, 0.5))
    assert torch.equal(noises, run.algorithm.neighborhood(shape, seed))  # pyright: ignore[reportAttributeAccessIssue]
    assert module.derive_seed(seed, "delta", 3) == derive_seed(seed, "delta", 3)

    with torch.no_grad(), lora.swapped(run.family.transformer, run.lora_step.averaged):
        rollout = next(iter(roll_out(run, run.family.encode(PROMPTS[:1] * len(run.groups)))))
        pictures = run.family.decode(rollout.final)
    group = flux.ours(PROMPTS[0], seeds=seed, neighbors=4)
    assert np.abs(pixels(group.images) - pixels(pictures)).max() <= 1
    wide = flux.ours(PROMPTS[0], seeds=[seed, 1], neighbors=2, perturbation_strength=1.0, output_type="latent").images
    assert torch.equal(wide[[1]], latents_of(flux.ours, seeds=derive_seed(seed, "delta", 1)))


# What diffusers' users expect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
def test_strengths_are_those_of_the_trainers_family(strength: float, case: Case):
    noise = noise_of(case.family, 7)
    try:
        for pipeline in (case.ours, case.family.pipeline, case.stock):
            pipeline.set_adapters(pipeline.get_active_adapters(), strength)
        ours = latents_of(case.ours)
        theirs = case.stock(prompt=PROMPTS[0], latents=case.ours._packed(noise), **case.call).images
        with lora.disabled(case.family.transformer) if strength == 0 else nullcontext():
            expected, rounding = with_rounding(case.family.transformer, lambda: trained_latents(case.family, noise))
    finally:
        for pipeline in (case.ours, case.family.pipeline, case.stock):
            pipeline.set_adapters(pipeline.get_active_adapters(), 1.0)
    assert torch.equal(ours, theirs)
    assert relative_error(case.unpack(ours), expected) <= (0 if case.name == "flux" else rounding)
    if strength != 1:
        assert relative_error(ours, latents_of(case.ours)) > 1e-5


def fresh_pipeline(case: Case) -> Any:
    pipeline = open_pipeline(case.base, str(ROOT / "pipelines" / f"{case.name}.py"))
    pipeline.load_lora_weights(case.adapter, adapter_name="first")
    return pipeline


@pytest.fixture
def fresh(case: Case) -> Any:
    """A pipeline of one's own, with the adapter."""
    return fresh_pipeline(case)


@pytest.fixture
def pipeline(flux: Case) -> Any:
    """The same of FLUX.1 alone."""
    return fresh_pipeline(flux)


def rewrite(adapter: Path, path: Path, factor: float = 1.0, **rollout: Any) -> Path:
    """A copy of another strength, and with other settings."""
    tensors = {name: tensor * factor if ".lora_B." in name else tensor for name, tensor in load_file(adapter).items()}
    metadata = read_metadata(adapter)
    own = json.loads(metadata["ngrpo"])
    own["rollout"] |= rollout
    save_file(tensors, path, metadata | {"ngrpo": json.dumps(own)})
    return path


def test_an_adapter_whose_base_had_taken_in_a_lora_asks_for_it_until_it_is_fused(
    pipeline: Any, flux: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    metadata = read_metadata(flux.adapter)
    own = json.loads(metadata["ngrpo"])
    own["model"]["fuse"] = {"few-steps.safetensors": 0.5}
    path = tmp_path / "beside.safetensors"
    save_file(load_file(flux.adapter), path, metadata | {"ngrpo": json.dumps(own)})
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(path, adapter_name="beside")
    asked = "was trained on a base with few-steps.safetensors at 0.5 in its weights"
    assert asked in caplog.text
    caplog.clear()
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(rewrite(flux.adapter, tmp_path / "few-steps.safetensors"), adapter_name="few-steps")
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(path, adapter_name="beside")
    assert asked not in caplog.text


def test_several_adapters_add_up_and_the_first_loaded_is_heard(
    case: Case, fresh: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    full, rounding = with_rounding(fresh.transformer, lambda: latents_of(fresh))
    base = latents_of(fresh, num_inference_steps=4)
    fresh.load_lora_weights(rewrite(case.adapter, tmp_path / "same.safetensors"), adapter_name="same")
    fresh.set_adapters(["first", "same"], [0.25, 0.75])
    assert relative_error(latents_of(fresh), full) <= rounding
    other = rewrite(case.adapter, tmp_path / "other.safetensors", -1.0, num_steps=3, solver="euler")
    fresh.load_lora_weights(other, adapter_name="other")
    fresh.set_adapters(["other", "first"])
    both, rounding = with_rounding(fresh.transformer, lambda: latents_of(fresh))
    assert "adapters other want other settings than first, loaded first, which is heard" in caplog.text
    fresh.disable_lora()
    assert relative_error(both, latents_of(fresh, seeds=7)) <= rounding
    fresh.enable_lora()
    fresh.set_adapters("other")
    assert torch.equal(latents_of(fresh), latents_of(fresh, num_inference_steps=3, solver="euler"))
    assert relative_error(base, full) == 0


def test_a_fused_adapter_draws_the_same_and_is_still_heard(case: Case, fresh: Any):
    full, rounding = with_rounding(fresh.transformer, lambda: latents_of(fresh))
    fresh.disable_lora()
    base = latents_of(fresh)
    fresh.enable_lora()
    fresh.fuse_lora()
    assert relative_error(latents_of(fresh), full) <= rounding
    fresh.unfuse_lora()
    assert relative_error(latents_of(fresh), full) <= rounding
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    assert relative_error(latents_of(fresh), full) <= rounding
    assert relative_error(base, full) > 1e-3


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_every_format_that_diffusers_reads_is_drawn_the_same(form: Format, case: Case, fresh: Any, tmp_path: Path):
    if form == "kohya" and case.name in ("flux", "sd3"):
        pytest.skip("diffusers reads kohya's names of FLUX.1 at its own width alone, and none of SD3")
    expected, rounding = with_rounding(fresh.transformer, lambda: latents_of(fresh))
    save_tensors(tmp_path / "x.safetensors", *convert(read_adapter_file(case.adapter), form))
    fresh.load_lora_weights(tmp_path / "x.safetensors", adapter_name="x")
    fresh.set_adapters("x")
    assert relative_error(latents_of(fresh), expected) <= rounding


@pytest.mark.parametrize("kind", ["alpha", "rslora", "patterns"])
def test_an_alpha_of_the_header_is_applied(kind: str, case: Case, fresh: Any, tmp_path: Path):
    """An adapter whose matrices are as much smaller as its alpha makes them larger; one layer has more ranks."""
    tensors, metadata = load_file(case.adapter), read_metadata(case.adapter)
    first = next(key for key in tensors if key.endswith(".lora_A.weight")).removesuffix(".lora_A.weight")
    rank = len(tensors[f"{first}.lora_A.weight"])
    config: dict[str, Any] = json.loads(metadata["lora_adapter_metadata"]) | {"transformer.lora_alpha": 3 * rank}
    scales = dict.fromkeys((key for key in tensors if ".lora_B." in key), 3.0)
    if kind == "rslora":
        config["transformer.use_rslora"] = True
        scales = dict.fromkeys(scales, 3 * rank**0.5)
    elif kind == "patterns":
        down, up = (tensors[f"{first}.lora_{side}.weight"] for side in "AB")
        tensors[f"{first}.lora_A.weight"] = torch.cat([down, torch.randn_like(down)])
        tensors[f"{first}.lora_B.weight"] = torch.cat([up, torch.zeros_like(up)], 1)
        layer = f"^{re.escape(first.removeprefix('transformer.'))}"
        config |= {"transformer.rank_pattern": {layer: 2 * rank}, "transformer.alpha_pattern": {layer: rank}}
        scales[f"{first}.lora_B.weight"] = 0.5
    expected, rounding = with_rounding(fresh.transformer, lambda: latents_of(fresh))
    tensors |= {key: tensors[key] / scale for key, scale in scales.items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata | {"lora_adapter_metadata": json.dumps(config)})
    fresh.load_lora_weights(tmp_path / "x.safetensors", adapter_name="x")
    fresh.set_adapters("x")
    assert relative_error(latents_of(fresh), expected) <= rounding
    fresh.set_adapters("x", 1 / 3)
    assert relative_error(latents_of(fresh), expected) > 1e-5


CPU = torch.device("cpu")


def offload_layers(pipeline: Any) -> None:
    """What `enable_sequential_cpu_offload` does, whose "cpu:0" accelerate does not take for a CPU."""
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            cpu_offload(module, CPU, offload_buffers=len(module._parameters) > 0)


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "models": lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu"),
    "layers": offload_layers,
    "groups": lambda pipeline: pipeline.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1),
    "leaves": lambda pipeline: pipeline.enable_group_offload(CPU, CPU, "leaf_level"),
}
"""With a CPU in the place of the GPU."""


@pytest.mark.parametrize("kind", OFFLOADS)
def test_offload_hooks_change_no_bit(kind: str, case: Case, fresh: Any):
    for part in (fresh.transformer, fresh.vae, *(getattr(fresh, name) for name in case.family.text_encoders)):
        for (
            weight
        ) in part.parameters():  # aligned, as when moved; mapped from a file, some CPUs round products otherwise
            weight.data = weight.data.clone()
    expected = latents_of(fresh, seeds=[7, 8], output_type="pt")
    start = {"image": Image.new("RGB", (16, 16), "red"), "output_type": "pt"}
    start |= {} if case.ours.edits else {"strength": 0.5}
    from_image = latents_of(fresh, **start)
    OFFLOADS[kind](fresh)
    hook = "_diffusers_hook" if kind in ("groups", "leaves") else "_hf_hook"
    for part in ("transformer", "vae", case.family.text_encoders[0]):
        assert any(hasattr(module, hook) for module in getattr(fresh, part).modules())
    for _ in range(2):
        assert all(weight.is_meta for weight in fresh.transformer.parameters()) == (kind == "layers")
        assert torch.equal(latents_of(fresh, seeds=[7, 8], output_type="pt"), expected)
    assert torch.equal(latents_of(fresh, prompt=[LONG, PROMPTS[0]], seeds=8, output_type="pt")[[1]], expected[1:])
    assert torch.equal(latents_of(fresh, **start), from_image)


@pytest.mark.parametrize("kind", ["groups", "leaves"])
def test_an_adapter_is_loaded_under_group_offload(kind: str, case: Case, fresh: Any):
    expected = latents_of(fresh)
    fresh.unload_lora_weights()
    OFFLOADS[kind](fresh)
    fresh.load_lora_weights(case.adapter)
    assert torch.equal(latents_of(fresh), expected)


def test_an_adapter_that_is_unloaded_is_not_heard(pipeline: Any):
    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    pipeline.unload_lora_weights()
    latents_of(pipeline, height=64, width=64, callback_on_step_end=callback)
    assert pipeline.num_timesteps == 28


def test_callbacks_see_every_step_and_may_interrupt(case: Case):
    steps: list[tuple[int, float]] = []

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append((step, timestep.item()))
        pipe._interrupt = len(steps) == 6
        return {"latents": tensors["latents"] * 1}

    drawn = latents_of(case.ours, seeds=[7, 8, 9], callback_on_step_end=callback)
    assert [step for step, _ in steps] == [0, 1, 2, 3, 0, 1]
    assert steps[0] == (0, 1000.0)
    assert len(drawn) == 2
    assert torch.equal(drawn[:1], latents_of(case.ours))


def test_every_output_type_and_tuples(case: Case):
    draw = case.ours
    images = draw(PROMPTS, seeds=[1, 2]).images
    arrays, tensors = (draw(PROMPTS, seeds=[1, 2], output_type=kind).images for kind in ("np", "pt"))
    size = case.family.config.height_px, case.family.config.width_px
    assert (arrays.shape, tuple(tensors.shape)) == ((4, *size, 3), (4, 3, *size))
    assert np.array_equal((arrays * 255).round().astype(int), pixels(images))
    assert isinstance(draw(PROMPTS[0], seeds=1, return_dict=False), tuple)
    assert type(draw(PROMPTS[0], seeds=1)).__name__.endswith("PipelineOutput")


def test_explicit_arguments_win(case: Case):
    """Positional ones too; with all of them it is the stock pipeline."""
    noise = case.ours._packed(noise_of(case.family, 7))
    call = case.call | {case.ours.guided_by: 2.5, "output_type": "latent"}
    if case.name != "flux2_klein":  # whose base has another shift for other numbers of steps
        call |= {"num_inference_steps": 3}
    if case.name == "flux":
        call |= {"true_cfg_scale": 2.0}
    crosses, dusk = ({"negative_prompt": text} for text in ("a cross", "dusk"))
    if case.name == "flux2_klein":
        crosses, dusk = (
            {"negative_prompt_embeds": case.ours.encode_prompt(text, max_sequence_length=64)[0]}
            for text in ("a cross", "dusk")
        )
    call |= crosses
    ours = case.ours(PROMPTS[0], latents=noise, **call).images
    assert torch.equal(ours, case.stock(prompt=PROMPTS[0], latents=noise, **call).images)
    assert relative_error(ours, case.ours(PROMPTS[0], latents=noise, **call | dusk).images) > 1e-6


@torch.no_grad()
def test_embeddings_in_place_of_prompts_draw_the_same(case: Case):
    expected = latents_of(case.ours, prompt=PROMPTS, seeds=[1, 2])
    tokens, negative = case.call["max_sequence_length"], case.call.get("negative_prompt")
    options = {"max_sequence_length": tokens}
    guided = {"do_classifier_free_guidance": True}
    if case.name == "flux":
        names = ("prompt_embeds", "pooled_prompt_embeds")
        rows = [case.ours.encode_prompt(prompt, None, **options) for prompt in PROMPTS]
    elif case.name == "sd3":
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        rows = [case.ours.encode_prompt(prompt, None, None, negative_prompt=negative, **options) for prompt in PROMPTS]
    elif case.name in ("flux2_klein", "qwen_image"):
        names = ("prompt_embeds",)
        rows = [case.ours.encode_prompt(prompt, **options) for prompt in PROMPTS]
    else:
        names = ("prompt_embeds", "negative_prompt_embeds")
        rows = [case.ours.encode_prompt(prompt, negative_prompt=negative, **guided, **options) for prompt in PROMPTS]
    for row, embeds in enumerate(rows):
        given = dict(zip(names, embeds, strict=False))
        drawn = latents_of(case.ours, prompt=None, seeds=[1, 2], **given)
        assert torch.equal(drawn, expected[2 * row : 2 * row + 2])


def test_a_prompt_is_encoded_once_for_all_its_pictures(case: Case, monkeypatch: pytest.MonkeyPatch):
    passes = []
    encoder = getattr(case.ours, case.family.text_encoders[-1])
    hook = encoder.register_forward_hook(lambda *_: passes.append(1))
    latents_of(case.ours, seeds=[1])
    once = len(passes)
    latents_of(case.ours, seeds=[1, 2, 3])
    hook.remove()
    assert len(passes) == 2 * once


def test_another_scheduler_is_left_as_it_is(flux: Case, pipeline: Any):
    exact(pipeline, flux.ours, shift=5.0, solver_order=1)
    assert torch.equal(latents_of(pipeline), latents_of(flux.ours, shift=5.0, solver="euler"))
    with pytest.raises(ValueError, match="solver and shift are for a FlowMatchEulerDiscreteScheduler, got a FlowDPM"):
        latents_of(pipeline, shift=3.0)


def test_at_another_size_the_shift_is_the_bases_own(flux: Case, pipeline: Any):
    base = pipeline.scheduler.config
    pipeline.scheduler = type(pipeline.scheduler).from_config(base, use_dynamic_shifting=True)
    seen: list[float] = []

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(timestep.item())
        return tensors

    for size in (64, 32):
        latents_of(pipeline, height=size, width=size, callback_on_step_end=callback)
    assert seen[1] == 900.0  # the adapter's shift of 3, of a time of 3 / 4
    assert seen[5] == pytest.approx(1000 * 3 * (e := np.exp(0.5 + 0.65 * (4 - 256) / 3840)) / (1 + 3 * e), rel=1e-6)


def test_a_pipeline_is_saved_and_opened_by_ours_and_by_diffusers(flux: Case, pipeline: Any, tmp_path: Path):
    pipeline.unload_lora_weights()
    pipeline(PROMPTS[0], seeds=7, num_inference_steps=2, height=64, width=64)
    pipeline.save_pretrained(tmp_path)
    again = open_pipeline(tmp_path, str(ROOT / "pipelines" / "flux.py"))
    again.load_lora_weights(flux.adapter)
    # Not to the bit: weights at another place of a file are at another place in memory, and other kernels run.
    expected, rounding = with_rounding(flux.ours.transformer, lambda: latents_of(flux.ours))
    assert relative_error(latents_of(again), expected) <= rounding
    theirs = exact(FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32), flux.ours)
    theirs.load_lora_weights(flux.adapter)
    noise = flux.ours._packed(noise_of(flux.family, 7))
    assert relative_error(theirs(PROMPTS[0], latents=noise, **flux.call).images, expected) <= rounding


def test_a_folder_with_a_pipeline_file_is_a_custom_pipeline(flux: Case, tmp_path: Path):
    for file in (ROOT / "pipelines").glob("*.py"):
        shutil.copy(file, tmp_path / ("pipeline.py" if file.name == "flux.py" else file.name))
    pipeline = open_pipeline(EMBEDDED, str(tmp_path))
    pipeline.load_lora_weights(flux.adapter.parent)
    assert torch.equal(latents_of(pipeline), latents_of(flux.ours))


def test_the_scheduler_drops_into_img2img(flux: Case, monkeypatch: pytest.MonkeyPatch):
    pipeline = exact(FluxImg2ImgPipeline.from_pipe(flux.stock), flux.ours)
    pipeline.set_progress_bar_config(disable=True)
    noised: list[Tensor] = []
    scale_noise = pipeline.scheduler.scale_noise
    monkeypatch.setattr(pipeline.scheduler, "scale_noise", lambda *args: noised.append(scale_noise(*args)) or noised[0])
    image = Image.fromarray((np.random.default_rng(0).random((64, 64, 3)) * 255).astype(np.uint8))
    call = {"num_inference_steps": 8, "max_sequence_length": 12, "height": 64, "width": 64, "output_type": "latent"}
    drawn = pipeline(PROMPTS[0], image=image, strength=0.75, generator=torch.Generator().manual_seed(0), **call).images
    text, sigmas = flux.family.encode(PROMPTS[:1]), flux.family.sigmas(8)[2:]
    start = flux.unpack(flux.ours._packed(noised[0]) if noised[0].ndim == 4 else noised[0])
    expected, rounding = with_rounding(
        flux.family.transformer, lambda: solve(flux.family, text, start, "dpmpp_2m", sigmas)
    )
    assert relative_error(flux.unpack(drawn), expected) <= rounding


@pytest.mark.slow
def test_a_compiled_transformer_draws_the_same(flux: Case, pipeline: Any):
    pipeline.transformer.compile()
    expected, rounding = with_rounding(flux.ours.transformer, lambda: latents_of(flux.ours))
    assert relative_error(latents_of(pipeline), expected) <= rounding


# Start from an image --------------------------------------------------------------------------------------------------


def picture(case: Case, seed: int) -> Image.Image:
    size = case.family.config.height_px, case.family.config.width_px, 3
    return Image.fromarray((np.random.default_rng(seed).random(size) * 255).astype(np.uint8))


def stock_from_image(case: Case, prompt: str, seed: int, image: Any, strength: float, **changes: Any) -> Any:
    """diffusers' image-to-image pipeline with our scheduler, told what the adapter says."""
    theirs = type(case.ours).from_image_class(**case.stock.components)
    theirs.set_progress_bar_config(disable=True)
    call = case.call | {"generator": torch.Generator().manual_seed(seed)} | changes
    return theirs(prompt, image=image, strength=strength, **call).images


@pytest.mark.parametrize("case", FROM_IMAGE, indirect=True)
def test_a_picture_from_an_image_is_the_stock_pipelines_of_its_seed(case: Case):
    images = [picture(case, 0), picture(case, 1)]
    drawn = latents_of(case.ours, prompt=[PROMPTS[0], LONG], seeds=[5, 9], image=images, strength=0.5)
    assert len(drawn) == 4
    for row, (prompt, seed) in enumerate((prompt, seed) for prompt in (0, 1) for seed in (5, 9)):
        theirs = stock_from_image(case, [PROMPTS[0], LONG][prompt], seed, images[prompt], 0.5)
        assert torch.equal(drawn[[row]], theirs)
    alone = latents_of(case.ours, seeds=9, image=images[0], strength=0.5)
    assert torch.equal(alone, drawn[[1]])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
    again = latents_of(
        case.ours, seeds=None, generator=generators, num_images_per_prompt=2, image=images[0], strength=0.5
    )
    assert torch.equal(again, drawn[:2])
    assert relative_error(alone, latents_of(case.ours, seeds=9, image=images[1], strength=0.5)) > 1e-2
    large = images[0].resize((100, 70))
    size = case.family.config.width_px, case.family.config.height_px
    theirs = stock_from_image(case, PROMPTS[0], 9, large.resize(size, Image.Resampling.LANCZOS), 0.5)
    assert torch.equal(latents_of(case.ours, seeds=9, image=large, strength=0.5), theirs)
    tensor = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    both, rounding = with_rounding(
        case.ours.transformer,
        lambda: latents_of(case.ours, prompt=[PROMPTS[0], LONG], seeds=5, image=tensor, strength=0.5),
    )
    assert relative_error(both, drawn[::2]) <= rounding


@pytest.mark.parametrize("case", FROM_IMAGE, indirect=True)
def test_of_an_image_the_last_steps_are_taken_at_the_exact_noise_levels(case: Case):
    steps: list[float] = []

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(timestep.item() / 1000)
        pipe._interrupt = len(steps) == 5
        return tensors

    call = {"image": picture(case, 0), "num_inference_steps": 8, "callback_on_step_end": callback}
    drawn = latents_of(case.ours, seeds=[7, 8, 9], strength=0.25, **call)
    expected = case.family.sigmas(8)[6:8]
    torch.testing.assert_close(torch.tensor(steps[:2]), expected, rtol=0, atol=1e-6)
    assert steps[2:4] == steps[:2]
    assert len(drawn) == 3
    assert len(steps) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"strength": 0.5}, r"strength must be in \(0, 1\] and needs image, got 0.5 and NoneType"),
        ({"image": 1, "strength": 0.0}, r"strength must be in \(0, 1\] and needs image, got 0.0 and int"),
        ({"image": 1, "strength": float("nan")}, r"strength must be in \(0, 1\]"),
        ({"image": [1, 2]}, "image must be one or as many as there are prompts, 1, got 2"),
        ({"image": 1, "neighbors": 2}, "neighbors and latents are for pictures from noise"),
        ({"image": 1, "seeds": None, "latents": torch.ones(1)}, "neighbors and latents are for pictures from noise"),
        ({"image": 1, "seeds": []}, "seeds must hold one seed at least"),
        ({"image": 1, "seeds": 2**64}, r"seeds must be from -2\*\*63 to 2\*\*64 - 1, got 18446744073709551616"),
    ],
)
def test_images_that_cannot_be_started_from_are_errors(call: dict[str, Any], message: str, flux: Case):
    with pytest.raises(ValueError, match=message):
        latents_of(flux.ours, **call)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"neighbors": 3, "seeds": None}, "neighbors=3 needs seeds"),
        ({"neighbors": 0}, "neighbors must be at least 1"),
        ({"neighbors": 2, "perturbation_strength": 0.0}, r"perturbation_strength in \(0, 1\], got 2 and 0.0"),
        ({"num_images_per_prompt": 2}, "seeds stands for num_images_per_prompt, generator and latents"),
        ({"generator": torch.Generator()}, "seeds stands for"),
        ({"seeds": None, "generator": [torch.Generator()] * 3}, "must be as many as pictures, 1, got 3"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"height": 100}, "height and width must be multiples of 16 here, got 100 and 64"),
        ({"solver": "heun"}, "solver must be one of euler, dpmpp_2m, got 'heun'"),
        ({"shift": 0.0}, "sigmas must decrease"),
        ({"prompt": []}, "prompt must be one value or as many as there are prompts"),
        ({"prompt": PROMPTS, "negative_prompt": ["a"] * 3}, "negative_prompt must be one value or .* 2, got 3"),
        ({"seeds": []}, "seeds must hold one seed at least"),
        ({"seeds": np.zeros(0, int)}, "seeds must hold one seed at least"),
        ({"seeds": [1, 2**64]}, r"seeds must be from -2\*\*63 to 2\*\*64 - 1, got 18446744073709551616"),
        (
            {"seeds": -(2**63) - 1, "neighbors": 2},
            r"seeds must be from -2\*\*63 to 2\*\*64 - 1, got -9223372036854775809",
        ),
        ({"seeds": 1.5}, "seeds must be whole numbers, got 1.5"),
        ({"seeds": np.array([0.5])}, "seeds must be whole numbers"),
        ({"seeds": "12"}, "seeds must be whole numbers, got '12'"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(call: dict[str, Any], message: str, flux: Case):
    with pytest.raises(ValueError, match=message):
        latents_of(flux.ours, **call)
    assert type(flux.ours.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("seeds", "numbers"),
    [
        (np.int64(7), [7]),
        (np.uint64(2**64 - 1), [2**64 - 1]),
        (np.arange(2), [0, 1]),
        (torch.tensor([3, 4]), [3, 4]),
        (range(2), [0, 1]),
        ((np.int32(1), 2), [1, 2]),
        (-1, [-1]),
    ],
)
def test_seeds_may_be_whole_numbers_of_any_library(seeds: Any, numbers: list[int], flux: Case):
    assert sys.modules[type(flux.ours).__mro__[1].__module__].as_seeds(seeds) == numbers


@pytest.mark.parametrize("form", ["lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_2.encoder.block.0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_text_encoders_that_diffusers_does_not_adapt_are_left_out_with_a_warning(
    name: str, form: str, get_case: Callable[[str], Case], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    case = get_case(name)
    if name == "sd3" and form.startswith("text_encoder_2"):
        pytest.skip("SD3's second text encoder is one that diffusers adapts")
    sides = ("down.weight", "up.weight") if form.startswith("lora_te") else ("A.weight", "B.weight")
    texts = {f"{form}.lora_{side}": torch.ones(2, 2) for side in sides}
    save_file(load_file(case.adapter) | texts, tmp_path / "x.safetensors", {"format": "pt"})
    try:
        case.ours.load_lora_weights(tmp_path / "x.safetensors", adapter_name="x")
        expected = case.ours.get_list_adapters()["transformer"]
    finally:
        case.ours.delete_adapters("x")
    assert "x" in expected
    assert f"adapts text encoders too, which are left out here: 2 tensors, as {form}" in caplog.text


def test_an_unknown_argument_is_an_error(flux: Case):
    with pytest.raises(TypeError, match="num_inference_step"):
        latents_of(flux.ours, num_inference_step=4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "no readable safetensors file"),
        ("pickle", r"adapters must be .safetensors files, got '.*adapter.bin': pickles can run code"),
        ("missing", "does not exist"),
        ("two", r"must hold one adapter, got a.safetensors, b.safetensors; choose with weight_name"),
        ("none", "must hold one adapter, got none"),
        ("metadata", "has ngrpo metadata that this pipeline cannot read"),
    ],
)
def test_an_adapter_that_is_none_is_an_error(damage: str, message: str, flux: Case, tmp_path: Path):
    path = tmp_path / "adapter.safetensors"
    if damage == "truncated":
        path.write_bytes(flux.adapter.read_bytes()[:3000])
    elif damage == "pickle":
        path = tmp_path / "adapter.bin"
        torch.save(load_file(flux.adapter), path)
    elif damage in ("two", "none"):
        for name in ("a", "b") if damage == "two" else ():
            shutil.copy(flux.adapter, tmp_path / f"{name}.safetensors")
        path = tmp_path
    elif damage == "metadata":
        save_file(load_file(flux.adapter), path, read_metadata(flux.adapter) | {"ngrpo": "{}"})
    pipeline = open_pipeline(EMBEDDED, str(ROOT / "pipelines" / "flux.py"))
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(path)


LAYER = {
    "flux": "transformer_blocks.0.attn.to_q",
    "flux2_klein": "transformer_blocks.0.attn.to_q",
    "sd3": "transformer_blocks.0.attn.to_q",
    "qwen_image": "transformer_blocks.0.attn.to_q",
    "z_image": "layers.0.attention.to_q",
}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("other", "fits no layer of this model: 2 of its 2 tensors have no place .unet.down.to_q.lora_[AB].weight"),
        ("part", r"fits this model in part: 2 of its \d+ tensors have no place \(transformer.nowhere.lora_A.weight"),
        (
            "half",
            r"fits this model in part: 1 of its \d+ tensors have no place \(transfor.*to_q.diff_b\); `ngrpo exp",
        ),
        ("size", r"is of another model: transformer.*to_q has in_features 1\d* there, \d+ here; load the base"),
        ("nan", "has weights that are not finite, in transformer.*lora_B.weight"),
        ("dora", "is a DoRA in words that diffusers does not read, and draws without; `ngrpo export"),
        ("alpha twice", r"says its alpha twice, in its header and beside its matrices; `ngrpo export"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_that_would_not_wholly_take_effect_is_an_error_and_leaves_nothing(
    name: str, damage: str, message: str, get_case: Callable[[str], Case], tmp_path: Path
):
    case, layer = get_case(name), f"transformer.{LAYER[name]}"
    tensors, metadata = load_file(case.adapter), read_metadata(case.adapter)
    if damage == "other":
        tensors = {f"unet.down.to_q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    elif damage == "part":
        tensors |= {f"transformer.nowhere.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    elif damage == "half":
        tensors[f"{layer}.diff_b"] = torch.ones(4)
    elif damage == "size":
        tensors[f"{layer}.lora_A.weight"] = torch.ones(4, 1)
    elif damage == "nan":
        tensors[f"{layer}.lora_B.weight"][0, 0] = torch.nan
    elif damage == "dora":
        tensors[f"{layer}.dora_scale"] = torch.ones(4)
    elif damage == "alpha twice":
        tensors[f"{layer}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    before = case.ours.get_list_adapters()
    with pytest.raises(ValueError, match=message):
        case.ours.load_lora_weights(tmp_path / "x.safetensors", adapter_name="x")
    assert case.ours.get_list_adapters() == before
    if damage != "alpha twice":
        with pytest.raises(ValueError, match=message.replace("adapter", "the adapter")):
            case.ours.load_lora_weights(tensors, adapter_name="x")


def test_an_adapter_of_another_family_is_an_error(case: Case, get_case: Callable[[str], Case]):
    match = r"(fits (no layer of this model|this model in part): .*|is of another model: .*); load the base that it was"
    for other in FAMILIES:
        if other != case.name:
            with pytest.raises(ValueError, match=match):
                case.ours.load_lora_weights(get_case(other).adapter, adapter_name="x")
            assert "x" not in case.ours.get_list_adapters().get("transformer", [])


@pytest.mark.parametrize("name", FAMILIES)
def test_alpha_beside_the_matrices_is_an_error_where_diffusers_does_not_read_it_there(
    name: str, get_case: Callable[[str], Case], tmp_path: Path
):
    """With an alpha of twice the rank FLUX.1, whose alpha diffusers reads, draws as at strength 2."""
    case, path = get_case(name), tmp_path / "x.safetensors"
    tensors = load_file(case.adapter)
    alphas = {key.replace(".lora_A.weight", ".alpha"): torch.tensor(2.0 * len(tensors[key])) for key in tensors}
    alphas = {key: alpha for key, alpha in alphas.items() if key.endswith(".alpha")}
    save_file(tensors | alphas, path, {"format": "pt"})
    if name != "flux":
        with pytest.raises(ValueError, match=r"x.safetensors' has alpha beside its matrices, where .*; `ngrpo export"):
            case.ours.load_lora_weights(path, adapter_name="x")
        return
    case.ours.load_lora_weights(path, adapter_name="x")
    try:
        case.ours.set_adapters("x")
        doubled, rounding = with_rounding(case.ours.transformer, lambda: latents_of(case.ours, **case.call))
        case.ours.set_adapters("default", 2.0)
        assert relative_error(doubled, latents_of(case.ours)) <= rounding
    finally:
        case.ours.delete_adapters("x")
        case.ours.set_adapters("default")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_strengths_that_are_not_finite_are_errors(bad: float, case: Case):
    message = "strengths of adapters must be finite, got (nan|inf)"
    for strengths in (bad, [bad], {"transformer": bad}):
        with pytest.raises(ValueError, match=message):
            case.ours.set_adapters("default", strengths)
    with pytest.raises(ValueError, match=message):
        case.ours.fuse_lora(lora_scale=bad)
    with pytest.raises(ValueError, match=message):
        latents_of(
            case.ours,
            **{
                "attention_kwargs" if case.name in ("flux2_klein", "qwen_image") else "joint_attention_kwargs": {
                    "scale": bad
                }
            },
        )
    assert case.ours.num_fused_loras == 0


@pytest.mark.parametrize("place", ["folder", "weight_name", "missing", "hub", "hub weight_name"])
def test_a_pickle_is_refused_wherever_it_is(place: str, case: Case, hub: HubServer, tmp_path: Path):
    torch.save({}, tmp_path / "adapter.bin")
    hub.repositories["owner/adapter"] = Repository()
    hub.files("owner/adapter")["adapter.bin"] = (tmp_path / "adapter.bin").read_bytes()
    source = {"folder": tmp_path, "weight_name": tmp_path, "missing": "gone/adapter.bin"}.get(place, "owner/adapter")
    options = {"weight_name": "adapter.bin"} if "weight_name" in place else {}
    with pytest.raises(ValueError, match=r"\.safetensors files?, got '?.*adapter.bin'?: pickles can run code"):
        case.ours.load_lora_weights(source, **options)


def test_an_adapter_of_another_trainer_is_drawn_as_the_stock_pipeline_draws(flux: Case, pipeline: Any, tmp_path: Path):
    path = tmp_path / "foreign.safetensors"
    metadata = {name: text for name, text in read_metadata(flux.adapter).items() if name != "ngrpo"}
    save_file(load_file(flux.adapter), path, metadata)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path)
    assert pipeline._active_settings() is None
    call = {name: value for name, value in flux.call.items() if name != "output_type"}
    assert torch.equal(latents_of(pipeline, **call), latents_of(flux.ours))


# The Hub, and the README ---------------------------------------------------------------------------------------------


def test_pipeline_and_adapter_come_from_a_repository_of_the_hub(case: Case, hub: HubServer):
    """As a push leaves them."""
    hub.repositories["owner/adapter"] = Repository()
    files = hub.files("owner/adapter")
    files |= {"pipeline.py": pipeline_file(case.name).encode(), "named.safetensors": case.adapter.read_bytes()}
    pipeline = open_pipeline(case.base, "owner/adapter")
    pipeline.load_lora_weights("owner/adapter")
    assert type(pipeline).__module__.startswith("diffusers_modules.local.owner--adapter.")
    assert torch.equal(latents_of(pipeline), latents_of(case.ours))
    files["other.safetensors"] = b""
    with pytest.raises(ValueError, match=r"must hold one adapter, got named.safetensors, other.safetensors"):
        pipeline.load_lora_weights("owner/adapter")


def test_the_quick_start_of_the_readme_runs_word_for_word(flux: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- quick start -->\n+```python\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    for name in ("ngrpo_lora", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(flux.adapter.parent, tmp_path / "runs" / "demo" / "adapter")
    monkeypatch.chdir(tmp_path)
    run_code(found[1], tmp_path)
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert np.array_equal(pixels([image]), pixels(flux.ours("a star above a heart", seeds=7).images))


def test_a_picture_to_edit_is_read_as_the_trainer_reads_it(tmp_path: Path):
    edit_sources = runpy.run_path(str(ROOT / "pipelines" / "neighbor_grpo.py"))["edit_sources"]
    turned, exif = Image.effect_noise((64, 40), 50).convert("RGB"), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((40, 64), 20_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (64, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as file:
            (drawn,) = edit_sources(file, None, 1, 48, 32)
        expected = SourcePicture(path, path.name, "here").fitted(48, 32)
        assert (drawn.mode, drawn.tobytes()) == ("RGB", expected.tobytes())
    with pytest.raises(ValueError, match="image must have 8 or 16 bits a channel, got 32-bit pixels"):
        edit_sources(Image.new("F", (64, 40)), None, 1, 48, 32)
