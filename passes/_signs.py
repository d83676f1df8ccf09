"""Which values of a graph can never be negative, as far as the op table proves it."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import facts
from gdnsq_fx.effects import writes_in_place
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.stored import storage_root


def nonnegative_values(graph_module: GraphModule) -> set[Node]:
    """Nodes whose value is proven to be at least 0, in one walk over the graph.

    A value that is written into in place stays proven only where that keeps signs.
    """
    proven: set[Node] = set()
    for node in graph_module.graph.nodes:
        op = facts(node).op
        if op is not None and (op.sign == "nonnegative" or _inherits(node, op, proven)):
            proven.add(node)
        elif writes_in_place(node):
            root = storage_root(node)
            proven = {n for n in proven if storage_root(n) is not root}
    return proven


def _inherits(node: Node, op: OpInfo, proven: set[Node]) -> bool:
    if op.sign != "inherits":
        return False
    bound = op.bind(node)
    return all(_holds(bound[name], proven) for name in op.roles if name in bound)


def _holds(value: object, proven: set[Node]) -> bool:
    if value is None:
        return True
    if isinstance(value, int | float):
        return value >= 0
    if isinstance(value, list | tuple):
        return all(_holds(item, proven) for item in value)
    return isinstance(value, Node) and value in proven
