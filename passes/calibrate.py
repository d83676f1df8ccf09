"""Calibrate: place every quantizer's levels from real data.

Activations: the range whose levels, at the target bit-width, give the least mean
squared error on a sample of the values met. Weights: levels over the whole span of each
channel. The model runs in evaluation, but a BatchNorm that is to be trained from its
first batch on normalises as it will then.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from gdnsq_fx.annotations import KEY, ModelFacts
from gdnsq_fx.errors import CalibrationError
from gdnsq_fx.inputs import InputStructure, check_device
from gdnsq_fx.quantize.observer import Observer
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.sites import (
    ActivationSite,
    activation_sites,
    require_quantizers,
    weight_sites,
)
from gdnsq_fx.state import preserved_state

from ._base import Pass, check_finite
from ._batch_statistics import batch_statistics_where_untrained
from ._masks import release_masks
from ._skips import check_skips


@dataclass(frozen=True, eq=False)
class Calibrate(Pass):
    """Run the batches through the model at identity precision and place the levels.

    Attributes:
        batches: iterable of batches, each with the structure of the example input,
            alone or followed by targets. Read once.
        inputs: that structure.
    """

    batches: Iterable[Any]
    inputs: InputStructure

    def requires(self, graph_module: GraphModule) -> None:
        """There are quantizers."""
        require_quantizers(graph_module, self.name)

    def ensures(self, graph_module: GraphModule) -> None:
        """Every quantizer has finite parameters."""
        sites = [*activation_sites(graph_module), *weight_sites(graph_module)]
        missed = [s.edge for s in sites if not s.quantizer.is_calibrated]
        if missed:
            raise CalibrationError(
                f"no finite level could be placed on {', '.join(missed[:5])}; check "
                "that the weights are finite"
            )

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Changes quantizer parameters; the graph only where an edge holds a mask."""
        masks = self._calibrate_activations(graph_module)
        if masks:
            release_masks(graph_module, masks)
            known = graph_module.meta.get(KEY)
            if isinstance(known, ModelFacts) and known.config.strict:
                check_skips(graph_module)
        for site in weight_sites(graph_module):
            weight = site.weight().detach()
            # Extremes pass NaN on, and need no copy of a large weight.
            if not all(torch.isfinite(end) for end in torch.aminmax(weight)):
                raise CalibrationError(
                    f"{site.edge} holds NaN or infinite values; the model's weights "
                    "must be finite before it can be quantized"
                )
            site.quantizer.open_to(weight, site.quantizer.spec.bits)
        return bool(masks)

    def _calibrate_activations(self, graph_module: GraphModule) -> list[str]:
        """Place the levels; returns the edges that hold a mask."""
        sites = activation_sites(graph_module)
        with _observing(sites) as observers:
            seen = self._run(graph_module)
        if not seen:
            raise CalibrationError(
                "calibration has no batch; pass a non-empty iterable that has not been "
                "used up, or leave it out to calibrate on the example input"
            )
        masks = [edge for edge, observer in observers.items() if observer.is_mask]
        for site in sites:
            if site.edge not in masks:
                observers[site.edge].place(site.quantizer)
        return masks

    def _run(self, graph_module: GraphModule) -> int:
        count = 0
        disabled = quantization_disabled(graph_module)
        own = batch_statistics_where_untrained(graph_module)
        with preserved_state(graph_module), disabled, torch.no_grad(), own:
            graph_module.eval()
            for count, one in enumerate(self.batches, start=1):
                batch = self.inputs.split(one)
                check_device(graph_module, batch.args, batch.kwargs)
                check_finite(batch, f"calibration batch {count}")
                graph_module(*batch.args, **batch.kwargs)
        return count


@contextmanager
def _observing(sites: list[ActivationSite]) -> Generator[dict[str, Observer]]:
    """Attach an observer to each quantizer for the time of the block."""
    observers = {site.edge: Observer(site.edge) for site in sites}
    handles = [
        site.quantizer.register_forward_pre_hook(observers[site.edge].hook)
        for site in sites
    ]
    try:
        yield observers
    finally:
        for handle in handles:
            handle.remove()
