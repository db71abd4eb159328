"""What an adapter adds to one layer, made from the tensors that its method keeps for it.

Each of these is linear in the layer's weight, and so is exactly a pair of matrices `up @ down`:

- LoRA: the pair itself; with a `mid` matrix (Tucker) it is folded into `down`.
- LoKr: `kron(w1, w2)`, of which each may be a product. Source: LyCORIS (arXiv 2309.14859).
- LoHa: `(w1_a @ w1_b) * (w2_a @ w2_b)`. Source: FedPara (arXiv 2108.06098).
- diff: the change itself; diff_b is that of the bias.

DoRA (arXiv 2402.09353) has a magnitude for each row beside these, by which the changed weight is scaled anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "OTHER_METHODS",
    "Layer",
    "Parts",
    "grouped",
    "is_no_layer",
    "made_layer",
    "nominal_rank",
    "readable",
    "scaled",
    "split_rows",
]

Parts = Mapping[str, Tensor]
"""The tensors that a file has for one layer, by what they are."""

_NAME = r"(?:\.(?P<adapter>[^.]+))?"  # of PEFT's adapter, within a key
_LORA = r"(?:\.lora_|\.lora\.|\.lora_linear_layer\.|(?<=_lora\d)\.|(?<=_lora)\.)"
KEYS: dict[str, str] = {
    "down": rf"\.lora_A(?:{_NAME}\.weight)?|{_LORA}down\.weight",
    "up": rf"\.lora_B(?:{_NAME}\.weight)?|{_LORA}up\.weight",
    "mid": r"\.lora_mid\.weight",
    "bias": rf"\.lora_B{_NAME}\.bias|\.lora_up\.bias",
    "alpha": r"\.alpha",
    "magnitude": rf"\.lora_magnitude_vector(?:{_NAME}\.weight)?|\.dora_scale",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
    **{part: rf"\.lokr_{part}{_NAME}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"hada_{part}": rf"\.hada_{part}{_NAME}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}
"""What the ends of keys mean."""

OTHER_METHODS = {
    r"\.oft_(blocks|diag|r\b)": "OFT",
    r"\.boft_": "BOFT",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"\.on_input$|\.ia3_l": "(IA)^3",
    r"\.(vera_lambda_[bd])|vera_[AB]": "VeRA",
}
"""Methods whose change is no sum, or is not in the file, by what their keys hold."""

NDIMS = (2, 4, 5)
"""Dimensions of the weights of linear layers and of convolutions of pictures and videos."""

NORM = r"norm\d*(_added)?(_[qkv])?(_img)?$"  # a name's end, with dots or without


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to one layer: `scale * up @ down` to its weight, and `scale * bias` to its bias.

    down: (r, in), of a convolution (r, in, k, k). up: (out, r), of a convolution (out, r, 1, 1).
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    """(out,); None where the layer's bias stays as it is."""
    magnitude: Tensor | None = None
    """(out,), DoRA's norms of the rows of the changed weight; None for a plain sum."""

    @property
    def rank(self) -> int:
        """The rank of this LoRA pair, the number of rows of its down matrix."""
        return len(self.down)

    @property
    def sides(self) -> tuple[int, ...]:
        """Shape of the weight that it changes: (out, in), of a convolution (out, in, k, k)."""
        return (len(self.up), *self.down.shape[1:])

    @property
    def folded(self) -> Tensor:
        """`scale * up` in float32, the up matrix with alpha folded in."""
        return self.up.float() * self.scale

    @property
    def folded_bias(self) -> Tensor | None:
        """`scale * bias` in float32, if it has one."""
        return None if self.bias is None else self.bias.float() * self.scale

    def delta(self) -> Tensor:
        """The change of the layer's weight in float32: (out, in), of a convolution (out, in * k * k)."""
        return self.folded.flatten(1) @ self.down.float().flatten(1)

    def exchanged(self) -> Layer:
        """The same with the halves of its rows exchanged, where they are a shift and a scale of `in` rows each."""
        if len(self.up) != 2 * self.down.shape[1]:
            return self
        half = len(self.up) // 2
        turned = {"up": self.up, "bias": self.bias, "magnitude": self.magnitude}
        return replace(self, **{name: part.roll(half, 0) for name, part in turned.items() if part is not None})

    def norm(self) -> float:
        """Frobenius norm of the weight's change, from two (r, r) products."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum().item()
        return abs(self.scale) * math.sqrt(max(square, 0.0))

    def is_finite(self) -> bool:
        """Whether all its numbers are finite, in float32 and with alpha folded in."""
        parts = (self.down.float(), self.folded, self.folded_bias, self.magnitude)
        return all(part.isfinite().all() for part in parts if part is not None)


def readable(tensor: Tensor) -> Tensor:
    """The tensor in a number type that can be computed with: float8, integers and others as float32.

    Raises:
        ValueError: a type that is no real number, or that has no arithmetic here.
    """
    if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return tensor
    try:
        if tensor.is_complex():
            raise NotImplementedError
        return tensor.float()
    except (NotImplementedError, RuntimeError):
        raise ValueError(f"has numbers of the type {str(tensor.dtype).removeprefix('torch.')}") from None


def grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each layer by the file's name for it, and the keys that are of no method that is known.

    Raises:
        ValueError: two tensors of one layer that mean the same, or several adapters in one file.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    unknown, twice, adapters = [], [], set()
    for key, tensor in tensors.items():
        found = next(((part, match) for part, form in KEYS.items() if (match := re.search(rf"(?:{form})$", key))), None)
        if found is None:
            unknown.append(key)
            continue
        part, match = found
        adapters |= {name for name in match.groupdict().values() if name and name != "weight"}
        parts = groups.setdefault(key[: match.start()], {})
        if part in parts:
            twice.append(key)
        parts[part] = tensor
    if len(adapters) > 1:
        raise ValueError(f"it holds {len(adapters)} adapters ({', '.join(sorted(adapters))}); save one of them alone")
    if twice:
        raise ValueError(f"it has {twice[0]!r} twice, under two names")
    return groups, unknown


def is_no_layer(name: str, parts: Parts) -> bool:
    """Whether a file's tensors for a name change a norm, a bare parameter or a bias alone, and no weight."""
    if not parts.keys() <= {"diff", "diff_b"}:
        return False
    return "diff" not in parts or parts["diff"].ndim not in NDIMS or re.search(NORM, name) is not None


