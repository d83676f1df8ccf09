"""Kernels in C (``native.c``) for quantizers on CPUs: what they serve, and their calls.

Each reads and writes a tensor once, where eager operations pass over it several times,
and costs a call where those cost a dozen. They serve float32 tensors; whatever else
comes, and any machine without a C compiler, is left to the eager kernels. Levels are
equal to theirs, sums for gradients (of the estimator ``lsq``) to rounding.

The grid of an activation is a tensor ``[2]``, step and range, or ``[3]`` with the
lowest level where that is not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdnsq_fx.quantize.blocks import Rows, is_dense, memory_rows, rows_of
from gdnsq_fx.quantize.native_library import Library, library
from gdnsq_fx.spec import Offset

# `PIECE` of native.c.
_PIECE = 4096
# A row of fewer values costs more than to copy it.
_SHORT = 32
# The unit of an offset in steps; free ones have none.
_PARTS: dict[Offset, float] = {"free": 0.0, "half_step": 0.5, "integer": 1.0}
_PLAIN = (Tensor, nn.Parameter)


def is_readable(value: Tensor) -> bool:
    """Whether its memory holds its values, as float32; it has some."""
    plain = type(value) in _PLAIN and value.is_cpu and value.dtype is torch.float32
    in_memory = plain and value.layout is torch.strided and not value.is_neg()
    return in_memory and value.data_ptr() != 0


def serves(value: Tensor, *scalars: Tensor | None) -> bool:
    """Whether the kernels can read a tensor with one grid, and there are any."""
    return (
        is_readable(value)
        and all(s is None or (is_readable(s) and s.numel() == 1) for s in scalars)
        and _is_present()
    )


def serves_rows(weight: Tensor, step: Tensor) -> bool:
    """Whether they can read a weight with a grid for each row of memory."""
    return (
        is_readable(weight)
        and is_readable(step)
        and step.is_contiguous()
        and memory_rows(weight, step) > 0
        and is_dense(weight)
        and _is_present()
    )


def serves_vectors(*vectors: Tensor) -> bool:
    """Whether they can read these as vectors of one length."""
    alike = len({vector.shape for vector in vectors}) == 1
    readable = all(is_readable(one) and one.is_contiguous() for one in vectors)
    return alike and readable and _is_present()


def weight_grid(
    low: Tensor, high: Tensor, step: Tensor, mode: Offset, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Lowest level and largest code of each row of a weight that they serve.

    Args:
        low, high, step: extremes and step of each, of one shape, contiguous.
        mode: of offsets, see `gdnsq_fx.quantize.levels.snap_offset`.
        tolerance: by how many bits a capacity may exceed whole ones.
    """
    lower, top = torch.empty_like(step), torch.empty_like(step)
    _library().weight_grid(
        *_pointers(low, high, step), step.numel(), _PARTS[mode], tolerance,
        *_pointers(lower, top),
    )  # fmt: skip
    return lower, top


def weight_levels(weight: Tensor, step: Tensor, lower: Tensor, top: Tensor) -> Tensor:
    """As `gdnsq_fx.quantize.levels.weight_levels`, of a weight that they serve."""
    made = torch.empty_like(weight)
    found = _library()
    found.weight_levels(
        *_pointers(weight, made), *_rows_and_length(weight, step),
        *_pointers(step, lower, top), found.threads(weight.numel()),
    )  # fmt: skip
    return made


