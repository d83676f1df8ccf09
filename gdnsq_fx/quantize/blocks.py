"""Tensors in blocks that stay in a processor's cache while a chain of operations runs.

Each eager operation passes over its whole tensor, so a chain of six of them moves a
large tensor through memory six times. Run over one block after the other, all but the
first read and the last write meet the cache. On other devices, and for tensors that are
not dense, the only block is the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

# Elements for each thread: 256 KiB in float32, of which a cache of 1 MB holds three.
# Smaller ones would leave threads without work: torch gives each 32,768 at least.
BLOCK = 1 << 16
# A tensor of no more than these is one block: calls cost more than memory then.
FEW = 4

Blocks = Iterator[tuple[tuple[Tensor, ...], tuple[Any, ...]]]
"""Views of tensors, and the part of each scale that belongs to them, or None."""


def is_plain(value: object) -> bool:
    """Whether a value is a tensor in memory, that may be written to block by block.

    Neither a proxy of a tracer, nor a subclass (fake, distributed), nor anything that a
    compiler traces.
    """
    return type(value) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def blocks(tensors: Sequence[Tensor], scale: Tensor, *others: Tensor | None) -> Blocks:
    """Corresponding blocks of tensors of one shape, in the order of memory.

    Args:
        tensors: of one shape.
        scale: broadcastable to them.
        others: of the scale's shape, or None.

    Yields:
        Views of the tensors, ``[r, n]``, and of the scales, ``[r, 1]``; or the whole of
        both, where that is small or no rows of memory.
    """
    first = tensors[0]
    size = BLOCK * torch.get_num_threads()
    rows = memory_rows(first, scale)
    large = first.numel() > FEW * size and rows > 0
    if not large or not all(_alike(first, other) for other in tensors):
        yield tuple(tensors), (scale, *others)
        return
    length = first.numel() // rows
    matrices = [t.as_strided((rows, length), (length, 1)) for t in tensors]
    columns = [s if s is None else s.reshape(rows, 1) for s in (scale, *others)]
    if rows == 1:
        for parts in _together(matrices, size, 1):
            yield parts, tuple(columns)
        return
    height = max(size // length, 1)
    scales = _together(columns, height, 0)
    for parts in _together(matrices, height, 0):
        yield parts, next(scales)


def _together(
    tensors: Sequence[Tensor | None], size: int, dim: int
) -> Iterator[tuple[Any, ...]]:
    """Corresponding parts; None has None for each. One call cuts a tensor: to slice
    part by part takes several times as long."""
    cut = [repeat(None) if t is None else t.split(size, dim) for t in tensors]
    return zip(*cut, strict=False)


Rows = tuple[int, int, int]
"""How many runs of memory there are, how long each is, and how far apart they begin."""


def is_dense(tensor: Tensor) -> bool:
    """Whether it fills its memory, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    form = rows_of(tensor)
    return form is not None and form[0] == 1


def rows_of(tensor: Tensor) -> Rows | None:
    """The memory that a tensor fills, in any order of dimensions; a part of a fused
    projection has a row for each token. None where it is of another form."""
    runs = [(1, 1)]  # size and stride of dimensions that make one
    by_stride = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in by_stride:
        inner, apart = runs[-1]
        if size == 1:
            continue
        if stride == inner * apart:
            runs[-1] = (inner * size, apart)
        else:
            runs.append((size, stride))
    (length, _), *outer = runs
    if not outer:
        return 1, length, 0
    ((count, stride),) = outer if len(outer) == 1 else [(0, 0)]
    return (count, length, stride) if stride > length else None


def memory_rows(tensor: Tensor, scale: Tensor) -> int:
    """How many rows of memory have a scale of their own; 0 where they are no rows."""
    if scale.numel() == 1:
        return 1
    leading = scale.ndim == tensor.ndim and scale.numel() == scale.shape[0]
    if not leading or scale.shape[0] != tensor.shape[0]:
        return 0
    count = tensor.shape[0]
    return count if tensor.stride(0) * count == tensor.numel() else 0


def _alike(first: Tensor, other: Tensor) -> bool:
    alike = other.shape == first.shape and other.stride() == first.stride()
    return alike and other.device.type == "cpu" and is_plain(other) and is_dense(other)