def nominal_rank(parts: Parts) -> int | None:
    """The rank by which alpha is divided; None where a method has none, and alpha does not count.

    Source: LyCORIS; diffusers and ComfyUI alike.
    """
    if "diff" in parts:
        return None
    inner = next((parts[key] for key in ("down", "w2_b", "w1_b", "hada_w1_b") if key in parts), None)
    return None if inner is None else len(inner)


def made_layer(parts: Parts) -> Layer:
    """The layer's change as a pair of matrices with scale 1, whichever linear method a file keeps it in.

    Raises:
        ValueError: tensors are missing or do not fit each other.
    """
    if "diff" in parts:  # in the place of a pair, as diffusers and ComfyUI have it
        change = parts["diff"]
        if change.ndim not in NDIMS or not change.numel():
            raise ValueError(f"has a change of {tuple(change.shape)}")
        up, down = _factors(change.flatten(1).float())
        down, up = down.view(-1, *change.shape[1:]), up.view(*up.shape, *[1] * (change.ndim - 2))
    elif {"down", "up"} & parts.keys():
        down, up = _lora(parts)
    elif {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"} & parts.keys():
        down, up = _lokr(parts)
    elif any(part.startswith("hada_") for part in parts):
        down, up = _loha(parts)
    else:
        raise ValueError(f"has {' and '.join(sorted(parts))} and no matrices")
    bias, magnitude, rows = parts.get("diff_b", parts.get("bias")), parts.get("magnitude"), len(up)
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"has a bias of {tuple(bias.shape)} for {rows} rows")
    if magnitude is not None:
        if tuple(magnitude.shape) not in ((rows,), (rows, 1), (rows, 1, 1, 1), (1, rows, 1, 1)):
            raise ValueError(f"is a DoRA over inputs: its scales are {tuple(magnitude.shape)}, for {rows} rows")
        magnitude = magnitude.float().flatten()
    return Layer(down, up, 1.0, bias if bias is not None and bias.any() else None, magnitude)


def scaled(layer: Layer, parts: Parts, scale: float) -> Layer:
    """A layer at its alpha / rank, which does not count for a bias that is `diff_b`.

    Source: ComfyUI's `comfy/lora.py`; diffusers' conversion of Wan's.
    """
    if "diff_b" in parts:
        return replace(layer, up=layer.up.float() * scale)
    return replace(layer, scale=scale)


def _lora(parts: Parts) -> tuple[Tensor, Tensor]:
    """The pair (down, up) of a LoRA."""
    if not {"down", "up"} <= parts.keys():
        raise ValueError("has only one of its two matrices")
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        mid = parts["mid"]
        if mid.ndim != 4 or down.ndim != 4 or mid.shape[1] != len(down) or down.shape[2:].numel() != 1:
            raise ValueError(f"has matrices that do not fit each other: {tuple(mid.shape)} and {tuple(down.shape)}")
        down = torch.einsum("mnwh,ni->miwh", mid.float(), down.flatten(1).float())
    inner = up.ndim == down.ndim and up.ndim in NDIMS and up.shape[1] == len(down) and up.shape[2:].numel() == 1
    if not inner or not down.numel() or not up.numel():
        raise ValueError(f"has matrices that do not fit each other: {tuple(down.shape)} and {tuple(up.shape)}")
    return down, up


