"""FreezeQuantizers: learned quantizers become fixed ones with whole levels.

The graph keeps its form; the modules behind the quantizer nodes change. Activations get
a whole number of levels, weights become whole codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.errors import PassError
from gdnsq_fx.quantize.frozen import FrozenActivation, FrozenWeight
from gdnsq_fx.sites import WeightSite, sites

from ._base import Pass


@dataclass(frozen=True, eq=False)
class FreezeQuantizers(Pass):
    """Replace every learned quantizer; False where none is left."""

    def requires(self, graph_module: GraphModule) -> None:
        """Every quantizer is calibrated and every weight finite."""
        for site in sites(graph_module):
            if not site.quantizer.is_calibrated:
                raise PassError(
                    f"{site.edge} has no finite step; calibrate or fine-tune before "
                    "freezing"
                )
            if isinstance(site, WeightSite) and not site.weight().isfinite().all():
                raise PassError(f"{site.edge} holds NaN or infinite values")

    @torch.no_grad()
    def rewrite(self, graph_module: GraphModule) -> bool:
        """Swap the modules behind the quantizer nodes."""
        found = sites(graph_module)
        for site in found:
            frozen: nn.Module
            if isinstance(site, WeightSite):
                frozen = FrozenWeight(site.quantizer, site.weight())
            else:
                frozen = FrozenActivation(site.quantizer)
            frozen.train(site.owner.training)
            site.owner.set_submodule(str(site.node.target), frozen)
        return bool(found)
