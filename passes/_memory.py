"""Which values of a prepared graph share memory that something may write into."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import facts
from gdnsq_fx.effects import writes_in_place
from gdnsq_fx.quantize.quantizer import Quantizer


def written_values(graph_module: GraphModule) -> set[Node]:
    """Call nodes and placeholders whose value may be written into, maybe by a caller.

    Conservative: quantizers count as views of their input, an operation that the op
    table does not know as one of its first argument, and a module that it does not know
    writes into all that it reads.
    """
    roots = {node: _root(node) for node in graph_module.graph.nodes}
    written: set[Node] = set()
    for node in roots:
        if writes_in_place(node):
            written |= {roots[one] for one in node.all_input_nodes[:1]}
        elif _is_unknown_module(graph_module, node):
            written |= {node, *(roots[one] for one in node.all_input_nodes)}
    return {node for node, root in roots.items() if root in written}


def _root(node: Node) -> Node:
    """The value that a value may be a view of, through modules as well."""
    while node.op.startswith("call_") and node.all_input_nodes:
        op = facts(node).op
        if op is not None and not op.may_alias and not writes_in_place(node):
            break
        node = node.all_input_nodes[0]
    return node


def _is_unknown_module(graph_module: GraphModule, node: Node) -> bool:
    if node.op != "call_module" or facts(node).op is not None:
        return False
    return not isinstance(graph_module.get_submodule(str(node.target)), Quantizer)
