"""Measures of all held-out pictures at once: their metrics, and one message for what is wrong with them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeConfig
from runs import read_rows, same, weights

from ngrpo_lora.errors import UserError
from ngrpo_lora.training import setup
from ngrpo_lora.training.measuring import call
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

MEASURES = """
from pathlib import Path

import numpy as np

def redness(images, prompts):
    assert all(isinstance(prompt, str) for prompt in prompts)
    first, second = (np.asarray(image)[..., 0].mean() / 255 for image in images)
    return {"first": first, "second": np.float32(second), "pictures": len(images)}

def later(images, prompts):
    asked = Path(__file__).with_suffix(".txt")
    if asked.exists():
        raise RuntimeError("no more")
    asked.touch()
    return {"once": 1}

def one(images):
    return {}

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "variety.py").write_text(MEASURES)
    return tmp_path / "variety.py"


def test_measures_are_metrics_of_the_base_and_of_every_evaluation(file: Path, make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path / "run", f"evaluation.measures={file}:redness", "evaluation.every=1"))
    last = complete(run)
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["eval/pictures"] == 2
        assert (row["eval/first"] + row["eval/second"]) / 2 == pytest.approx(row["eval/redness_mean"], abs=1e-6)
        assert row["eval/first"] != row["eval/second"]
    assert last["eval/first"] == rows[-1]["eval/first"] != rows[0]["eval/first"]


def test_a_measure_that_fails_at_the_base_ends_the_run_and_later_it_does_not(
    file: Path, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    measures = f"evaluation.measures=[{file}:redness, {file}:later]"
    complete(prepare(make_config(tmp_path / "whole", measures)))
    first, *_, last = read_rows(tmp_path / "whole")
    assert first["eval/once"] == 1
    assert "eval/once" not in last
    assert last["eval/pictures"] == 2  # of the others
    assert f"evaluation at iteration 2: evaluation.measures: {file}:later failed (RuntimeError: no more)" in caplog.text

    run = prepare(make_config(tmp_path / "failed", measures))
    before = weights(run)
    with pytest.raises(UserError, match=r"evaluation of the base model: evaluation.measures: .*later failed"):
        complete(run)
    assert same(before, weights(run))
    assert read_rows(tmp_path / "failed") == []


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{file}:rednes", r"evaluation\.measures\.0 names no function of .*variety\.py, got 'rednes'; did you mean"),
        ("{file}:number", r"evaluation\.measures\.0 names no function of .*variety\.py, got 'number'"),
        (
            "{file}:one",
            r"evaluation\.measures\.0 must be a function of \(images, prompts\), but .* \(too many",
        ),
        ("gone.py:one", r"evaluation\.measures\.0 names the file 'gone\.py', which does not exist here"),
    ],
)
def test_a_function_that_cannot_be_is_refused_before_a_model_loads(
    reference: str,
    message: str,
    file: Path,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(setup, "load_fused", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        prepare(make_config(tmp_path / "run", f"evaluation.measures={reference.format(file=file)}"))


def test_whatever_numbers_python_has_are_floats():
    found = call("m.py:m", lambda images, prompts: {"a": 1, "b.c-d": np.float32(0.5), "e": np.int64(2)}, [], [], {})
    assert found == {"eval/a": 1.0, "eval/b.c-d": 0.5, "eval/e": 2.0}
    assert {type(value) for value in found.values()} == {float}
    assert call("m.py:m", lambda images, prompts: {}, [], [], {}) == {}


@pytest.mark.parametrize(
    "returned", [None, 0.5, [0.5], {"a": "b"}, {"a": None}, {"a": math.nan}, {"a": 1.0, "b": math.inf}, {1: 2.0}]
)
def test_other_than_finite_numbers_by_name_are_refused_in_one_message(returned: object):
    with pytest.raises(UserError) as error:
        call("m.py:m", lambda images, prompts: returned, [], [], {})
    assert str(error.value) == (
        "evaluation.measures: m.py:m must return finite numbers by name, such as {'hue_bits': 2.5}, "
        f"got {returned!r}; leave out what cannot be measured"
    )


@pytest.mark.parametrize("name", ["", "a b", "a/b", "world_mean", "strict_accuracy", "taken"])
def test_a_name_that_means_something_else_is_refused(name: str):
    with pytest.raises(UserError, match=rf"m must give names of its own, .*, got '{name}'; rename it"):
        call("m.py:m", lambda images, prompts: {name: 1.0}, [], [], {"eval/taken": 2.0})
