"""What flows through the trainer: rows that are joined and chosen, and metrics that are averaged."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from ngrpo_lora.training.metering import Stages
from ngrpo_lora.types import Rollout, Samples, TextEmbeds, are_finite, mean_metrics


def test_prompts_that_are_joined_are_padded_with_zeros_and_chosen_by_row():
    """Sequences differ in length, a pooled vector and a number of tokens do not."""
    long, short = torch.ones(1, 3, 2), 2 * torch.ones(1, 1, 2)
    alone = [{"sequence": x, "pooled": x[:, 0], "lengths": torch.tensor([x.shape[1]])} for x in (long, short)]
    joined = TextEmbeds.join(alone)
    assert len(joined) == 2
    assert torch.equal(joined.tensors["sequence"][0], long[0])
    assert joined.tensors["sequence"][1].tolist() == [[2, 2], [0, 0], [0, 0]]
    assert joined.tensors["pooled"].tolist() == [[1, 1], [2, 2]]
    assert joined.tensors["lengths"].tolist() == [3, 1]
    assert joined[[1, 0, 1]].tensors["lengths"].tolist() == [1, 3, 1]
    assert TextEmbeds.join([]).tensors == {}


def test_a_rollout_moves_as_a_whole():
    rollout = Rollout(torch.ones(2, 1), torch.ones(2), torch.ones(1)).to("meta")
    assert {tensor.device.type for tensor in (rollout.latents, rollout.sigmas, rollout.final)} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_finite_where_each_of_their_values_is(dtype: torch.dtype):
    largest, inf, nan = torch.finfo(dtype).max, math.inf, math.nan
    rows = [
        [0, 0, 0, 0],
        [largest] * 4,
        [-largest] * 4,
        [inf, 0, 0, 0],
        [-inf, 0, 0, 0],
        [nan, 0, 0, 0],
        [inf, -inf, 0, 0],
    ]
    table = torch.tensor(rows, dtype=dtype)
    assert are_finite(table).tolist() == table.isfinite().all(1).tolist() == [True] * 3 + [False] * 4


@pytest.mark.gpu
def test_a_rollout_comes_from_a_gpu_without_a_wait_and_is_there_when_its_stage_ends():
    ones = torch.ones(8192, 8192, device="cuda")
    with Stages()("rollout"):
        late = Rollout(torch.linalg.matrix_power(ones / 8192, 64), torch.ones(2), ones[0]).to("cpu")
    assert late.latents.is_pinned()
    assert late.final.is_pinned()
    torch.testing.assert_close(late.latents, torch.full((8192, 8192), 1 / 8192))


def test_samples_are_chosen_with_all_that_belongs_to_them():
    images = [Image.new("RGB", (1, 1), (value, 0, 0)) for value in range(4)]
    samples = Samples(images, ["a", "b", "c", "d"], [{"n": n} for n in range(4)], group_size=2)
    chosen = samples[[3, 0]]
    assert (len(samples), len(chosen)) == (4, 2)
    assert chosen.images == [images[3], images[0]]
    assert (chosen.prompts, chosen.metadata, chosen.group_size) == (["d", "a"], [{"n": 3}, {"n": 0}], 2)


def test_metrics_are_averaged_and_of_the_largest_the_largest_is_kept():
    rows = torch.tensor([[1.0, 3.0], [2.0, 1.0]])
    assert mean_metrics(rows, ["policy/entropy", "policy/max_ratio"]) == {
        "policy/entropy": 1.5,
        "policy/max_ratio": 3.0,
    }
    none = mean_metrics(torch.zeros(0, 2), ["policy/entropy", "policy/max_ratio"])
    assert all(math.isnan(value) for value in none.values())
