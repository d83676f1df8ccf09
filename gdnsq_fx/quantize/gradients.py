"""Gradients of the two quantizers, from input, levels and the gradient that arrives.

The rounding error in steps is ``n = (y - x') / s`` with y the levels and x' the clamped
input. These are the eager kernels: a pass over memory for each operation is what they
cost, so they write into their own buffers wherever they can, and run block by block
where the estimator needs nothing of a tensor as a whole (``lsq``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdnsq_fx.quantize.blocks import blocks
from gdnsq_fx.quantize.clamp import Clamp, clamp_of
from gdnsq_fx.quantize.estimators import input_factor, step_derivative
from gdnsq_fx.spec import Estimator


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
            and in the precision of the step. The gradient of x may be written over the
            levels.
        step, range_, lower: scalar tensors as in `quantize_activation`.
        estimator: how gradients pass the rounding.
    """
    clamp = clamp_of(step, range_, lower, x)
    if estimator != "lsq":
        sums = _activation_block(x, levels, gradient, clamp, step, estimator)
    else:
        sums = torch.zeros(3, dtype=step.dtype, device=step.device)
        gradient = _laid_out_like(gradient, x)
        for (part, over, arriving), _ in blocks((x, levels, gradient), step):
            sums += _activation_block(part, over, arriving, clamp, step, estimator)
    top, clipped, noise = sums.unbind()
    return levels, noise - top, top, clipped


def _activation_block(
    x: Tensor,
    levels: Tensor,
    gradient: Tensor,
    clamp: Clamp,
    step: Tensor,
    estimator: Estimator,
) -> Tensor:
    """Sums of the gradient above the clamp and outside of it, and of the noise term,
    ``[3]``; the gradient of x is written over the levels."""
    clamped = clamp.apply(x)
    error = torch.sub(levels, clamped, out=clamped)
    passed = clamp.inside(gradient, x, levels)
    clipped = gradient.sum() - passed.sum()
    top = clipped if clamp.is_above_alone else clamp.above(gradient, x).sum()
    noise, factor = _estimated(error, gradient, passed, step, estimator, ())
    if factor is not None:
        passed.mul_(factor)
    return torch.stack([top, clipped, noise])


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
            shape and in the precision of the step. The levels may be overwritten.
        step, dims, estimator: as in `quantize_weight`.
    """
    if estimator == "lsq":
        gradient = _laid_out_like(gradient, weight)
        grad_step = torch.zeros_like(step)
        for parts, (one, into) in blocks((weight, levels, gradient), step, grad_step):
            part, level, arriving = parts
            error = level.sub_(part).mul_(arriving)
            into.add_(error.sum_to_size(into.shape).div_(one))
        return gradient, grad_step
    error = levels.sub_(weight)
    grad_step, factor = _estimated(error, gradient, gradient, step, estimator, dims)
    return gradient if factor is None else gradient * factor, grad_step


def _laid_out_like(gradient: Tensor, value: Tensor) -> Tensor:
    """The gradient in the strides of the value, as blocks of both want it."""
    if gradient.stride() == value.stride():
        return gradient
    return torch.empty_like(value).copy_(gradient)


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
