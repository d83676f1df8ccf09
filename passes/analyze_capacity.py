"""AnalyzeCapacity: measure every quantized edge from one stream of batches.

Facts only: each quantizer node gets its `EdgeFacts` (capacity, entropy, SQNR, share
clipped, cost, predicted divergences). A few forward and backward passes for each batch
serve all edges together (``analysis/directions.py``, ``_prediction.py``); batches are
read once, and memory does not grow with their number unless edges are confirmed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from torch.fx import GraphModule

from gdnsq_fx.analysis.costs import EdgeCost, edge_costs
from gdnsq_fx.analysis.divergence import Curvature
from gdnsq_fx.analysis.edge_statistics import EdgeStatistics, statistics_of
from gdnsq_fx.annotations import annotate, facts
from gdnsq_fx.errors import CalibrationError, ConfigError
from gdnsq_fx.inputs import Batch, InputStructure, check_device
from gdnsq_fx.sites import (
    ActivationSite,
    WeightSite,
    bit_width,
    require_quantizers,
    sites,
)
from gdnsq_fx.state import preserved_state

from ._base import Pass, check_finite
from ._confirm import Confirmation
from ._prediction import Prediction

MAX_WIDTH = 16


@dataclass(frozen=True, eq=False)
class AnalyzeCapacity(Pass):
    """Write `EdgeFacts` on every quantizer node.

    Cost for each batch, for any number of edges: ``draws`` backward passes and one
    forward pass; ``joint`` adds two and one, each width one forward pass. A backward
    pass stops at activations, so it costs about as much as a forward pass.

    Attributes:
        batches: iterable of batches, alone or followed by targets, or taken apart.
        inputs: structure of the example input.
        draws: directions sent back for each batch, a power of two; more of them, less
            variance, and more classes without any.
        confirm: measure this many edges of the largest predicted divergence as well,
            one at a time (holds the batches in memory).
        curvature: ``softmax`` where the output are logits, ``identity`` for regression.
        joint: predict (and where confirmed, measure) what each edge costs in the model
            with every edge quantized.
        widths: bit-widths at which to predict the divergence of each edge alone.
        advice: predict it at one bit more as well, unless ``widths`` are given.
        part: the part of an output that is compared, a function of the output; by
            default ``logits`` or the first tensor.
        by_sample: predict the divergence of edges alone, at ``widths`` too, sample by
            sample, so that it does not depend on how samples are cut into batches:
            signs are drawn from what a sample holds, and levels of activations placed
            by what calibration found instead of on the first batch.
    """

    batches: Iterable[object]
    inputs: InputStructure
    draws: int = 4
    confirm: int = 0
    curvature: Curvature = "softmax"
    joint: bool = True
    widths: Sequence[int] = ()
    advice: bool = True
    part: Callable[[Any], Any] | None = None
    by_sample: bool = False

    def __post_init__(self) -> None:
        if self.draws < 1 or self.draws & (self.draws - 1):
            raise ConfigError(
                f"draws must be a power of two (1, 2, 4, ...), got {self.draws}"
            )
        if self.confirm < 0:
            raise ConfigError(f"confirm must be at least 0, got {self.confirm}")
        if any(not 1 <= width <= MAX_WIDTH for width in self.widths):
            raise ConfigError(
                f"widths must lie between 1 and {MAX_WIDTH} bits, got {self.widths}"
            )
        if self.curvature not in get_args(Curvature):
            raise ConfigError(
                f"curvature must be one of {', '.join(get_args(Curvature))}, got "
                f"{self.curvature!r}"
            )

    def requires(self, graph_module: GraphModule) -> None:
        """There are calibrated quantizers."""
        require_quantizers(graph_module, self.name)

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Facts only; parameters, buffers and the random state stay as they are."""
        found = statistics_of(graph_module)
        samples = 0
        kept: list[Batch] = []
        with preserved_state(graph_module):
            graph_module.eval()
            prediction = Prediction(
                graph_module,
                found,
                self.draws,
                self.joint,
                self.widths,
                self.advice,
                self.curvature,
                self.part,
                self.by_sample,
            )
            for one in self.batches:
                batch = one if isinstance(one, Batch) else self.inputs.split(one)
                check_device(graph_module, batch.args, batch.kwargs)
                check_finite(batch, "an analysis batch")
                samples += prediction.add(batch)
                if self.confirm:
                    kept.append(batch)
            if not samples:
                raise CalibrationError(
                    "analysis has no batch; pass a non-empty iterable that has not "
                    "been used up"
                )
            _check_numbers(found)
            self._write(graph_module, found, samples)
            self._confirm(graph_module, kept)
        return False

    def _write(
        self,
        graph_module: GraphModule,
        found: Mapping[str, EdgeStatistics],
        samples: int,
    ) -> None:
        bits = {name: bit_width(one.levels) for name, one in found.items()}
        costs = edge_costs(graph_module, bits)
        for site in sites(graph_module):
            measured = found[site.edge].facts(samples)
            measured = replace(measured, **asdict(costs.get(site.edge, EdgeCost())))
            if not self.joint:
                measured = replace(measured, joint_divergence=None)
            for node in site.nodes:
                annotate(node, edge=measured)

    def _confirm(self, graph_module: GraphModule, batches: Sequence[Batch]) -> None:
        """Measure the worst edges one at a time."""
        ranked = sorted(sites(graph_module), key=_predicted, reverse=True)
        if not self.confirm:
            return
        confirmation = Confirmation(graph_module, batches, self.curvature, self.joint)
        for site in ranked[: self.confirm]:
            confirmation.measure(site)


def _check_numbers(found: Mapping[str, EdgeStatistics]) -> None:
    for edge, one in found.items():
        if math.isnan(float(one.signal)):
            raise CalibrationError(
                f"{edge} carries NaN on the analysis batches; run the model on them in "
                "floating point and find where the first one comes from"
            )


def _predicted(site: WeightSite | ActivationSite) -> float:
    edge = facts(site.node).edge
    return 0.0 if edge is None else edge.predicted_divergence
