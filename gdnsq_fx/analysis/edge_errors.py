"""Where the error of an edge comes from while a probe runs the graph."""

# The version counter of a tensor has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from gdnsq_fx.analysis.edge_statistics import EdgeStatistics
from gdnsq_fx.quantize.activation_grid import ActivationGrid
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.quantize.widths import at_width


class ErrorSource(Protocol):
    """``source(quantizer, value)``: quantized minus exact, of the value's shape."""

    def __call__(self, quantizer: Quantizer, value: Tensor) -> Tensor:
        """The error of one value."""
        ...


class ErrorsNow:
    """The errors with the quantizers as they stand, which must not change meanwhile.

    Args:
        keep: compute the error of a parameter once for all batches, which takes the
            memory of the parameters. A weight that is computed from parameters is
            another tensor each time, and its error is never kept.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._grids: dict[str, ActivationGrid] = {}

    @torch.no_grad()
    def __call__(self, quantizer: Quantizer, value: Tensor) -> Tensor:
        """The error of one value."""
        if isinstance(quantizer, ActivationQuantizer):
            grid = self.grid(quantizer)
            return grid.error_of_codes_(grid.codes(value), value)
        if not self._keep or not _is_constant(quantizer, value):
            return quantizer.quantize(value).sub_(value)
        known = self._kept.get(quantizer.edge)
        if known is None or known[0] is not value or known[1] != value._version:
            known = value, value._version, quantizer.quantize(value).sub_(value)
            self._kept[quantizer.edge] = known
        return known[2]

    def grid(self, quantizer: ActivationQuantizer) -> ActivationGrid:
        """The levels of an activation, computed once."""
        known = self._grids.get(quantizer.edge)
        if known is None:
            known = self._grids[quantizer.edge] = quantizer.grid()
        return known


def _is_constant(quantizer: Quantizer, value: Tensor) -> bool:
    """Whether the next batch brings the same tensor, which tells if it was changed."""
    if not isinstance(quantizer, WeightQuantizer):
        return False
    return isinstance(value, nn.Parameter) and not value.is_inference()


class MeasuredErrors:
    """The errors now; the values of activations are added to their statistics."""

    def __init__(
        self, statistics: Mapping[str, EdgeStatistics], now: ErrorsNow
    ) -> None:
        self._statistics = statistics
        self._now = now

    @torch.no_grad()
    def __call__(self, quantizer: Quantizer, value: Tensor) -> Tensor:
        """The error of one value."""
        if isinstance(quantizer, ActivationQuantizer):
            grid = self._now.grid(quantizer)
            return self._statistics[quantizer.edge].add_activation(grid, value)
        return self._now(quantizer, value)


class ErrorsAt:
    """The errors at other bit-widths; levels are placed on the first value met, or by
    what calibration found.

    An edge that stands at its width already keeps its levels.

    Args:
        widths: of every edge, by name.
        hard_bits: of every edge, now.
        now: of the edges that stand at their width.
        keep: as in `ErrorsNow`.
        as_calibrated: as in `at_width`.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        hard_bits: Mapping[str, int],
        now: ErrorsNow,
        *,
        keep: bool,
        as_calibrated: bool = False,
    ) -> None:
        self.widths = widths
        self._hard_bits = hard_bits
        self._now = now
        self._as_calibrated = as_calibrated
        self._then = ErrorsNow(keep=keep)
        self._placed: dict[str, Quantizer] = {}

    @torch.no_grad()
    def __call__(self, quantizer: Quantizer, value: Tensor) -> Tensor:
        """The error of one value."""
        edge = quantizer.edge
        if self._hard_bits[edge] == self.widths[edge]:
            return self._now(quantizer, value)
        placed = self._placed.get(edge)
        if placed is None:
            placed = at_width(
                quantizer,
                value,
                self.widths[edge],
                as_calibrated=self._as_calibrated,
            )
            self._placed[edge] = placed
        return self._then(placed, value)
