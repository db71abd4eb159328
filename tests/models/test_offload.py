"""Blocks that wait in system memory: the same numbers to the bit, and never more than two of them on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import LoraConfig, ModelConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._offload import swap_blocks
from ngrpo_lora.models.flux import Family
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

CPU = torch.device("cpu")
TARGETS = ["to_q", "to_out.0", "proj_mlp", "ff.net.2"]


@pytest.fixture(scope="module")
def original() -> FluxTransformer2DModel:
    """Two double blocks and four single ones, which are smaller."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )
    return model.requires_grad_(False).eval()


def blocks_of(model: FluxTransformer2DModel) -> list[nn.Module]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def prepared(original: FluxTransformer2DModel, count: int, device: torch.device = CPU) -> FluxTransformer2DModel:
    """A copy of which `count` blocks wait, with an adapter that is not 0."""
    model = copy.deepcopy(original)
    if count:
        swap_blocks(blocks_of(model), count, device)
    model.to(device)
    lora.inject(model, LoraConfig(rank=2), TARGETS, [], 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(device)
    model.enable_gradient_checkpointing()
    return model


def run(model: FluxTransformer2DModel, seed: int = 0, device: torch.device = CPU) -> Tensor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    generator = torch.Generator().manual_seed(seed)
    return model(
        hidden_states=normal(1, 6, 8),
        encoder_hidden_states=normal(1, 5, 12),
        pooled_projections=normal(1, 10),
        timestep=torch.tensor([0.5], device=device),
        txt_ids=torch.zeros(5, 3, device=device),
        img_ids=torch.zeros(6, 3, device=device),
        return_dict=False,
    )[0]


def everything(model: FluxTransformer2DModel, device: torch.device = CPU) -> list[Tensor]:
    """Two passes without gradient, two with before their backward pass (as guidance has them), and one more."""
    with torch.no_grad():
        outputs = [run(model, seed, device) for seed in (0, 1)]
    outputs += [run(model, 2, device), run(model, 3, device)]
    (outputs[-1] - outputs[-2]).square().sum().backward()
    with torch.no_grad(), lora.disabled(model):
        outputs.append(run(model, 0, device))
    gradients = [parameter.grad for parameter in lora.parameters(model).values()]
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def waits(weight: Tensor) -> bool:
    """Whether a weight takes no memory on the device."""
    return weight.untyped_storage().nbytes() == weight.element_size()


def watched(model: FluxTransformer2DModel, count: int) -> Callable[[], tuple[list[int], set[int]]]:
    """Looks up which of the last `count` blocks are on the device, and in how many runs of memory."""
    frozen = [[w for w in block.parameters() if not w.requires_grad] for block in blocks_of(model)[-count:]]

    def look() -> tuple[list[int], set[int]]:
        here = [index for index, weights in enumerate(frozen) if not any(waits(w) for w in weights)]
        assert all(index in here or all(map(waits, weights)) for index, weights in enumerate(frozen))
        return here, {w.untyped_storage().data_ptr() for index in here for w in frozen[index]}

    return look


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_outputs_and_gradients_are_those_of_the_whole_model_to_the_bit(original: FluxTransformer2DModel, count: int):
    expected, actual = everything(prepared(original, 0)), everything(prepared(original, count))
    assert len(expected) == 5 + 28
    assert all(gradient.any() for gradient in expected)
    assert all(map(torch.equal, actual, expected))


def test_at_most_two_waiting_blocks_are_on_the_device_and_the_next_comes_while_one_computes(
    original: FluxTransformer2DModel,
):
    model = prepared(original, 5)
    look, seen = watched(model, 5), []
    for index, block in enumerate(blocks_of(model)[-5:]):
        block.register_forward_pre_hook(lambda *_, index=index: seen.append((index, *look())))
        for weight in block.parameters():
            if weight.requires_grad:
                weight.register_hook(lambda *_, index=index: seen.append((index, *look())))
    assert look() == ([], set())
    everything(model)
    assert len(seen) > 5 * 7
    assert all(index in here and len(buffers) <= 2 and len(here) <= 2 for index, here, buffers in seen)
    forwards = [[0, 1], [1, 2], [2, 3], [3, 4]]
    here = [here for _, here, _ in seen]
    assert here[:10] == [*forwards, [0, 4]] * 2  # without gradient: on from the last to the first
    assert here[10:15] == [*forwards, [3, 4]]  # with gradient: the last will be recomputed first
    recomputed = [here for index, here, _ in seen[20:-5] if index == 3]
    assert recomputed[0] == [2, 3]


def test_a_waiting_weight_keeps_its_shape_and_type_and_gives_nan_where_it_is_used_unasked(
    original: FluxTransformer2DModel,
):
    model = copy.deepcopy(original).to(torch.bfloat16)
    shapes = {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()}
    swap_blocks(blocks_of(model), 6, CPU)
    assert {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()} == shapes
    layer = model.transformer_blocks[0].attn.to_q
    assert layer(torch.ones(1, 32, dtype=torch.bfloat16)).isnan().all()


def test_a_gradient_through_a_block_that_was_not_recomputed_is_an_error(original: FluxTransformer2DModel):
    model = prepared(original, 4)
    model.disable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(model).sum().backward()


def test_a_run_with_waiting_blocks_is_the_run_without(make_config: MakeConfig, tmp_path: Path):
    common = ["trainer.gradient_checkpointing=true", "trainer.micro_batch_size=3", "evaluation.num_prompts=1"]
    common += ["rollout.group_size=2", "algorithm.num_anchors=1"]
    adapters, evaluations = [], []
    for count in (0, 3):
        run = prepare(make_config(tmp_path / str(count), *common, f"model.swap_blocks={count}"))
        places = {name: p.data_ptr() for name, p in run.lora_step.parameters.items()}
        evaluations.append({name: value for name, value in complete(run).items() if not name.startswith("time/")})
        assert {name: p.data_ptr() for name, p in run.lora_step.parameters.items()} == places
        adapters.append(load_file(tmp_path / str(count) / "adapter" / FILE_NAME))
    assert evaluations[0] == evaluations[1]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert any(weight.any() for name, weight in adapters[0].items() if "lora_B" in name)


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(UserError, match="model.swap_blocks must be at most 4, the blocks of this model, got 5"):
        Family(ModelConfig(swap_blocks=5), "cpu")


def test_quantised_weights_do_not_wait():
    block = nn.Linear(4, 4).requires_grad_(False)
    block.weight = nn.Parameter(block.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="model.swap_blocks must be 0 for a model whose weights are quantised, got 1"):
        swap_blocks([block], 1, CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["trainer.gradient_checkpointing=false"],
            "trainer.gradient_checkpointing must be true with model.swap_blocks=2",
        ),
        (["rollout.merge_adapter=true"], "rollout.merge_adapter must be false with model.swap_blocks=2, got true"),
        (["trainer.strategy=fsdp"], "trainer.strategy must be replicated with model.swap_blocks=2, got fsdp"),
        (["model.compile=true"], "model.swap_blocks must be 0 with model.compile=true, got 2"),
        (["model.quantization=nf4"], "model.swap_blocks must be 0 with a quantised base, got 2"),
    ],
)
def test_what_does_not_go_with_waiting_blocks_is_refused_before_the_model_loads(
    make_config: MakeConfig, tmp_path: Path, settings: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, "model.swap_blocks=2", "trainer.gradient_checkpointing=true", *settings)


@pytest.mark.gpu
def test_on_a_gpu_outputs_and_gradients_are_those_of_the_whole_model_to_the_bit(original: FluxTransformer2DModel):
    device = torch.device("cuda")
    expected = everything(prepared(original, 0, device), device)
    model = prepared(original, 6, device)
    assert {weight.device.type for weight in model.parameters()} == {"cuda"}
    for _ in range(3):  # copies and computation overlap differently every time
        for parameter in lora.parameters(model).values():
            parameter.grad = None
        assert all(map(torch.equal, everything(model, device), expected))


@pytest.mark.gpu
def test_on_a_gpu_only_two_blocks_take_memory():
    device = torch.device("cuda")
    blocks = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(8)]
    weights, x = [block.weight.to(device, copy=True) for block in blocks], torch.ones(1, 2048, device=device)
    expected = x
    for weight in weights * 3:
        expected = nn.functional.linear(expected, weight)
    del weights, weight
    before = torch.cuda.memory_allocated()
    swap_blocks(blocks, 8, device)
    torch.cuda.reset_peak_memory_stats()
    for block in blocks * 3:
        x = block(x)
    assert torch.equal(x, expected)
    assert torch.cuda.max_memory_allocated() - before < 2.1 * 2048 * 2048 * 4
