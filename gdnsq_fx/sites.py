"""Where the quantizers of a graph stand: one `Site` for each quantizer node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from torch.fx import GraphModule, Node

from gdnsq_fx.errors import PassError
from gdnsq_fx.quantize.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer
from gdnsq_fx.state import in_evaluation

Q = TypeVar("Q", bound=Quantizer)


@dataclass(frozen=True)
class Site(Generic[Q]):
    """A quantizer node and its module."""

    node: Node
    quantizer: Q

    @property
    def edge(self) -> str:
        """Name of the edge, such as ``layer1.0.conv1.weight``."""
        return self.quantizer.edge


@dataclass(frozen=True)
class WeightSite(Site[WeightQuantizer]):
    """A weight quantizer and where its weight comes from."""

    owner: GraphModule

    def weight(self) -> Tensor:
        """The weight as it is now (with its graph where it is parametrized)."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return stored_value(self.owner, source)


@dataclass(frozen=True)
class ActivationSite(Site[ActivationQuantizer]):
    """An activation quantizer."""


def stored_value(owner: GraphModule, node: Node) -> Tensor:
    """The tensor behind a ``get_attr`` node or the call of a parametrization."""
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        with in_evaluation(module):  # a look must not move its buffers (spectral norm)
            return module()
    prefix, _, name = str(node.target).rpartition(".")
    return getattr(owner.get_submodule(prefix), name)


def sites(graph_module: GraphModule) -> list[WeightSite | ActivationSite]:
    """All quantizers in graph order."""
    found: list[WeightSite | ActivationSite] = []
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, WeightQuantizer):
            found.append(WeightSite(node, module, graph_module))
        elif isinstance(module, ActivationQuantizer):
            found.append(ActivationSite(node, module))
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


def bit_width(levels: int) -> int:
    """Whole bits that hold a number of levels; at least 1."""
    return max((levels - 1).bit_length(), 1)


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
