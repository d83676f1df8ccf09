"""The capacity report as plain text, at most 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from gdnsq_fx.analysis.report import CapacityReport, EdgeReport

HEADERS = (
    "edge", "op", "shape", "bits", "capacity", "entropy", "used", "SQNR", "divergence", ""
)  # fmt: skip
NAME_WIDTH = 26
MARK = "<<"


def report_text(report: CapacityReport, limit: int | None) -> str:
    """Table of edges, then cut, totals, coverage and skipped nodes."""
    shown = report.edges[:limit]
    table = tabulate(
        [_row(edge) for edge in shown],
        headers=HEADERS,
        colalign=("left", "left", "left", *["right"] * 6, "left"),
        disable_numparse=True,
    )
    hidden = len(report.edges) - len(shown)
    more = [f"... and {hidden} more edges (to_text(limit=None))"] if hidden else []
    return "\n".join([table, *more, "", *_summary(report), *_skipped(report)])


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: ``12.3 k``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def shortened(name: str, width: int) -> str:
    """A name cut in its middle, where it is the least telling."""
    if len(name) <= width:
        return name
    tail = width // 2 + 2
    return f"{name[: width - tail - 2]}..{name[-tail:]}"


def bits_of(edge: EdgeReport) -> str:
    """``2``, or ``8 > 2`` where the target is not met yet."""
    met = edge.bits <= edge.target_bits
    return str(edge.bits) if met else f"{edge.bits} > {edge.target_bits}"


def divergence_of(edge: EdgeReport) -> str:
    """Predicted, and measured where it was."""
    measured = edge.measured_divergence
    predicted = f"{edge.predicted_divergence:.2e}"
    return predicted if measured is None else f"{predicted} ({measured:.2e})"


def _row(edge: EdgeReport) -> list[str]:
    return [
        shortened(edge.name, NAME_WIDTH),
        shortened(edge.op, 10),
        "x".join(str(n) for n in edge.shape),
        bits_of(edge),
        quantity(edge.capacity),
        quantity(edge.entropy),
        f"{100 * edge.utilisation:.0f}%",
        f"{edge.sqnr_db:.1f}",
        divergence_of(edge),
        MARK if edge.bottleneck else "",
    ]


def _summary(report: CapacityReport) -> list[str]:
    totals, coverage, cut = report.totals, report.coverage, report.cut
    lines = [
        "capacity, entropy: bits per sample; SQNR: dB; divergence: predicted Jeffreys "
        "divergence,",
        "nats per sample, if only this edge is quantized (measured in brackets). "
        f"{MARK} marks the fewest",
        "edges that make up half of it.",
        "",
    ]
    if cut is not None:
        lines += [
            f"minimum cut  {quantity(cut.bits, 'bit')} per sample, "
            f"{100 * cut.share:.1f}% of what floating point sends across it:",
            *(f"             {name}" for name in cut.values[:6]),
            *([f"             ... {len(cut.values) - 6} more"] if cut.values[6:] else []),
        ]
    ratio = totals.float_size_bytes / max(totals.size_bytes, 1)
    cheaper = totals.float_bops / max(totals.bops, 1)
    return [
        *lines,
        f"size         {quantity(totals.size_bytes, 'B')} ({ratio:.1f}x smaller than "
        f"{quantity(totals.float_size_bytes, 'B')})",
        f"cost         {quantity(totals.bops, 'BOP')} per sample ({cheaper:.0f}x fewer "
        f"than 32-bit), {quantity(totals.macs, 'MAC')}",
        f"coverage     {100 * coverage.macs:.1f}% of MACs, "
        f"{100 * coverage.weights:.1f}% of weights quantized",
    ]


def _skipped(report: CapacityReport) -> list[str]:
    if not report.coverage.skipped:
        return []
    lines = ["skipped:"]
    for skip in report.coverage.skipped:
        where = f" ({skip.source})" if skip.source else ""
        lines.append(f"  {skip.name}: {skip.reason}{where}")
    return lines
