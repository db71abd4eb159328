"""A seed is a function of its labels, in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.seeds import consecutive_seeds, derive_seed


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_labels_give_the_same_seed_in_every_process(hash_seed: str):
    """SHA-256 of the labels joined by 0x1f, its first eight bytes without the last bit."""
    assert derive_seed(0, "rollout", 3, 1) == 1153230929943754437
    code = "from ngrpo_lora.seeds import derive_seed; print(derive_seed(0, 'rollout', 3, 1))"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "1153230929943754437\n"


def test_no_label_runs_into_the_next_and_a_seed_has_63_bits():
    seeds = [derive_seed(*labels) for labels in ((), (1,), (12,), (1, 2), ("1", "2", ""), (2, 1), (1, "2", 3))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= derive_seed(label) < 2**63 for label in range(100))
    assert max(derive_seed(label) for label in range(100)) > 2**62


def test_seeds_that_follow_one_another_end_where_generators_do():
    assert list(consecutive_seeds(7, 2)) == [7, 8]
    assert list(consecutive_seeds(2**64 - 2, 2)) == [2**64 - 2, 2**64 - 1]
    for first, count in ((2**64, 1), (2**64 - 1, 2), (-1, 1), (10**30, 1)):
        with pytest.raises(ConfigError, match=f"--seed must be from 0 to {2**64 - count}, for .*, got {first}$"):
            consecutive_seeds(first, count)
