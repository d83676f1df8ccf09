"""What is summed up for one edge while batches stream by, and the facts made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.capacity import (
    capacity_bits,
    code_counts,
    entropy_bits,
    grouped_entropy_bits,
    sqnr_db,
    sum_of_squares,
)
from gdnsq_fx.analysis.divergence import vanishing_divergence
from gdnsq_fx.annotations import EdgeFacts
from gdnsq_fx.quantize.activation_grid import ActivationGrid
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import activation_sites, bit_width, weight_sites


class EdgeStatistics:
    """Running sums of one edge; memory does not grow with the number of batches."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.elements = 0
        # Tensors after the first batch: reading them waits for the device.
        self.signal: Tensor | float = 0.0
        self.noise: Tensor | float = 0.0
        self.clipped: Tensor | float = 0.0
        self.divergence = 0.0
        self.divergence_at: dict[int, float] = {}
        self.joint_slope = 0.0
        self.joint_curvature = 0.0
        self.counts = torch.zeros(levels, dtype=torch.long)

    def add_activation(self, grid: ActivationGrid, value: Tensor) -> Tensor:
        """Take note of a batch; returns its quantization error, of the same shape."""
        codes = grid.codes(value)
        counts = code_counts(codes, self.levels)
        error = grid.error_of_codes_(codes, value)
        self.counts = self.counts.to(counts.device) + counts
        self.elements += value.numel()
        self.signal = self.signal + sum_of_squares(value)
        self.noise = self.noise + sum_of_squares(error)
        self.clipped = self.clipped + grid.clipped_count(value).double()
        return error

    def add_divergence(self, total: float, width: int | None = None) -> None:
        """Add a sum over samples of predicted divergences, now or at another width."""
        if width is None:
            self.divergence += total
        else:
            self.divergence_at[width] = self.divergence_at.get(width, 0.0) + total

    def predictions(self, samples: int) -> dict[str, Any]:
        """The fields of `EdgeFacts` that are predicted, per sample."""
        slope, curvature = self.joint_slope / samples, self.joint_curvature / samples
        return {
            "predicted_divergence": self.divergence / samples,
            "joint_divergence": vanishing_divergence(slope, curvature),
            "divergence_at": {
                width: total / samples for width, total in self.divergence_at.items()
            },
        }

    def facts(self, samples: int) -> EdgeFacts:
        """The facts of an activation edge, per sample."""
        elements = self.elements // samples
        levels = torch.tensor(self.levels)
        return EdgeFacts(
            elements=elements,
            bits=bit_width(self.levels),
            capacity=capacity_bits(torch.tensor(elements), levels),
            entropy=entropy_bits(self.counts) / samples,
            sqnr_db=sqnr_db(float(self.signal), float(self.noise)),
            clipped=float(self.clipped) / max(self.elements, 1),
            **self.predictions(samples),
        )


class WeightStatistics(EdgeStatistics):
    """A weight is the same in every batch: all but the divergence is known at once."""

    @torch.no_grad()
    def __init__(self, quantizer: WeightQuantizer, weight: Tensor) -> None:
        levels = quantizer.levels(weight)
        super().__init__(int(levels.max()))
        view = quantizer.layout.grouped(weight)
        kept = [d for d in range(view.ndim) if d not in quantizer.dims]
        codes = quantizer.layout.grouped(quantizer.codes(weight))
        codes = codes.permute(*kept, *quantizer.dims)
        groups = levels.numel()
        self.elements = weight.numel()
        self.signal = sum_of_squares(weight)
        self.noise = sum_of_squares(quantizer.quantize(weight).sub_(weight))
        self.capacity = capacity_bits(torch.tensor(weight.numel() / groups), levels)
        self.entropy = grouped_entropy_bits(codes, groups)

    def facts(self, samples: int) -> EdgeFacts:
        """The facts of a weight edge; elements and bits are those of the tensor."""
        return EdgeFacts(
            elements=self.elements,
            bits=bit_width(self.levels),
            capacity=self.capacity,
            entropy=self.entropy,
            sqnr_db=sqnr_db(float(self.signal), float(self.noise)),
            clipped=0.0,
            **self.predictions(samples),
        )


def statistics_of(graph_module: GraphModule) -> dict[str, EdgeStatistics]:
    """Empty statistics for every quantized edge of a graph, by name."""
    found = {
        s.edge: EdgeStatistics(s.quantizer.levels())
        for s in activation_sites(graph_module)
    }
    for site in weight_sites(graph_module):
        found[site.edge] = WeightStatistics(site.quantizer, site.weight().detach())
    return found
