"""Which process this is, by what its launcher has set."""

from __future__ import annotations

import pytest

from ngrpo_lora.ranks import launched, process_device


@pytest.mark.parametrize(("world_size", "several"), [(None, False), ("1", False), ("2", True)])
def test_a_process_has_peers_where_the_launcher_says_so(
    world_size: str | None, several: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert launched() is several


def test_each_process_has_its_own_gpu_unless_one_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process_device("cuda") == "cuda"  # alone
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [process_device(device) for device in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    monkeypatch.delenv("LOCAL_RANK")
    assert process_device("cuda") == "cuda:0"
