"""Files of every naming and method, broken in every way: each is refused in words, or drawn as diffusers draws it.

A case is a function of its number. What is checked of each: no traceback from reading, from `ngrpo info` or from any
export; no adapter that changes nothing without a word; and where stock diffusers loads the file too, the same change of
every layer that it changes.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lora_files import header, kohya, renamed
from safetensors.torch import load_file, save_file
from tiny_transformers import MAKERS, make, pipeline_of, random_layers
from torch import Tensor

from ngrpo_lora.adapters.names import FORMATS
from ngrpo_lora.adapters.reading import Layer, check_fits, log_warnings, read_adapter_file
from ngrpo_lora.adapters.report import describe, lines
from ngrpo_lora.adapters.writing import Format, convert
from ngrpo_lora.errors import UserError

CASES, IN_THE_DEFAULT_SUITE, IN_ONE_TEST = 500, 100, 25
FORMS = ("transformer.{}.lora_{}.weight", "diffusion_model.{}.lora_{}.weight", "base_model.model.{}.lora_{}.weight")
ODD_HEADERS: tuple[dict[str, str], ...] = (
    {},
    {"ss_network_dim": "Dynamic", "ss_network_alpha": "None"},
    {"ss_network_dim": "8", "ss_network_alpha": "1"},
    {"lora_adapter_metadata": "{"},
    {"lora_adapter_metadata": "[]"},
    {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "x", "transformer.r": 2})},
    {"ngrpo": "3", "ngrpo_merged": '["x"]'},
    {"ngrpo": json.dumps({"model": "x", "rollout": 1, "rewards": ["a"], "held_out": 5})},
    {"ngrpo": json.dumps({"rewards": [{"weight": "x"}], "held_out": {"before": {"a": "b"}, "after": {"a": None}}})},
    {"ss_base_model_version": "sdxl_base_v1-0"},
)
Tensors = dict[str, Tensor]
Change = Callable[[random.Random, Tensors], Tensors]


# Files ---------------------------------------------------------------------------------------------------------------


@cache
def model(family: str) -> tuple[Any, Any, dict[str, Layer]]:
    """A tiny transformer, diffusers' pipeline around it, and an adapter of its layers."""
    transformer = make(family)
    return transformer, pipeline_of(family, transformer), random_layers(family, transformer)


