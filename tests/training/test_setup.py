"""What is said or refused before a run starts, and the adapter that it starts from."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FinishedRun, MakeConfig
from torch import Tensor

from ngrpo_lora import gaussian_noise
from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.sampling.sampler import draw, sample_images
from ngrpo_lora.training.setup import open_algorithm, prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.types import TextEmbeds


def test_prompts_that_an_encoder_cuts_are_counted(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "prompts.txt").write_text("a red star\na red star and a blue circle\n" + "a red star and " * 40)
    (tmp_path / "held_out.txt").write_text("a red star")
    sources = [f"prompts.{key}={tmp_path / name}.txt" for key, name in (("train", "prompts"), ("held_out", "held_out"))]
    prepare(make_config(tmp_path / "run", *sources, "model.max_sequence_length=6"))
    assert "T5 reads 6 tokens: 2 of 3 prompts are cut there" in caplog.text
    assert "CLIP reads 12 tokens: 1 of 3 prompts are cut there" in caplog.text


def test_a_model_that_is_none_is_refused(make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "FluxPipeline"')
    with pytest.raises(UserError, match=r"model_index\.json is no JSON"):
        prepare(make_config(tmp_path / "run", f"model.path={tmp_path / 'model'}"))


def base_velocity(latents: Tensor, text: TextEmbeds) -> Tensor:
    with torch.no_grad():
        return load_family(ModelConfig()).velocity(latents, 0.5, text)


def test_float32_products_are_rounded_where_a_run_says_so(make_config: MakeConfig, tmp_path: Path):
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("true", "high"), ("false", "highest")):
            prepare(make_config(tmp_path / setting, f"trainer.tf32={setting}"))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_training_goes_on_from_an_adapter_and_a_resumed_run_has_its_own_weights(
    make_config: MakeConfig, finished_run: FinishedRun, tmp_path: Path
):
    """The first evaluation is that of the file, and the reference is still the base."""
    source = finished_run.output_dir
    settings = (f"lora.init_from={source}", "lora.rank=6", "trainer.num_iterations=1", "evaluation.every=1")
    config = make_config(tmp_path / "run", *settings)
    check_run(config)
    run = prepare(config)
    expected = sample_images(find_adapter(source), None, [p.text for p in run.held_out[:1]], [1000])[0]
    text = run.family.encode([run.held_out[0].text])
    drawn = draw(run.family, text, [1000], config.rollout.solver, run.schedule.sigmas)[0]
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1
    latents = gaussian_noise((1, *run.family.latent_shape), 0)
    with torch.no_grad(), lora.disabled(run.family.transformer):
        assert torch.equal(run.family.velocity(latents, 0.5, text), base_velocity(latents, text))
    complete(run)
    trained = {name: p.detach().clone() for name, p in run.lora_step.parameters.items()}

    resumed = make_config(tmp_path / "run", *settings, "resume=latest")
    (tmp_path / "elsewhere").mkdir()
    resumed = resumed.model_copy(update={"lora": resumed.lora.model_copy(update={"init_from": "gone.safetensors"})})
    for name, parameter in prepare(resumed).lora_step.parameters.items():
        assert torch.equal(parameter, trained[name])


# An algorithm of the user's, with the settings of `neighbor` and those of its methods that are named.
OLDER = """
from ngrpo_lora.algorithms import neighbor

class Config(neighbor.Config, frozen=True):
    name: str

class Algorithm:
    needs_reference, metric_names = False, ()
    {} = (getattr(neighbor.Algorithm, name) for name in "{}".split(", "))
    {}

    def __init__(self, config, rollout): ...
"""


@pytest.mark.parametrize(
    ("kept", "body", "message"),
    [
        (
            "rollout, advantages, loss",
            "def updates(self, advantages, seed): ...",
            "Algorithm.updates must have the parameters self, .*, iteration, as in .*, got self, advantages, seed;",
        ),
        ("rollout, advantages, updates", "", "Algorithm.loss must have the parameters .*, got no such method;"),
        (
            "rollout, advantages, updates, loss",
            "",
            "Algorithm must have needs_old, as in algorithms/_base.py; add them",
        ),
    ],
)
def test_an_algorithm_of_another_contract_is_refused(
    kept: str, body: str, message: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "of_mine").mkdir()
    (tmp_path / "of_mine" / "older.py").write_text(OLDER.format(kept, kept, body))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("of_mine", "of_mine.older"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=f"algorithm.name=of_mine.older: {message}"):
        open_algorithm(make_config(tmp_path / "run", "algorithm.name=of_mine.older"))
