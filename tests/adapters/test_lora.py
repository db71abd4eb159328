"""The adapter on a one-block FLUX transformer in memory, and on one of every family that it starts from a file of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from lora_files import kohya, merged_output, relative_error, write
from tiny_transformers import make, output, random_layers
from torch import Tensor

from ngrpo_lora import registry
from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.names import FORMATS
from ngrpo_lora.adapters.reading import Layer, read_adapter_file
from ngrpo_lora.adapters.writing import Format
from ngrpo_lora.config import LoraConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models.flux import Family

ATTENTION, FEED_FORWARD = list(Family.attention), list(Family.feed_forward)

BLOCK, SINGLE = "transformer_blocks.0.", "single_transformer_blocks.0."


def tiny_transformer(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 2, 2),
        )
    return model.to(dtype).requires_grad_(False).eval()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (2, 4, 4), "encoder_hidden_states": (2, 3, 8), "pooled_projections": (2, 8)}
    ids = {"txt_ids": torch.zeros(3, 3), "img_ids": torch.zeros(4, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()} | ids


def run(model: FluxTransformer2DModel) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model.dtype), timestep=torch.tensor([0.5, 0.5]), return_dict=False)[0]


def injected(seed: int = 0, **settings: object) -> FluxTransformer2DModel:
    model = tiny_transformer()
    config = LoraConfig.model_validate({"rank": 2} | settings)
    lora.inject(model, config, ATTENTION + FEED_FORWARD, ["proj_out"], seed)
    return model


def randomise(model: FluxTransformer2DModel) -> None:
    with torch.no_grad():
        for parameter in lora.parameters(model).values():
            parameter.normal_()


def test_the_named_layers_of_the_blocks_are_adapted_and_no_other():
    names = {name.split(".lora_")[0] for name in lora.parameters(injected())}
    joint = [f"attn.{part}" for part in ATTENTION] + [part for part in FEED_FORWARD if part.startswith("ff")]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
    assert names == {BLOCK + part for part in joint} | {SINGLE + part for part in single}


def test_a_new_adapter_changes_nothing():
    assert torch.equal(run(injected()), run(tiny_transformer()))


def test_the_adapter_adds_alpha_over_rank_times_b_a():
    model, base = injected(alpha=6.0), tiny_transformer()
    randomise(model)
    parameters, name = lora.parameters(model), f"{BLOCK}attn.to_q"
    update = parameters[f"{name}.lora_B.default.weight"] @ parameters[f"{name}.lora_A.default.weight"]
    x = torch.randn(5, 16)
    adapted, plain = model.get_submodule(name)(x), base.get_submodule(name)(x)
    torch.testing.assert_close(adapted - plain, 6.0 / 2 * x @ update.T, rtol=1e-4, atol=1e-4)


def test_the_adapter_is_float32_on_a_base_of_16_bits():
    model = tiny_transformer(torch.bfloat16)
    lora.inject(model, LoraConfig(rank=2), ATTENTION, [], seed=0)
    assert {p.dtype for p in lora.parameters(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert run(model).isfinite().all()


def test_the_start_is_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = lora.parameters(injected(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = lora.parameters(injected(seed=1)), lora.parameters(injected(seed=2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_disabled_is_the_base_exactly_and_only_for_the_context():
    model = injected()
    randomise(model)
    adapted = run(model)
    with lora.disabled(model):
        assert torch.equal(run(model), run(tiny_transformer()))
    assert torch.equal(run(model), adapted)
    assert not torch.equal(adapted, run(tiny_transformer()))


def test_disabled_ends_with_an_exception_too():
    model = injected()
    randomise(model)
    adapted = run(model)
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    assert torch.equal(run(model), adapted)


def test_a_merged_adapter_gives_the_same_outputs_from_the_base_layers_alone():
    model = injected(alpha=6.0)
    randomise(model)
    adapted, ran = run(model), []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: ran.append(1))
    with lora.merged(model):
        merged = run(model)
    assert not ran
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4 * adapted.abs().max().item())
    assert not torch.allclose(adapted, run(tiny_transformer()), rtol=1e-2, atol=1e-2)
    assert torch.equal(run(model), adapted)
    assert ran


def test_merged_weights_are_put_back_bit_for_bit_after_an_exception_too():
    model = injected()
    randomise(model)
    adapted = run(model)

    def fail_while_merged() -> None:
        with lora.merged(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_merged()
    assert torch.equal(run(model), adapted)
    with lora.disabled(model):
        assert torch.equal(run(model), run(tiny_transformer()))


def test_a_merged_adapter_keeps_the_type_of_the_base():
    model = tiny_transformer(torch.bfloat16)
    lora.inject(model, LoraConfig(rank=2), ATTENTION, [], 0)
    randomise(model)
    adapted = run(model).float()
    with lora.merged(model):
        assert {p.dtype for name, p in model.named_parameters() if "lora" not in name} == {torch.bfloat16}
        merged = run(model).float()
    assert (merged - adapted).norm() < 0.05 * adapted.norm()


def test_an_adapter_is_not_merged_into_quantised_weights():
    model = injected()
    layer = model.get_submodule(f"{BLOCK}attn.to_q").get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="rollout.merge_adapter=true needs a base whose weights are not quantised"):
        lora.merged(model).__enter__()


def test_swapped_weights_are_put_back_bit_for_bit():
    model, other = injected(), injected()
    randomise(model)
    randomise(other)
    before = {name: p.detach().clone() for name, p in lora.parameters(model).items()}
    weights = {name: p.detach() for name, p in lora.parameters(other).items()}

    def fail_with_the_others_weights() -> None:
        with lora.swapped(model, weights):
            assert torch.equal(run(model), run(other))
            raise KeyError

    with pytest.raises(KeyError):
        fail_with_the_others_weights()
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in lora.parameters(model).items())


def test_targets_that_fit_no_layer_are_an_error():
    with pytest.raises(UserError, match="lora.targets fits no layer of FluxTransformer2DModel"):
        lora.inject(tiny_transformer(), LoraConfig(), ["to_qkv"], [], 0)


# To start from


def injected_into(family: str, rank: int, targets: str = "attention+feed_forward") -> Any:
    """A transformer with the trainer's own LoRA, whose alpha is not its rank."""
    kind, transformer = registry.load(registry.MODELS, family).Family, make(family)
    suffixes = kind.attention + (kind.feed_forward if targets != "attention" else ())
    lora.inject(transformer, LoraConfig(rank=rank, alpha=3.0), [*suffixes], [], seed=0)
    return transformer


