"""Int8 codes as few bits: ``codes = factor * levels + least`` in every channel.

What `grids.int8_weight` makes of a weight of b bits are codes ``K * k + m``, k from 0
to ``2^b - 1``. K and m are found again from the codes themselves: m is the least code
of a channel, K the greatest common divisor of their distances from it. A channel whose
codes were rounded since (`passes/_biases.py` coarsens scales of nearly 0) may need more
bits than the rest. It stays whole where that costs less than more bits for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CODES = 256
# Elements that are looked at together: bounds what is allocated on the way.
_CHUNK = 1 << 22
_BITS = 8


@dataclass(frozen=True, eq=False)
class AffineCodes:
    """``codes = factor * levels + least``, but for the channels in ``whole``.

    Attributes:
        levels: uint8 from 0 to ``2^bits - 1``, shape of the codes; 0 in ``whole``.
        bits: of one level, 1 to 8.
        factor: uint8 of shape [channels], or [1] for all.
        least: int8 of the shape of ``factor``.
        axis: dimension of the channels, None where there is one factor.
        whole: int64, indices of channels whose codes are stored as they are.
        rows: int8, those codes, [len(whole), ...], the channel in front.
    """

    levels: Tensor
    bits: int
    factor: Tensor
    least: Tensor
    axis: int | None
    whole: Tensor
    rows: Tensor

    @property
    def size(self) -> int:
        """Bytes of all of it, bit-packed."""
        packed = -(-self.levels.numel() * self.bits // 8)
        small = self.factor.numel() + self.least.numel() + 8 * self.whole.numel()
        return packed + small + self.rows.numel()

    def codes(self) -> Tensor:
        """The int8 codes again."""
        shape = [1] * self.levels.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        factor, least = self.factor.int().reshape(shape), self.least.int()
        found = (self.levels.int() * factor + least.reshape(shape)).to(torch.int8)
        if self.whole.numel():
            found[self.whole] = self.rows
        return found


def affine_codes(codes: Tensor, axis: int | None = None) -> AffineCodes:
    """The fewest bits for int8 codes, with one factor or one for each channel.

    Args:
        codes: int8, any shape, not empty.
        axis: dimension of the channels; None: one factor.
    """
    alone = _affine(codes, None)
    if axis is None or codes.shape[axis] == 1:
        return alone
    each = _affine(codes, axis)
    return each if each.size < alone.size else alone


def _affine(codes: Tensor, axis: int | None) -> AffineCodes:
    moved = codes.reshape(1, -1) if axis is None else codes.movedim(axis, 0)
    rows = moved.flatten(1)
    least = rows.amin(1)
    factor = _divisors(rows, least)
    top = (rows.amax(1).int() - least.int()) // factor
    # frexp: the exponent e of a whole number n has 2^(e - 1) <= n < 2^e.
    need = torch.frexp(top.float()).exponent.clamp(min=1)
    # Rows are written over along the first dimension, so only there they may be whole.
    bits = _cheapest(need, rows.shape[1]) if axis == 0 else int(need.max())
    whole = torch.nonzero(need > bits).flatten()
    levels = torch.empty_like(rows, dtype=torch.uint8)
    for start, stop in _chunks(rows):
        part = rows[start:stop].int() - least[start:stop, None].int()
        levels[start:stop] = (part // factor[start:stop, None]).to(torch.uint8)
    levels[whole] = 0
    shaped = levels.reshape(moved.shape if axis is not None else codes.shape)
    shaped = shaped if axis is None else shaped.movedim(0, axis)
    kept = moved[whole].clone() if axis == 0 else codes.new_empty(0)
    return AffineCodes(
        shaped.contiguous(), bits, factor.to(torch.uint8), least, axis, whole, kept
    )


def _divisors(rows: Tensor, least: Tensor) -> Tensor:
    """Greatest common divisor of the distances of a row's codes, int32, at least 1."""
    present = torch.zeros(len(rows), _CODES, dtype=torch.bool)
    for start, stop in _chunks(rows):
        part = rows[start:stop].long() - least[start:stop, None].long()
        present[start:stop].scatter_(1, part, True)
    found = torch.zeros(len(rows), dtype=torch.int32)
    for distance in range(1, _CODES):
        found = torch.gcd(found, present[:, distance].int() * distance)
    return found.clamp(min=1)


def _cheapest(need: Tensor, length: int) -> int:
    """Bits for all rows such that what exceeds them, stored whole, costs least."""

    def cost(bits: int) -> float:
        whole = int((need > bits).sum())
        return len(need) * length * bits / 8 + whole * (length + 8)

    return min(range(1, _BITS + 1), key=cost)


def _chunks(rows: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows of bounded size."""
    count = max(1, _CHUNK // max(1, rows.shape[1]))
    return [(n, min(n + count, len(rows))) for n in range(0, len(rows), count)]
