"""What one more bit buys, edge by edge: divergence against bytes and bit operations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gdnsq_fx.analysis.edge_report import EdgeReport
from gdnsq_fx.analysis.notation import quantity


@dataclass(frozen=True)
class Step:
    """One edge raised to the next width.

    Attributes:
        edge: its name.
        bits: width now; ``raised_bits`` the one after.
        divergence: predicted now, nats per sample, if only this edge is quantized;
            ``raised_divergence`` after.
        extra_bytes: stored more; 0 for an activation.
        extra_bops: bit operations per sample more.
    """

    edge: str
    bits: int
    raised_bits: int
    divergence: float
    raised_divergence: float
    extra_bytes: int
    extra_bops: int

    @property
    def gain(self) -> float:
        """Divergence that it saves, nats per sample."""
        return self.divergence - self.raised_divergence

    def __str__(self) -> str:
        return (
            f"raise {self.edge} to {self.raised_bits} bits: divergence "
            f"{self.divergence:.2e} -> {self.raised_divergence:.2e}, "
            f"+{quantity(self.extra_bytes, 'B')}, +{quantity(self.extra_bops, 'BOP')}"
        )


def next_steps(edges: Iterable[EdgeReport]) -> tuple[Step, ...]:
    """The next step of every edge for which it was predicted, largest gain first.

    Args:
        edges: with ``divergence_at`` for a width above their own.
    """
    found = [step for step in map(_next_step, edges) if step is not None]
    return tuple(sorted(found, key=lambda step: -step.gain))


def best_per_byte(steps: Iterable[Step]) -> Step | None:
    """Of the steps that store more, the one which saves most for each byte."""
    stored = [step for step in steps if step.extra_bytes and step.gain > 0]
    return max(stored, key=lambda step: step.gain / step.extra_bytes, default=None)


def best_per_bop(steps: Iterable[Step]) -> Step | None:
    """Of the steps that compute more, the one which saves most for each BOP."""
    computed = [step for step in steps if step.extra_bops and step.gain > 0]
    return max(computed, key=lambda step: step.gain / step.extra_bops, default=None)


def _next_step(edge: EdgeReport) -> Step | None:
    raised = min((w for w in edge.divergence_at if w > edge.bits), default=None)
    if raised is None:
        return None
    more = raised - edge.bits
    return Step(
        edge=edge.name,
        bits=edge.bits,
        raised_bits=raised,
        divergence=edge.predicted_divergence,
        raised_divergence=edge.divergence_at[raised],
        extra_bytes=math.ceil(edge.parameters * more / 8),
        # Bit operations are a product of widths, of which this edge has one.
        extra_bops=edge.bops * more // edge.bits,
    )
