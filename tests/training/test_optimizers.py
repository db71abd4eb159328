"""Learning-rate schedules in closed form, and which optimizer a name means."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from ngrpo_lora.config import OptimizerConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.training.optimizers import learning_rate_factor, load_state, make_optimizer


def factors(num_iterations: int, **settings: object) -> list[float]:
    config = OptimizerConfig.model_validate(settings)
    return [learning_rate_factor(config, iteration, num_iterations) for iteration in range(num_iterations)]


def test_schedules_on_numbers():
    assert factors(4, schedule="constant") == [1, 1, 1, 1]
    assert factors(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert factors(4, schedule="cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_even_steps_and_the_rest_follows_its_schedule(schedule: str):
    warmed = factors(12, schedule=schedule, warmup_iterations=4)
    assert warmed[:4] == [0.25, 0.5, 0.75, 1]
    assert warmed[4:] == factors(8, schedule=schedule)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 10, 50])
def test_no_iteration_has_a_rate_of_0_or_beyond_the_configured_one(warmup: int, schedule: str):
    assert all(0 < factor <= 1 for factor in factors(10, schedule=schedule, warmup_iterations=warmup))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", "AdamW"),
        ("adamw_8bit", "AdamW8bit"),
        ("paged_adamw_8bit", "PagedAdamW8bit"),
        ("lion_8bit", "Lion8bit"),
    ],
)
def test_a_name_is_that_optimizer_with_the_configured_settings(name: str, kind: str):
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    config = OptimizerConfig.model_validate(
        {"name": name, "learning_rate": 0.2, "betas": [0.8, 0.9], "weight_decay": 0.3, "eps": 1e-5}
    )
    optimizer = make_optimizer(config, [nn.Parameter(torch.ones(3))])
    assert type(optimizer).__name__ == kind
    (group,) = optimizer.param_groups
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.2, (0.8, 0.9), 0.3)
    if name != "lion_8bit":
        assert group["eps"] == 1e-5


def test_a_missing_bitsandbytes_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optimizer.name=lion_8bit needs bitsandbytes: pip install"):
        make_optimizer(OptimizerConfig(name="lion_8bit"), [nn.Parameter(torch.ones(3))])


def test_a_paged_optimizer_is_paged_after_it_is_resumed(monkeypatch: pytest.MonkeyPatch):
    """On a GPU the optimizer's own buffers are pages of system memory; elsewhere they are ordinary ones."""
    pytest.importorskip("bitsandbytes")
    config = OptimizerConfig(name="paged_adamw_8bit")
    weights = [nn.Parameter(torch.randn(256, 512)), nn.Parameter(torch.randn(3))]
    first = make_optimizer(config, weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    first.step()
    second: Any = make_optimizer(config, weights)
    buffers, buffer = [], second.get_state_buffer

    def noted(*given: Any, **more: Any) -> torch.Tensor:
        buffers.append(buffer(*given, **more))
        return buffers[-1]

    monkeypatch.setattr(second, "get_state_buffer", noted)
    load_state(second, first.state_dict())
    own = [second.state[weight][name] for weight in weights for name in ("state1", "state2")]
    assert [id(tensor) for tensor in own] == [id(tensor) for tensor in buffers]
    for weight in weights:
        for name, value in first.state[weight].items():
            torch.testing.assert_close(second.state[weight][name], value, rtol=0, atol=0)
