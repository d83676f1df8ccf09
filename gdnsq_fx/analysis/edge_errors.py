"""Where the error of an edge comes from while a probe runs the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from gdnsq_fx.analysis.edge_statistics import EdgeStatistics
from gdnsq_fx.quantize.quantizer import ActivationQuantizer, Quantizer
from gdnsq_fx.quantize.widths import at_width


class ErrorSource(Protocol):
    """``source(quantizer, value)``: quantized minus exact, of the value's shape."""

    def __call__(self, quantizer: Quantizer, value: Tensor) -> Tensor:
        """The error of one value."""
        ...


@torch.no_grad()
def error_now(quantizer: Quantizer, value: Tensor) -> Tensor:
    """The error with the quantizer as it stands."""
    return quantizer.quantize(value) - value


class MeasuredErrors:
    """The errors now; the values of activations are added to their statistics."""

    def __init__(self, statistics: Mapping[str, EdgeStatistics]) -> None:
        self._statistics = statistics

    @torch.no_grad()
    def __call__(self, quantizer: Quantizer, value: Tensor) -> Tensor:
        """The error of one value."""
        if isinstance(quantizer, ActivationQuantizer):
            return self._statistics[quantizer.edge].add_activation(quantizer, value)
        return error_now(quantizer, value)


class ErrorsAt:
    """The errors at other bit-widths; levels are placed on the first value met.

    An edge that stands at its width already keeps its levels.

    Args:
        widths: of every edge, by name.
        hard_bits: of every edge, now.
    """

    def __init__(self, widths: Mapping[str, int], hard_bits: Mapping[str, int]) -> None:
        self.widths = widths
        self._hard_bits = hard_bits
        self._placed: dict[str, Quantizer] = {}

    @torch.no_grad()
    def __call__(self, quantizer: Quantizer, value: Tensor) -> Tensor:
        """The error of one value."""
        edge = quantizer.edge
        if self._hard_bits[edge] == self.widths[edge]:
            return error_now(quantizer, value)
        placed = self._placed.get(edge)
        if placed is None:
            placed = at_width(quantizer, value, self.widths[edge])
            self._placed[edge] = placed
        return error_now(placed, value)