@pytest.mark.parametrize("family", ["flux", "qwen_image", "sana", "sd3", "wan", "z_image"])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_run_starts_with_the_effect_of_the_file_that_it_starts_from(family: str, form: Format, tmp_path: Path):
    """Ranks 1 to 2 in a LoRA of rank 4: what is left over has zeros in lora_B, and a lora_A to learn with."""
    if form not in FORMATS[family]:
        pytest.skip(f"{family} has no such format")
    path, layers = tmp_path / "x.safetensors", random_layers(family, make(family))
    layers = {name: x for name, x in layers.items() if f"{family}.{name}" != "flux.proj_out"}
    if form == "kohya":
        kohya(layers, family, 0.5, path)
    else:
        first = next(iter(layers))
        layers[first] = Layer(layers[first].down[:1], layers[first].up[:, :1])
        write(path, layers, family)
    file = read_adapter_file(path, family)
    transformer = injected_into(family, rank=4)
    lora.start_from(transformer, file, [])
    assert relative_error(output(family, transformer), merged_output(family, file.layers)) <= 1e-6
    parameters = lora.parameters(transformer)
    for name, layer in file.layers.items():
        down, up = (parameters[f"{name}.lora_{part}.default.weight"] for part in "AB")
        assert not up[:, layer.rank :].any()
        assert down[layer.rank :].flatten(1).any(1).all()


def test_a_file_of_higher_rank_says_which_rank_is_needed(tmp_path: Path):
    file = read_adapter_file(write(tmp_path / "x.safetensors", random_layers("sd3", make("sd3")), "sd3"))
    with pytest.raises(
        UserError, match=r"lora.rank must be at least 2, that of lora.init_from .*x.safetensors', got 1"
    ):
        lora.start_from(injected_into("sd3", rank=1), file, [])


@pytest.mark.parametrize(("part", "what"), [("bias", "biases"), ("magnitude", "the scales of a DoRA")])
def test_what_a_run_does_not_train_is_an_error(part: str, what: str, tmp_path: Path):
    layers = {
        name: replace(x, **{part: torch.ones(len(x.up))}) for name, x in random_layers("sd3", make("sd3")).items()
    }
    file = read_adapter_file(write(tmp_path / "x.safetensors", layers, "sd3"))
    with pytest.raises(UserError, match=rf"lora.init_from .*x.safetensors' has {what} beside its matrices \(transf"):
        lora.start_from(injected_into("sd3", rank=2), file, [])


def test_layers_that_a_run_does_not_train_are_an_error_unless_nothing_follows_from_them(tmp_path: Path):
    layers = random_layers("sd3", make("sd3"))
    file = read_adapter_file(write(tmp_path / "x.safetensors", layers, "sd3"))
    with pytest.raises(UserError, match=r"adapts 6 layers that lora.targets leaves out \(transformer_blocks.0.ff.net"):
        lora.start_from(injected_into("sd3", rank=2, targets="attention"), file, [])
    unused = "transformer_blocks.1.attn.add_q_proj"
    transformer = make("sd3")
    attention = registry.load(registry.MODELS, "sd3").Family.attention
    suffixes = [*attention, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj"]
    lora.inject(transformer, LoraConfig(rank=2), [*suffixes, "ff_context.net.2"], [unused], seed=0)
    lora.start_from(transformer, file, [unused])
    assert relative_error(output("sd3", transformer), merged_output("sd3", layers)) <= 1e-6
