"""The capacity report as one self-contained HTML page, to be opened offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gdnsq_fx.analysis.advice import best_per_bop, best_per_byte, next_steps
from gdnsq_fx.analysis.chart_figures import dynamics_figure, profile_figure
from gdnsq_fx.analysis.cuts import MinimumCut
from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.analysis.edge_report import Findings
from gdnsq_fx.analysis.html_style import SCRIPT, STYLE
from gdnsq_fx.analysis.html_table import edge_table
from gdnsq_fx.analysis.network_figure import network_figure
from gdnsq_fx.analysis.notation import quantity
from gdnsq_fx.analysis.profile import Position
from gdnsq_fx.extras import required

SHOWN_VALUES = 4  # of a cut; the drawing shows all
SHOWN_STEPS = 5
_STEPS = (
    "Each edge raised by one bit alone, those first that save most of the predicted "
    "divergence. gdnsq_fx.allocate chooses the bits of all edges for a budget."
)
_NETWORK = (
    "Squares are operations, coloured by the weights they read; circles are quantized "
    "activations; diamonds join several values; grey is in floating point. The colour "
    "is the share of the predicted divergence that quantizing this edge alone would "
    "cause. Drag to move, scroll to zoom, double-click to see all again."
)
_PROFILE = (
    "What is still to be read once each value has been computed, in the order of "
    "computation. A quantized copy adds nothing where its original goes on as well."
)
_TABLE = (
    "Click a header to sort. Capacity, entropy and slack: bits per sample. Divergence: "
    "predicted Jeffreys divergence of the output, nats per sample, if only this edge "
    "is quantized. Slack: what an activation could lose before it becomes part of the "
    "minimum cut. The fewest edges that make up half of all divergence are marked."
)
_DYNAMICS = (
    "Fine-tuning. Above: the loss, shaded where it rose most. Below: the capacity of "
    "each edge; a white stroke marks the step at which it first met its target, and "
    "the edges that resisted longest stand on top."
)


def html_page(
    report: Findings,
    profile: Sequence[Position],
    slack: Mapping[str, float],
    history: CapacityTracker | None,
) -> str:
    """The page as a string.

    Raises:
        MissingExtraError: plotly or igraph is not installed.
    """
    figures = [
        ("Network", _NETWORK, network_figure(report, slack)),
        ("Capacity profile", _PROFILE, profile_figure(profile)),
    ]
    if history is not None and history.records:
        figures.append(("Training dynamics", _DYNAMICS, dynamics_figure(history)))
    sections = [
        _section(title, note, _figure(figure, number))
        for number, (title, note, figure) in enumerate(figures)
    ]
    table = _section("Edges", _TABLE, edge_table(report.edges, slack))
    sections.insert(2, table)
    sections.insert(3, _advice(report))
    if history is not None:
        sections.append(_rises(history))
    body = "\n".join([_cards(report), *sections, _skipped(report)])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Capacity report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>Capacity report</h1>
{body}
<script>{SCRIPT}</script>
</body></html>
"""


def _figure(figure: Any, number: int) -> str:
    """A plotly figure; the first brings plotly's script along, inline."""
    drawn = required("plotly.io", "the HTML report").to_html(
        figure,
        full_html=False,
        include_plotlyjs=number == 0,
        div_id=f"figure-{number}",
        config={
            "displaylogo": False,
            "responsive": True,
            "scrollZoom": number == 0,
            "modeBarButtonsToRemove": ["select2d", "lasso2d"],
        },
    )
    return f'<div class="figure">{drawn}</div>'


def _section(title: str, note: str, content: str) -> str:
    return f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{content}'


def _cards(report: Findings) -> str:
    totals, coverage = report.totals, report.coverage
    size, floats = totals.size_bytes, totals.float_size_bytes
    cards = [
        (
            quantity(size, "B"),
            f"size, {floats / max(size, 1):.1f}× smaller than {quantity(floats, 'B')}",
        ),
        (
            quantity(totals.bops, "BOP"),
            f"per sample, {totals.float_bops / max(totals.bops, 1):.0f}× fewer than in "
            f"32 bits; {quantity(totals.macs, 'MAC')}",
        ),
        (
            f"{coverage.macs:.1%}",
            f"of MACs and {coverage.weights:.1%} of weights quantized",
        ),
        *_cut_card("minimum cut", report.cut),
        *_cut_card("cut of least share", report.relative_cut),
    ]
    drawn = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for value, note in cards
    )
    return f'<div class="cards">{drawn}</div>'


def _cut_card(name: str, cut: MinimumCut | None) -> list[tuple[str, str]]:
    if cut is None:
        return []
    values = ", ".join(cut.values[:SHOWN_VALUES])
    more = len(cut.values) - SHOWN_VALUES
    values += f" and {more} more" if more > 0 else ""
    return [
        (quantity(cut.bits, "bit"), f"{name}: {cut.share:.1%} of floats, at {values}")
    ]


def _advice(report: Findings) -> str:
    """The steps that save most, and the best for bytes and for bit operations."""
    steps = next_steps(report.edges)
    named = {
        best_per_byte(steps): "most for each byte",
        best_per_bop(steps): "most for each bit operation",
    }
    chosen = [*steps[:SHOWN_STEPS], *(s for s in named if s not in steps[:SHOWN_STEPS])]
    items = "".join(
        f"<li>{escape(str(step))}"
        + (f" <b>({named[step]})</b>" if step in named else "")
        + "</li>"
        for step in chosen
        if step is not None
    )
    if not items:
        return ""
    return _section("What the next bit buys", _STEPS, f"<ul>{items}</ul>")


def _rises(history: CapacityTracker) -> str:
    """Where the loss rose, in words."""
    items = [
        f"<li>steps {r.first_step} to {r.last_step}: {r.before:.3g} to {r.after:.3g}"
        + "".join(f", <code>{escape(e)}</code> −{bits:.2f} bits" for e, bits in r.lost)
        + "</li>"
        for r in history.loss_rises
    ]
    return f"<p>Where the loss rose:</p><ul>{''.join(items)}</ul>" if items else ""


def _skipped(report: Findings) -> str:
    if not report.coverage.skipped:
        return ""
    items = "".join(
        f"<li><code>{escape(s.name)}</code> {escape(s.reason)} {escape(s.source)}</li>"
        for s in report.coverage.skipped
    )
    return f"<h2>Left in floating point</h2><ul>{items}</ul>"