def weight_gradients(
    weight: Tensor, gradient: Tensor, step: Tensor, lower: Tensor, top: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Gradients of a quantized weight by ``lsq`` for the weight and log2 of its step.

    Returns:
        None where one of the tensors is not what the kernels can read.
    """
    if not (is_readable(weight) and is_readable(gradient) and is_dense(weight)):
        return None
    gradient = _like(gradient, weight)
    rows, length = _rows_and_length(weight, step)
    by_step, scratch = torch.empty_like(step), _sums(rows * _pieces(length))
    found = _library()
    found.weight_gradients(
        *_pointers(weight, gradient), rows, length, *_pointers(step, lower, top),
        *_pointers(scratch, by_step), found.threads(weight.numel()),
    )  # fmt: skip
    return gradient, by_step


def extremes(
    weight: Tensor, step: Tensor, part_length: Callable[[int], int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least and largest weight of each row, and of equal parts of the rows.

    Args:
        weight, step: that they serve, a step for each row.
        part_length: length of a row -> length of a part of it.

    Returns:
        Two shaped like ``step``, and two ``[rows, parts]``.
    """
    rows, whole = _rows_and_length(weight, step)
    length = part_length(whole)
    low, high = torch.empty_like(step), torch.empty_like(step)
    lows, highs = step.new_empty(2, rows, whole // length).unbind()
    found = _library()
    found.extremes(
        weight.data_ptr(), rows, whole // length, length,
        *_pointers(lows, highs, low, high), found.threads(weight.numel()),
    )  # fmt: skip
    return low, high, lows, highs


def activation_grid(
    log2_step: Tensor, log2_range: Tensor, lower: Tensor | None, mode: Offset
) -> Tensor:
    """The grid of an activation from scalars that they serve."""
    count = 2 if lower is None else 3
    grid = torch.empty(count, dtype=torch.float32, device="cpu")
    place, size = grid.data_ptr(), grid.element_size()
    into = (place, place + size, None if lower is None else place + 2 * size)
    _library().activation_grid(
        *_pointers(log2_step, log2_range, lower), _PARTS[mode], *into
    )
    return grid


def activation_scalars(
    log2_step: Tensor, log2_range: Tensor, lower: Tensor, mode: Offset
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as three scalars, of memory of their own."""
    step, range_ = torch.empty_like(log2_step), torch.empty_like(log2_range)
    bound = torch.empty_like(lower)
    _library().activation_grid(
        *_pointers(log2_step, log2_range, lower), _PARTS[mode],
        *_pointers(step, range_, bound),
    )  # fmt: skip
    return step, range_, bound


def activation_levels(x: Tensor, grid: Tensor) -> Tensor:
    """As `gdnsq_fx.quantize.levels.activation_levels`, of a tensor that they serve."""
    x, form = _in_rows(x)
    made, found = torch.empty_like(x), _library()
    found.activation_levels(
        x.data_ptr(), made.data_ptr(), *form, grid.data_ptr(), _is_signed(grid),
        found.threads(x.numel()),
    )  # fmt: skip
    return made


def activation_gradients(
    x: Tensor, gradient: Tensor, grid: Tensor, into: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Gradients of a quantized activation by ``lsq`` for x, log2 of step and range, and
    the lowest level.

    Args:
        x, grid: what `activation_levels` took.
        gradient: the one that arrives, of the shape of x.
        into: what `activation_levels` made, to be written over, or None.

    Returns:
        None where one of the tensors is not what the kernels can read.
    """
    if not (is_readable(x) and is_readable(gradient)):
        return None
    x, form = _in_rows(x)
    if into is None:
        into = torch.empty_like(x)
    gradient, found = _like(gradient, into), _library()
    scratch = _sums(3 * form[0] * _pieces(form[1]))
    by_step, by_range = grid.new_empty(()), grid.new_empty(())
    by_lower = grid.new_empty(()) if _is_signed(grid) else None
    found.activation_gradients(
        *_pointers(x, gradient, into), *form, grid.data_ptr(), _is_signed(grid),
        *_pointers(scratch, by_step, by_range, by_lower), found.threads(x.numel()),
    )  # fmt: skip
    return into, by_step, by_range, by_lower


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


def _is_signed(grid: Tensor) -> bool:
    return grid.numel() == 3


def _in_rows(value: Tensor) -> tuple[Tensor, Rows]:
    """The value, copied where its memory has any other form, and its rows."""
    if value.is_contiguous():
        return value, (1, value.numel(), 0)
    form = rows_of(value)
    if form is None or (form[0] > 1 and form[1] < _SHORT):
        value = torch.empty_like(value).copy_(value)
        form = (1, value.numel(), 0)
    return value, form


def _like(gradient: Tensor, value: Tensor) -> Tensor:
    """The gradient in the strides of the value, as one of a sum has none of its own."""
    if gradient.stride() == value.stride():
        return gradient
    return torch.empty_like(value).copy_(gradient)


def _rows_and_length(weight: Tensor, step: Tensor) -> tuple[int, int]:
    """Of what `serves_rows`: a row for each step."""
    return step.numel(), weight.numel() // step.numel()


def _pieces(length: int) -> int:
    return -(-length // _PIECE)


def _sums(count: int) -> Tensor:
    """Room for the sums over pieces."""
    return torch.empty(count, dtype=torch.float64, device="cpu")


def _pointers(*tensors: Tensor | None) -> Sequence[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]
