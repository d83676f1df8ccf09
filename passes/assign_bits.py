"""AssignBits: give each quantizer a target bit-width of its own (mixed precision).

Only targets change; run `Calibrate` afterwards, which places the levels for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from gdnsq_fx.errors import PassError
from gdnsq_fx.sites import assign_targets, require_quantizers, sites

from ._base import Pass


@dataclass(frozen=True, eq=False)
class AssignBits(Pass):
    """Set the target of every edge that is named.

    Attributes:
        bits: edge -> bits, 1..16; edges that it leaves out keep their target.
    """

    bits: Mapping[str, int]

    def requires(self, graph_module: GraphModule) -> None:
        """Every name is that of an edge."""
        require_quantizers(graph_module, self.name)
        known = [site.edge for site in sites(graph_module)]
        unknown = [edge for edge in self.bits if edge not in known]
        if unknown:
            raise PassError(
                f"AssignBits: no edge is called {', '.join(unknown[:5])}; there are "
                f"{', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
            )

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Changes targets only, never the graph."""
        assign_targets(graph_module, self.bits)
        return False
