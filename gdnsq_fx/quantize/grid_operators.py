"""Grids of quantizers as operators that compiled models call.

Left to itself, inductor computes the numbers of a grid in every loop over values that
reads them, on a CPU once for each vector of 16: powers, logarithms and divisions of
scalars that took longer than the values themselves. What an operator returns is
computed once, by kernels in C where there are any.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from gdnsq_fx.quantize import native
from gdnsq_fx.quantize.capacity import CAPACITY_TOLERANCE
from gdnsq_fx.quantize.levels import lowest_level, weight_bounds
from gdnsq_fx.spec import Offset


def are_wanted(value: Tensor) -> bool:
    """Whether a compiler for CPUs traces this, which is to run and not to be kept."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and value.device.type == "cpu"


@torch.library.custom_op("gdnsq_fx::activation_grid", mutates_args=())
def activation_grid(
    log2_step: Tensor, log2_range: Tensor, lower: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Step, range and lowest level of an activation, scalars.

    Args:
        log2_step, log2_range, lower: what its quantizer learned.
        mode: of its offset.
    """
    if log2_step.numel() == 1 and native.serves_vectors(log2_step, log2_range, lower):
        return native.activation_scalars(
            log2_step, log2_range, lower, cast(Offset, mode)
        )
    step = torch.exp2(log2_step)
    bound = lowest_level(lower, step, cast(Offset, mode))
    # An operator must not return what it was given.
    return step, torch.exp2(log2_range), bound.clone()


@activation_grid.register_fake
def _(
    log2_step: Tensor, log2_range: Tensor, lower: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    made = map(torch.empty_like, (log2_step, log2_range, lower))
    return tuple(made)  # type: ignore[return-value]  # pyright: ignore


@torch.library.custom_op("gdnsq_fx::weight_grid", mutates_args=())
def weight_grid(
    log2_step: Tensor, low: Tensor, high: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Step, lowest level and largest code of each scale group of a weight.

    Args:
        log2_step: what its quantizer learned.
        low, high: extremes of the weight, of its shape; they get no gradient.
        mode: of its offset.
    """
    step, offset = torch.exp2(log2_step), cast(Offset, mode)
    if native.serves_vectors(low, high, step):
        return step, *native.weight_grid(low, high, step, offset, CAPACITY_TOLERANCE)
    lower, top = weight_bounds(low, high, step, offset)
    return step, lower.clone(), top


@weight_grid.register_fake
def _(
    log2_step: Tensor, low: Tensor, high: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    made = (torch.empty_like(log2_step) for _ in range(3))
    return tuple(made)  # type: ignore[return-value]  # pyright: ignore


def _keep_grid(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[:2])


def _activation_backward(
    ctx: Any, by_step: Tensor, by_range: Tensor, by_lower: Tensor
) -> Any:
    """The lowest level passes its gradient as if it were not moved."""
    step, range_ = ctx.saved_tensors
    by_logs = (by_step * step * math.log(2.0), by_range * range_ * math.log(2.0))
    return *by_logs, by_lower, None


def _weight_backward(ctx: Any, by_step: Tensor, *others: Tensor) -> Any:
    step, _ = ctx.saved_tensors
    return by_step * step * math.log(2.0), None, None, None


activation_grid.register_autograd(_activation_backward, setup_context=_keep_grid)
weight_grid.register_autograd(_weight_backward, setup_context=_keep_grid)
