"""How far apart rounding alone takes two computations of the same float32 numbers, on the machine at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

DRAWS = 8
MULTIPLE = 4  # two, since either path is as far from the exact result; two, since few draws can miss the largest


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def with_rounding(network: nn.Module, compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What is computed with a float32 network, and the largest relative error that rounding explains.

    Two right paths add in different orders, as each kernel and each processor does, and sampling makes the difference
    larger: of the embedded model's latents it is 3e-7 to 1e-5, by size, seed and steps. So it is measured here: all is
    computed DRAWS times more, each time with every weight multiplied by 1 + 2^-23 or 1 - 2^-23 at random, which is to
    a weight what rounding is to a sum. The bound is MULTIPLE times the largest difference that this makes. It knows
    nothing of what rounds outside the network's sums, such as noise levels.
    """
    expected, largest = compute(), 0.0
    kept = [weight.clone() for weight in network.parameters()]
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        for weight in network.parameters():
            signs = torch.randint(2, weight.shape, generator=generator) * 2 - 1
            weight *= 1 + torch.finfo(torch.float32).eps * signs
        largest = max(largest, relative_error(compute(), expected))
        for weight, before in zip(network.parameters(), kept, strict=True):
            weight.copy_(before)
    return expected, MULTIPLE * largest
