"""Measure the divergence that single edges cost, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.divergence import Curvature, jeffreys, primary_output
from gdnsq_fx.annotations import annotate, facts
from gdnsq_fx.inputs import Batch, batch_size
from gdnsq_fx.quantize.quantizer import quantization_disabled, quantization_enabled
from gdnsq_fx.sites import ActivationSite, WeightSite
from gdnsq_fx.state import cloned


class Confirmation:
    """Outputs of the exact and of the quantized model, to compare single edges with.

    Args:
        graph_module: prepared, in evaluation.
        batches: held in memory, with both outputs of each.
        curvature: as in `AnalyzeCapacity`.
        joint: measure what an edge costs in the quantized model as well.
    """

    @torch.no_grad()
    def __init__(
        self,
        graph_module: GraphModule,
        batches: Sequence[Batch],
        curvature: Curvature,
        joint: bool,
    ) -> None:
        self._graph_module = graph_module
        self._batches = batches
        self._curvature = curvature
        self._samples = sum(batch_size(b.args, b.kwargs) for b in batches)
        with quantization_disabled(graph_module):
            self._exact = [self._output(batch) for batch in batches]
        self._all: float | None = None
        if joint:
            with quantization_enabled(graph_module):
                self._all = self._divergence()

    @torch.no_grad()
    def measure(self, site: WeightSite | ActivationSite) -> None:
        """Note both divergences on every node of the site."""
        with quantization_disabled(self._graph_module):
            site.quantizer.enabled = True
            alone = self._divergence()
        vanishing: float | None = None
        if self._all is not None:
            with quantization_enabled(self._graph_module):
                site.quantizer.enabled = False
                vanishing = self._all - self._divergence()
        edge = facts(site.node).edge
        assert edge is not None
        edge = replace(
            edge, measured_divergence=alone, measured_joint_divergence=vanishing
        )
        for node in site.nodes:
            annotate(node, edge=edge)

    def _divergence(self) -> float:
        """Divergence from the exact model as the quantizers are switched, nats."""
        total = 0.0
        for batch, wanted in zip(self._batches, self._exact, strict=True):
            got = self._output(batch)
            if self._curvature == "softmax":
                total += float(jeffreys(got, wanted).sum())
            else:
                total += float((got - wanted).square().sum())
        return total / self._samples

    def _output(self, batch: Batch) -> Tensor:
        args, kwargs = cloned((batch.args, batch.kwargs))
        return primary_output(self._graph_module(*args, **kwargs))
