"""Grids of quantizers as operators that compiled models call.

Left to itself, inductor computes the numbers of a grid in every loop over values that
reads them, on a CPU once for each vector of 16: powers, logarithms and divisions of
scalars that took longer than the values themselves. What an operator returns is
computed once.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from gdnsq_fx.quantize.levels import lowest_level, weight_bounds
from gdnsq_fx.spec import Offset


def are_wanted(value: Tensor) -> bool:
    """Whether a compiler for CPUs traces this, which is to run and not to be kept."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and value.device.type == "cpu"


@torch.library.custom_op("gdnsq_fx::activation_grid", mutates_args=())
def activation_grid(
    log2_step: Tensor, log2_range: Tensor, lower: Tensor | None, mode: str
) -> Tensor:
    """Step, range and, where ``lower`` is not None, lowest level, ``[2]`` or ``[3]``.

    Args:
        log2_step, log2_range, lower: parameters of an activation's quantizer, scalars.
        mode: of its offset.
    """
    step = torch.exp2(log2_step)
    grid = [step, torch.exp2(log2_range)]
    if lower is not None:
        grid.append(lowest_level(lower, step, cast(Offset, mode)))
    return torch.stack(grid)


@activation_grid.register_fake
def _(log2_step: Tensor, log2_range: Tensor, lower: Tensor | None, mode: str) -> Tensor:
    return log2_step.new_empty(2 if lower is None else 3)


@torch.library.custom_op("gdnsq_fx::weight_grid", mutates_args=())
def weight_grid(log2_step: Tensor, low: Tensor, high: Tensor, mode: str) -> Tensor:
    """Step, lowest level and largest code of each scale group, ``[3, *groups]``.

    Args:
        log2_step: parameter of a weight's quantizer.
        low, high: extremes of the weight, of its shape; they get no gradient.
        mode: of its offset.
    """
    step = torch.exp2(log2_step)
    lower, top = weight_bounds(low, high, step, cast(Offset, mode))
    return torch.stack([step, lower, top])


@weight_grid.register_fake
def _(log2_step: Tensor, low: Tensor, high: Tensor, mode: str) -> Tensor:
    return log2_step.new_empty(3, *log2_step.shape)


def _keep_grid(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _activation_backward(ctx: Any, gradient: Tensor) -> Any:
    """The lowest level passes its gradient as if it were not moved."""
    (grid,) = ctx.saved_tensors
    by_logs = gradient * grid * math.log(2.0)
    by_lower = gradient[2] if len(grid) == 3 else None
    return by_logs[0], by_logs[1], by_lower, None


def _weight_backward(ctx: Any, gradient: Tensor) -> Any:
    (grid,) = ctx.saved_tensors
    return gradient[0] * grid[0] * math.log(2.0), None, None, None


activation_grid.register_autograd(_activation_backward, setup_context=_keep_grid)
weight_grid.register_autograd(_weight_backward, setup_context=_keep_grid)
