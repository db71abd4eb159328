"""Which process this is, by what its launcher has set."""

from __future__ import annotations

import pytest

from ngrpo_lora.errors import UserError
from ngrpo_lora.ranks import is_first, launched, process_device, several_wanted, started_alone

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1"}, False),  # stale, and harmless
        (TORCHRUN, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "1"}, False),
        (TORCHRUN | {"PMI_SIZE": "1"}, True),  # torchrun, started by srun
    ],
)
def test_a_process_has_peers_where_the_launcher_says_so(environment: dict[str, str], several: bool):
    assert launched(environment) is several


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a number of processes, at least 1, got ''; unset WORLD_SIZE"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be a number of processes, at least 1, got '-2'"),
        ({"RANK": "4"}, "RANK must be a number from 0 to 3 with WORLD_SIZE=4, got '4'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be a number from 0 to 3"),
        ({"MASTER_PORT": None}, "must then have MASTER_PORT too; unset WORLD_SIZE, or start the run by accelerate"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(changed: dict[str, str | None], message: str):
    environment = {key: value for key, value in (TORCHRUN | changed).items() if value is not None}
    with pytest.raises(UserError) as error:
        launched(environment)
    assert message in str(error.value)


def test_the_first_process_is_the_one_of_rank_0():
    assert is_first({})
    assert is_first({"OMPI_COMM_WORLD_RANK": "0"})
    assert is_first(TORCHRUN | {"RANK": "0", "PMI_RANK": "1"})
    assert not is_first(TORCHRUN)
    assert not is_first({"PMI_RANK": "1"})


def test_a_launchers_only_process_starts_no_others():
    assert not started_alone({})
    assert started_alone({"RANK": "0", "WORLD_SIZE": "1"})
    assert started_alone({"ACCELERATE_MIXED_PRECISION": "no"})
    several = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    assert several_wanted(several)
    assert not several_wanted(several | {"WORLD_SIZE": "2"})
    assert not several_wanted({"ACCELERATE_USE_CPU": "True"})


def test_each_process_has_its_own_gpu_unless_one_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_device("cuda") == "cuda"  # alone
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert [process_device(device) for device in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
