"""Calibrate: place every quantizer's levels from real data.

Activations: the range whose levels, at the target bit-width, give the least mean
squared error on a sample of the values met. Weights: levels over the whole span of each
channel. The model runs in evaluation, but a BatchNorm that is to be trained from its
first batch on normalises as it will then.

Inside an opaque module an edge may be reached by no batch, as in an expert that no
token is routed to. Then the example input places its levels, or else what all edges
alike have met, as in the other experts. Either is a `CalibrationWarning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.annotations import KEY, ModelFacts
from gdnsq_fx.errors import CalibrationError, CalibrationWarning
from gdnsq_fx.inputs import InputStructure, check_device
from gdnsq_fx.nested import alike, path_of
from gdnsq_fx.quantize.observer import Observer
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.sites import (
    ActivationSite,
    activation_sites,
    require_quantizers,
    weight_sites,
)
from gdnsq_fx.state import is_on_meta, preserved_state

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
        example: a further batch, for edges inside opaque modules that no batch reaches.
        added: place the levels that have no place yet, on grids that 0 lies on, while
            all others stay and quantize.
    """

    batches: Iterable[Any]
    inputs: InputStructure
    example: Any = None
    added: bool = False

    def requires(self, graph_module: GraphModule) -> None:
        """There are quantizers, and values for them."""
        require_quantizers(graph_module, self.name)
        if is_on_meta(graph_module):
            raise CalibrationError(
                "the model has tensors on the meta device, which hold no values; call "
                'to_empty(device="cpu") and load_state_dict(weights, strict=False) '
                "before Calibrate"
            )

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
        for site in () if self.added else weight_sites(graph_module):
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
        sites = self._sites(graph_module)
        with _observing(sites) as observers:
            seen = self._run(graph_module, self.batches)
        if not seen:
            raise CalibrationError(
                "calibration has no batch; pass a non-empty iterable that has not been "
                "used up, or leave it out to calibrate on the example input"
            )
        self._observe_elsewhere(graph_module, sites, observers)
        masks = [edge for edge, observer in observers.items() if observer.is_mask]
        for site in sites:
            if site.edge not in masks:
                observers[site.edge].place(site.quantizer, from_zero=self.added)
                observers[site.edge].note_shares(site.quantizer)
        return masks

    def _sites(self, graph_module: GraphModule) -> list[ActivationSite]:
        found = activation_sites(graph_module)
        return [s for s in found if not (self.added and s.quantizer.is_calibrated)]

    def _observe_elsewhere(
        self,
        graph_module: GraphModule,
        sites: list[ActivationSite],
        observers: dict[str, Observer],
    ) -> None:
        """Give edges inside opaque modules that no batch reached what others saw."""
        missed = [s for s in sites if path_of(s.owner) and observers[s.edge].is_empty]
        if not missed:
            return
        by_path = {site.path: observers[site.edge] for site in sites}
        seen_by_others = {s.edge: _seen_alike(graph_module, s, by_path) for s in missed}
        found = dict.fromkeys([s.edge for s in missed], "the other modules of its kind")
        if self.example is not None:
            with _observing(missed) as own:
                self._run(graph_module, [self.example])
            met = {edge: one for edge, one in own.items() if not one.is_empty}
            seen_by_others |= met
            found |= dict.fromkeys(met, "the example input")
        observers |= seen_by_others
        places = [f"{e} from {how}" for e, how in found.items()]
        more = f" and {len(places) - 5} more" if places[5:] else ""
        warnings.warn(
            "no calibration batch reaches some edges inside opaque modules; their "
            f"levels are placed elsewhere: {', '.join(places[:5])}{more}. Calibrate on "
            "more data to place them from their own values",
            CalibrationWarning,
            stacklevel=2,
        )

    @contextmanager
    def _disabled(self, graph_module: GraphModule) -> Generator[None]:
        off = [s.quantizer for s in self._sites(graph_module)]
        with quantization_disabled(nn.ModuleList(off) if self.added else graph_module):
            yield

    def _run(self, graph_module: GraphModule, batches: Iterable[Any]) -> int:
        count = 0
        disabled = self._disabled(graph_module)
        own = batch_statistics_where_untrained(graph_module)
        with preserved_state(graph_module), disabled, torch.no_grad(), own:
            graph_module.eval()
            for count, one in enumerate(batches, start=1):
                batch = self.inputs.split(one)
                check_device(graph_module, batch.args, batch.kwargs)
                check_finite(batch, f"calibration batch {count}")
                graph_module(*batch.args, **batch.kwargs)
        return count


def _seen_alike(
    graph_module: GraphModule, site: ActivationSite, by_path: dict[str, Observer]
) -> Observer:
    """What the same edge of the likest graphs that saw anything has seen, together."""
    target = str(site.node.target)
    for group in alike(graph_module, site.owner):
        paths = [f"{path_of(one)}.{target}" for one in group]
        found = Observer.of_all(site.edge, [by_path[p] for p in paths if p in by_path])
        if not found.is_empty:
            return found
    return Observer(site.edge)


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
