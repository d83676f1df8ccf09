"""Least and largest weight of each scale group, and what their gradients reach."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gdnsq_fx.quantize import native

# Weights in a part; few rows have less than some hundred.
PART = 192


def with_gradient(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    dims: Sequence[int],
    parts: Parts | None = None,
) -> tuple[Tensor, Tensor]:
    """Extremes that are known already, differentiable by the weight.

    Args:
        weight: any shape.
        low, high: its extremes over ``dims``, which have size 1.
        dims: dimensions that share a scale.
        parts: as `extremes_of` found them.

    Returns:
        Both as they are. With ``parts`` a gradient goes to one weight that is
        equal to the extreme, otherwise all that are share it evenly, as with
        `torch.amin`. No second derivatives.
    """
    return _Extremes.apply(weight, low, high, tuple(dims), parts)  # type: ignore[no-any-return]


def extremes_of(
    weight: Tensor, dims: Sequence[int]
) -> tuple[Tensor, Tensor, Parts | None]:
    """Least and largest weight over ``dims``; those of parts of each group, too.

    Parts are None where scale groups are no rows of memory.
    """
    dims = tuple(dims)
    rows = _rows(weight, dims)
    if rows is None:
        return weight.amin(dims, keepdim=True), weight.amax(dims, keepdim=True), None
    shape = [1 if d in dims else n for d, n in enumerate(weight.shape)]
    length = part_length(rows.shape[1])
    cut = rows.view(len(rows), -1, length)
    parts = Parts(cut.amin(2), cut.amax(2), length)
    return parts.lows.amin(1).view(shape), parts.highs.amax(1).view(shape), parts


def native_extremes_of(
    weight: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Parts | None]:
    """The same by kernels in C, of a weight that `native.serves_rows`."""
    low, high, lows, highs = native.extremes(weight, step, part_length)
    if not weight.is_contiguous():  # parts of memory, which nobody can search
        return low, high, None
    return low, high, Parts(lows, highs, weight.numel() // lows.numel())


@dataclass(frozen=True)
class Parts:
    """Extremes of equal parts of each scale group.

    To find where in a row its least weight stands takes several times as long as to
    find the weight. With the parts known, it takes a look at one part of each row.

    Attributes:
        lows, highs: ``[rows, parts]``.
        length: of a part.
    """

    lows: Tensor
    highs: Tensor
    length: int

    def lowest_at(self, rows: Tensor) -> Tensor:
        """Column of the least weight of each row, ``[rows, 1]``."""
        part = self.lows.min(1).indices
        return self._column(part, self._part(rows, part).min(1).indices)

    def highest_at(self, rows: Tensor) -> Tensor:
        """Column of the largest weight of each row, ``[rows, 1]``."""
        part = self.highs.max(1).indices
        return self._column(part, self._part(rows, part).max(1).indices)

    def _part(self, rows: Tensor, part: Tensor) -> Tensor:
        """One part of each row."""
        cut = rows.view(len(rows), self.lows.shape[1], self.length)
        return cut[torch.arange(len(rows), device=rows.device), part]

    def _column(self, part: Tensor, inside: Tensor) -> Tensor:
        return (part * self.length + inside).unsqueeze(1)


@cache
def part_length(length: int) -> int:
    """Of the parts of a row: its largest divisor up to `PART`, or itself where that is
    a small one."""
    best = max(d for d in range(1, PART + 1) if length % d == 0)
    return best if best >= PART // 4 else length


@dataclass(frozen=True)
class Seen:
    """Extremes of a parameter as forward met it.

    Attributes:
        parameter: whose.
        version: of its values.
        low, high: the extremes.
        parts: see `extremes_of`.
    """

    parameter: weakref.ref[Tensor]
    version: int
    low: Tensor
    high: Tensor
    parts: Parts | None

    def is_of(self, weight: Tensor) -> bool:
        """Whether this weight has these extremes still."""
        return self.parameter() is weight and self.version == weight._version


class Looks:
    """What was seen of a weight; a deep copy of a quantizer has seen nothing.

    Attributes:
        last: what the last forward pass in training met.
        ahead: what was seen since, for the next one.
    """

    def __init__(self) -> None:
        self.last: Seen | None = None
        self.ahead: Seen | None = None

    def __reduce__(self) -> tuple[type[Looks], tuple[()]]:
        return Looks, ()


class _Extremes(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        low: Tensor,
        high: Tensor,
        dims: tuple[int, ...],
        parts: Parts | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, low, high)
        ctx.dims = dims
        ctx.parts = parts
        return low.clone(), high.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, low, high = ctx.saved_tensors
        grad_low, grad_high = grad_outputs
        if ctx.parts is not None:
            gradient = _placed(weight, grad_low, grad_high, ctx.dims, ctx.parts)
        else:
            gradient = _share(weight, low, grad_low, ctx.dims)
            gradient.add_(_share(weight, high, grad_high, ctx.dims))
        return gradient.to(weight.dtype), None, None, None, None


def _placed(
    weight: Tensor,
    grad_low: Tensor,
    grad_high: Tensor,
    dims: tuple[int, ...],
    parts: Parts,
) -> Tensor:
    """Zeros, and the gradients at their places."""
    gradient = torch.zeros_like(weight, dtype=grad_low.dtype)
    rows, searched = _rows(gradient, dims), _rows(weight, dims)
    assert rows is not None and searched is not None, "parts are those of rows alone"
    low_at, high_at = parts.lowest_at(searched), parts.highest_at(searched)
    by_low, by_high = grad_low.reshape(low_at.shape), grad_high.reshape(low_at.shape)
    # In a constant row both stand at one place, which gets both.
    by_high = by_high + by_low * (low_at == high_at)
    rows.scatter_(1, low_at, by_low).scatter_(1, high_at, by_high)
    return gradient


def _share(
    weight: Tensor, extreme: Tensor, gradient: Tensor, dims: tuple[int, ...]
) -> Tensor:
    """The gradient of an extreme, shared by the weights that are equal to it."""
    # A float mask: counting in bool is several times slower. No ``out=``, which
    # compilers refuse in other strides.
    equal = torch.empty_like(weight, dtype=extreme.dtype).copy_(weight).eq_(extreme)
    return equal.mul_(gradient / equal.sum(dims, keepdim=True))


def _rows(weight: Tensor, dims: Sequence[int]) -> Tensor | None:
    """A view with a scale group in each row; None where there is none."""
    kept = [d for d, size in enumerate(weight.shape) if d not in dims and size > 1]
    if not weight.is_contiguous() or kept not in ([], [0]):
        return None
    return weight.view(weight.shape[0] if kept else 1, -1) if weight.numel() else None
