"""Forward and backward passes of one batch that predict divergences of all edges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.directions import Directions
from gdnsq_fx.analysis.divergence import Curvature, divergence_slope, primary_output
from gdnsq_fx.analysis.edge_errors import (
    ErrorsAt,
    ErrorsNow,
    ErrorSource,
    MeasuredErrors,
)
from gdnsq_fx.analysis.edge_statistics import EdgeStatistics
from gdnsq_fx.analysis.random_signs import content_seeds
from gdnsq_fx.inputs import Batch, batch_size
from gdnsq_fx.sites import bit_width
from gdnsq_fx.spec import MAX_BITS
from gdnsq_fx.state import cloned

from ._probe import EdgeProbe

Products = Mapping[str, Tensor]

# Only the sum of the joint curvature over all samples is used, which samples, each with
# signs of its own, average already; its slope has no such noise.
JOINT_DRAWS = 1


@dataclass(frozen=True)
class Prediction:
    """Adds what a batch tells to the statistics of every edge.

    One forward pass at identity precision and ``draws`` backward passes; for ``joint``
    one forward pass of the quantized model and two backward passes more; for each
    width one forward pass more. Backward passes stop at activations. Memory is
    that of one forward pass with its graph and an error for each edge, and with
    widths, ``draws`` gradients of every edge.

    Attributes:
        graph_module: prepared, in evaluation.
        statistics: of every edge, by name.
        draws, joint, widths, advice, curvature, part, by_sample: as in
            `AnalyzeCapacity`.
    """

    graph_module: GraphModule
    statistics: Mapping[str, EdgeStatistics]
    draws: int
    joint: bool
    widths: Sequence[int]
    advice: bool
    curvature: Curvature
    part: Callable[[Any], Any] | None = None
    by_sample: bool = False
    _alone_signs: torch.Generator = field(default_factory=lambda: _seeded(0))
    _joint_signs: torch.Generator = field(default_factory=lambda: _seeded(1))
    _now: ErrorsNow = field(init=False)
    _raised: list[ErrorsAt] = field(default_factory=list[ErrorsAt])
    _at_width: list[ErrorsAt] = field(default_factory=list[ErrorsAt])

    def __post_init__(self) -> None:
        bits = {name: bit_width(s.levels) for name, s in self.statistics.items()}
        # With widths the gradients of all draws fill the memory instead.
        keep = not self.widths
        now = ErrorsNow(keep=keep)
        object.__setattr__(self, "_now", now)
        for width in self.widths:
            at = dict.fromkeys(bits, width)
            self._at_width.append(
                ErrorsAt(at, bits, now, keep=keep, as_calibrated=self.by_sample)
            )
        if self.advice and not self.widths:
            more = {name: min(b + 1, MAX_BITS) for name, b in bits.items()}
            self._raised.append(ErrorsAt(more, bits, now, keep=keep))

    def add(self, batch: Batch) -> int:
        """Measure and predict on one batch; returns its number of samples."""
        size = batch_size(batch.args, batch.kwargs)
        logits = self._alone(batch, size)
        if self.joint:
            self._together(batch, size, logits)
        return size

    def _alone(self, batch: Batch, size: int) -> Tensor:
        """Each edge alone, linearized at identity precision; returns the output."""
        sources = [MeasuredErrors(self.statistics, self._now), *self._raised]
        probe, logits = self._run(batch, sources)
        inputs = (batch.args, batch.kwargs)
        seeds = content_seeds(inputs, size) if self.by_sample else ()
        directions = Directions(
            logits, self.draws, self.curvature, self._alone_signs, seeds
        )
        drawn: list[list[Products]] = [[] for _ in sources]
        kept: list[Sequence[Tensor | None]] = []
        for number, direction in enumerate(directions, start=1):
            last = number == self.draws
            if self._at_width:
                kept.append(probe.gradients(logits, direction, last=last))
                found = probe.products_of(kept[-1], size)
            else:
                found = probe.products(logits, direction, size, last=last)
            for products, one in zip(drawn, found, strict=True):
                products.append(one)
        self._predict(drawn[0], directions, None)
        for errors, products in zip(self._raised, drawn[1:], strict=True):
            self._predict(products, directions, errors.widths)
        del probe  # its errors make room for those at another width
        for errors in self._at_width:
            other, _ = self._run(batch, [errors], grad=False)
            products = [other.products_of(gradients, size)[0] for gradients in kept]
            self._predict(products, directions, errors.widths)
        return logits.detach()

    def _predict(
        self,
        drawn: Sequence[Products],
        directions: Directions,
        widths: Mapping[str, int] | None,
    ) -> None:
        """Add to the statistics what the products of all draws predict."""
        for edges in _alike(drawn[0]):
            products = torch.stack([_stacked(one, edges) for one in drawn], 1)
            totals: list[float] = directions.divergences(products).sum(1).tolist()
            for edge, total in zip(edges, totals, strict=True):
                width = None if widths is None else widths[edge]
                self.statistics[edge].add_divergence(total, width)

    def _together(self, batch: Batch, size: int, reference: Tensor) -> None:
        """All edges quantized: slope and curvature of the divergence along each."""
        probe, logits = self._run(batch, [self._now], joint=True)
        slope = divergence_slope(logits, reference, self.curvature)
        (products,) = probe.products(logits, slope, size, last=False)
        for edges in _alike(products):
            slopes = _stacked(products, edges).double().sum(1)
            for edge, total in zip(edges, slopes.tolist(), strict=True):
                self.statistics[edge].joint_slope += total
        (direction,) = Directions(
            logits, JOINT_DRAWS, self.curvature, self._joint_signs
        )
        (products,) = probe.products(logits, direction, size, last=True)
        for edges in _alike(products):
            squares = _stacked(products, edges).double().square().sum(1)
            for edge, total in zip(edges, squares.tolist(), strict=True):
                self.statistics[edge].joint_curvature += total

    def _run(
        self,
        batch: Batch,
        sources: Sequence[ErrorSource],
        *,
        joint: bool = False,
        grad: bool = True,
    ) -> tuple[EdgeProbe, Tensor]:
        probe = EdgeProbe(self.graph_module, sources, joint=joint)
        args, kwargs = cloned((batch.args, batch.kwargs))
        with torch.set_grad_enabled(grad):
            output = probe.run_all(args, kwargs)
            part = output if self.part is None else self.part(output)
            return probe, primary_output(part)


def _alike(products: Products) -> Iterator[list[str]]:
    """Edges whose products have one shape: few calls, and reads, serve them all."""
    for length in {len(one) for one in products.values()}:
        yield [edge for edge, one in products.items() if len(one) == length]


def _stacked(products: Products, edges: Sequence[str]) -> Tensor:
    """Products of some edges, ``[edges, batch]`` or ``[edges, 1]``."""
    return torch.stack([products[edge] for edge in edges])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
