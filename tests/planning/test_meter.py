"""The count of live bytes and FLOPs: closed forms, and that shapes alone give what real numbers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngrpo_lora.planning.meter import Meter, attention_on_meta, thin


def test_a_tensor_counts_until_its_last_view_is_gone():
    weight = torch.ones(1000)
    with Meter() as meter:
        x = torch.zeros(1000)
        view = x.view(10, 100)[3]
        del x
        assert meter.live == 4000
        y = weight.t().mul_(1)
        assert meter.live == 4000
        del view, y
        assert meter.live == 0
        a = torch.zeros(100, dtype=torch.bfloat16)
        a + a
    assert (meter.live, meter.peak) == (200, 4000)


def test_what_a_backward_pass_needs_is_held_until_it_is_used():
    x, layers = torch.ones(8, 100, requires_grad=True), [nn.Linear(100, 100, bias=False) for _ in range(3)]
    for layer in layers:
        layer.weight.grad = torch.zeros(100, 100)
    with Meter() as meter:
        h = x
        for layer in layers:
            h = layer(h).tanh()  # keeps its result, of 8 * 100 floats, and lets its argument go
        held = meter.live
        h.sum().backward()
        del h
    assert held == 3 * 3200
    assert meter.live == 3200  # the gradient of x
    assert meter.flops == 3 * 3 * 2 * 8 * 100 * 100


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query = x.view(*x.shape[:2], 4, -1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, query, query).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(attended)))


class Model(nn.Module):
    """Two rows of blocks, the second one wider inside, and layers around them."""

    def __init__(self, first: int, second: int):
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(first))
        self.head = nn.Linear(32, 400)
        wide = (nn.Sequential(nn.Linear(32, 700), nn.Tanh(), nn.Linear(700, 32)) for _ in range(second))
        self.wide = nn.ModuleList(wide)

    def forward(self, x: Tensor, checkpoint: bool) -> Tensor:
        x = self.embed(x)
        for block in [*self.blocks, *self.wide]:
            run = torch.utils.checkpoint.checkpoint if checkpoint else lambda f, x, **_: f(x)
            x = run(block, x, use_reentrant=False)
        return self.head(x)


def measured(
    model: nn.Module, counts: dict[nn.Module, int], device: str, grad: bool, checkpoint: bool, calls: int = 1
) -> tuple[int, int]:
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    x = torch.zeros(2, 24, 16, device=device)
    with attention_on_meta(), Meter(counts) as meter, torch.set_grad_enabled(grad):
        y = sum(model(x, checkpoint) for _ in range(calls))
        assert isinstance(y, Tensor)
        if grad:
            y.square().sum().backward()
    return meter.peak, meter.flops


@pytest.mark.parametrize(("grad", "checkpoint"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("rows", [(9, 7), (5, 12), (2, 1), (20, 3)])
def test_three_blocks_of_a_row_and_no_contents_say_what_the_whole_model_takes(
    rows: tuple[int, int], grad: bool, checkpoint: bool
):
    whole = measured(Model(*rows), {}, "cpu", grad, checkpoint)
    with torch.device("meta"):
        thinned = Model(*rows)
    counts = thin(thinned)
    assert sum(counts.values()) == sum(rows)
    assert len(counts) == sum(min(3, count) for count in rows)
    assert measured(thinned, counts, "meta", grad, checkpoint) == whole


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("rows", [(9, 7), (3, 20)])
def test_gradients_of_a_second_call_wait_for_those_of_the_first(rows: tuple[int, int], checkpoint: bool):
    """As in guidance by two passes: a weight's gradients are added up before they reach it."""
    whole = measured(Model(*rows), {}, "cpu", True, checkpoint, 2)
    with torch.device("meta"):
        thinned = Model(*rows)
    peak, flops = measured(thinned, thin(thinned), "meta", True, checkpoint, 2)
    assert flops == whole[1]
    assert whole[0] <= peak <= 1.01 * whole[0]


def test_attention_is_put_back():
    original = F.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), attention_on_meta():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is original


def test_masks_without_contents_are_true_everywhere_and_only_within_the_context():
    """What is chosen by a mask is all, what by its opposite nothing, as of real tokens that are all a prompt's."""
    for device in ("cpu", "meta"):
        mask, tokens = torch.ones(5, dtype=torch.bool, device=device), torch.ones(5, 3, device=device)
        with attention_on_meta(), Meter() as meter:
            chosen, others = tokens[mask], tokens[~mask]
            assert torch.all(mask)
            assert (chosen.shape, others.shape) == ((5, 3), (0, 3))
            del others
            assert meter.live >= chosen.nbytes
    with pytest.raises((NotImplementedError, RuntimeError)):
        tokens[mask]


@pytest.mark.parametrize(
    ("device", "value", "walked"),
    [("meta", 0, False), ("meta", 0.5, False), ("meta", torch.ones(()), True), ("cpu", 0, True)],
)
def test_numbers_are_not_written_into_tensors_without_contents(device: str, value: object, walked: bool):
    class Counting(Meter):
        operators = 0

        def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
            self.operators += 1
            return super().__torch_dispatch__(*args, **kwargs)

    with attention_on_meta(), Counting() as meter:
        mask = torch.full((8, 8), -1.0, device=device)
        made = meter.operators
        for row in range(8):
            mask[row, : row + 1] = value
    assert (meter.operators > made) == walked
    assert meter.peak >= 8 * 8 * 4
    if device == "cpu":
        assert torch.equal(mask, torch.full((8, 8), -1.0).triu(1))
