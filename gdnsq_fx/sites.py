"""Where the quantizers of a graph stand: one `Site` for each quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.nested import graphs_of, joined, path_of
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.stored import stored_value

Q = TypeVar("Q", bound=Quantizer)


@dataclass(frozen=True)
class Site(Generic[Q]):
    """A quantizer module and the nodes that call it.

    Attributes:
        nodes: in graph order; more than one where tensors share a grid.
        quantizer: their module.
        owner: the graph module that they stand in, the model or one inside it.
    """

    nodes: tuple[Node, ...]
    quantizer: Q
    owner: GraphModule

    @property
    def node(self) -> Node:
        """The first of its nodes."""
        return self.nodes[0]

    @property
    def path(self) -> str:
        """Path of the quantizer in the whole model."""
        return joined(path_of(self.owner), str(self.node.target))

    @property
    def edge(self) -> str:
        """Name of the edge, such as ``layer1.0.conv1.weight``."""
        return self.quantizer.edge


@dataclass(frozen=True)
class WeightSite(Site[WeightQuantizer]):
    """A weight quantizer and where its weight comes from."""

    def weight(self) -> Tensor:
        """The weight as it is now (with its graph where it is computed)."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return stored_value(self.owner, source)


@dataclass(frozen=True)
class ActivationSite(Site[ActivationQuantizer]):
    """An activation quantizer."""


def sites(graph_module: GraphModule) -> list[WeightSite | ActivationSite]:
    """All quantizers in graph order, each once; then those of the graphs inside."""
    return [site for one in graphs_of(graph_module) for site in _sites_in(one)]


def _sites_in(graph_module: GraphModule) -> list[WeightSite | ActivationSite]:
    nodes: dict[Quantizer, list[Node]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, Quantizer):
            nodes.setdefault(module, []).append(node)
    found: list[WeightSite | ActivationSite] = []
    for module, calls in nodes.items():
        if isinstance(module, WeightQuantizer):
            found.append(WeightSite(tuple(calls), module, graph_module))
        elif isinstance(module, ActivationQuantizer):
            found.append(ActivationSite(tuple(calls), module, graph_module))
    return found


def weight_sites(graph_module: GraphModule) -> list[WeightSite]:
    """Weight quantizers in graph order."""
    return [s for s in sites(graph_module) if isinstance(s, WeightSite)]


def activation_sites(graph_module: GraphModule) -> list[ActivationSite]:
    """Activation quantizers in graph order."""
    return [s for s in sites(graph_module) if isinstance(s, ActivationSite)]


def hard_bits(graph_module: GraphModule) -> dict[str, int]:
    """Hard bit-width ceil(log2(levels)) of every edge, by name of the edge."""
    bits = {
        s.edge: bit_width(s.quantizer.levels()) for s in activation_sites(graph_module)
    }
    for site in weight_sites(graph_module):
        bits[site.edge] = bit_width(int(site.quantizer.levels(site.weight()).max()))
    return bits


def assign_targets(graph_module: GraphModule, bits: Mapping[str, int]) -> None:
    """Set the target bit-width of every edge that is named, 1..16.

    Raises:
        ConfigError: bits outside their domain.
    """
    for site in sites(graph_module):
        chosen = bits.get(site.edge, site.quantizer.spec.bits)
        site.quantizer.spec = replace(site.quantizer.spec, bits=chosen)


def bit_width(levels: int) -> int:
    """Whole bits that hold a number of levels; at least 1."""
    return max((levels - 1).bit_length(), 1)


def quantizer_behind(graph_module: GraphModule, value: object) -> Quantizer | None:
    """The quantizer on whose levels a value lies, None where it is floating point.

    Views keep the levels, and so do tensors of one grid put side by side.
    """
    if not isinstance(value, Node):
        return None
    if value.op == "call_module":
        module = graph_module.get_submodule(str(value.target))
        if isinstance(module, Quantizer):
            return module
    op = facts(value).op
    if op is None or op.kind not in ("view", "concat"):
        return None
    operands = op.operands(op.bind(value))
    found = {quantizer_behind(graph_module, operand.value) for operand in operands}
    return found.pop() if len(found) == 1 else None


def require_quantizers(graph_module: GraphModule, what: str) -> None:
    """Raise where there is no quantizer.

    Raises:
        PassError: names what was asked for and `prepare`.
    """
    if not sites(graph_module):
        raise PassError(
            f"{what} needs a model with quantizers, and this one has none; call "
            "gdnsq_fx.prepare(model, example_input) first"
        )
