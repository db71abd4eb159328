"""Files of users that import old places of this package are told the new ones, in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngrpo_lora import registry
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.moved import stale_imports

OLD = """
from ngrpo_lora.noise import derive_seed, neighbor_noise
from ngrpo_lora.scoring import Samples, combine
from ngrpo_lora import solvers, euler
import ngrpo_lora.trainer
from ngrpo_lora.errors import UserError
from ngrpo_lora.config import RewardConfig

def score(images, prompts, metadata):
    from ngrpo_lora.surrogate import auto_temperature
    return [0.0] * len(images)
"""


def test_every_stale_import_is_named_with_its_new_place_and_no_other():
    assert stale_imports(OLD) == [
        "ngrpo_lora.noise.derive_seed is ngrpo_lora.seeds.derive_seed now",
        "ngrpo_lora.noise.neighbor_noise is ngrpo_lora.equations.noise.neighbor_noise now",
        "ngrpo_lora.scoring.Samples is ngrpo_lora.types.Samples now",
        "ngrpo_lora.scoring.combine is ngrpo_lora.scoring.combining.combine now",
        "ngrpo_lora.solvers is ngrpo_lora.equations.solvers now",
        "ngrpo_lora.trainer is ngrpo_lora.training.trainer now",
        "ngrpo_lora.surrogate.auto_temperature is ngrpo_lora.equations.surrogate.auto_temperature now",
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("from ngrpo_lora.checkpoint import load", "ngrpo_lora.records.checkpoints.load"),
        ("from ngrpo_lora import checkpoint", "ngrpo_lora.records.checkpoints"),
        ("from ngrpo_lora.advantages import group_advantages", "ngrpo_lora.equations.advantages.group_advantages"),
        ("from ngrpo_lora.algorithms.neighbor import Config", None),
        ("from ngrpo_lora.sampling import load_family", "ngrpo_lora.models._loading.load_family"),
        ("from ngrpo_lora.adapter_file import read_adapter_file", "ngrpo_lora.adapters.reading.read_adapter_file"),
        ("from ngrpo_lora.lora import inject", "ngrpo_lora.adapters.lora.inject"),
        ("from torch import nothing", None),
    ],
)
def test_a_stale_import_is_told_its_place(line: str, told: str | None):
    found = stale_imports(line)
    assert [text.partition(" is ")[2] for text in found] == ([f"{told} now"] if told else [])


def test_what_never_was_is_gone():
    assert stale_imports("from ngrpo_lora.zzz import qqq") == ["ngrpo_lora.zzz.qqq is gone"]


def test_a_reward_file_of_old_is_refused_with_all_new_places(tmp_path: Path):
    path = tmp_path / "reward.py"
    path.write_text(OLD)
    with pytest.raises(
        ConfigError, match=r"imports what has moved: ngrpo_lora\.noise\.derive_seed is ngrpo_lora\.seeds"
    ):
        registry.resolve_function(f"{path}:score")


def test_an_import_that_fails_for_another_reason_says_it(tmp_path: Path):
    path = tmp_path / "reward.py"
    path.write_text("import a_package_that_is_not_there\n")
    with pytest.raises(
        ConfigError, match="reward.py, line 1: ModuleNotFoundError: No module named 'a_package_that_is_no"
    ):
        registry.resolve_function(f"{path}:score")


def test_an_algorithm_of_old_is_refused_with_all_new_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "house_of_old").mkdir()
    (tmp_path / "house_of_old" / "__init__.py").write_text("")
    (tmp_path / "house_of_old" / "mine.py").write_text("from ngrpo_lora.surrogate import leaping_logits\n")
    with pytest.raises(
        ConfigError, match=r"ngrpo_lora\.equations\.surrogate\.leaping_logits now; change these imports"
    ):
        registry.load(registry.ALGORITHMS, "house_of_old.mine")
