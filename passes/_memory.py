"""Which values of a prepared graph share memory that something may yet write into."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import facts
from gdnsq_fx.effects import writes_in_place
from gdnsq_fx.quantize.quantizer import Quantizer

from ._evaluated_norm import is_affine_norm


def written_values(graph_module: GraphModule) -> set[Node]:
    """Nodes whose value something may write into after it was computed.

    Conservative: quantizers count as views of their input, an operation that the op
    table does not know as one of its first argument, and a module that it does not know
    writes into all that it reads, and later into what it returns.
    """
    roots: dict[Node, Node] = {
        n: _root(graph_module, n) for n in graph_module.graph.nodes
    }
    places = {node: place for place, node in enumerate(roots)}
    last_write: dict[Node, int] = {}
    for node, place in places.items():
        if writes_in_place(node):
            last_write |= {roots[one]: place for one in node.all_input_nodes[:1]}
        elif _is_unknown_module(graph_module, node):
            last_write |= {roots[one]: place for one in node.all_input_nodes}
            last_write[roots[node]] = len(places)
    return {n for n, place in places.items() if last_write.get(roots[n], -1) > place}


def _root(graph_module: GraphModule, node: Node) -> Node:
    """The value that a value may be a view of, through modules as well."""
    while node.op.startswith("call_") and node.all_input_nodes:
        if _makes_new(graph_module, node):
            break
        node = node.all_input_nodes[0]
    return node


def _makes_new(graph_module: GraphModule, node: Node) -> bool:
    """Whether the value of a call is known to have memory of its own."""
    if is_affine_norm(_module(graph_module, node)):
        return True
    op = facts(node).op
    return op is not None and not op.may_alias and not writes_in_place(node)


def _is_unknown_module(graph_module: GraphModule, node: Node) -> bool:
    module = _module(graph_module, node)
    if module is None or facts(node).op is not None:
        return False
    return not (isinstance(module, Quantizer) or is_affine_norm(module))


def _module(graph_module: GraphModule, node: Node) -> nn.Module | None:
    called = node.op == "call_module"
    return graph_module.get_submodule(str(node.target)) if called else None
