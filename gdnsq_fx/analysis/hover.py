"""Labels and hover texts of the drawn network, in the little HTML that plotly knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gdnsq_fx.analysis.edge_report import EdgeReport
from gdnsq_fx.analysis.notation import bits_of, quantity, shortened
from gdnsq_fx.analysis.shown import more_facts
from gdnsq_fx.analysis.sketch import JOIN, OPERATION

LABEL = 14  # characters of a line


def label_of(data: Mapping[str, Any]) -> str:
    """The name on two lines, broken at its last dot that keeps both short."""
    parts = str(data["label"]).split(".")
    breaks = [
        [".".join(parts[:n]), ".".join(parts[n:])] for n in range(1, len(parts))
    ] or [parts]
    fitting = [pair for pair in breaks if max(map(len, pair)) <= LABEL]
    lines = (fitting or [min(breaks, key=lambda pair: max(map(len, pair)))])[-1]
    return "<br>".join(escape(shortened(line, LABEL)) for line in lines)


def hover_of(
    data: Mapping[str, Any],
    edges: Sequence[EdgeReport],
    shares: Mapping[str, float],
    slack: Mapping[str, float],
) -> str:
    """All facts of a node of `sketch_of` and of the edges it stands for.

    Args:
        edges: those edges.
        shares: of the predicted divergence, by name of the edge.
        slack: bits per sample, by name of the edge.
    """
    lines = [f"<b>{escape(data['label'])}</b>"]
    if data["kind"] in (OPERATION, JOIN):
        macs = f", {quantity(data['macs'], 'MAC')}" if data["macs"] else ""
        lines += [f"{escape(data['operation'])}{macs}"]
    others = [label for label in data["folded"] if label != data["label"]]
    if others:
        lines += [escape("with " + shortened(", ".join(others), 60))]
    for edge in edges:
        lines += _facts(edge, shares[edge.name], slack.get(edge.name))
    if not edges and data["float_bits"]:
        lines += [f"floating point, {quantity(data['float_bits'], 'bit')} per sample"]
    return "<br>".join(lines)


def _facts(edge: EdgeReport, share: float, slack: float | None) -> list[str]:
    size = "×".join(str(n) for n in edge.shape)
    lines = [
        f"<b>{escape(edge.name)}</b>  {size}, {escape(bits_of(edge))} bits",
        f"predicted divergence {edge.predicted_divergence:.2e} nat, {share:.1%} of all",
        f"capacity {quantity(edge.capacity, 'bit')}, entropy "
        f"{quantity(edge.entropy, 'bit')} ({edge.utilisation:.0%} used)",
        f"SQNR {edge.sqnr_db:.1f} dB",
    ]
    if edge.measured_divergence is not None:
        lines.insert(2, f"measured divergence {edge.measured_divergence:.2e} nat")
    if slack is not None:
        lines += [f"slack {quantity(slack, 'bit')} before it is the minimum cut"]
    more = more_facts(edge)
    return [
        *lines,
        *(f"{escape(k).replace('_', ' ')} {v:.3g}" for k, v in more.items()),
    ]
