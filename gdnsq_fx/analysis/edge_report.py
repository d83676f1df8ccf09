"""One line of the report, and all that its pages show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from gdnsq_fx.analysis.coverage import Coverage, Totals
from gdnsq_fx.analysis.cuts import MinimumCut


@dataclass(frozen=True)
class EdgeReport:
    """One quantized edge. Units: bits per sample, dB, nats per sample.

    Attributes:
        name: ``layer.input`` or ``layer.weight``.
        op: operation that reads it first.
        shape: of the value, with batch size 1 for activations.
        bits: hard bit-width now; ``target_bits`` is the one to meet.
        bottleneck: among the fewest edges whose predicted divergences make up half of
            the sum over all edges.

    The rest as in `EdgeFacts`; utilisation is entropy / capacity.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    bits: int
    target_bits: int
    capacity: float
    entropy: float
    utilisation: float
    sqnr_db: float
    clipped: float
    predicted_divergence: float
    measured_divergence: float | None
    joint_divergence: float | None
    measured_joint_divergence: float | None
    divergence_at: Mapping[int, float]
    macs: int
    bops: int
    parameters: int
    bottleneck: bool


@dataclass(frozen=True)
class Findings:
    """What the text and the HTML page show; see `CapacityReport`."""

    edges: tuple[EdgeReport, ...]
    cut: MinimumCut | None
    relative_cut: MinimumCut | None
    totals: Totals
    coverage: Coverage
    graph: nx.DiGraph[str]
