"""Adapters of different bases that are used together, which is said once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from ngrpo_lora.adapters.bases import base_of, warn_of_bases, warn_of_use
from ngrpo_lora.adapters.merging import merge
from ngrpo_lora.adapters.reading import AdapterFile
from ngrpo_lora.adapters.writing import save_tensors
from ngrpo_lora.config import ModelConfig

DEV, SCHNELL = "owner/dev", "owner/schnell"
FAST = {"path": DEV, "fuse": {"fast": 1.0}}


def header(**model: object) -> dict[str, str]:
    return {"ngrpo": json.dumps({"family": "flux", "model": ModelConfig(**model).model_dump()})}  # pyright: ignore[reportArgumentType]


def opened(name: str, metadata: dict[str, str]) -> AdapterFile:
    return AdapterFile(Path(name), metadata, {}, ("flux",), "diffusers", "header")


def said(files: list[AdapterFile], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        warn_of_bases(files)
    return caplog.messages


def test_a_base_is_a_model_at_its_revision_with_what_it_had_taken_in():
    assert base_of(header(path=DEV)) == DEV
    assert base_of(header(path=DEV, revision="v2", fuse={"a/b/c.safetensors": 0.5})) == (
        "owner/dev at v2 + 0.5 x a/b/c.safetensors"
    )
    for foreign in ({}, {"ngrpo": "{"}, {"ngrpo": "[]"}, {"ngrpo": '{"model": 3}'}, {"ss_base_model_version": "flux1"}):
        assert base_of(foreign) is None


def test_different_bases_are_named_once_with_their_adapters(caplog: pytest.LogCaptureFixture):
    dev, schnell, foreign = opened("a", header(path=DEV)), opened("b", header(path=SCHNELL)), opened("c", {})
    fast = opened("d", header(path=DEV, fuse={"fast": 1.0}))
    assert said([dev, schnell, foreign], caplog) == [
        "adapters were trained on different bases (a on owner/dev, b on owner/schnell), and may do less on another; "
        "use those of one base, unless you mean to mix them"
    ]
    (message,) = said([dev, fast], caplog)
    assert "(a on owner/dev, d on owner/dev + 1 x fast)" in message
    for alike in ([dev], [dev, opened("e", header(path=DEV, height_px=96))], [dev, foreign], [foreign, foreign], []):
        assert said(alike, caplog) == []


def test_a_merge_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    for name, model in (("a", DEV), ("b", SCHNELL)):
        tensors = {f"{layer}.lora_A.weight": torch.ones(1, 16), f"{layer}.lora_B.weight": torch.ones(16, 1)}
        own = json.loads(header(path=model)["ngrpo"]) | {"fused": {}, "held_out": {}}
        save_tensors(tmp_path / name, tensors, {"ngrpo": json.dumps(own)})
    with caplog.at_level(logging.WARNING, "ngrpo_lora.adapters.bases"):
        merged = merge([(str(tmp_path / name), 1.0) for name in "ab"], family="flux")
    (message,) = [record.getMessage() for record in caplog.records if "different bases" in record.getMessage()]
    assert f"{tmp_path / 'b'} on {SCHNELL}" in message
    assert json.loads(merged.metadata["ngrpo"]).keys() == {"family", "fused", "model"}  # of the first


@pytest.mark.parametrize(
    ("trained", "used", "beside", "taken", "part"),
    [
        ({"path": DEV}, DEV, (), {}, None),
        ({"path": DEV}, SCHNELL, (), {}, "was trained on owner/dev, and may do less on owner/schnell"),
        ({"path": "embedded"}, "embedded-edit", (), {}, "was trained on embedded, and may do less on embedded-edit"),
        ({"path": DEV}, ".", (), {}, None),  # a folder may hold any weights
        (FAST, DEV, ("fast",), {}, None),
        (FAST, DEV, ("slow",), {"b": 1.0}, "works beside fast, which owner/dev has not taken in; y"),
        (FAST, DEV, (), {"a": 1.0000001}, None),  # under another name, or merged
        (
            FAST,
            DEV,
            ("fast",),
            {"a": 0.5},
            "works beside fast at 1, which owner/dev has taken in at 0.5; its pictures may be worse there",
        ),
    ],
)
def test_an_adapter_that_is_used_otherwise_than_it_was_trained_is_told(
    trained: dict[str, object],
    used: str,
    beside: tuple[str, ...],
    taken: dict[str, float],
    part: str | None,
    caplog: pytest.LogCaptureFixture,
):
    metadata = {"ngrpo": json.dumps(json.loads(header(**trained)["ngrpo"]) | {"fused": {"fast": "a"}})}
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        warn_of_use([opened("a", metadata), opened("c", {})], used, beside, taken, "y")
    assert caplog.messages == ([] if part is None else [f"adapter a {part}"])
