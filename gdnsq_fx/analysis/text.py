"""The capacity report as plain text, at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from tabulate import SEPARATING_LINE, tabulate

from gdnsq_fx.analysis.bars import LEAST_BAR, with_bars
from gdnsq_fx.analysis.cuts import MinimumCut
from gdnsq_fx.analysis.edge_report import EdgeReport, Findings

WIDTH = 100
MARK = "<<"
SHOWN_VALUES = 6  # of a cut
_HEADERS = ("edge", "op", "shape", "bits", "capacity", "entropy", "used", "SQNR")
_LEFT = 3  # edge, op and shape are text; the rest are numbers


def report_text(report: Findings, limit: int | None, colour: bool = False) -> str:
    """Table of edges, then cuts, totals, coverage and skipped nodes.

    Args:
        limit: show this many of the worst edges (None: all).
        colour: with ANSI colours, for a terminal.
    """
    shown = report.edges[:limit]
    hidden = len(report.edges) - len(shown)
    more = [f"... and {hidden} more edges (to_text(limit=None))"] if hidden else []
    return "\n".join(
        [_table(shown, colour), *more, "", *_summary(report), *_skipped(report)]
    )


def _table(edges: Sequence[EdgeReport], colour: bool) -> str:
    """The table, names shortened until it fits, then a bar for each edge."""
    measured = any(e.measured_divergence is not None for e in edges)
    divergences = ["predicted", "measured"] if measured else ["divergence"]
    headers = [*_HEADERS, *divergences, ""]
    rows = [cells_of(edge, measured) for edge in edges]
    for name in range(40, 12, -1):
        table = _drawn(headers, rows, (name, 16, 10))
        if max(len(line) for line in table) <= WIDTH - LEAST_BAR - 1:
            break
    else:
        table = _drawn(headers, rows, (8, 11, 8))
    return "\n".join(with_bars(table, edges, WIDTH, colour))


def _drawn(
    headers: list[str], rows: list[list[str]], widths: tuple[int, int, int]
) -> list[str]:
    """Lines of the table with edge, shape and op of at most these widths."""
    align = ["left"] * _LEFT + ["right"] * (len(headers) - _LEFT - 1) + ["left"]
    name, shape, op = widths
    body = [
        [
            shortened(row[0], name),
            shortened(row[1], op),
            shortened(row[2], shape),
            *row[_LEFT:],
        ]
        for row in rows
    ]
    # The header is a row of its own: tabulate pads real headers by two.
    table = tabulate(
        [headers, SEPARATING_LINE, *body],
        tablefmt="simple",
        colalign=align,
        disable_numparse=True,
    )
    return [line.rstrip() for line in table.splitlines()[1:-1]]


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: ``12.3 k``."""
    value = float(f"{value:.3g}")  # first round: 999,999 is 1 M
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def shortened(name: str, width: int) -> str:
    """A name cut in its middle: both ends tell edges of one network apart."""
    if len(name) <= width:
        return name
    tail = (width - 2) // 2
    return f"{name[: width - 2 - tail]}..{name[-tail:]}"


def bits_of(edge: EdgeReport) -> str:
    """``2``, or ``8 > 2`` where the target is not met yet."""
    met = edge.bits <= edge.target_bits
    return str(edge.bits) if met else f"{edge.bits} > {edge.target_bits}"


def cells_of(edge: EdgeReport, measured: bool) -> list[str]:
    """One row of the table; with the measured divergence where asked for."""
    return [
        edge.name,
        edge.op,
        "x".join(str(n) for n in edge.shape),
        bits_of(edge),
        quantity(edge.capacity),
        quantity(edge.entropy),
        f"{100 * edge.utilisation:.0f}%",
        f"{edge.sqnr_db:.1f}",
        f"{edge.predicted_divergence:.2e}",
        *([divergence(edge.measured_divergence)] if measured else []),
        MARK if edge.bottleneck else "",
    ]


def divergence(value: float | None) -> str:
    """Three digits, or nothing where it was not measured."""
    return "" if value is None else f"{value:.2e}"


def _summary(report: Findings) -> list[str]:
    totals, coverage, cut = report.totals, report.coverage, report.cut
    lines = [
        "capacity, entropy: bits per sample; SQNR: dB; divergence: predicted Jeffreys "
        "divergence,",
        "nats per sample, if only this edge is quantized. "
        f"{MARK} marks the fewest edges that make up half.",
        "",
    ]
    lines += _cut_lines("minimum cut", cut)
    if report.relative_cut != cut:
        lines += _cut_lines("least share", report.relative_cut)
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


def _cut_lines(name: str, cut: MinimumCut | None) -> list[str]:
    if cut is None:
        return []
    more = len(cut.values) - SHOWN_VALUES
    shown = [shortened(name, WIDTH - 13) for name in cut.values[:SHOWN_VALUES]]
    return [
        f"{name}  {quantity(cut.bits, 'bit')} per sample, "
        f"{100 * cut.share:.1f}% of what floating point sends across it:",
        *(f"             {value}" for value in shown),
        *([f"             ... {more} more"] if more > 0 else []),
    ]


def _skipped(report: Findings) -> list[str]:
    if not report.coverage.skipped:
        return []
    lines = ["skipped:"]
    for skip in report.coverage.skipped:
        where = f" ({skip.source})" if skip.source else ""
        line = f"{skip.name}: {skip.reason}{where}"
        lines += wrap(line, WIDTH, initial_indent="  ", subsequent_indent="      ")
    return lines
