"""`CapacityReport`: what `analyze` found, for people, programs and networkx."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
from torch.fx import GraphModule

from gdnsq_fx.analysis.advice import Step, next_steps
from gdnsq_fx.analysis.bars import printable, prints_colour
from gdnsq_fx.analysis.coverage import Coverage, Totals, coverage_of, totals_of
from gdnsq_fx.analysis.cuts import MinimumCut, capacity_graph, minimum_cut
from gdnsq_fx.analysis.diff import ReportDiff, difference
from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.analysis.edge_report import EdgeReport, Findings
from gdnsq_fx.analysis.html import html_page
from gdnsq_fx.analysis.plots import report_plot
from gdnsq_fx.analysis.profile import Position, capacity_profile
from gdnsq_fx.analysis.relative_cut import relative_cut
from gdnsq_fx.analysis.slack import slack_of
from gdnsq_fx.analysis.text import report_text
from gdnsq_fx.annotations import EdgeFacts, facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.extras import required
from gdnsq_fx.sites import ActivationSite, WeightSite, sites

BOTTLENECK_SHARE = 0.5


@dataclass(frozen=True)
class CapacityReport:
    """Capacity, entropy and predicted divergence of every edge; cut, totals, coverage.

    ``print(report)`` shows the table; `graph` is the network as a flow of bits.

    Attributes:
        edges: sorted by predicted divergence, worst first.
        cut: the minimum cut, None where no path leads from an input to the output.
        relative_cut: the clean cut that keeps the smallest share of floating point.
    """

    edges: tuple[EdgeReport, ...]
    cut: MinimumCut | None
    relative_cut: MinimumCut | None
    totals: Totals
    coverage: Coverage
    graph: nx.DiGraph[str] = field(repr=False, compare=False)

    @cached_property
    def profile(self) -> tuple[Position, ...]:
        """What crosses the network at each position along its depth."""
        return capacity_profile(self.graph)

    @cached_property
    def slack(self) -> dict[str, float]:
        """Bits per sample that each activation edge could lose before it becomes part
        of the minimum cut, by name; 0 in the cut. Weights do not flow and have none."""
        return slack_of(self.graph)

    @cached_property
    def advice(self) -> tuple[Step, ...]:
        """What raising each edge to its next width buys and costs, most gain first."""
        return next_steps(self.edges)

    def __str__(self) -> str:
        return printable(self.to_text(colour=prints_colour()))

    def to_text(self, limit: int | None = 40, *, colour: bool = False) -> str:
        """The report as plain text of at most 100 columns.

        Args:
            limit: show the worst so many edges (None: all).
            colour: with ANSI colours; ``print(report)`` has them on a terminal unless
                ``NO_COLOR`` is set.
        """
        return report_text(self._findings(), limit, colour)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graph, JSON-able."""
        return {
            "edges": [_edge_dict(edge) for edge in self.edges],
            "minimum_cut": _cut_dict(self.cut),
            "relative_cut": _cut_dict(self.relative_cut),
            "slack": self.slack,
            "advice": [asdict(step) for step in self.advice],
            "profile": [{**asdict(p), "share": p.share} for p in self.profile],
            "totals": asdict(self.totals),
            "coverage": asdict(self.coverage),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text; written to ``path`` where given."""
        return _written(json.dumps(self.to_dict(), indent=2, allow_nan=False), path)

    def to_html(
        self, path: str | Path | None = None, history: CapacityTracker | None = None
    ) -> str:
        """One self-contained page (4 MB, most of it plotly's script), for offline use.

        Args:
            path: file to write.
            history: how fine-tuning went, shown as well.

        Raises:
            MissingExtraError: plotly or igraph is not installed.
        """
        page = html_page(self._findings(), self.profile, self.slack, history)
        return _written(page, path)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with one row for each edge, by name, worst first.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        pandas = required("pandas", "to_pandas()")
        rows = [{**asdict(e), "slack": self.slack.get(e.name)} for e in self.edges]
        return pandas.DataFrame(rows).set_index("name")

    def plot(self, limit: int | None = 40) -> Any:
        """A ``matplotlib.figure.Figure``: the worst edges, and the capacity profile.

        Args:
            limit: show this many edges (None: all).

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return report_plot(self.edges, self.profile, limit)

    def diff(self, after: CapacityReport) -> ReportDiff:
        """What changed from this report to a later one, edges matched by name."""
        return difference(self.edges, after.edges)

    def _findings(self) -> Findings:
        return Findings(
            self.edges,
            self.cut,
            self.relative_cut,
            self.totals,
            self.coverage,
            self.graph,
        )


def _edge_dict(edge: EdgeReport) -> dict[str, Any]:
    """JSON has lists instead of tuples, and names instead of numbers as keys."""
    at = {str(width): value for width, value in edge.divergence_at.items()}
    return {**asdict(edge), "shape": list(edge.shape), "divergence_at": at}


def _cut_dict(cut: MinimumCut | None) -> dict[str, Any] | None:
    return None if cut is None else {**asdict(cut), "share": cut.share}


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def build_report(graph_module: GraphModule) -> CapacityReport:
    """The report from the facts that `AnalyzeCapacity` left on the graph.

    Raises:
        PassError: the analysis has not run on this graph.
    """
    found = [(site, facts(site.node).edge) for site in sites(graph_module)]
    measured = [(site, edge) for site, edge in found if edge is not None]
    if not measured or len(measured) < len(found):
        raise PassError("no facts on the quantizers; run AnalyzeCapacity first")
    measured.sort(key=lambda pair: pair[1].predicted_divergence, reverse=True)
    marked = _bottlenecks([edge.predicted_divergence for _, edge in measured])
    graph = capacity_graph(graph_module)
    return CapacityReport(
        edges=tuple(
            _edge_report(site, edge, rank < marked)
            for rank, (site, edge) in enumerate(measured)
        ),
        cut=minimum_cut(graph),
        relative_cut=relative_cut(graph),
        totals=totals_of(graph_module),
        coverage=coverage_of(graph_module),
        graph=graph,
    )


def divergences_at(graph_module: GraphModule) -> dict[str, dict[int, float]]:
    """Edge -> bits -> predicted divergence, at the widths that were asked for.

    Raises:
        PassError: the analysis has not run on this graph with widths.
    """
    found = {site.edge: facts(site.node).edge for site in sites(graph_module)}
    every = {name: dict(e.divergence_at) for name, e in found.items() if e is not None}
    if len(every) < len(found) or not all(every.values()):
        raise PassError(
            "no divergences at widths; run AnalyzeCapacity(..., widths=...)"
        )
    return every


def _bottlenecks(divergences: list[float]) -> int:
    """How many of the worst edges make up half of all predicted divergence."""
    half = BOTTLENECK_SHARE * sum(divergences)
    running = 0.0
    for count, divergence in enumerate(divergences, start=1):
        running += divergence
        if running >= half and running > 0.0:
            return count
    return 0


def _edge_report(
    site: WeightSite | ActivationSite, edge: EdgeFacts, bottleneck: bool
) -> EdgeReport:
    readers = [facts(user).op for node in site.nodes for user in node.users]
    return EdgeReport(
        name=site.edge,
        op=next((op.name for op in readers if op is not None), ""),
        shape=_shape(site),
        bits=edge.bits,
        target_bits=site.quantizer.spec.bits,
        capacity=edge.capacity,
        entropy=edge.entropy,
        utilisation=edge.entropy / edge.capacity if edge.capacity else 0.0,
        sqnr_db=edge.sqnr_db,
        clipped=edge.clipped,
        predicted_divergence=edge.predicted_divergence,
        measured_divergence=edge.measured_divergence,
        joint_divergence=edge.joint_divergence,
        measured_joint_divergence=edge.measured_joint_divergence,
        divergence_at=edge.divergence_at,
        macs=edge.macs,
        bops=edge.bops,
        parameters=edge.parameters,
        bottleneck=bottleneck,
    )


def _shape(site: WeightSite | ActivationSite) -> tuple[int, ...]:
    found = facts(site.node)
    if found.shape is None:
        return ()
    if isinstance(site, WeightSite) or not found.shape:
        return found.shape
    leads = found.shape[0] % max(found.batch, 1) == 0
    return (found.shape[0] // found.batch, *found.shape[1:]) if leads else found.shape
