"""The two quantizers as functions of (value, step, offset), forward and backward.

Forward (GDNSQ, arXiv 2508.14004, the noisy channel):

    activation   x' = clamp(x, b, b + q - s);  k = round((x' - b)/s);  y = s*k + b
    weight       k = round((w - b)/s);  y = s*k + b,  b = min(w), no clamp

Rounding is half to even and monotone, so the activation clamps codes instead of values:
``k = clamp(round((x - b)/s), 0, round(q/s - 1))`` is the same code, and the very
arithmetic that the integer model uses (`to_codes`, `from_codes`).

Both functions save only their input and the scalars; backward computes the codes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gdnsq_fx.quantize.estimators import input_factor, step_derivative
from gdnsq_fx.spec import Estimator, Offset


def to_codes(value: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """Unclamped codes ``round_half_to_even((value - offset) / step)``, as floats."""
    return value.sub(offset).div_(step).round_()


def from_codes(codes: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """Levels ``step * codes + offset`` of codes held as floats."""
    return codes.mul(step).add_(offset)


def from_codes_(codes: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """As `from_codes`, in the memory of codes that nothing reads afterwards.

    For passes without gradients, and outside what ``torch.fx`` may trace.
    """
    return codes.mul_(step).add_(offset)


def max_code(step: Tensor, range_: Tensor) -> Tensor:
    """Largest code of a clamped quantizer, ``round(q/s - 1)`` (scalar tensor)."""
    return (range_ / step - 1.0).round()


def snap_offset(offset: Tensor, step: Tensor, mode: Offset) -> Tensor:
    """Offset on the grid of its mode; the gradient passes as if it were not moved.

    Args:
        offset: lowest level b.
        step: step s, broadcastable to ``offset``.
        mode: ``free`` leaves b; ``half_step`` and ``integer`` move it to the nearest
            multiple of s/2 and of s.
    """
    if mode == "free":
        return offset
    unit = (step if mode == "integer" else step / 2).detach()
    snapped = torch.round(offset.detach() / unit) * unit
    # The difference is exactly zero, so the value stays exactly on its grid.
    return snapped + (offset - offset.detach())


def quantize_activation(
    x: Tensor, step: Tensor, range_: Tensor, lower: Tensor, estimator: Estimator
) -> Tensor:
    """Fake-quantize an activation.

    Args:
        x: any shape, floating point.
        step, range_, lower: s > 0, q > 0 and b, scalar tensors in x's units.
        estimator: how gradients pass the rounding.

    Returns:
        A tensor of the shape and dtype of x with at most round(q/s) levels.

    Gradients (METHOD of arXiv 2508.14004): dy/dx is 1 inside the clamp (times the
    estimator's factor) and 0 outside; dy/db is 1 where clamped; dy/dq is 1 and dy/ds
    is -1 where clamped above; dy/ds is the estimator's noise term inside.
    """
    return _QuantizeActivation.apply(x, step, range_, lower, estimator)  # type: ignore[no-any-return]


def quantize_weight(
    weight: Tensor,
    step: Tensor,
    lower: Tensor,
    dims: Sequence[int],
    estimator: Estimator,
    top: Tensor | None = None,
) -> Tensor:
    """Fake-quantize a weight; its range is its own, so no outlier is cut off.

    Args:
        weight: any shape, floating point.
        step, lower: s > 0 and b, of the weight's shape with ``dims`` reduced to 1.
        dims: dimensions that share one step.
        estimator: how gradients pass the rounding.
        top: largest code, shaped like ``step``. Meant for codes that a rounding error
            lifts above the whole bits which the capacity stands for.

    Returns:
        A tensor of the weight's shape and dtype. dy/dw is 1 times the estimator's
        factor, dy/ds its noise term summed over ``dims``; ``lower`` gets no gradient.
    """
    return _QuantizeWeight.apply(weight, step, lower, tuple(dims), estimator, top)  # type: ignore[no-any-return]


def weight_codes(
    weight: Tensor, step: Tensor, lower: Tensor, top: Tensor | None
) -> Tensor:
    """Whole codes of a weight, as floats; arguments as in `quantize_weight`."""
    codes = to_codes(wide(weight, step), step, lower).clamp_(min=0.0)
    return codes if top is None else torch.minimum(codes, top)


def wide(value: Tensor, step: Tensor) -> Tensor:
    """The value in the step's precision: codes are wrong in half precision."""
    return value.to(torch.promote_types(value.dtype, step.dtype))


class _QuantizeActivation(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        range_: Tensor,
        lower: Tensor,
        estimator: Estimator,
    ) -> Tensor:
        ctx.save_for_backward(x, step, range_, lower)
        ctx.estimator = estimator
        codes = to_codes(wide(x, step), step, lower)
        codes = torch.minimum(codes.clamp_(min=0.0), max_code(step, range_))
        return from_codes(codes, step, lower).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step, range_, lower = ctx.saved_tensors
        gradient = wide(grad_outputs[0], step)
        x_wide = wide(x, step)
        above = x_wide > lower + range_ - step
        below = x_wide < lower
        inside = ~(above | below)
        clamped = torch.minimum(x_wide.clamp(min=lower), lower + range_ - step)
        position = clamped.sub_(lower).div_(step)
        error = position.round() - position
        passed = torch.where(inside, gradient, 0.0)
        noise = step_derivative(error, ctx.estimator)
        top = torch.where(above, gradient, 0.0).sum()
        grad_step = (passed * noise).sum() - top
        grad_lower = (gradient - passed).sum()
        factor = input_factor(gradient, error, ctx.estimator, tuple(range(error.ndim)))
        grad_x = passed if factor is None else passed * factor
        return (
            grad_x.to(x.dtype),
            grad_step.reshape(step.shape),
            top.reshape(range_.shape),
            grad_lower.reshape(lower.shape),
            None,
        )


class _QuantizeWeight(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        lower: Tensor,
        dims: tuple[int, ...],
        estimator: Estimator,
        top: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, step, lower)
        ctx.dims = dims
        ctx.estimator = estimator
        codes = weight_codes(weight, step, lower, top)
        return from_codes(codes, step, lower).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, step, lower = ctx.saved_tensors
        gradient = wide(grad_outputs[0], step)
        position = (wide(weight, step) - lower) / step
        error = position.round() - position
        noise = step_derivative(error, ctx.estimator)
        grad_step = (gradient * noise).sum(ctx.dims, keepdim=True)
        factor = input_factor(gradient, error, ctx.estimator, ctx.dims)
        grad_weight = gradient if factor is None else gradient * factor
        return grad_weight.to(weight.dtype), grad_step, None, None, None, None
