"""Least and largest weight of each scale group, and what their gradients reach."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Places = tuple[Tensor, Tensor]
"""Columns of the least and the largest weight of each scale group, ``[rows, 1]``."""


def with_gradient(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    dims: Sequence[int],
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """Extremes that are known already, differentiable by the weight.

    Args:
        weight: any shape.
        low, high: its extremes over ``dims``, which have size 1.
        dims: dimensions that share a scale.
        places: where they stand, if that is known.

    Returns:
        Both as they are. A gradient goes to the place of the extreme; where places are
        not known, all weights that are equal to it share it evenly, as with
        `torch.amin`. No second derivatives.
    """
    return _Extremes.apply(weight, low, high, tuple(dims), places)  # type: ignore[no-any-return]


def located(
    weight: Tensor, dims: Sequence[int]
) -> tuple[Tensor, Tensor, Places | None]:
    """Least and largest weight over ``dims``, and where they stand if that is cheap.

    It is where each scale group is a row of memory; otherwise places are None.
    """
    rows = _rows(weight, dims)
    if rows is None:
        dims = tuple(dims)
        return weight.amin(dims, keepdim=True), weight.amax(dims, keepdim=True), None
    low, low_at = rows.min(1, keepdim=True)
    high, high_at = rows.max(1, keepdim=True)
    shape = [1 if d in dims else n for d, n in enumerate(weight.shape)]
    return low.view(shape), high.view(shape), (low_at, high_at)


@dataclass(frozen=True)
class Seen:
    """Extremes of a parameter as forward met it.

    Attributes:
        parameter: whose.
        version: of its values.
        low, high: the extremes.
        places: where they stand, if that is known.
    """

    parameter: weakref.ref[Tensor]
    version: int
    low: Tensor
    high: Tensor
    places: Places | None

    def is_of(self, weight: Tensor) -> bool:
        """Whether this weight has these extremes still."""
        return self.parameter() is weight and self.version == weight._version


class _Extremes(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        low: Tensor,
        high: Tensor,
        dims: tuple[int, ...],
        places: Places | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, low, high)
        ctx.dims = dims
        ctx.places = places
        return low.clone(), high.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, low, high = ctx.saved_tensors
        grad_low, grad_high = grad_outputs
        if ctx.places is not None:
            gradient = _placed(weight, grad_low, grad_high, ctx.dims, ctx.places)
        else:
            gradient = _share(weight, low, grad_low, ctx.dims)
            gradient.add_(_share(weight, high, grad_high, ctx.dims))
        return gradient.to(weight.dtype), None, None, None, None


def _placed(
    weight: Tensor,
    grad_low: Tensor,
    grad_high: Tensor,
    dims: tuple[int, ...],
    places: Places,
) -> Tensor:
    """Zeros, and the gradients at their places."""
    gradient = torch.zeros_like(weight, dtype=grad_low.dtype)
    rows = _rows(gradient, dims)
    assert rows is not None, "places are known of weights in rows alone"
    low_at, high_at = places
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
    kept = [d for d in range(weight.ndim) if d not in dims]
    if not weight.is_contiguous() or kept not in ([], [0]):
        return None
    return weight.view(weight.shape[0] if kept else 1, -1) if weight.numel() else None
