"""Kernels in C (``native.c``) for quantizers on CPUs: what they serve, and their calls.

Each reads and writes a tensor once, where eager operations pass over it several times,
and costs a call where those cost a dozen. They serve float32 tensors, and the estimator
``lsq`` in backward; whatever else comes, and any machine without a C compiler, is left
to the eager kernels. Levels are equal to theirs, sums for gradients to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.quantize.blocks import is_dense, is_plain, memory_rows
from gdnsq_fx.quantize.native_library import Library, library
from gdnsq_fx.spec import Offset

# `PIECE` of native.c.
_PIECE = 4096
# The unit of an offset in steps; free ones have none.
_PARTS: dict[Offset, float] = {"free": 0.0, "half_step": 0.5, "integer": 1.0}


def serves(value: Tensor, *scalars: Tensor | None) -> bool:
    """Whether the kernels can read a tensor with one grid, and there are any."""
    return (
        _is_readable(value)
        and all(s is None or (_is_readable(s) and s.numel() == 1) for s in scalars)
        and _is_present()
    )


def serves_rows(weight: Tensor, step: Tensor, *others: Tensor | None) -> bool:
    """Whether they can read a weight with a grid for each row of memory."""
    scales = [step, *(one for one in others if one is not None)]
    return (
        memory_rows(weight, step) > 0
        and is_dense(weight)
        and _is_readable(weight)
        and serves_scales(*scales)
    )


def serves_scales(*scales: Tensor) -> bool:
    """Whether they can read numbers of as many scale groups."""
    count = scales[0].numel()
    alike = all(
        _is_readable(s) and s.is_contiguous() and s.numel() == count for s in scales
    )
    return alike and _is_present()


def weight_grid(
    low: Tensor, high: Tensor, step: Tensor, mode: Offset, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Lowest level and largest code of each scale group, where `serves_scales`.

    Args:
        low, high, step: extremes and step of each, of one shape.
        mode: of offsets, see `gdnsq_fx.quantize.levels.snap_offset`.
        tolerance: by how many bits a capacity may exceed whole ones.
    """
    lower, top = torch.empty_like(step), torch.empty_like(step)
    _library().weight_grid(
        *_pointers(low, high, step), step.numel(), _PARTS[mode], tolerance,
        *_pointers(lower, top),
    )  # fmt: skip
    return lower, top


def activation_offset(lower: Tensor, step: Tensor, mode: Offset) -> Tensor:
    """The lowest level on the grid of its mode, a scalar, where `serves`."""
    made = torch.empty_like(lower)
    _library().activation_offset(
        *_pointers(lower, step), _PARTS[mode], *_pointers(made)
    )
    return made


def activation_levels(
    x: Tensor, step: Tensor, range_: Tensor, lower: Tensor | None
) -> Tensor:
    """As `gdnsq_fx.quantize.levels.activation_levels`, where `serves`."""
    x = _dense(x)
    made = torch.empty_like(x)
    found, count = _library(), x.numel()
    found.activation_levels(
        *_pointers(x, made), count, *_pointers(step, range_, lower),
        found.threads(count),
    )  # fmt: skip
    return made


def weight_levels(
    weight: Tensor, step: Tensor, lower: Tensor, top: Tensor | None
) -> Tensor:
    """As `gdnsq_fx.quantize.levels.weight_levels`, where `serves_rows`."""
    made = torch.empty_like(weight)
    found = _library()
    found.levels(
        *_pointers(weight, made), *_rows_and_length(weight, step),
        *_pointers(step, lower, top), found.threads(weight.numel()),
    )  # fmt: skip
    return made


def activation_gradients(
    x: Tensor,
    gradient: Tensor,
    step: Tensor,
    range_: Tensor,
    lower: Tensor | None,
    into: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Gradients of `quantize_activation` by ``lsq`` for x, step, range, lower bound.

    Args:
        x, step, range_, lower: what `activation_levels` took.
        gradient: the one that arrives, of the shape of x.
        into: a tensor like x that the gradient of x may be written over, or None.

    Returns:
        None where one of the tensors is not what the kernels can read.
    """
    if not (_is_readable(x) and _is_readable(gradient)):
        return None
    x = _dense(x)
    gradient = _like(gradient, x)
    if into is None or into.stride() != x.stride():
        into = torch.empty_like(x)
    count, scratch = x.numel(), _sums(3 * _pieces(x.numel()))
    by_scalars, library = x.new_empty(3), _library()
    library.activation_gradients(
        *_pointers(x, gradient, into), count, *_pointers(step, range_, lower),
        *_pointers(scratch, by_scalars), library.threads(count),
    )  # fmt: skip
    by_step, by_range, by_lower = by_scalars.unbind()
    return into, by_step, by_range, by_lower


def weight_gradients(
    weight: Tensor, gradient: Tensor, step: Tensor, lower: Tensor, top: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Gradients of `quantize_weight` by ``lsq`` for weight and step; None as above."""
    if not (_is_readable(weight) and _is_readable(gradient) and is_dense(weight)):
        return None
    gradient = _like(gradient, weight)
    rows, length = _rows_and_length(weight, step)
    by_step, scratch = torch.empty_like(step), _sums(rows * _pieces(length))
    library = _library()
    library.weight_gradients(
        *_pointers(weight, gradient), rows, length, *_pointers(step, lower, top),
        *_pointers(scratch, by_step), library.threads(weight.numel()),
    )  # fmt: skip
    return gradient, by_step


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of each row of a contiguous matrix, ``[rows]`` each."""
    low, high = rows.new_empty(2, len(rows)).unbind()
    found = _library()
    found.extremes(
        rows.data_ptr(), *rows.shape, *_pointers(low, high),
        found.threads(rows.numel()),
    )  # fmt: skip
    return low, high


def _is_readable(value: Tensor) -> bool:
    """Whether its memory holds its values, as float32; it has some."""
    plain = is_plain(value) and value.layout is torch.strided and not value.is_neg()
    on_cpu = plain and value.device.type == "cpu"
    return on_cpu and value.dtype == torch.float32 and value.data_ptr() != 0


def _is_present() -> bool:
    """Whether there are kernels for as many threads as torch uses, and nobody who
    watches every operation (tracers, counters) and would miss these."""
    inner: Any = getattr(torch, "_C")  # noqa: B009
    watched = inner._len_torch_dispatch_stack() or inner._len_torch_function_stack()
    if watched or inner._is_tracing():
        return False
    found = library()
    return found is not None and (found.is_parallel or torch.get_num_threads() == 1)


def _library() -> Library:
    found = library()
    assert found is not None, "whoever calls has asked what is served"
    return found


def _dense(value: Tensor) -> Tensor:
    """The value, copied where it has gaps (a part of a fused projection)."""
    return value if is_dense(value) else torch.empty_like(value).copy_(value)


def _like(gradient: Tensor, value: Tensor) -> Tensor:
    """The gradient in the strides of the value, as one of a sum has none of its own."""
    if gradient.stride() == value.stride():
        return gradient
    return torch.empty_like(value).copy_(gradient)


def _rows_and_length(weight: Tensor, step: Tensor) -> tuple[int, int]:
    rows = memory_rows(weight, step)
    return rows, weight.numel() // rows


def _pieces(length: int) -> int:
    return -(-length // _PIECE)


def _sums(count: int) -> Tensor:
    """Room for the sums over pieces."""
    return torch.empty(count, dtype=torch.float64, device="cpu")


def _pointers(*tensors: Tensor | None) -> Sequence[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]
