"""The two quantizers as differentiable functions of (value, step, offset).

Forward is ``levels.py``. Both functions save only their input and the scalars; backward
computes the levels again (and inside `recomputed_levels` those who read them do, too).
The gradients stand in ``gradients.py``, and as plain formulas for compilers in
``traced_gradients.py``. Kernels in C have functions of their own
(``native_functions.py``); ``kernels.py`` says when which is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gdnsq_fx.quantize import gradients, traced_gradients
from gdnsq_fx.quantize.kernels import Kernels, compiled, is_compiled
from gdnsq_fx.quantize.levels import activation_levels, weight_levels, wide
from gdnsq_fx.quantize.recompute import (
    Recipe,
    held_recipe,
    hold_recipe,
    recipe_for,
)
from gdnsq_fx.spec import Estimator


def quantize_activation(
    x: Tensor,
    step: Tensor,
    range_: Tensor,
    lower: Tensor | None,
    estimator: Estimator,
    kernels: Kernels = "eager",
) -> Tensor:
    """Fake-quantize an activation.

    Args:
        x: any shape, floating point.
        step, range_, lower: s > 0, q > 0 and b, scalar tensors in x's units. Without
            ``lower`` b is 0, and x must be known never to be negative.
        estimator: how gradients pass the rounding.
        kernels: what computes it; those in C are not chosen here.

    Returns:
        A tensor of the shape and dtype of x with at most round(q/s) levels; dense x
        keep their strides.

    Gradients (METHOD of arXiv 2508.14004): dy/dx is 1 inside the clamp (times the
    estimator's factor) and 0 outside; dy/db is 1 where clamped; dy/dq is 1 and dy/ds
    is -1 where clamped above; dy/ds is the estimator's noise term inside. There are no
    second derivatives: asking for them raises a RuntimeError.
    """
    scalars = (step, range_, lower)
    regional = is_compiled(kernels, x)
    flat = x.view(-1) if regional and x.is_contiguous() else x  # one region for all
    recipe = recipe_for(_activation_levels(regional), flat, *scalars)
    made = _QuantizeActivation.apply(flat, *scalars, estimator, recipe, regional)
    if recipe is not None:
        recipe.made(made)  # not a view of it, which need not live on
    return made if flat is x else made.view(x.shape)


def quantize_weight(
    weight: Tensor,
    step: Tensor,
    lower: Tensor,
    dims: Sequence[int],
    estimator: Estimator,
    top: Tensor | None = None,
    kernels: Kernels = "eager",
) -> Tensor:
    """Fake-quantize a weight; its range is its own, so no outlier is cut off.

    Args:
        weight: any shape, floating point.
        step, lower: s > 0 and b, of the weight's shape with ``dims`` reduced to 1.
        dims: dimensions that share one step.
        estimator: how gradients pass the rounding.
        top: largest code, shaped like ``step``. Meant for codes that a rounding error
            lifts above the whole bits which the capacity stands for.
        kernels: what computes it; those in C are not chosen here.

    Returns:
        A tensor of the weight's shape and dtype. dy/dw is 1 times the estimator's
        factor, dy/ds its noise term summed over ``dims``; ``lower`` gets no gradient.
    """
    rows, grid, dims = weight, (step, lower, top), tuple(dims)
    regional = is_compiled(kernels, weight)
    if regional:
        rows, *grid, dims = _in_rows(weight, *grid, dims)
    recipe = recipe_for(_weight_levels(regional), rows, *grid)
    made = _applied(rows, *grid, dims, estimator, recipe, regional)
    if recipe is not None:
        recipe.made(made)
    return made if rows is weight else made.view(weight.shape)


def _activation_levels(regional: bool) -> Callable[..., Tensor]:
    return compiled(activation_levels) if regional else activation_levels


def _weight_levels(regional: bool) -> Callable[..., Tensor]:
    return compiled(weight_levels) if regional else weight_levels


def _applied(weight: Tensor, *rest: Any) -> Tensor:
    """Left to itself, a compiler keeps levels and rounding error of each weight for
    backward; inside of a checkpoint it computes them again, from a weight that stays
    where it is."""
    training = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if not (training and torch.is_grad_enabled() and weight.requires_grad):
        return _QuantizeWeight.apply(weight, *rest)  # type: ignore[no-any-return]
    apply: Any = _QuantizeWeight.apply
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(apply, weight, *rest, **options)  # type: ignore[no-any-return]


def _in_rows(
    weight: Tensor,
    step: Tensor,
    lower: Tensor,
    top: Tensor | None,
    dims: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """A matrix with a scale for each row where it can be one: one region for all."""
    count = step.numel()
    leading = step.ndim > 0 and step.shape[0] == count
    if not weight.is_contiguous() or not (leading or count == 1):
        return weight, step, lower, top, dims
    scales = (None if s is None else s.view(count, 1) for s in (step, lower, top))
    return weight.view(count, -1), *scales, (1,)  # type: ignore[return-value]  # pyright: ignore


class _QuantizeActivation(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        range_: Tensor,
        lower: Tensor | None,
        estimator: Estimator,
        recipe: Recipe | None,
        regional: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, step, range_, lower)
        ctx.estimator = estimator
        hold_recipe(ctx, recipe)
        ctx.regional = regional
        return _activation_levels(regional)(x, step, range_, lower)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step, range_, lower = ctx.saved_tensors
        gradient, scalars = grad_outputs[0], (step, range_, lower)
        derive = _derivation(ctx, traced_gradients.activation_gradients)
        if derive is not None:
            grads = derive(x, gradient, *scalars, ctx.estimator)
        else:
            value = wide(x, step)
            levels = _levels(ctx, activation_levels, x, value, *scalars)
            grads = gradients.activation_gradients(
                value, levels, wide(gradient, step), *scalars, ctx.estimator
            )
        grad_x, grad_step, grad_range, grad_lower = grads
        return (
            grad_x.to(x.dtype),
            grad_step.reshape(step.shape),
            grad_range.reshape(range_.shape),
            None if lower is None else grad_lower.reshape(lower.shape),
            None,
            None,
            None,
        )


class _QuantizeWeight(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        lower: Tensor,
        top: Tensor | None,
        dims: tuple[int, ...],
        estimator: Estimator,
        recipe: Recipe | None,
        regional: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, step, lower, top)
        ctx.dims = dims
        ctx.estimator = estimator
        hold_recipe(ctx, recipe)
        ctx.regional = regional
        return _weight_levels(regional)(weight, step, lower, top)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, step, lower, top = ctx.saved_tensors
        gradient, rest = grad_outputs[0], (ctx.dims, ctx.estimator)
        derive = _derivation(ctx, traced_gradients.weight_gradients)
        if derive is not None:
            grads = derive(weight, gradient, step, lower, *rest)
        else:
            value = wide(weight, step)
            levels = _levels(ctx, weight_levels, weight, value, step, lower, top)
            grads = gradients.weight_gradients(
                value, levels, wide(gradient, step), step, *rest
            )
        grad_weight, grad_step = grads
        grad_weight = grad_weight.to(weight.dtype)
        return grad_weight, grad_step, None, None, None, None, None, None


def _derivation(ctx: Any, formulas: Callable[..., Any]) -> Callable[..., Any] | None:
    """The formulas where they are compiled, None for the other kernels."""
    if torch.compiler.is_compiling():
        return formulas
    if not ctx.regional:
        return None
    recipe = held_recipe(ctx)
    if recipe is not None:
        recipe.let_go()
    return compiled(formulas)


def _levels(
    ctx: Any,
    compute: Callable[..., Tensor],
    given: Tensor,
    value: Tensor,
    *scalars: Any,
) -> Tensor:
    """Levels of an input in the precision of the step, those of a recipe if it may."""
    recipe = held_recipe(ctx)
    if recipe is None:
        return compute(value, *scalars)
    if value.dtype != given.dtype:  # rounded to half precision since
        recipe.let_go()
        return compute(value, *scalars)
    return recipe.take()
