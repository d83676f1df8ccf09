"""The graph of a child of an opaque module, which goes on calling it by its name."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.capture.captured import CapturedModule
from gdnsq_fx.nested import PLACE_KEY, Place, nested_graphs

_ATTRIBUTES_KEY = "gdnsq_fx.attributes"


class _KeepsAttributes(nn.Module):
    """Has the plain attributes of the module that it stands for (``in_features``)."""

    def __getattr__(self, name: str) -> Any:
        meta = self.__dict__.get("meta") or {}
        kept: dict[str, Any] = meta.get(_ATTRIBUTES_KEY, {})
        if name in kept:
            return kept[name]
        return super().__getattr__(name)


class ChildGraph(_KeepsAttributes, CapturedModule):
    """A captured child of an opaque module."""

    kept_meta = (*CapturedModule.kept_meta, PLACE_KEY, _ATTRIBUTES_KEY)


class LoweredChild(_KeepsAttributes, GraphModule):
    """The integer graph of a child of an opaque module."""


class StandIn(_KeepsAttributes):
    """Computes what a graph computes, and holds no tensors and no sub-modules.

    What works with it does not look into the child that it stands for.
    """

    def __init__(self, body: ChildGraph) -> None:
        super().__init__()
        self.__dict__["body"] = body
        self.__dict__["meta"] = body.meta

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, in the mode of the stand-in."""
        body: ChildGraph = self.__dict__["body"]
        body.train(self.training)
        return body(*args, **kwargs)


def child_graph(captured: CapturedModule, child: nn.Module) -> ChildGraph:
    """The graph with the plain attributes of the module that it was captured from."""
    made = ChildGraph(captured, captured.graph, type(child).__name__)
    made.meta.update(captured.meta)
    plain = nn.Module().__dict__
    made.meta[_ATTRIBUTES_KEY] = {
        name: value
        for name, value in vars(child).items()
        if name not in plain and not (isinstance(value, Tensor) and not value.is_leaf)
    }
    made.training = child.training
    return made


def place(graph: ChildGraph, opaque: str, inner: str) -> None:
    """Tell a graph, and the graphs inside it, where in the model they stand."""
    for nested in nested_graphs(graph):
        found: Place = nested.meta[PLACE_KEY]
        outer = f"{opaque}.{inner}.{found.opaque}"
        nested.meta[PLACE_KEY] = Place(outer, found.inner)
    graph.meta[PLACE_KEY] = Place(opaque, inner)
