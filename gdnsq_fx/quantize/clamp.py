"""The clamp of an activation quantizer in backward: what passes, and what does not.

Comparing into bool and selecting by it is several times slower than the backward of
``hardtanh`` and of ``threshold``, which do both at once. They select: a gradient that
is infinite elsewhere stays out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gdnsq_fx.quantize.blocks import is_plain

LEAST_NORMAL = torch.finfo(torch.float32).tiny


class Clamp(ABC):
    """Ends b and b + q - s of what is quantized."""

    @property
    @abstractmethod
    def is_above_alone(self) -> bool:
        """Whether b is 0 and no value is below."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """The clamped values, a new tensor."""

    @abstractmethod
    def inside(self, gradient: Tensor, x: Tensor, into: Tensor) -> Tensor:
        """The gradient where x lies within the ends, else 0, written ``into``."""

    @abstractmethod
    def above(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient where x lies above, else 0."""


def clamp_of(step: Tensor, range_: Tensor, lower: Tensor | None, x: Tensor) -> Clamp:
    """The clamp of a value x, which is in the precision of the step or a wider one."""
    high = range_ - step if lower is None else lower + range_ - step
    if x.device.type == "cpu" and is_plain(x) and is_plain(high):
        return _ByNumbers(lower, high, x.dtype)
    return _ByTensors(lower, high)


class _ByNumbers(Clamp):
    """On a CPU, where reading a scalar waits for nothing: one pass an operation."""

    def __init__(self, low: Tensor | None, high: Tensor, dtype: torch.dtype) -> None:
        self._low = None if low is None else float(low)
        self._high = float(high)
        # The operations leave out the ends, which belong to the inside.
        self._below = -math.inf if low is None else _next(low, -math.inf, dtype)
        self._beyond = _next(high, math.inf, dtype)

    @property
    def is_above_alone(self) -> bool:
        return self._low is None

    def apply(self, x: Tensor) -> Tensor:
        return x.clamp(self._low, self._high)

    def inside(self, gradient: Tensor, x: Tensor, into: Tensor) -> Tensor:
        return torch.ops.aten.hardtanh_backward(
            gradient, x, self._below, self._beyond, grad_input=into
        )

    def above(self, gradient: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(gradient, x, self._high)


class _ByTensors(Clamp):
    """On devices, which are not asked for scalars."""

    def __init__(self, low: Tensor | None, high: Tensor) -> None:
        self._low = low
        self._high = high

    @property
    def is_above_alone(self) -> bool:
        return self._low is None

    def apply(self, x: Tensor) -> Tensor:
        clamped = torch.minimum(x, self._high)
        if self._low is None:
            return clamped
        return torch.maximum(clamped, self._low, out=clamped)

    def inside(self, gradient: Tensor, x: Tensor, into: Tensor) -> Tensor:
        return torch.ops.aten.hardtanh_backward(
            gradient,
            self.apply(x).sub_(x),
            -LEAST_NORMAL,
            LEAST_NORMAL,
            grad_input=into,
        )

    def above(self, gradient: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(gradient, x - self._high, 0.0)


def _next(end: Tensor, towards: float, dtype: torch.dtype) -> float:
    """The next number of a type."""
    end = end.to(dtype)
    return float(torch.nextafter(end, torch.full_like(end, towards)))
