"""The capacity report as plain text, at most 100 columns."""

from __future__ import annotations

from textwrap import wrap

from gdnsq_fx.analysis.advice import best_per_bop, best_per_byte, next_steps
from gdnsq_fx.analysis.cuts import MinimumCut
from gdnsq_fx.analysis.edge_report import Findings
from gdnsq_fx.analysis.notation import quantity, shortened
from gdnsq_fx.analysis.text_table import JOINT, MARK, edge_table

WIDTH = 100
SHOWN_VALUES = 6  # of a cut
_INDENT = " " * 13
_NOTES = (
    "capacity, entropy: bits per sample; SQNR: dB; alone: predicted Jeffreys "
    "divergence,",
    "nats per sample, if only this edge is quantized. "
    f"{MARK} marks the fewest edges that make up half.",
)
_JOINT_NOTE = (
    "joint: what vanishes of the divergence of the quantized model if this edge alone "
    "is exact."
)


def report_text(report: Findings, limit: int | None, colour: bool = False) -> str:
    """Table of edges, then cuts, totals, coverage and skipped nodes.

    Args:
        limit: show this many of the worst edges (None: all).
        colour: with ANSI colours, for a terminal.
    """
    shown = report.edges[:limit]
    hidden = len(report.edges) - len(shown)
    more = [f"... and {hidden} more edges (to_text(limit=None))"] if hidden else []
    table, headers = edge_table(shown, WIDTH, colour)
    notes = [*_NOTES, *([_JOINT_NOTE] if JOINT in headers else [])]
    summary = [*_summary(report), *_advice(report), *_skipped(report)]
    return "\n".join([*table, *more, "", *notes, "", *summary])


def _summary(report: Findings) -> list[str]:
    totals, coverage, cut = report.totals, report.coverage, report.cut
    lines = _cut_lines("minimum cut", cut)
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


def _advice(report: Findings) -> list[str]:
    """The best next step for its bytes, and for its bit operations."""
    steps = next_steps(report.edges)
    best = {"per byte": best_per_byte(steps), "per BOP": best_per_bop(steps)}
    if best["per byte"] == best["per BOP"]:
        best = {"next bit": best["per byte"]}
    lines = [f"{unit:<13}{step}" for unit, step in best.items() if step is not None]
    return [
        part for line in lines for part in wrap(line, WIDTH, subsequent_indent=_INDENT)
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
