"""The two quantizers as differentiable functions of their parameters, by kernels in C.

They compute what the quantizers compose of `torch.exp2`, offsets and ``functions.py``.
That takes a dozen nodes of autograd for each quantizer, which cost more than the values
of a small layer do; here it is one node and three calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.quantize import gradients, levels, native
from gdnsq_fx.quantize.blocks import is_dense
from gdnsq_fx.quantize.levels import wide
from gdnsq_fx.quantize.recompute import (
    Recipe,
    held_recipe,
    hold_recipe,
    recipe_for,
)
from gdnsq_fx.spec import Estimator, Offset


def quantize_activation(
    x: Tensor,
    log2_step: Tensor,
    log2_range: Tensor,
    lower: Tensor | None,
    offset: Offset,
    estimator: Estimator,
) -> Tensor:
    """Fake-quantize an activation that `native.serves`.

    Args:
        x: any shape, float32.
        log2_step, log2_range: log2 of s and q, scalars.
        lower: lowest level b before it is moved to the grid of its mode, a scalar
            through which gradients pass as if it were not moved; None: 0.
        offset: that mode.
        estimator: how gradients pass the rounding.

    Returns:
        What `gdnsq_fx.quantize.functions.quantize_activation` does.
    """
    grid = native.activation_grid(log2_step, log2_range, lower, offset)
    recipe = recipe_for(_activation_levels, x, grid)
    made = _Activation.apply(x, log2_step, log2_range, lower, grid, estimator, recipe)
    if recipe is not None:
        recipe.made(made)
    return made  # type: ignore[no-any-return]


def quantize_weight(
    weight: Tensor,
    log2_step: Tensor,
    grid: tuple[Tensor, Tensor, Tensor],
    layout: ChannelLayout,
    estimator: Estimator,
) -> Tensor:
    """Fake-quantize a weight that `native.serves_rows`.

    Args:
        weight: any shape, float32.
        log2_step: log2 of the step of each scale group, which gradients reach.
        grid: its step, lowest level and largest code, of one shape.
        layout: which weights share a scale.
        estimator: how gradients pass the rounding.

    Returns:
        What `gdnsq_fx.quantize.functions.quantize_weight` does.
    """
    recipe = recipe_for(_weight_levels, weight, *grid, layout)
    made = _Weight.apply(weight, log2_step, grid, layout, estimator, recipe)
    if recipe is not None:
        recipe.made(made)
    return made  # type: ignore[no-any-return]


class _Activation(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log2_step: Tensor,
        log2_range: Tensor,
        lower: Tensor | None,
        grid: Tensor,
        estimator: Estimator,
        recipe: Recipe | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        hold_recipe(ctx, recipe)
        ctx.grid = grid
        ctx.estimator = estimator
        return native.activation_levels(x, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,), (gradient,), grads = ctx.saved_tensors, grad_outputs, None
        if ctx.estimator == "lsq":
            recipe = held_recipe(ctx)
            into = None if recipe is None else recipe.spare()
            grads = native.activation_gradients(x, gradient, ctx.grid, into)
        if grads is None:
            made = _levels(ctx, _activation_levels, x, ctx.grid)
            grads = _activation_gradients(x, made, gradient, ctx.grid, ctx.estimator)
        return *grads, None, None, None


class _Weight(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log2_step: Tensor,
        grid: tuple[Tensor, Tensor, Tensor],
        layout: ChannelLayout,
        estimator: Estimator,
        recipe: Recipe | None,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        hold_recipe(ctx, recipe)
        ctx.grid = grid
        ctx.layout = layout
        ctx.estimator = estimator
        return native.weight_levels(weight, *grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,), (gradient,), grads = ctx.saved_tensors, grad_outputs, None
        if ctx.estimator == "lsq":
            recipe = held_recipe(ctx)
            if recipe is not None:
                recipe.let_go()
            grads = native.weight_gradients(weight, gradient, *ctx.grid)
        if grads is None:
            made = _levels(ctx, _weight_levels, weight, *ctx.grid, ctx.layout)
            grads = _weight_gradients(
                weight, made, gradient, ctx.grid[0], ctx.layout, ctx.estimator
            )
        return *grads, None, None, None, None


def _activation_levels(x: Tensor, grid: Tensor) -> Tensor:
    """Levels of what was kept; hooks may give it back in another form."""
    if native.is_readable(x):
        return native.activation_levels(x, grid)
    step, range_, *lower = grid.unbind()
    return levels.activation_levels(x, step, range_, lower[0] if lower else None)


def _weight_levels(weight: Tensor, *rest: Any) -> Tensor:
    """The same for weights."""
    *grid, layout = rest
    if native.is_readable(weight) and is_dense(weight):
        return native.weight_levels(weight, *grid)
    return levels.weight_levels(layout.grouped(weight), *grid).view_as(weight)


def _levels(ctx: Any, compute: Any, *given: Any) -> Tensor:
    recipe = held_recipe(ctx)
    made: Tensor = compute(*given) if recipe is None else recipe.take()
    return made


def _activation_gradients(
    x: Tensor, made: Tensor, gradient: Tensor, grid: Tensor, estimator: Estimator
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The other estimators, and gradients that the kernels cannot read."""
    step, range_, *rest = grid.unbind()
    lower = rest[0] if rest else None
    x, made, gradient = (wide(one, step) for one in (x, made, gradient))
    by_x, by_step, by_range, by_lower = gradients.activation_gradients(
        x, made, gradient, step, range_, lower, estimator
    )
    by_lower = None if lower is None else by_lower.reshape(())
    by_logs = (_by_log2(one, of) for one, of in ((by_step, step), (by_range, range_)))
    return by_x, *by_logs, by_lower  # type: ignore[return-value]  # pyright: ignore


def _weight_gradients(
    weight: Tensor,
    made: Tensor,
    gradient: Tensor,
    step: Tensor,
    layout: ChannelLayout,
    estimator: Estimator,
) -> tuple[Tensor, Tensor]:
    """The same for weights."""
    dims = layout.reduced_dims(weight.ndim)
    shape = weight.shape
    weight, made, gradient = (
        layout.grouped(wide(one, step)) for one in (weight, made, gradient)
    )
    by_weight, by_step = gradients.weight_gradients(
        weight, made, gradient, step, dims, estimator
    )
    return by_weight.view(shape), _by_log2(by_step, step)


def _by_log2(gradient: Tensor, value: Tensor) -> Tensor:
    """d/d log2(v) from d/dv."""
    return gradient.reshape(value.shape) * value * torch.log(value.new_tensor(2.0))
