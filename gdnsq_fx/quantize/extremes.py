"""Least and largest weight of each scale group, and what their gradients reach."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def with_gradient(
    weight: Tensor, low: Tensor, high: Tensor, dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Extremes that are known already, differentiable by the weight.

    Args:
        weight: any shape.
        low, high: its extremes over ``dims``, which have size 1.
        dims: dimensions that share a scale.

    Returns:
        Both as they are. As with `torch.amin` a gradient is shared evenly by all
        weights that are equal to the extreme. No second derivatives.
    """
    return _Extremes.apply(weight, low, high, tuple(dims))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Seen:
    """Extremes of a parameter as forward met it.

    Attributes:
        parameter: whose.
        version: of its values.
        low, high: the extremes.
    """

    parameter: weakref.ref[Tensor]
    version: int
    low: Tensor
    high: Tensor

    @staticmethod
    def of(weight: Tensor, low: Tensor, high: Tensor) -> Seen | None:
        """What is known of a parameter; None for a weight that is computed."""
        if not isinstance(weight, nn.Parameter):
            return None
        return Seen(weakref.ref(weight), weight._version, low, high)

    def is_of(self, weight: Tensor) -> bool:
        """Whether this weight has these extremes still."""
        return self.parameter() is weight and self.version == weight._version


class _Extremes(Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, low: Tensor, high: Tensor, dims: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, low, high)
        ctx.dims = dims
        return low.clone(), high.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, low, high = ctx.saved_tensors
        grad_low, grad_high = grad_outputs
        gradient = _share(weight, low, grad_low, ctx.dims)
        gradient.add_(_share(weight, high, grad_high, ctx.dims))
        return gradient.to(weight.dtype), None, None, None


def _share(
    weight: Tensor, extreme: Tensor, gradient: Tensor, dims: tuple[int, ...]
) -> Tensor:
    """The gradient of an extreme, shared by the weights that are equal to it."""
    # A float mask: comparing into bool, and counting there, is several times slower.
    equal = torch.empty_like(weight, dtype=extreme.dtype)
    torch.eq(weight.to(extreme.dtype), extreme, out=equal)
    return equal.mul_(gradient / equal.sum(dims, keepdim=True))
