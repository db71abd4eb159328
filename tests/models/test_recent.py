"""Prompts met lately: their conditionings are the same as if they had been encoded again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MakeConfig

from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.models._recent import RecentPrompts
from ngrpo_lora.models.flux import Family


def tensors(values: int) -> dict[str, torch.Tensor]:
    """Of 4 * `values` bytes."""
    return {"embeds": torch.zeros(1, values)}


def test_those_that_were_asked_for_longest_ago_make_room():
    recent = RecentPrompts(max_bytes=32)
    recent.keep("a", tensors(4))
    recent.keep("b", tensors(4))
    assert [*recent.of(["a", "c", "b"])] == ["a", "b"]
    recent.of(["a"])
    recent.keep("c", tensors(4))
    assert [*recent.of("abc")] == ["a", "c"]
    assert recent.size == 32
    assert recent.keep("d", tensors(9))["embeds"].shape == (1, 9)  # is given, though there is no room for it
    assert (recent.of("abcd"), recent.size) == ({}, 0)


@pytest.fixture
def family(make_config: MakeConfig, tmp_path: Any) -> BaseFamily:
    return load_family(make_config(tmp_path / "run").model)


def test_a_prompt_is_encoded_once_for_each_setting(family: BaseFamily, monkeypatch: pytest.MonkeyPatch):
    encode_alone, encoded = Family.encode_alone, list[str]()

    def count(self: Family, prompt: str) -> dict[str, torch.Tensor]:
        encoded.append(prompt)
        return encode_alone(self, prompt)

    monkeypatch.setattr(Family, "encode_alone", count)
    first = family.encode(["a red star", "two circles", "a red star"])
    again = family.encode(["two circles", "a red star"])
    assert encoded == ["a red star", "two circles"]
    for name, rows in first.tensors.items():
        assert torch.equal(rows[[1, 0]], again.tensors[name])
    shorter = family.with_settings(family.config.model_copy(update={"max_sequence_length": 3}))
    assert shorter.encode(["a red star"]).tensors["prompt_embeds"].shape[1] == 3
    assert encoded == ["a red star", "two circles", "a red star"]
    assert torch.equal(family.encode(["a red star"]).tensors["prompt_embeds"], first.tensors["prompt_embeds"][:1])
