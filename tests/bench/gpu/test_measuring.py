"""What is measured of a row: real iterations of a model with random weights, on the CPU, and figures that add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.bench.gpu import measuring
from ngrpo_lora.bench.gpu.__main__ import main
from ngrpo_lora.bench.gpu.parts import Part, Row, make_parts
from ngrpo_lora.bench.gpu.results import opened_result, read_result, write_result
from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.training.export import save_adapter

PARTS = {part.name: part for part in make_parts("cpu")}


def smaller(row: Row) -> RunConfig:
    """A row's configuration with fewer steps and a small adapter."""
    rollout = row.config.rollout.model_copy(update={"num_steps": 4})
    lora = row.config.lora.model_copy(update={"rank": 4})
    return row.config.model_copy(update={"rollout": rollout, "lora": lora})


def measured(part: Part, index: int, folder: Path) -> dict[str, float]:
    """The figures of a part's row, by the process's own function."""
    row = part.rows[index]
    path = folder / "part.json"
    write_result(path, opened_result(replace(part, rows=(Row(row.label, smaller(row)),)), path, "this machine"))
    main(path)
    (found,) = read_result(path)["rows"]
    assert (found["state"], found["reason"]) == ("measured", None)
    return found["found"]


def test_an_iteration_is_timed_against_its_bare_calls(tmp_path: Path):
    found = measured(PARTS["sizes"], 1, tmp_path)
    parts = found["rollout_s"] + found["reward_s"] + found["update_s"]
    assert 0 < parts <= found["iteration_s"] < 2 * parts
    assert found["bare_s"] > 0
    assert 0 < found["waits"] < 1
    assert (found["samples"], found["old_per_sample"]) == (3, 4)
    assert found["theta_per_sample"] == pytest.approx(4 / 3)
    assert found["update_gib"] is None  # a CPU's memory is not measured
    assert 0 < found["plan_rollout_gib"] < found["plan_update_gib"]


def test_dance_trains_all_samples_of_its_group(tmp_path: Path):
    found = measured(PARTS["methods"], 1, tmp_path)
    assert (found["old_per_sample"], found["theta_per_sample"]) == (4, int(0.6 * 3))
    assert found["iteration_s"] > 0


def test_the_exported_adapter_does_in_diffusers_what_it_was_trained_to(tmp_path: Path):
    found = measured(PARTS["export"], 0, tmp_path)
    assert 0 <= found["difference"] < 0.1
    assert found["file_mib"] > 0


def test_a_broken_export_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def doubled(path: Path, family: BaseFamily, config: RunConfig) -> None:
        save_adapter(path, family, config)
        tensors = {name: 2 * tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, read_metadata(path))

    monkeypatch.setattr(measuring, "save_adapter", doubled)
    (row,), path = PARTS["export"].rows, tmp_path / "part.json"
    part = replace(PARTS["export"], rows=(Row(row.label, smaller(row)),))
    write_result(path, opened_result(part, path, "this machine"))
    with pytest.raises(SystemExit):  # a GPU that has failed may not be usable, so another process goes on
        main(path)
    (found,) = read_result(path)["rows"]
    assert found["state"] == "failed"
    assert "differs from the trained one" in found["reason"]


@pytest.mark.parametrize("index", range(4))
def test_every_optimizer_has_a_step(index: int, tmp_path: Path):
    if index:
        pytest.importorskip("bitsandbytes")
    found = measured(PARTS["optimizers"], index, tmp_path)
    assert found["step_s"] > 0
    assert found["elements"] > 0
    assert found["state_gib"] is None


def test_what_overlaps_counts_once():
    assert measuring.covered([]) == 0
    assert measuring.covered([(5, 6), (0, 2), (1, 3), (1, 1.5)]) == 4
    assert measuring.covered([(0, 10), (2, 3), (9, 11)]) == 11


def test_tests_are_counted(tmp_path: Path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_also_passes(): pass\n"
        "def test_fails(): assert False\n"
        "def test_is_skipped(): pytest.skip('no GPU')\n"
    )
    found = measuring.pytest_counts(tmp_path, "test_some.py")
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    with pytest.raises(UserError, match="pytest ended with status 4"):
        measuring.pytest_counts(tmp_path, "test_none.py")