def _lokr(parts: Parts) -> tuple[Tensor, Tensor]:
    """The pair (down, up) of `kron(w1, w2)`: the Kronecker product of two products is the product of two of them."""
    up_1, down_1 = _pair(parts, "w1")
    if "t2" in parts:
        whole = _tucker(parts, "t2", "w2_a", "w2_b")
        up_2, down_2 = _factors(whole.flatten(1))
        kernel: Sequence[int] = whole.shape[2:]
    else:
        kernel = parts["w2"].shape[2:] if "w2" in parts else ()
        up_2, down_2 = _pair(parts, "w2")
    up, down = torch.kron(up_1, up_2), torch.kron(down_1, down_2)
    if not kernel:
        return down, up
    return down.view(len(down), -1, *kernel), up.view(*up.shape, *[1] * len(kernel))


def _loha(parts: Parts) -> tuple[Tensor, Tensor]:
    """The pair (down, up) of the product of two LoRAs, number by number; its rank is at most that of their product."""
    if "hada_t1" in parts or "hada_t2" in parts:
        first, second = (_tucker(parts, f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b") for n in (1, 2))
        if first.shape != second.shape:
            raise ValueError(f"has matrices that do not fit each other: {tuple(first.shape)}, {tuple(second.shape)}")
        whole = first * second
        up, down = _factors(whole.flatten(1))
        return down.view(-1, *whole.shape[1:]), up[..., None, None]
    (up_1, down_1), (up_2, down_2) = (_pair(parts, f"hada_w{n}") for n in (1, 2))
    if len(up_1) != len(up_2) or down_1.shape[1] != down_2.shape[1]:
        raise ValueError("has matrices that do not fit each other")
    rank = up_1.shape[1] * up_2.shape[1]
    if rank >= min(len(up_1), down_1.shape[1]):
        up, down = _factors((up_1 @ down_1) * (up_2 @ down_2))
        return down, up
    up = (up_1[:, :, None] * up_2[:, None]).flatten(1)
    return (down_1[:, None] * down_2[None]).flatten(0, 1), up


def _pair(parts: Parts, name: str) -> tuple[Tensor, Tensor]:
    """The factors (up, down) of a matrix that is kept whole, as `name`, or as `name_a @ name_b`."""
    if name in parts:
        if parts[name].ndim not in NDIMS or not parts[name].numel():
            raise ValueError(f"has a {name} of {tuple(parts[name].shape)}")
        return _factors(parts[name].flatten(1).float())
    if not {f"{name}_a", f"{name}_b"} <= parts.keys():
        raise ValueError(f"has no {name}, neither whole nor as two matrices")
    up, down = parts[f"{name}_a"].float(), parts[f"{name}_b"].float()
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down) or not len(down):
        raise ValueError(f"has matrices that do not fit each other: {tuple(up.shape)} and {tuple(down.shape)}")
    return up, down


def _tucker(parts: Parts, core: str, first: str, second: str) -> Tensor:
    """(out, in, k, k) of a convolution from a core (r, r, k, k) and two matrices, (r, out) and (r, in)."""
    if not {core, first, second} <= parts.keys():
        raise ValueError(f"has only some of {core}, {first} and {second}")
    tensors = [parts[key].float() for key in (core, first, second)]
    try:
        return torch.einsum("ijkl,ip,jr->prkl", *tensors)
    except RuntimeError:
        raise ValueError(f"has matrices that do not fit each other: {[tuple(t.shape) for t in tensors]}") from None


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) whose product is the matrix itself, exactly: one of them is the identity, on the shorter side."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows), matrix
    return matrix, torch.eye(columns)


def split_rows(layer: Layer, widths: Sequence[int]) -> list[Layer]:
    """Divide a layer into several that follow one another in its rows, each with only the ranks that reach it."""
    split, start = [], 0
    for width in widths:
        rows = slice(start, start + width)
        up = layer.up[rows]
        used = up.flatten(1).any(0)
        used[0] |= not used.any()  # a layer that is left as it is has a rank too
        others: list[Any] = [None if part is None else part[rows] for part in (layer.bias, layer.magnitude)]
        split.append(Layer(layer.down[used], up[:, used], layer.scale, *others))
        start += width
    return split
