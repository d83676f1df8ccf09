"""Graph modules that are pickled node by node.

Torch pickles the code of a graph module and traces it again when it is read, which
fails where a size goes into a factory such as ``torch.zeros(n)``.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

_REGISTRIES = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True)
class _Reference:
    """A node by its name."""

    name: str


class PickledByNodes(GraphModule):
    """A `torch.fx.GraphModule` whose pickle holds its nodes and its module tree.

    Facts in ``meta`` are a cache and stay behind, but for those that are ``kept_meta``.
    """

    kept_meta: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        tree = nn.Module()
        for kind in _REGISTRIES:
            setattr(tree, kind, getattr(self, kind))
        tree._non_persistent_buffers_set = self._non_persistent_buffers_set
        tree.training = self.training
        meta = {key: self.meta[key] for key in self.kept_meta if key in self.meta}
        # The class of an instance is made for it alone; the one above has a name.
        kind = type(self).__mro__[1]
        return _rebuilt, (kind, tree, _written(self.graph), self._get_name(), meta)


def _written(graph: Graph) -> list[tuple[Any, ...]]:
    def written(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, Node) else value

    return [
        (
            node.op,
            node.target,
            map_aggregate(node.args, written),
            map_aggregate(node.kwargs, written),
            node.name,
            node.stack_trace,
        )
        for node in graph.nodes
    ]


def _rebuilt(
    kind: type[GraphModule],
    tree: nn.Module,
    nodes: list[tuple[Any, ...]],
    name: str,
    meta: dict[str, Any],
) -> GraphModule:
    graph = Graph()
    made: dict[str, Node] = {}

    def read(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Reference) else value

    for op, target, args, kwargs, node_name, trace in nodes:
        given = map_aggregate(args, read), map_aggregate(kwargs, read)
        node = graph.create_node(op, target, *given, node_name)
        node.stack_trace = trace
        made[node_name] = node
    module = kind(tree, graph, name)
    module.meta.update(meta)
    return module
