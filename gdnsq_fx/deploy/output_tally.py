"""How far the outputs of one runtime lie from those of another, batch after batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdnsq_fx.deploy.following import FLOAT_ROUNDING


@dataclass
class OutputTally:
    """Sums over batches; the memory it takes does not grow with their number.

    Attributes:
        largest: difference, in the units of the output.
        relative: the same as a share of the range of the reference's output.
        positions: that have a likeliest class.
        other_argmax: those of them where another class is the likeliest.
    """

    largest: float = 0.0
    positions: int = 0
    other_argmax: int = 0
    _total: float = 0.0
    _elements: int = 0
    _each: dict[int, list[float]] = field(default_factory=dict[int, list[float]])

    @property
    def mean(self) -> float:
        """Mean difference of all elements."""
        return self._total / max(self._elements, 1)

    @property
    def relative(self) -> float:
        """Of several outputs, that which differs most in terms of its range."""
        shares = [
            worst / (high - low) if high > low else worst
            for worst, low, high in self._each.values()
        ]
        return max(shares, default=0.0)

    def add(self, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        """Count the outputs of one batch, of equal structure and shapes."""
        for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
            if not other.numel():
                continue
            apart = distances(one, other)
            worst = float(apart.max())
            self.largest = max(self.largest, worst)
            self._total += float(apart.sum())
            self._elements += apart.numel()
            kept = self._each.setdefault(place, [0.0, torch.inf, -torch.inf])
            finite = other[torch.isfinite(other)].double()
            kept[0] = max(kept[0], worst)
            if finite.numel():
                kept[1] = min(kept[1], float(finite.min()))
                kept[2] = max(kept[2], float(finite.max()))
            self._add_classes(one, other)

    def _add_classes(self, one: Tensor, other: Tensor) -> None:
        # Dense maps have their classes in dimension 1.
        dim = 1 if other.ndim >= 4 else other.ndim - 1
        if other.ndim < 2 or other.shape[dim] < 2 or not other.is_floating_point():
            return
        differs = one.argmax(dim) != other.argmax(dim)
        self.positions += differs.numel()
        self.other_argmax += int(differs.sum())


def distances(got: Tensor, wanted: Tensor) -> Tensor:
    """Absolute differences in float64; infinite where one alone is no number."""
    one, other = got.double(), wanted.double()
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(same, 0.0, (one - other).abs())
    return torch.where(apart.isnan(), torch.inf, apart)


def input_distances(
    got: Sequence[Tensor], wanted: Sequence[Tensor], count: int
) -> Tensor:
    """Largest difference of each input of a batch, float64 ``[B]``.

    An output whose dimension 0 is not the batch counts for every input.
    """
    worst = torch.zeros(count, dtype=torch.float64)
    for one, other in zip(got, wanted, strict=True):
        if not other.numel():
            continue
        apart = distances(one, other)
        if other.ndim and other.shape[0] == count:
            worst = torch.maximum(worst, apart.reshape(count, -1).amax(1))
        else:
            worst = torch.maximum(worst, apart.max())
    return worst


def same_inputs(got: Sequence[Tensor], wanted: Sequence[Tensor], count: int) -> Tensor:
    """Which inputs of a batch have equal outputs up to float rounding, bool ``[B]``.

    An output whose dimension 0 is not the batch counts for every input.
    """
    same = torch.ones(count, dtype=torch.bool)
    for one, other in zip(got, wanted, strict=True):
        if not other.numel():
            continue
        finite = other[torch.isfinite(other)].double()
        size = float(finite.abs().max()) if finite.numel() else 0.0
        close = distances(one, other) <= FLOAT_ROUNDING * size
        if other.ndim and other.shape[0] == count:
            same &= close.reshape(count, -1).all(1)
        else:
            same &= close.all()
    return same
