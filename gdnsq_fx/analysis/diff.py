"""What changed between two reports: `ReportDiff`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

from gdnsq_fx.analysis.edge_report import EdgeReport
from gdnsq_fx.analysis.notation import quantity, shortened

NAME = 40


@dataclass(frozen=True)
class EdgeChange:
    """One edge in both reports, before and after.

    Attributes:
        name: of the edge.
        bits: hard bit-widths.
        capacity: bits per sample.
        divergence: predicted Jeffreys divergence, nats per sample.
    """

    name: str
    bits: tuple[int, int]
    capacity: tuple[float, float]
    divergence: tuple[float, float]

    @property
    def change(self) -> float:
        """Divergence after minus before, nats per sample."""
        return self.divergence[1] - self.divergence[0]


@dataclass(frozen=True)
class ReportDiff:
    """Two reports compared; edges are matched by name.

    Attributes:
        changes: edges in both, sorted by the size of the change in divergence, then of
            that in capacity, largest first.
        only_before, only_after: names of edges in one report alone.
    """

    changes: tuple[EdgeChange, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, limit: int | None = 40) -> str:
        """A table of at most 100 columns, the ``limit`` largest changes (None: all)."""
        shown = self.changes[:limit]
        hidden = len(self.changes) - len(shown)
        rows = [_row(change) for change in shown]
        headers = ["edge", "bits", "capacity", "divergence", "change"]
        table = tabulate(
            [headers, SEPARATING_LINE, *rows],
            tablefmt="simple",
            colalign=("left", "right", "right", "right", "right"),
            disable_numparse=True,
        )
        lines = [line.rstrip() for line in table.splitlines()[1:-1]]
        if hidden:
            lines.append(f"... and {hidden} more edges (to_text(limit=None))")
        for title, names in (
            ("only before", self.only_before),
            ("only after", self.only_after),
        ):
            lines += [f"{title}:  {shortened(name, 80)}" for name in names]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able; pairs are [before, after]."""
        pairs = ("bits", "capacity", "divergence")
        return {
            "changes": [
                {
                    "name": c.name,
                    **{key: list(asdict(c)[key]) for key in pairs},
                    "change": c.change,
                }
                for c in self.changes
            ],
            "only_before": list(self.only_before),
            "only_after": list(self.only_after),
        }


def difference(before: Sequence[EdgeReport], after: Sequence[EdgeReport]) -> ReportDiff:
    """Match the edges of two reports by name."""
    earlier, later = {e.name: e for e in before}, {e.name: e for e in after}
    changes = [_change(earlier[n], later[n]) for n in earlier if n in later]
    changes.sort(
        key=lambda c: (abs(c.change), abs(c.capacity[1] - c.capacity[0])), reverse=True
    )
    return ReportDiff(
        tuple(changes),
        tuple(n for n in earlier if n not in later),
        tuple(n for n in later if n not in earlier),
    )


def _change(before: EdgeReport, after: EdgeReport) -> EdgeChange:
    return EdgeChange(
        before.name,
        (before.bits, after.bits),
        (before.capacity, after.capacity),
        (before.predicted_divergence, after.predicted_divergence),
    )


def _row(change: EdgeChange) -> list[str]:
    bits, capacity = change.bits, [quantity(c) for c in change.capacity]
    first, last = change.divergence
    return [
        shortened(change.name, NAME),
        str(bits[0]) if bits[0] == bits[1] else f"{bits[0]} -> {bits[1]}",
        capacity[0] if capacity[0] == capacity[1] else " -> ".join(capacity),
        f"{first:.2e} -> {last:.2e}",
        _factor(first, last),
    ]


def _factor(before: float, after: float) -> str:
    if before == after:
        return "="
    return f"x{after / before:.2g}" if before else "new"
