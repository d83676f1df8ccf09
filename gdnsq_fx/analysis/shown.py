"""What every view of a report shows of an edge beside the columns of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from gdnsq_fx.analysis.edge_report import EdgeReport

_IN_THE_TABLE = frozenset(
    {
        "name", "op", "shape", "bits", "target_bits", "capacity", "entropy",
        "utilisation", "sqnr_db", "predicted_divergence", "measured_divergence",
        "bottleneck",
    }
)  # fmt: skip


def more_facts(edge: EdgeReport) -> dict[str, float]:
    """Its other numbers by name, such as ``clipped``; without those not measured."""
    found: dict[str, float] = {}
    for one in fields(edge):
        value: Any = getattr(edge, one.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and one.name not in _IN_THE_TABLE:
            found[one.name] = value
    return found


def divergence_shares(edges: Sequence[EdgeReport]) -> dict[str, float]:
    """Each edge's share of the sum of all predicted divergences, 0..1."""
    total = sum(edge.predicted_divergence for edge in edges)
    return {e.name: e.predicted_divergence / total if total else 0.0 for e in edges}