def sound(rng: random.Random, family: str, path: Path) -> Tensors:
    """The tensors of a file that has nothing wrong, in any of the namings and methods."""
    layers = model(family)[2]
    kind = rng.choice(["pair", "pair", "alpha", "dora", "bias", "kohya", "lokr", "text"])
    if kind == "kohya" and "kohya" in FORMATS[family] and family != "flux":  # whose width diffusers takes for granted
        return load_file(kohya(layers, family, 0.5, path))
    chosen = {name: layers[name] for name in rng.sample(sorted(layers), 3)}
    form = rng.choice(FORMS)
    tensors, stem = renamed(chosen, form), form.partition(".lora_")[0]
    for name, layer in chosen.items():
        own = stem.format(name)
        if kind == "alpha":
            tensors[f"{own}.alpha"] = torch.tensor(float(rng.randint(0, 3)))
        if kind == "dora":
            tensors[f"{own}.lora_magnitude_vector"] = torch.rand(len(layer.up))
        if kind == "bias":
            tensors[f"{own}.lora_B.bias"] = torch.rand(len(layer.up))
        if kind == "text":
            tensors["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"] = torch.ones(1, 4)
        if kind == "lokr" and layer.up.ndim == 2:
            rows, across = layer.sides[:2]
            for key in [key for key in tensors if key.startswith(f"{own}.lora_")]:
                del tensors[key]
            tensors |= {f"{own}.lokr_w1": torch.rand(2, 2), f"{own}.lokr_w2": torch.rand(rows // 2, across // 2)}
    return tensors


def leave_out(rng: random.Random, tensors: Tensors) -> Tensors:
    gone = rng.choice(sorted(tensors))
    return {key: tensor for key, tensor in tensors.items() if key != gone}


def rename(rng: random.Random, tensors: Tensors) -> Tensors:
    old = rng.choice(sorted(tensors))
    place = rng.randrange(len(old))
    new = rng.choice(
        [old[:place] + rng.choice("x._0") + old[place + 1 :], old.replace("0", "7"), old[::-1], f"x.{old}", ""]
    )
    return {new if key == old else key: tensor for key, tensor in tensors.items()}


def other_prefix(rng: random.Random, tensors: Tensors) -> Tensors:
    prefix = rng.choice(["", "unet.", "model.diffusion_model.", "lycoris_", "transformer.transformer."])
    return {prefix + key.partition(".")[2]: tensor for key, tensor in tensors.items()}


def reshape(rng: random.Random, tensors: Tensors) -> Tensors:
    key = rng.choice(sorted(tensors))
    change: Callable[[Tensor], Tensor] = rng.choice(
        [
            lambda t: t.flatten(),
            lambda t: t[None],
            lambda t: t[:0],
            lambda t: t.mT if t.ndim > 1 else t,
            lambda t: t[:1],
        ]
    )
    return tensors | {key: change(tensors[key][None] if not tensors[key].ndim else tensors[key]).contiguous().clone()}


def other_numbers(rng: random.Random, tensors: Tensors) -> Tensors:
    key = rng.choice(sorted(tensors))
    types = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.int8, torch.bool]
    change: Callable[[Tensor], Tensor] = rng.choice(
        [lambda t: t.to(rng.choice(types)), lambda t: t * float("nan"), lambda t: t * 1e38 * 1e38, lambda t: t * 0]
    )
    return tensors | {key: change(tensors[key])}


def mix(rng: random.Random, tensors: Tensors) -> Tensors:
    family = rng.choice(sorted(MAKERS))
    return tensors | renamed(dict(rng.sample(sorted(model(family)[2].items()), 2)), rng.choice(FORMS))


def as_it_is(rng: random.Random, tensors: Tensors) -> Tensors:
    return tensors


CHANGES: tuple[Change, ...] = (as_it_is, leave_out, rename, other_prefix, reshape, other_numbers, mix)


def broken(number: int, folder: Path) -> tuple[Path, str]:
    """The file of a case, and the family of the model that it is put on."""
    rng = random.Random(number)
    torch.manual_seed(number)
    family, path = rng.choice(sorted(MAKERS)), folder / f"{number}.safetensors"
    tensors = rng.choice(CHANGES)(rng, sound(rng, family, path))
    own = header(family) if rng.random() < 0.5 else rng.choice(ODD_HEADERS)
    damaged = rng.random() < 0.15
    save_file(tensors, path, dict([*own.items()][:1]) if damaged else own)  # several entries are written in any order
    if damaged:
        data = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
    return path, family


# What becomes of them ------------------------------------------------------------------------------------------------


def stock_changes(family: str, path: Path) -> dict[str, Tensor]:
    """What stock diffusers adds to each weight; empty where it cannot load the file, or does nothing."""
    transformer, pipeline, _ = model(family)
    try:
        pipeline.load_lora_weights(path, adapter_name="stock")
        return {
            name: module.get_delta_weight("stock")
            for name, module in transformer.named_modules()
            if hasattr(module, "get_delta_weight") and "stock" in module.active_adapters
        }
    except Exception:  # of every kind
        return {}
    finally:
        pipeline.unload_lora_weights()


def refusal(act: Callable[[], object]) -> str | None:
    """The message of what is refused in words, which must be one line; None for what succeeds."""
    try:
        act()
    except UserError as error:
        message = str(error)
    else:
        return None
    assert len(message.splitlines()) == 1
    return message


def check(number: int, folder: Path, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether a case was read; refused otherwise."""
    path, family = broken(number, folder)
    refusal(lambda: lines(describe(path)))
    exported(path)
    caplog.clear()
    if refused := refusal(lambda: check_fits(read_adapter_file(path, family), model(family)[0], family)):
        assert refused.startswith("adapter ")
        return False
    file = read_adapter_file(path, family)
    log_warnings(file)
    changed = [name for name, layer in file.layers.items() if layer.norm() or layer.bias is not None]
    assert changed or "changes nothing" in caplog.text
    for name, change in stock_changes(family, path).items():
        mine = file.layers[name].delta().view_as(change)
        assert (mine - change).norm() <= 1e-5 * change.norm() + 1e-6, name
    return True


def exported(path: Path) -> None:
    """Write a file in every format that its family has: only finite numbers, or a refusal."""
    if refusal(lambda: read_adapter_file(path)):
        return
    file = read_adapter_file(path)
    for form in get_args(Format):
        if not refusal(lambda form=form: convert(file, form)):
            tensors, own = convert(file, form)
            assert all(tensor.isfinite().all() for tensor in tensors.values())
            assert all(isinstance(value, str) for value in own.values())


def groups() -> list[Any]:
    starts = range(0, CASES, IN_ONE_TEST)
    return [pytest.param(start, marks=[pytest.mark.slow] * (start >= IN_THE_DEFAULT_SUITE)) for start in starts]


@pytest.mark.parametrize("start", groups())
def test_broken_files_are_refused_in_words_or_drawn_as_diffusers_draws_them(
    start: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    wrong, read = {}, 0
    for number in range(start, start + IN_ONE_TEST):
        try:
            read += check(number, tmp_path, caplog)
        except Exception as error:  # all of them are shown
            wrong[number] = f"{type(error).__name__}: {error}"
    assert not wrong
    assert 0 < read < IN_ONE_TEST


def test_a_case_is_the_same_file_each_time(tmp_path: Path):
    (tmp_path / "again").mkdir()
    for number in range(20):
        path, _ = broken(number, tmp_path)
        again, _ = broken(number, tmp_path / "again")
        assert sorted(path.read_bytes()) == sorted(again.read_bytes())
