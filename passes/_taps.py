"""Places in a running graph where a backward pass hands out the gradient it brings.

What is read there is done with at once, while the gradient is in the cache, and its
memory serves the rest of the pass. Gradients asked for with ``torch.autograd.grad``
would all be held until its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Called with the number of a tap and the gradient there.
Receiver = Callable[[int, Tensor], None]


class Taps:
    """The taps of one run, numbered in the order in which they were set."""

    def __init__(self) -> None:
        # An input of every tap: what leads to it is all that a backward pass computes.
        self._anchor = torch.zeros((), requires_grad=True)
        self._receiver: Receiver | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def set(self, value: Tensor, *, copy: bool) -> Tensor:
        """The value, with a tap.

        Args:
            value: floating point.
            copy: it, or what is handed on, may be written into later.
        """
        number = self._count
        self._count += 1
        return _Tap.apply(value, self._anchor, self, number, copy)  # type: ignore[no-any-return]

    def backward(
        self, output: Tensor, direction: Tensor, receiver: Receiver, *, last: bool
    ) -> None:
        """One backward pass of ``direction' output``, as far as there are taps.

        Args:
            output: of this run.
            direction: of its shape.
            receiver: gets the gradient of each tap that the output depends on.
            last: free the graph.
        """
        self._receiver = receiver
        try:
            torch.autograd.grad(
                output, self._anchor, direction, not last, allow_unused=True
            )
        finally:
            self._receiver = None

    def receive(self, number: int, gradient: Tensor) -> None:
        """Hand a gradient on."""
        assert self._receiver is not None
        self._receiver(number, gradient)


class _Tap(Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, anchor: Tensor, taps: Taps, number: int, copy: bool
    ) -> Tensor:
        del anchor
        ctx.taps, ctx.number = taps, number
        return value.clone() if copy else value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grad_outputs
        ctx.taps.receive(ctx.number, gradient)
        return gradient, None, None, None, None
