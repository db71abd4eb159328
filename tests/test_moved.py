"""A file of a user's that imports old places of the package is told the new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngrpo_lora import registry
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.moved import stale_imports


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "from ngrpo_lora.noise import neighbor_noise",
            ["ngrpo_lora.noise.neighbor_noise is ngrpo_lora.equations.noise.neighbor_noise now"],
        ),
        ("import ngrpo_lora.trainer", ["ngrpo_lora.trainer is ngrpo_lora.training.trainer now"]),
        (
            "from ngrpo_lora import lora, nothing_like_it",
            ["ngrpo_lora.lora is ngrpo_lora.adapters.lora now", "ngrpo_lora.nothing_like_it is gone"],
        ),
        (
            "def f():\n    from ngrpo_lora.sampling import sample_images",
            ["ngrpo_lora.sampling.sample_images is ngrpo_lora.sampling.sampler.sample_images now"],
        ),
    ],
)
def test_what_has_moved_is_named_with_its_new_place(source: str, said: list[str]):
    assert stale_imports(source) == said
    assert stale_imports(f"{source}\n{source}") == said  # once


def test_what_is_there_is_not_named():
    source = "import numpy\nfrom ngrpo_lora import adapters, gaussian_noise\nimport ngrpo_lora.equations.noise\n"
    assert stale_imports(source + "from ngrpo_lora.errors import *\nfrom ngrpo_lora.config import RunConfig") == []


def test_a_reward_of_an_older_version_is_refused_in_these_words(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("from ngrpo_lora.noise import neighbor_noise\n\ndef score(images):\n    return [0.0]\n")
    with pytest.raises(ConfigError, match=r"mine\.py' imports what has moved: ngrpo_lora\.noise\..*; change these imp"):
        registry.resolve_function(f"{path}:score")
    path.write_text("import a_package_that_is_gone\n\ndef score(images):\n    return [0.0]\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_gone"):
        registry.resolve_function(f"{path}:score")
