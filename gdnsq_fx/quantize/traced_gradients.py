"""Gradients of the two quantizers as plain formulas, for compilers.

A compiler fuses them into one kernel, and needs neither buffers to write into nor the
levels. `gradients` is the same for eager execution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdnsq_fx.quantize.estimators import input_factor, step_derivative
from gdnsq_fx.quantize.levels import wide
from gdnsq_fx.spec import Estimator


def activation_gradients(
    x: Tensor,
    gradient: Tensor,
    step: Tensor,
    range_: Tensor,
    lower: Tensor | None,
    estimator: Estimator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gdnsq_fx.quantize.gradients.activation_gradients`, without the levels.

    Tensors of half precision are taken as they are; their gradient is in theirs.
    """
    given, x, gradient = x, wide(x, step), wide(gradient, step)
    high = range_ - step if lower is None else lower + range_ - step
    clamped = torch.minimum(x, high)
    if lower is not None:
        clamped = torch.maximum(clamped, lower)
    inside = clamped == x
    passed = torch.where(inside, gradient, 0.0)
    grad_lower = torch.where(inside, 0.0, gradient).sum()
    position = (clamped if lower is None else clamped - lower) / step
    error = position.round() - position
    noise = step_derivative(error, estimator)
    # Without a lower bound nothing is below.
    top = grad_lower if lower is None else torch.where(x > high, gradient, 0.0).sum()
    grad_step = (passed * noise).sum() - top
    factor = input_factor(gradient, error, estimator, tuple(range(error.ndim)))
    grad_x = passed if factor is None else passed * factor
    return grad_x.to(given.dtype), grad_step, top, grad_lower


def weight_gradients(
    weight: Tensor,
    gradient: Tensor,
    step: Tensor,
    lower: Tensor,
    dims: tuple[int, ...],
    estimator: Estimator,
) -> tuple[Tensor, Tensor]:
    """As `gdnsq_fx.quantize.gradients.weight_gradients`, without the levels;
    half precision as above."""
    given, weight, gradient = weight, wide(weight, step), wide(gradient, step)
    position = (weight - lower) / step
    error = position.round() - position
    noise = step_derivative(error, estimator)
    grad_step = (gradient * noise).sum(dims, keepdim=True)
    factor = input_factor(gradient, error, estimator, dims)
    passed = gradient if factor is None else gradient * factor
    return passed.to(given.dtype), grad_step
