"""What calibration sees of one activation, and the range it chooses from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdnsq_fx.errors import CalibrationError
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer

SAMPLE_SIZE = 1 << 16
CANDIDATES = 64
# Of a range that is searched; see `Observer._best_shrink`.
MOST_BITS = 12
# Data on a lattice, such as pixels of whole sixteenths, may lie midway between two
# levels in numbers. Float rounding would choose theirs, and runtimes round differently,
# so levels lie a little further apart there.
MIDWAY = 1e-4
MOST_MIDWAY = 1e-3
OFF_LATTICE = 1.0 + 1.0 / 256.0
# Products of such values overflow, so that only what is never multiplied with its like
# holds them: a mask.
MASK_LIMIT = math.sqrt(torch.finfo(torch.float32).max)


class Observer:
    """Extremes and a sample of the values of one edge.

    Memory is bounded: half of the sample is dropped whenever it would exceed its size.
    What is kept is drawn at random (an even stride would see the same channels each
    time), from a generator of its own.

    Attributes:
        low, high: extremes of what was seen, masks aside.
        is_mask: some of it was beyond ``MASK_LIMIT``, or minus infinity.
    """

    def __init__(self, edge: str) -> None:
        self.edge = edge
        self.is_mask = False
        self.low = math.inf
        self.high = -math.inf
        self._share = 1.0
        self._sample = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def of_all(cls, edge: str, others: Iterable[Observer]) -> Observer:
        """An observer that has seen what others have."""
        made = cls(edge)
        for other in others:
            made.add(other._sample)
            made.low = min(made.low, other.low)
            made.high = max(made.high, other.high)
        return made

    @property
    def is_empty(self) -> bool:
        """Whether it has seen no value yet."""
        return not self.low <= self.high

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a quantizer."""
        del module
        self.add(args[0])

    def add(self, values: Tensor) -> None:
        """Take note of a tensor of any shape.

        Raises:
            CalibrationError: it holds NaN, or plus infinity: something overflowed.
        """
        if values.numel() == 0:
            return
        flat = values.detach().reshape(-1).float()
        low, high = (float(v) for v in torch.aminmax(flat))
        if not low < math.inf or not high < math.inf:
            raise CalibrationError(
                f"NaN or infinite values reach {self.edge} in calibration although the "
                "inputs are finite; check the weights and the layers before it"
            )
        if max(-low, high) > MASK_LIMIT:
            self.is_mask = True
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        # Halved before drawing: a large activation is never drawn from as a whole.
        while self._sample.numel() + flat.numel() * self._share > SAMPLE_SIZE:
            self._sample = self._drawn(self._sample, 0.5)
            self._share /= 2.0
        drawn = self._drawn(flat, self._share)
        self._sample = torch.cat([self._sample.to(flat.device), drawn])

    def _drawn(self, flat: Tensor, share: float) -> Tensor:
        """About a share of the values, at random places; all of them at share 1."""
        if share == 1.0 or not flat.numel():
            return flat
        count = math.ceil(flat.numel() * share)
        places = torch.randint(flat.numel(), (count,), generator=self._generator)
        return flat[places.to(flat.device)]

    def place(self, quantizer: ActivationQuantizer, *, from_zero: bool = False) -> None:
        """Set step, range and lower bound for the target bits, and note the extremes.

        Args:
            quantizer: of this edge.
            from_zero: 0 is to lie among the levels, whatever the values.

        Raises:
            CalibrationError: nothing was observed.
        """
        if self.is_empty:
            raise CalibrationError(
                f"no value reached {self.edge} in calibration; its layer does not run "
                "on these batches, so exclude it or add batches that use it"
            )
        quantizer.observed.copy_(torch.tensor([self.low, self.high]))
        low = 0.0 if quantizer.nonnegative else self.low
        high = self.high
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        bits = quantizer.spec.bits
        (shrink,) = self._best_shrinks(low, high, [bits])
        quantizer.cover(low * shrink, high * shrink, bits)
        if self._share_midway(quantizer) > MOST_MIDWAY:
            quantizer.cover(*_off_lattice(low * shrink, high * shrink), bits)

    def _share_midway(self, quantizer: ActivationQuantizer) -> float:
        """Share of values that lie midway between two levels, to float rounding."""
        step, lowest = quantizer.step.detach(), quantizer.offset.detach()
        places = (self._sample - lowest.to(self._sample)) / step.to(self._sample)
        inside = (places > 0.0) & (places < float(quantizer.levels() - 1))
        midway = ((places % 1.0) - 0.5).abs() < MIDWAY
        return float((inside & midway).float().mean()) if len(places) else 0.0

    def note_shares(self, quantizer: ActivationQuantizer) -> None:
        """Note where the levels would lie at other widths (`change_width` uses it)."""
        low = 0.0 if quantizer.nonnegative else self.low
        widths = range(1, len(quantizer.shares) + 1)
        shares = self._best_shrinks(low, self.high, widths)
        quantizer.shares.copy_(torch.tensor(shares))

    def _best_shrinks(
        self, low: float, high: float, widths: Sequence[int]
    ) -> list[float]:
        """Share of the full range with the least mean squared error, for each width.

        From 13 bits on it is 1: to cut the extreme of n = 2^16 values off by 1/64 of
        the range R costs (R/64)^2 / n, which is more than the whole rounding error
        (R/2^bits)^2 / 12.
        """
        if not high > low or min(widths) > MOST_BITS:
            return [1.0] * len(widths)
        values = self._sample.sort().values.double()
        return [
            _best_shrink(values, low, high, b) if b <= MOST_BITS else 1.0
            for b in widths
        ]


def _off_lattice(low: float, high: float) -> tuple[float, float]:
    """The range with its levels further apart; what does not hold 0 grows outwards."""
    wider = (high - low) * (OFF_LATTICE - 1.0)
    if low > 0.0:
        return low, high + wider
    if high < 0.0:
        return low - wider, high
    return low * OFF_LATTICE, high * OFF_LATTICE


def _best_shrink(values: Tensor, low: float, high: float, bits: int) -> float:
    """The best share on ascending values; 2^bits levels."""
    shares = torch.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES, device=values.device)
    codes = torch.linspace(0.0, 1.0, 2**bits, device=values.device).double()
    levels = (low + (high - low) * codes) * shares.double()[:, None]
    errors = _squared_errors(values, levels)
    # The first of equals is the widest; sums of squares are equal to rounding.
    equal = errors <= errors.min() + 1e-12 * values.square().sum()
    return float(shares[equal.float().argmax()])


def _squared_errors(values: Tensor, levels: Tensor) -> Tensor:
    """Sum of squared distances of values to their nearest levels, for each set of them.

    A sum over cells instead of values: with n values of sum S nearest to a level v,
    their squared distances add up to ``sum of squares - 2 v S + n v^2``.

    Args:
        values: ``[N]``, ascending.
        levels: ``[sets, L]``, ascending along L.

    Returns:
        ``[sets]``.
    """
    borders = (levels[:, 1:] + levels[:, :-1]) / 2
    inner = torch.searchsorted(values, borders)
    first, last = torch.zeros_like(levels[:, :1]), torch.ones_like(levels[:, :1])
    ends = torch.cat([first.long(), inner, last.long() * len(values)], 1)
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])[ends].diff()
    counts = ends.diff()
    return values.square().sum() + (levels * (counts * levels - 2 * sums)).sum(1)
