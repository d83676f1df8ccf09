"""Learned grids as the grids that integer kernels have.

A kernel knows ``scale * (code - zero_point)``: int8 codes of weights with zero point 0,
uint8 codes of activations. A learned grid is ``step * k + offset``, k from 0, and its
offset is no multiple of the step in general. With ``offset = m * step / K`` the codes
``K * k + m`` at the scale ``step / K`` are the same values: any K will do for offsets
of whole steps, an even one for those of half steps. Any other offset is moved to the
finest such grid that fits eight bits, by at most ``step / (2 * K)``. Weights take the
largest K that fits, for a bias is moved to a multiple of the accumulator's scale, and
the finer that is the less a bias moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# An offset counts as a whole multiple if it is one up to float32 rounding.
_EXACT = 1e-4
_INT8 = (-128, 127)
# Scale of a channel of zeros: its bias is to be a multiple of something small.
_TINY = 2.0**-40
_UINT8_MAX = 255


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight ``scale * codes``.

    Attributes:
        codes: int8, shape of the weight.
        scale: float32, one for each index along ``axis``, or one.
        axis: dimension that the scales run along; None: one scale.
        moved: largest distance of a level from the learned one, in learned steps.
    """

    codes: Tensor
    scale: Tensor
    axis: int | None
    moved: float

    def scales(self) -> Tensor:
        """The scales, broadcastable to the codes."""
        if self.axis is None:
            return self.scale
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape)


@dataclass(frozen=True)
class Uint8Grid:
    """An activation ``scale * (code - zero_point)``, codes ``K * k + least``.

    Attributes:
        step: learned step, in the units of the tensor.
        factor: K.
        least: code of the lowest level.
        zero_point: code of the value 0.
        max_code: largest k.
        moved: distance of the lowest level from the learned one, in steps.
    """

    step: float
    factor: int
    least: int
    zero_point: int
    max_code: int
    moved: float

    @property
    def scale(self) -> float:
        """Distance of two codes, in the units of the tensor."""
        return self.step / self.factor

    @property
    def lowest(self) -> float:
        """The lowest level, in the units of the tensor."""
        return (self.least - self.zero_point) * self.scale

    @property
    def is_direct(self) -> bool:
        """Whether its codes are whole steps from 0, as one quantization makes them."""
        return self.factor == 1 and self.least == 0


def int8_weight(codes: Tensor, step: Tensor, offset: Tensor) -> Int8Weight | None:
    """A weight ``step * codes + offset`` in int8 with zero point 0.

    Args:
        codes: whole numbers from 0, of any shape.
        step, offset: broadcastable to ``codes``; a step may be negative or 0 where a
            normalization was folded into it.

    Returns:
        None where the steps run along more than one dimension, or codes exceed 8 bits.
    """
    axes = [d for d in range(step.ndim) if step.shape[d] > 1]
    if len(axes) > 1 or step.shape != offset.shape or int(codes.max()) > _UINT8_MAX:
        return None
    axis = axes[0] + codes.ndim - step.ndim if axes else None
    rows = codes.reshape(1, -1) if axis is None else codes.movedim(axis, 0).flatten(1)
    steps, offsets = step.reshape(-1).double(), offset.reshape(-1).double()
    if axis is None:
        steps, offsets = steps[:1], offsets[:1]
    whole, scale, moved = _int8_rows(rows.double(), steps, offsets)
    moved_back = whole.reshape(codes.shape)
    if axis is not None:
        shape = codes.movedim(axis, 0).shape
        moved_back = whole.reshape(shape).movedim(0, axis)
    stored = moved_back.to(torch.int8).contiguous()
    return Int8Weight(stored, scale.float(), axis, float(moved.max()))


def _int8_rows(
    codes: Tensor, step: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [C, N], scales [C] and distances [C] in steps of channels with one step."""
    sign = torch.where(step < 0, -1.0, 1.0)
    flat = step == 0  # gamma is 0: the channel is its bias alone
    size = torch.where(flat, _TINY, step.abs())
    codes = torch.where(flat[:, None], 0.0, codes)
    ratio = torch.where(flat, 0.0, sign * offset / size)
    factor = _factors(codes.amax(1), ratio, sign)
    fits = factor > 0
    # Nothing fits: eight bits that start at half a step. Round to the nearest of all.
    values = codes + ratio[:, None]
    spread = values.abs().amax(1).clamp(min=1.0) / _INT8[1]
    unit = torch.where(fits, 1.0 / factor.clamp(min=1.0), spread)
    exact = factor[:, None] * codes + torch.round(factor * ratio)[:, None]
    whole = torch.where(fits[:, None], exact, torch.round(values / unit[:, None]))
    moved = (whole * unit[:, None] - values).abs().amax(1)
    return whole * sign[:, None], size * unit, moved


def _factors(top: Tensor, ratio: Tensor, sign: Tensor) -> Tensor:
    """K of each channel; 0 where no grid of this form fits eight bits."""
    largest, exact = torch.zeros_like(ratio), torch.zeros_like(ratio)
    for factor in range(1, _UINT8_MAX + 1):
        least = torch.round(factor * ratio)
        ends = torch.stack((least, least + factor * top)) * sign
        fits = (ends.amin(0) >= _INT8[0]) & (ends.amax(0) <= _INT8[1])
        whole = (factor * ratio - least).abs() < _EXACT * factor
        largest = torch.where(fits & (factor > 1), float(factor), largest)
        exact = torch.where(fits & whole, float(factor), exact)
    return torch.where(exact > 0, exact, largest)


def uint8_grid(step: float, offset: float, max_code: int) -> Uint8Grid | None:
    """An activation grid ``step * k + offset``, k = 0 .. max_code, in uint8.

    Returns:
        None where no codes with a zero point in 0 .. 255 hold it.
    """
    ratio = offset / step
    found: Uint8Grid | None = None
    for factor in range(1, _UINT8_MAX // max(max_code, 1) + 1):
        first = round(factor * ratio)  # code of the lowest level if that of 0 were 0
        zero_point, least = max(0, -first), max(0, first)
        if max(zero_point, least + factor * max_code) > _UINT8_MAX:
            continue
        moved = abs(first / factor - ratio)
        found = Uint8Grid(step, factor, least, zero_point, max_code, moved)
        if moved < _EXACT:
            break
    return found
