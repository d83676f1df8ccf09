"""AnalyzeCapacity: measure every quantized edge from one stream of batches.

Facts only: each quantizer node gets its `EdgeFacts` (capacity, entropy, SQNR, share
clipped, predicted divergence). The model runs at identity precision in evaluation; a
few backward passes for each batch serve all edges together (see
``analysis/divergence.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.divergence import (
    Curvature,
    curvature_root,
    jeffreys,
    primary_output,
)
from gdnsq_fx.analysis.edge_statistics import EdgeStatistics, statistics_of
from gdnsq_fx.annotations import annotate, facts
from gdnsq_fx.errors import CalibrationError, ConfigError
from gdnsq_fx.inputs import Batch, InputStructure, batch_size, check_device
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.sites import ActivationSite, WeightSite, require_quantizers, sites
from gdnsq_fx.state import cloned, preserved_state

from ._base import Pass, check_finite
from ._probe import EdgeProbe


@dataclass(frozen=True, eq=False)
class AnalyzeCapacity(Pass):
    """Write `EdgeFacts` on every quantizer node.

    Attributes:
        batches: iterable of batches, alone or followed by targets.
        inputs: structure of the example input.
        draws: random sign vectors for each batch; more of them, less variance.
        confirm: measure this many edges of the largest predicted divergence as well,
            one at a time (holds the batches in memory).
        curvature: ``softmax`` where the output are logits, ``identity`` for regression.
    """

    batches: Iterable[object]
    inputs: InputStructure
    draws: int = 4
    confirm: int = 0
    curvature: Curvature = "softmax"

    def __post_init__(self) -> None:
        if self.draws < 1 or self.confirm < 0:
            raise ConfigError(
                "draws must be at least 1 and confirm at least 0, got "
                f"{self.draws} and {self.confirm}"
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
        batches = list(self.batches) if self.confirm else self.batches
        found = statistics_of(graph_module)
        samples = 0
        with preserved_state(graph_module):
            graph_module.eval()
            generator = torch.Generator().manual_seed(0)
            for one in batches:
                batch = self.inputs.split(one)
                check_device(graph_module, batch.args, batch.kwargs)
                check_finite(batch, "an analysis batch")
                samples += self._measure(graph_module, batch, found, generator)
            if not samples:
                raise CalibrationError(
                    "analysis has no batch; pass a non-empty iterable that has not "
                    "been used up"
                )
            for site in sites(graph_module):
                measured = found[site.edge].facts(samples)
                for node in site.nodes:
                    annotate(node, edge=measured)
            self._confirm(graph_module, batches)
        return False

    def _measure(
        self,
        graph_module: GraphModule,
        batch: Batch,
        found: dict[str, EdgeStatistics],
        generator: torch.Generator,
    ) -> int:
        """One batch: forward with probes, then ``draws`` backward passes."""
        size = batch_size(batch.args, batch.kwargs)
        probe = EdgeProbe(graph_module, found)
        args, kwargs = cloned((batch.args, batch.kwargs))
        with torch.enable_grad():
            logits = primary_output(probe.run_all(args, kwargs))
        tensors = [tensor for tensor, _, _ in probe.probes]
        for draw in range(self.draws):
            signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0
            signs = signs.to(logits)
            gradients = torch.autograd.grad(
                logits,
                tensors,
                curvature_root(logits.detach(), signs, self.curvature),
                retain_graph=draw + 1 < self.draws,
                allow_unused=True,
            )
            probe.add_products(gradients, size, 1.0 / self.draws)
        return size

    def _confirm(self, graph_module: GraphModule, batches: Iterable[object]) -> None:
        """Quantize the worst edges one at a time and compare outputs."""
        ranked = sorted(sites(graph_module), key=_predicted, reverse=True)
        for site in ranked[: self.confirm]:
            measured = self._divergence_of(graph_module, site, batches)
            edge = facts(site.node).edge
            assert edge is not None
            for node in site.nodes:
                annotate(node, edge=replace(edge, measured_divergence=measured))

    @torch.no_grad()
    def _divergence_of(
        self,
        graph_module: GraphModule,
        site: WeightSite | ActivationSite,
        batches: Iterable[object],
    ) -> float:
        total, samples = 0.0, 0
        for one in batches:
            batch = self.inputs.split(one)
            with quantization_disabled(graph_module):
                wanted = _output(graph_module, batch)
                site.quantizer.enabled = True
                got = _output(graph_module, batch)
            if self.curvature == "softmax":
                total += float(jeffreys(got, wanted).sum())
            else:
                total += float((got - wanted).square().sum())
            samples += batch_size(batch.args, batch.kwargs)
        return total / samples


def _output(graph_module: GraphModule, batch: Batch) -> Tensor:
    args, kwargs = cloned((batch.args, batch.kwargs))
    return primary_output(graph_module(*args, **kwargs))


def _predicted(site: WeightSite | ActivationSite) -> float:
    edge = facts(site.node).edge
    return 0.0 if edge is None else edge.predicted_divergence
