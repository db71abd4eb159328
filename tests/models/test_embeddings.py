"""Embeddings on disk: the same run to the bit, encoders that are gone before the transformer comes, nothing twice."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from safetensors.torch import load_file
from torch import Tensor

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.models import _embeddings
from ngrpo_lora.models._base import Parts
from ngrpo_lora.models._embeddings import EmbeddingCache
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.models.flux import Family
from ngrpo_lora.training import setup
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

PROMPTS = ["a red star", "two blue circles", "a red star"]
SHORT = ["rollout.group_size=2", "algorithm.num_anchors=1", "evaluation.num_prompts=1"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that reaches the text encoders, in turn."""
    prompts: list[str] = []
    encode_alone = Family.encode_alone

    def count(self: Family, prompt: str) -> Any:
        prompts.append(prompt)
        return encode_alone(self, prompt)

    monkeypatch.setattr(Family, "encode_alone", count)
    return prompts


def filled(folder: Path, config: ModelConfig, prompts: list[str]) -> EmbeddingCache:
    cache = EmbeddingCache(folder, config)
    cache.fill(Family(config, "cpu", "text"), prompts)
    return cache


def test_a_run_with_a_cache_is_the_run_without(make_config: MakeConfig, tmp_path: Path):
    rows, adapters = [], []
    for mode in ("keep", "cache"):
        complete(prepare(make_config(tmp_path / mode, *SHORT, f"model.text_encoders={mode}")))
        lines = (tmp_path / mode / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        rows.append([{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics])
        adapters.append(load_file(tmp_path / mode / "adapter" / FILE_NAME))
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert any(weight.any() for name, weight in adapters[0].items() if "lora_B" in name)


def test_encoders_are_gone_before_the_transformer_is_loaded(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoders: list[weakref.ref[Any]] = []
    loaded: list[Parts] = []

    def load(config: ModelConfig, parts: Parts = "all", base_is_sharded: bool = False) -> Any:
        loaded.append(parts)
        assert all(encoder() is None for encoder in encoders)
        family = load_family(config, parts, base_is_sharded)
        encoders.extend(map(weakref.ref, family.encoders))
        encoders.extend(weakref.ref(parameter) for encoder in family.encoders for parameter in encoder.parameters())
        return family

    monkeypatch.setattr(setup, "load_family", load)  # of the encoders alone
    monkeypatch.setattr(setup, "load_fused", load)
    family: Any = prepare(make_config(tmp_path, *SHORT, "model.text_encoders=cache")).family
    assert loaded == ["text", "image"]
    assert len(encoders) > 2
    assert family.encoders == []
    assert family.pipeline.text_encoder is family.pipeline.text_encoder_2 is None


def test_a_resumed_run_encodes_only_what_is_new(make_config: MakeConfig, tmp_path: Path, encoded: list[str]):
    def start(*settings: str) -> Run:
        return prepare(make_config(tmp_path, *SHORT, "model.text_encoders=cache", *settings))

    first = start("trainer.num_iterations=1", "evaluation.every=1")
    prompts = {first.prompts.prompt(i).text for i in range(2)} | {p.text for p in first.held_out} | {""}
    assert sorted(encoded) == sorted(prompts)
    complete(first)
    assert sorted(encoded) == sorted(prompts)
    encoded.clear()
    start("resume=latest", "trainer.num_iterations=1", "evaluation.every=1")
    assert encoded == []
    complete(start("resume=latest", "trainer.num_iterations=2"))
    assert sorted(encoded) == sorted({first.prompts.prompt(i).text for i in range(2, 4)} - prompts)


def test_rows_are_those_of_the_encoders(tmp_path: Path):
    family = Family(ModelConfig(), "cpu")
    cache = filled(tmp_path, ModelConfig(), PROMPTS)
    assert len(list(tmp_path.iterdir())) == 2
    expected = family.encode(PROMPTS)
    actual = cache.encode(PROMPTS, family.device)
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(actual.tensors[name], tensor)
        assert actual.tensors[name].dtype == tensor.dtype


def test_a_file_that_was_not_finished_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
):
    def torn(tensors: Any, path: Path) -> None:
        path.write_bytes(b"\x10")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_embeddings, "save_file", torn)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path, ModelConfig(), PROMPTS)
    assert list(tmp_path.iterdir()) == []
    cache = EmbeddingCache(tmp_path, ModelConfig())
    assert cache.missing(PROMPTS) == PROMPTS[:2]
    encoded.clear()
    filled(tmp_path, ModelConfig(), PROMPTS)
    assert encoded == PROMPTS[:2]
    assert cache.missing(PROMPTS) == []
    assert len(cache.encode(PROMPTS, torch.device("cpu"))) == 3


def test_what_decides_an_embedding_decides_its_file(tmp_path: Path):
    base = ModelConfig(path="owner/model", device="cpu")

    def file(prompt: str = "a star", **settings: Any) -> Path:
        return EmbeddingCache(tmp_path, base.model_copy(update=settings)).file(prompt)

    others = [
        file("a star "),
        file(path="owner/other"),
        file(revision="main"),
        file(dtype="bfloat16"),
        file(max_sequence_length=64),
        file(negative_prompt="blurred"),
    ]
    assert len({file(), *others}) == 1 + len(others)
    same = [file(height_px=128), file(guidance_scale=2.0), file(quantization="nf4"), file(text_encoders="cache")]
    assert {*same} == {file()}


def test_auto_is_the_file_of_the_type_that_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        dtype: EmbeddingCache(tmp_path, ModelConfig(dtype=dtype, device="cpu")).file("a star")
        for dtype in ("float32", "bfloat16")
    }
    for native, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native}, raising=False)
        auto = EmbeddingCache(tmp_path, ModelConfig(dtype="auto", device="cpu")).file("a star")
        assert auto == files[dtype]


def test_the_negative_prompt_of_guidance_by_two_passes_comes_from_the_cache_too(tmp_path: Path, encoded: list[str]):
    class Guided(Family):
        distilled_guidance = False

    config = ModelConfig(guidance_scale=2.0, negative_prompt="a grey square")
    whole, drawing = Guided(config, "cpu"), Guided(config, "cpu", "image")
    drawing.cache = filled(tmp_path, config, [*PROMPTS, config.negative_prompt])
    latents = gaussian_noise((3, *whole.latent_shape), 0)
    with torch.no_grad():
        expected = whole.velocity(latents, 0.5, whole.encode(PROMPTS))
        encoded.clear()
        text = drawing.encode(PROMPTS)
        assert torch.equal(drawing.velocity(latents, 0.5, text), expected)
        drawing.negative = None
        drawing.config = config.model_copy(update={"negative_prompt": "a red star"})
        text = drawing.encode(PROMPTS)
        assert not torch.equal(drawing.velocity(latents, 0.5, text), expected)
    assert encoded == []


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_encoders_visit_the_device_and_their_weights_never_leave_system_memory(device: str):
    family = Family(ModelConfig(text_encoders="offload"), "cpu")
    family.device = torch.device(device)

    def weights() -> list[Tensor]:
        return [parameter for encoder in family.encoders for parameter in encoder.parameters()]

    before = weights()
    with family.awake():
        assert {weight.device.type for weight in weights()} == {device}
    assert all(now is then and now.device.type == "cpu" for now, then in zip(weights(), before, strict=True))


@pytest.mark.gpu
def test_prompts_of_offloaded_encoders_are_on_the_gpu():
    family = Family(ModelConfig(text_encoders="offload"), "cuda")
    assert {tensor.device.type for tensor in family.encode(PROMPTS).tensors.values()} == {"cuda"}
