"""Calls that repeat themselves are counted, and cost what they cost when each of them is walked."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from ngrpo_lora.config import LoraConfig, ModelConfig, load_config
from ngrpo_lora.planning import sketch as sketches
from ngrpo_lora.planning.meter import Meter
from ngrpo_lora.planning.repeats import counting_repeats


class Frames(nn.Module):
    """Doubles frames one by one, with a cache of up to two frames before; counts how often it is walked."""

    def __init__(self, grows: bool = False):
        super().__init__()
        self.layer = nn.Conv1d(4, 4, 1, device="meta")
        self.walked, self.grows = 0, grows

    def forward(self, frame: Tensor, cache: list[Tensor], place: list[int], first: bool = False) -> Tensor:
        self.walked += 1
        place[0] += 1
        inner = self.layer(torch.cat([*cache, frame], 2)).repeat(1, 1, 50).relu()  # more than all frames together
        kept = [*cache, frame.clone()]
        cache[:] = kept if self.grows else kept[-2:]
        return inner[..., -frame.shape[2] :].repeat(1, 1, 2)


def cost(network: Frames, frames: int, counted: bool) -> tuple[int, int, torch.Size]:
    """Peak, FLOPs and the shape of all frames together."""
    cache: list[Tensor] = []
    with torch.no_grad(), Meter() as meter, counting_repeats(network, meter) if counted else nullcontext():
        out = network(torch.zeros(2, 4, 8, device="meta"), cache, [0], first=True)
        for _ in range(frames - 1):
            out = torch.cat([out, network(torch.zeros(2, 4, 8, device="meta"), cache, [0])], 2)
    return meter.peak, meter.flops, out.shape


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("grows", [False, True])
def test_frames_cost_what_they_cost_one_by_one(frames: int, grows: bool):
    network = Frames(grows)
    whole = cost(network, frames, counted=False)
    walked, network.walked = network.walked, 0
    assert cost(network, frames, counted=True) == whole
    assert network.walked == (walked if grows else min(walked, 4))  # a cache that grows never repeats itself
    assert "forward" not in vars(network)


MODELS = [
    ("wan", "model.num_frames=33", False),
    ("wan", "model.num_frames=29", True),
    ("wan-i2v", "model.num_frames=25", False),
    ("flux", "model.width_px=2048", True),
]


@pytest.mark.parametrize(("preset", "setting", "tiling"), MODELS)
def test_decoding_costs_what_it_costs_when_every_call_is_walked(
    preset: str, setting: str, tiling: bool, monkeypatch: pytest.MonkeyPatch
):
    model: ModelConfig = load_config(preset, [setting]).model.model_copy(update={"dtype": "bfloat16"})
    counted = sketches.sketch_once.__wrapped__(model.model_dump_json(), LoraConfig()).decode(1, tiling)
    monkeypatch.setattr(sketches, "counting_repeats", lambda *_: nullcontext())
    assert sketches.sketch_once.__wrapped__(model.model_dump_json(), LoraConfig()).decode(1, tiling) == counted
