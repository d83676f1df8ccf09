"""Plots of reports and of training with matplotlib, for papers and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gdnsq_fx.analysis.edge_report import EdgeReport
from gdnsq_fx.analysis.notation import shortened
from gdnsq_fx.analysis.palette import CUT, FAINT, HEAT, INK, LINE
from gdnsq_fx.analysis.profile import Position
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.extras import required

if TYPE_CHECKING:
    from gdnsq_fx.analysis.dynamics import CapacityTracker

WIDTH = 9.0  # inches
NAME = 32


def report_plot(
    edges: Sequence[EdgeReport], profile: Sequence[Position], limit: int | None
) -> Any:
    """Predicted divergence as a bar for each edge, and the profile along the depth."""
    shown = list(edges[:limit])
    figure = _figure(2.9 + 0.2 * len(shown))
    bars, lower = figure.subplots(2, 1, height_ratios=[0.6 + 0.2 * len(shown), 2.0])
    places = range(len(shown))
    colours = [HEAT[3][1] if e.bottleneck else LINE for e in shown]
    bars.barh(places, [e.predicted_divergence for e in shown], color=colours)
    measured = [
        (e.measured_divergence, n)
        for n, e in enumerate(shown)
        if e.measured_divergence is not None
    ]
    if measured:
        bars.plot(*zip(*measured, strict=True), "|", color=INK, ms=9, label="measured")
        bars.legend(frameon=False, loc="lower right")
    bars.set_yticks(places, [shortened(e.name, NAME) for e in shown], fontsize=8)
    bars.invert_yaxis()
    bars.margins(y=0.01)
    bars.set_xlabel("predicted Jeffreys divergence if only this edge is quantized, nat")
    _draw_profile(lower, profile)
    for axes in (bars, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def dynamics_plot(tracker: CapacityTracker) -> Any:
    """Loss and metric above, capacity of every edge below, latest to yield on top."""
    records = tracker.records
    if not records:
        raise ConfigError(
            "nothing was recorded: pass the tracker to finetune(..., tracker=tracker)"
        )
    edges = list(tracker.first_met)
    figure = _figure(3.2 + 0.18 * len(edges))
    upper, lower = figure.subplots(
        2, 1, sharex=True, height_ratios=[2.0, 0.8 + 0.18 * len(edges)]
    )
    steps = [r.step for r in records]
    upper.plot(steps, [r.loss for r in records], color=CUT[1], lw=1.2)
    upper.set_ylabel("loss", color=CUT[1])
    for rise in tracker.loss_rises:
        upper.axvspan(rise.first_step, rise.last_step, color=HEAT[1][1], lw=0)
    if tracker.metrics:
        right = upper.twinx()
        metrics = ([*tracker.metrics], [*tracker.metrics.values()])
        right.plot(*metrics, "o-", color=INK, ms=3, lw=1)
        right.set_ylabel("metric")
    values = [[r.capacity.get(edge, 0.0) for r in records] for edge in edges]
    mesh = lower.pcolormesh(
        steps, range(len(edges)), values, cmap="viridis", shading="nearest", vmin=0.0
    )
    met = [(tracker.first_met[e], n) for n, e in enumerate(edges)]
    lower.plot(*zip(*((s, n) for s, n in met if s is not None), strict=True), "w|")
    lower.set_yticks(range(len(edges)), [shortened(e, NAME) for e in edges], fontsize=7)
    lower.invert_yaxis()
    lower.set_xlabel("step")
    figure.colorbar(mesh, ax=[upper, lower], label="capacity, bits per element")
    return figure


def _figure(height: float) -> Any:
    """A figure of its own: nothing of pyplot's global state is touched."""
    figure = required("matplotlib.figure", "plot()")
    return figure.Figure(figsize=(WIDTH, height), layout="constrained")


def _draw_profile(axes: Any, profile: Sequence[Position]) -> None:
    places = range(len(profile))
    axes.fill_between(
        places, [p.float_bits for p in profile], step="mid", color=FAINT, lw=0
    )
    axes.step(places, [p.bits for p in profile], where="mid", color=CUT[1], lw=1.5)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_xlabel("position along the depth (values in topological order)")
    axes.set_ylabel("bits per sample")
    axes.set_title(
        "capacity profile: quantized (line) and floating point (area)",
        fontsize=9,
        loc="left",
    )
