"""Gradients of the two quantizers, from input, levels and the gradient that arrives.

The rounding error in steps is ``n = (y - x') / s`` with y the levels and x' the clamped
input. These are the eager kernels: a memory pass for each operation is what they cost,
so they write into their own buffers wherever they can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdnsq_fx.quantize.estimators import input_factor, step_derivative
from gdnsq_fx.spec import Estimator

LEAST_NORMAL = torch.finfo(torch.float32).tiny


def activation_gradients(
    x: Tensor,
    levels: Tensor,
    gradient: Tensor,
    step: Tensor,
    range_: Tensor,
    lower: Tensor | None,
    estimator: Estimator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `quantize_activation` for x, step, range and lower bound.

    Args:
        x, levels, gradient: input, output and the gradient arriving there, of one shape
            and in the precision of the step.
        step, range_, lower: scalar tensors as in `quantize_activation`.
        estimator: how gradients pass the rounding.
    """
    high = range_ - step if lower is None else lower + range_ - step
    clamped = torch.minimum(x, high)
    margin = clamped - x
    passed = _where_zero(gradient, margin)
    top = None
    if lower is not None:  # what cannot be negative is clamped above only
        top = (gradient - passed).sum()
        margin = torch.maximum(x, lower)
        passed = _where_zero(passed, torch.sub(x, margin, out=margin))
        clamped = torch.maximum(clamped, lower, out=clamped)
    error = torch.sub(levels, clamped, out=clamped)
    grad_step, factor = _estimated(error, gradient, passed, step, estimator, ())
    grad_lower = torch.sub(gradient, passed, out=clamped).sum()
    top = grad_lower if top is None else top
    grad_x = passed if factor is None else passed.mul_(factor)
    return grad_x, grad_step - top, top, grad_lower


def weight_gradients(
    weight: Tensor,
    levels: Tensor,
    gradient: Tensor,
    step: Tensor,
    dims: tuple[int, ...],
    estimator: Estimator,
) -> tuple[Tensor, Tensor]:
    """Gradients of `quantize_weight` for weight and step.

    Args:
        weight, levels, gradient: input, output and the gradient arriving there, of one
            shape and in the precision of the step.
        step, dims, estimator: as in `quantize_weight`.
    """
    error = levels - weight
    grad_step, factor = _estimated(error, gradient, gradient, step, estimator, dims)
    return gradient if factor is None else gradient * factor, grad_step


def _where_zero(gradient: Tensor, margin: Tensor) -> Tensor:
    """The gradient where a margin, never positive, is 0; it is written over the margin.

    Comparing into bool and selecting by it is several times slower than the backward of
    a ReLU, which does both at once. It selects: what is infinite elsewhere stays out.
    """
    return torch.ops.aten.threshold_backward(
        gradient, margin, -LEAST_NORMAL, grad_input=margin
    )


def _estimated(
    error: Tensor,
    gradient: Tensor,
    passed: Tensor,
    step: Tensor,
    estimator: Estimator,
    dims: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """Derivative by the step of what passes, and the factor on it, None where 1.

    Args:
        error: ``n * s``; it is overwritten.
        dims: dimensions that share a step; empty for all of them.
    """
    keep = bool(dims)
    if estimator == "lsq":
        return error.mul_(passed).sum(dims or None, keepdim=keep) / step, None
    error.div_(step)
    noise = step_derivative(error, estimator).mul_(passed)
    every = dims or tuple(range(error.ndim))
    factor = input_factor(gradient, error, estimator, every)
    return noise.sum(dims or None, keepdim=keep), factor
