"""Nested state as tensors by name and JSON, and back."""

from __future__ import annotations

import json

import pytest
import torch

from ngrpo_lora.records import trees


def test_what_is_split_is_joined():
    shared = torch.arange(6.0)
    state = {
        "iteration": 3,
        "nothing": None,
        "infinite": float("inf"),
        "parameters": {"a.b": shared, "c": shared.to(torch.bfloat16)},
        "averaged": {"a.b": shared},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "empty": torch.zeros(0)}}, "betas": (0.9, 0.999)},
    }
    tree, tensors = trees.split(state)
    back = trees.join(json.loads(json.dumps(tree)), tensors)
    assert back["optimizer"]["betas"] == [0.9, 0.999]
    assert back["optimizer"]["state"].keys() == {0}
    assert back["averaged"]["a.b"] is back["parameters"]["a.b"]
    assert (back["iteration"], back["nothing"], back["infinite"]) == (3, None, float("inf"))
    for ours, theirs in ((back["parameters"]["c"], shared.to(torch.bfloat16)), (back["parameters"]["a.b"], shared)):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert len(tensors) == 4
    assert sum(tensor.nbytes for tensor in tensors.values()) == 6 * 4 + 6 * 2 + 4


def test_what_shares_memory_but_not_shape_has_names_of_its_own():
    whole = torch.arange(6.0)
    _, tensors = trees.split({"whole": whole, "half": whole[:3]})
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"whole": 6, "half": 3}


def test_what_no_checkpoint_can_hold_is_named():
    with pytest.raises(TypeError, match="optimizer.0 is a set, which a checkpoint cannot hold"):
        trees.split({"optimizer": [{1}]})
