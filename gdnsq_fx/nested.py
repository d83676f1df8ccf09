"""Graphs inside a graph: children of opaque modules that were captured on their own.

An opaque module stays one ``call_module`` node and runs its own Python, but children of
it may be graph modules. Such a graph knows where in the whole model it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch.fx import GraphModule, Node

PLACE_KEY = "gdnsq_fx.place"


class Place(NamedTuple):
    """Where a nested graph stands.

    Attributes:
        opaque: path of the opaque module in the whole model.
        inner: path of the graph within that module.
    """

    opaque: str
    inner: str


def path_of(graph_module: GraphModule) -> str:
    """Path in the whole model; empty for the model itself."""
    place = graph_module.meta.get(PLACE_KEY)
    return ".".join(place) if isinstance(place, Place) else ""


def joined(prefix: str, name: str) -> str:
    """``prefix.name``, or what of the two is not empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def nested_graphs(graph_module: GraphModule) -> list[GraphModule]:
    """The graphs inside, outer before inner, in the order of the module tree."""
    return [
        module
        for path, module in graph_module.named_modules()
        if path and isinstance(module, GraphModule) and PLACE_KEY in module.meta
    ]


def graphs_of(graph_module: GraphModule) -> list[GraphModule]:
    """The graph itself, and those inside."""
    return [graph_module, *nested_graphs(graph_module)]


def owner_of(graph_module: GraphModule, node: Node) -> GraphModule:
    """The graph module, among `graphs_of`, whose graph holds a node."""
    return next(g for g in graphs_of(graph_module) if g.graph is node.graph)


def alike(graph_module: GraphModule, one: GraphModule) -> list[list[GraphModule]]:
    """The other graphs of one opaque module that do the same job as one of them.

    The experts of a mixture are alike, and so are their layers, one by one, where the
    layers were captured and not the experts.

    Returns:
        Groups of graphs, the likest first (see `counterparts`).
    """
    place = one.meta.get(PLACE_KEY)
    if not isinstance(place, Place):
        return []
    beside = {
        found.inner: module
        for module in nested_graphs(graph_module)
        if (found := module.meta[PLACE_KEY]).opaque == place.opaque
    }
    kinds = {inner: type(module).__name__ for inner, module in beside.items()}
    groups = counterparts(place.inner, kinds)
    return [[beside[inner] for inner in group] for group in groups]


def counterparts(path: str, kinds: Mapping[str, object]) -> list[list[str]]:
    """Paths as long as one and of its kind, the likest first.

    Likest are those that differ in the outermost place alone: of ``experts.3.fc1`` it
    is ``experts.0.fc1``, before ``experts.3.fc2``.

    Args:
        path: one of the paths.
        kinds: the kind of each path.

    Returns:
        Groups of paths that differ in the same places.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for other, kind in kinds.items():
        if kind == kinds[path] and other != path:
            places = _differing(path.split("."), other.split("."))
            groups.setdefault(places, []).append(other)
    groups.pop((), None)
    return [groups[places] for places in sorted(groups, key=lambda p: (len(p), p))]


def _differing(names: list[str], others: list[str]) -> tuple[int, ...]:
    """In which places they differ; in none where one is longer."""
    if len(names) != len(others):
        return ()
    return tuple(n for n, name in enumerate(names) if name != others[n])
