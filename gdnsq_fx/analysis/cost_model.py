"""What a bit assignment costs: bytes and bit operations as functions of the bits.

Both are known from the graph alone, so that thousands of assignments can be compared
without touching a quantizer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from gdnsq_fx.analysis.capacity import FLOAT_BITS
from gdnsq_fx.analysis.costs import Factors, factored_macs, operations
from gdnsq_fx.annotations import facts
from gdnsq_fx.budget import Budget
from gdnsq_fx.sites import WeightSite, sites

BYTES_PER_GROUP = 8  # step and offset in 32 bits each


@dataclass(frozen=True)
class CostModel:
    """Sizes of the edges, and which of them meet in which operation.

    Attributes:
        weights: weight edge -> elements.
        groups: weight edge -> scale groups.
        activations: activation edge -> elements per sample.
        macs: factors -> MACs per sample of all operations with them.
    """

    weights: Mapping[str, int]
    groups: Mapping[str, int]
    activations: Mapping[str, int]
    macs: Mapping[Factors, int]

    @staticmethod
    def of(graph_module: GraphModule) -> CostModel:
        """The costs of a prepared graph."""
        weights: dict[str, int] = {}
        groups: dict[str, int] = {}
        activations: dict[str, int] = {}
        for site in sites(graph_module):
            if isinstance(site, WeightSite):
                weights[site.edge] = site.weight().numel()
                groups[site.edge] = site.quantizer.log2_step.numel()
            else:
                activations[site.edge] = sum(facts(n).elements for n in site.nodes)
        return CostModel(weights, groups, activations, _macs(graph_module))

    @property
    def edges(self) -> tuple[str, ...]:
        """Weights, then activations."""
        return (*self.weights, *self.activations)

    def edge_bytes(self, edge: str, bits: int) -> int:
        """Packed size of a weight; 0 for an activation, which is not stored."""
        if edge not in self.weights:
            return 0
        codes = math.ceil(self.weights[edge] * bits / 8)
        return codes + BYTES_PER_GROUP * self.groups[edge]

    def weight_bytes(self, bits: Mapping[str, int]) -> int:
        """Bytes of all quantized weights."""
        return sum(self.edge_bytes(edge, bits[edge]) for edge in self.weights)

    def bops(self, bits: Mapping[str, int]) -> int:
        """Bit operations per sample."""
        return sum(
            macs * math.prod(FLOAT_BITS if e is None else bits[e] for e in factors)
            for factors, macs in self.macs.items()
        )

    def costs(self, bits: Mapping[str, int]) -> dict[str, float]:
        """Everything that a `Budget` may bound, by its name there."""
        return {
            "weight_bytes": self.weight_bytes(bits),
            "bops": self.bops(bits),
            "mean_weight_bits": _mean(self.weights, bits),
            "mean_act_bits": _mean(self.activations, bits),
            "weight_bits": max((bits[e] for e in self.weights), default=0),
            "act_bits": max((bits[e] for e in self.activations), default=0),
        }

    def ceiling(self, edge: str, budget: Budget) -> float:
        """The most bits that a budget allows one edge by itself, inf where it does
        not say."""
        name = "weight_bits" if edge in self.weights else "act_bits"
        return budget.ceilings.get(name, math.inf)

    def meets(self, bits: Mapping[str, int], budget: Budget) -> bool:
        """Whether an assignment stays within every bound."""
        costs = self.costs(bits)
        return all(costs[name] <= bound for name, bound in budget.bounds.items())


def _mean(elements: Mapping[str, int], bits: Mapping[str, int]) -> float:
    total = sum(elements.values())
    return sum(n * bits[edge] for edge, n in elements.items()) / total if total else 0.0


def _macs(graph_module: GraphModule) -> dict[Factors, int]:
    found: Counter[Factors] = Counter()
    for owner, node in operations(graph_module):
        for factors, macs in factored_macs(owner, node):
            found[factors] += macs
    return dict(found)
