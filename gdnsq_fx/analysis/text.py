"""The capacity report as plain text, at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from tabulate import SEPARATING_LINE, tabulate

from gdnsq_fx.analysis.edge_report import EdgeReport, Findings

WIDTH = 100
MARK = "<<"
_HEADERS = ("edge", "op", "shape", "bits", "capacity", "entropy", "used", "SQNR")
_JOINT = (
    "joint: what vanishes if only this edge goes back to floating point, all others "
    "quantized."
)
_LEAST_NAME = 18
_LEFT = 3  # edge, op and shape are text; the rest are numbers


def report_text(report: Findings, limit: int | None) -> str:
    """Table of edges, then cut, totals, coverage and skipped nodes.

    The joint divergence is left out where it would leave no room for names.
    """
    shown = report.edges[:limit]
    hidden = len(report.edges) - len(shown)
    more = [f"... and {hidden} more edges (to_text(limit=None))"] if hidden else []
    joint = any(e.joint_divergence is not None for e in shown)
    table = _table(shown, True) if joint else []
    summary = _summary(report, joint=bool(table))
    table = table or _table(shown, False)
    return "\n".join([*table, *more, "", *summary, *_skipped(report)])


def _table(edges: Sequence[EdgeReport], joint: bool) -> list[str]:
    """The table, names shortened until it fits; empty where they would be too short."""
    measured = any(e.measured_divergence is not None for e in edges)
    divergences = ["predicted", "measured"] if measured else ["divergence"]
    headers = [*_HEADERS, *divergences, *(["joint"] if joint else []), ""]
    rows = [cells_of(edge, measured, joint) for edge in edges]
    for name in range(40, _LEAST_NAME if joint else 12, -1):
        table = _drawn(headers, rows, (name, 16, 10))
        if max(len(line) for line in table) <= WIDTH:
            return table
    return [] if joint else _drawn(headers, rows, (8, 11, 8))


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


def cells_of(edge: EdgeReport, measured: bool, joint: bool) -> list[str]:
    """One row of the table; with measured and joint divergence where asked for."""
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
        *([divergence(edge.joint_divergence)] if joint else []),
        MARK if edge.bottleneck else "",
    ]


def divergence(value: float | None) -> str:
    """Three digits, or nothing where it was not measured."""
    return "" if value is None else f"{value:.2e}"


def _summary(report: Findings, joint: bool) -> list[str]:
    totals, coverage, cut = report.totals, report.coverage, report.cut
    lines = [
        "capacity, entropy: bits per sample; SQNR: dB; divergence: predicted Jeffreys "
        "divergence,",
        "nats per sample, if only this edge is quantized. "
        f"{MARK} marks the fewest edges that make up half.",
        *([_JOINT] if joint else []),
        "",
    ]
    if cut is not None:
        lines += [
            f"minimum cut  {quantity(cut.bits, 'bit')} per sample, "
            f"{100 * cut.share:.1f}% of what floating point sends across it:",
            *(f"             {shortened(n, WIDTH - 13)}" for n in cut.values[:6]),
            *(
                [f"             ... {len(cut.values) - 6} more"]
                if cut.values[6:]
                else []
            ),
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


def _skipped(report: Findings) -> list[str]:
    if not report.coverage.skipped:
        return []
    lines = ["skipped:"]
    for skip in report.coverage.skipped:
        where = f" ({skip.source})" if skip.source else ""
        line = f"{skip.name}: {skip.reason}{where}"
        lines += wrap(line, WIDTH, initial_indent="  ", subsequent_indent="      ")
    return lines
