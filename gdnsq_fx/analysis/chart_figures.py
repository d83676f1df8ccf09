"""Charts of the HTML report: capacity profile and training dynamics (plotly)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.analysis.notation import quantity, shortened
from gdnsq_fx.analysis.palette import BACKGROUND, CUT, FAINT, FONT, HEAT, INK
from gdnsq_fx.analysis.profile import Position
from gdnsq_fx.extras import required

GRID = "#f1f3f5"
_WHAT = "the HTML report"


def profile_figure(profile: Sequence[Position]) -> Any:
    """Bits that cross at each position, and their share of floating point below."""
    subplots = required("plotly.subplots", _WHAT)
    plotly = required("plotly.graph_objects", _WHAT)
    figure = subplots.make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4]
    )
    places = list(range(len(profile)))
    text = [
        f"<b>after {escape(p.label)}</b><br>{quantity(p.bits, 'bit')} per sample in "
        f"{p.values} value{'s' * (p.values > 1)}<br>{p.share:.1%} of "
        f"{quantity(p.float_bits, 'bit')} in floating point"
        for p in profile
    ]
    line: dict[str, Any] = {"x": places, "mode": "lines", "hovertext": text}
    area = {"fill": "tozeroy", "hoverinfo": "skip", "line": _line(FAINT, 2)}
    shown = {"hoverinfo": "text", "line": _line(CUT[1], 2)}
    floats, bits = [p.float_bits for p in profile], [p.bits for p in profile]
    add = figure.add_trace
    add(plotly.Scatter(**{**line, **area}, y=floats, name="floating point"), 1, 1)
    add(plotly.Scatter(**line, **shown, y=bits, name="quantized"), 1, 1)
    share = {**line, **shown, "line": _line(HEAT[3][1], 2), "showlegend": False}
    add(plotly.Scatter(**share, y=[100 * p.share for p in profile]), 2, 1)
    figure.update_yaxes(type="log", title="bits per sample", row=1, col=1)
    figure.update_yaxes(title="share, %", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title="values in topological order", row=2, col=1)
    return _styled(figure, 420)


def dynamics_figure(tracker: CapacityTracker) -> Any:
    """Loss and metric above, the capacity of each edge below, the latest on top."""
    subplots = required("plotly.subplots", _WHAT)
    plotly = required("plotly.graph_objects", _WHAT)
    records, met = tracker.records, tracker.first_met
    steps, edges = [r.step for r in records], [escape(edge) for edge in met]
    lower = 16 * len(edges) + 40
    figure = subplots.make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=20 / (lower + 300),
        row_heights=[200, lower], specs=[[{"secondary_y": True}], [{}]],
    )  # fmt: skip
    loss = {"x": steps, "y": [r.loss for r in records], "line": _line(CUT[1], 1.5)}
    figure.add_trace(plotly.Scatter(**loss, name="loss", mode="lines"), 1, 1)
    if tracker.metrics:
        metric = {"x": [*tracker.metrics], "y": [*tracker.metrics.values()]}
        marks = plotly.Scatter(**metric, name="metric", line=_line(INK, 1.5))
        figure.add_trace(marks, 1, 1, secondary_y=True)
        figure.update_yaxes(title="metric", secondary_y=True, showgrid=False)
    figure.add_trace(plotly.Heatmap(**_heatmap(tracker, lower)), 2, 1)
    reached = {e: s for e, s in met.items() if s is not None}
    figure.add_trace(plotly.Scatter(**_marks(reached)), 2, 1)
    for rise in tracker.loss_rises:
        ends = {"x0": rise.first_step, "x1": rise.last_step}
        figure.add_vrect(
            **ends, fillcolor=HEAT[1][1], opacity=0.45, line_width=0, layer="below",
            row=1, col=1,
        )  # fmt: skip
    figure.update_yaxes(title="loss", row=1, col=1, secondary_y=False)
    labels = [escape(shortened(e, 34)) for e in met]
    ticks = {"tickvals": edges, "ticktext": labels, "tickfont": {"size": 10}}
    figure.update_yaxes(autorange="reversed", **ticks, row=2, col=1)
    figure.update_xaxes(title="step", row=2, col=1)
    return _styled(figure, 300 + lower)


def _heatmap(tracker: CapacityTracker, height: int) -> dict[str, Any]:
    records, edges = tracker.records, list(tracker.first_met)
    widest = max((b for r in records for b in r.capacity.values()), default=0.0)
    return {
        "x": [r.step for r in records],
        "y": [escape(edge) for edge in edges],
        "z": [[r.capacity.get(e) for r in records] for e in edges],
        "colorscale": "Viridis",
        "zmin": 0.0,
        "zmax": widest,
        "colorbar": {
            "title": {"text": "bits per element", "side": "right"},
            "thickness": 12, "outlinewidth": 0, "len": height / (height + 220),
            "y": 0, "yanchor": "bottom",
        },
        "hovertemplate": "<b>%{y}</b><br>step %{x}: %{z:.2f} bits<extra></extra>",
    }  # fmt: skip


def _marks(met: Mapping[str, int]) -> dict[str, Any]:
    """A stroke where each edge first met its target."""
    return {
        "x": list(met.values()),
        "y": [escape(edge) for edge in met],
        "name": "target first met",
        "mode": "markers",
        "marker": {
            "symbol": "line-ns", "size": 11, "line": {"color": "white", "width": 2},
        },
        "hovertemplate": "<b>%{y}</b><br>target met at step %{x}<extra></extra>",
        "showlegend": False,
    }  # fmt: skip


def _line(colour: str, width: float) -> dict[str, Any]:
    return {"color": colour, "width": width, "shape": "hvh" if width == 2 else "linear"}


def _styled(figure: Any, height: int) -> Any:
    figure.update_layout(
        height=height,
        plot_bgcolor=BACKGROUND,
        paper_bgcolor=BACKGROUND,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        font={"family": FONT, "color": INK, "size": 12},
        hoverlabel={"bgcolor": "white", "align": "left"},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)
    return figure
