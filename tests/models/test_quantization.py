"""A transformer in 8 or 4 bits: the real layers, trained end to end, and an adapter that fits the whole base too.

bitsandbytes' layers compute on the CPU as on a GPU; diffusers only refuses to load them there, which is undone here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import MakeConfig, update_peak
from diffusers import FluxPipeline
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from torch import Tensor, nn

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models import _quantization
from ngrpo_lora.models.flux import Family
from ngrpo_lora.planning.plan import make_plan
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.sampling import settings
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.world import EMBEDDED

KINDS = ["nf4", "int8", "int8_torchao", "float8_torchao"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which bitsandbytes' layers can be trained."""
    if request.param == "cpu":
        monkeypatch.setattr(_quantization, "NEED_GPU", ())
        for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
            monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
            monkeypatch.setattr(quantizer, "update_device_map", lambda *args: {"": "cpu"})
        # Otherwise layers in eval mode would be packed for the CPU's inference kernel, which has no backward pass.
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    return request.param


def needs(kind: str) -> None:
    pytest.importorskip(_quantization.PACKAGES[kind])


def plain(weight: Any) -> Tensor:
    """A copy of a weight's numbers, which torchao's types cannot be compared by."""
    return weight.dequantize() if "torchao" in type(weight).__module__ else weight.detach().clone()


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# Root mean squares relative to the base and to the adapter's effect; measured are 0.132 and 0.183 for nf4, 0.0095 and
# 0.0074 for int8; 0.0100 and 0.0092 for int8_torchao, 0.0366 and 0.0310 for float8_torchao, of the model before this.
@pytest.mark.parametrize(
    ("kind", "base_error", "effect_error"),
    [("nf4", 0.17, 0.2), ("int8", 0.02, 0.02), ("int8_torchao", 0.015, 0.015), ("float8_torchao", 0.05, 0.045)],
)
def test_a_quantised_base_trains_an_adapter_that_does_the_same_on_the_whole_base(
    make_config: MakeConfig, tmp_path: Path, device: str, kind: str, base_error: float, effect_error: float
):
    needs(kind)
    settings = [f"model.quantization={kind}", f"model.device={device}", "trainer.gradient_checkpointing=true"]
    settings += ["rollout.group_size=3", "evaluation.num_prompts=1"]
    settings += ["optimizer.learning_rate=5e-2"]  # the adapter then does as much as the base
    run = prepare(make_config(tmp_path, *settings))
    family: Any = run.family
    assert {p.dtype for p in run.lora_step.parameters.values()} == {torch.float32}
    frozen = {n: plain(p) for n, p in family.transformer.named_parameters() if not p.requires_grad}
    complete(run)
    for name, weight in family.transformer.named_parameters():
        if not weight.requires_grad:
            assert torch.equal(plain(weight), frozen[name]), name
    assert any(p.any() for name, p in run.lora_step.parameters.items() if "lora_B" in name)

    seen: dict[str, Any] = {}
    watch = family.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    latents = gaussian_noise((2, *family.latent_shape), 0).to(device)
    text = family.encode(["a red star", "two blue circles"])
    pipeline = FluxPipeline.from_pretrained(EMBEDDED).to(device)
    pipeline.load_lora_weights(tmp_path / "adapter" / FILE_NAME)
    with torch.no_grad():
        live = family.velocity(latents, 0.5, text)
        watch.remove()
        stock = pipeline.transformer(**seen)[0]
        ours = family.transformer(**seen)[0]
        pipeline.transformer.disable_adapters()
        with lora.disabled(family.transformer):
            quantised, whole = family.transformer(**seen)[0], pipeline.transformer(**seen)[0]
    assert live.isfinite().all()
    assert 1e-4 < relative(quantised, whole) < base_error
    assert relative(stock - whole, ours - quantised) < effect_error


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_only_the_transformer_is_quantised_and_keeps_its_types(device: str, kind: str):
    family: Any = Family(ModelConfig(quantization=kind, dtype="bfloat16"), device)
    layer = family.transformer.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype == {"nf4": torch.uint8, "int8": torch.int8}[kind]
    if kind == "nf4":
        assert (layer.weight.quant_type, layer.weight.quant_state.nested) == ("nf4", True)
        assert layer.weight.numel() == 128 * 128 / 2
        assert layer.compute_dtype == torch.bfloat16
    others = [*family.encoders, family.vae]
    assert {p.dtype for module in others for p in module.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        latents = gaussian_noise((1, *family.latent_shape), 0).to(device)
        assert family.velocity(latents, 0.5, family.encode(["a star"])).isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_layer_computes_with_its_inputs_as_they_are(device: str, dtype: str):
    family: Any = Family(ModelConfig(quantization="int8", dtype=dtype), device)
    layer = family.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(3, 5, layer.in_features, device=device, dtype=family.dtype, requires_grad=True)
    weight = (layer.weight.double() * layer.weight.SCB.double()[:, None] / 127).to(family.dtype)
    whole = x.detach().requires_grad_()
    actual, expected = layer(x), torch.nn.functional.linear(whole, weight, layer.bias)
    assert relative(actual, expected) < {"float32": 1e-6, "bfloat16": 2e-3}[dtype]
    for out in (actual, expected):
        out.square().sum().backward()
    assert x.grad is not None
    assert whole.grad is not None
    assert relative(x.grad, whole.grad) < {"float32": 1e-6, "bfloat16": 5e-3}[dtype]


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8_torchao"])
def test_an_update_with_a_quantised_base_takes_no_more_than_planned(
    make_config: MakeConfig, tmp_path: Path, device: str, kind: str
):
    needs(kind)
    settings = [f"model.quantization={kind}", f"model.device={device}", "trainer.gradient_checkpointing=true"]
    settings += ["rollout.group_size=4", "trainer.micro_batch_size=4", "algorithm.updates_per_rollout=1"]
    config = make_config(tmp_path, *settings)
    items = make_plan(config).gpu["update"]
    kept = items.get("kept state", 0) / 2  # the other half is there before
    planned = (
        items["activations"] + items["gradients"] + kept
    )  # with the largest weight unpacked, be that at the peak or not
    assert 0.8 * planned < update_peak(config) <= planned


def test_where_only_prompts_are_encoded_nothing_is_quantised():
    family = Family(ModelConfig(quantization="nf4"), "cpu", "text")
    assert family.pipeline.transformer is None
    assert len(family.encode(["a star"])) == 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_without_a_gpu_bitsandbytes_types_are_refused_before_the_model_loads(
    make_config: MakeConfig, tmp_path: Path, kind: str
):
    message = (
        f"model.quantization={kind} needs a CUDA GPU, but the model's device is cpu; set it to int8_torchao or none"
    )
    with pytest.raises(ConfigError, match=message):
        check_run(make_config(tmp_path, f"model.quantization={kind}", "model.device=cpu"))
    with pytest.raises(UserError, match=message):
        Family(ModelConfig(quantization=kind), "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, kind: str
):
    package = _quantization.PACKAGES[kind]
    real = importlib.util.find_spec
    monkeypatch.setattr(_quantization, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(ConfigError, match=f"model.quantization={kind} needs {package}.*; pip install {package}"):
        check_run(make_config(tmp_path, f"model.quantization={kind}", f"model.device={device}"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.merge_adapter=true", "rollout.merge_adapter must be false with model.quantization={}, got true"),
        ("trainer.strategy=fsdp", "trainer.strategy must be replicated with model.quantization={}, got fsdp"),
    ],
)
def test_what_does_not_go_with_quantised_weights_is_refused_with_the_configuration(
    make_config: MakeConfig, tmp_path: Path, kind: str, setting: str, message: str
):
    with pytest.raises(ConfigError, match=message.format(kind)):
        make_config(tmp_path, f"model.quantization={kind}", setting)


def test_without_a_gpu_one_draws_with_the_whole_base(monkeypatch: pytest.MonkeyPatch):
    for kind, drawn in (("nf4", "none"), ("int8", "none"), ("int8_torchao", "int8_torchao"), ("none", "none")):
        info = AdapterInfo(ModelConfig(quantization=kind), RolloutConfig())
        monkeypatch.setattr(settings, "own_settings", lambda path, adapter, info=info: info)
        assert settings.drawing_settings("adapter", None, "cpu").model.quantization == drawn


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.15), ("int8", 0.02)])
def test_layers_within_blocks_are_quantised_as_diffusers_does(kind: str, error: float):
    from bitsandbytes import nn as bnb

    block = nn.Sequential(nn.Linear(64, 128), nn.ModuleList([nn.Linear(128, 64, bias=False)])[0])
    inputs = torch.randn(5, 64)
    before = block(inputs)
    _quantization.quantize_linears(block, kind, torch.device("cpu"))
    layer = bnb.Linear4bit if kind == "nf4" else bnb.Linear8bitLt
    assert all(isinstance(child, layer) for child in block)
    difference = (block(inputs) - before).norm() / before.norm()
    assert 0 < difference < error
