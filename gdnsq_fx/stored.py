"""Values that depend on stored tensors alone: weights, and what is computed from them.

A weight may be a parameter, a view of it (``weight.t()``, ``weight.chunk(3)[0]``), or
any expression of parameters and buffers, such as a standardized or parametrized weight.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node, map_arg

from gdnsq_fx.annotations import facts
from gdnsq_fx.effects import draws_randomly, writes_in_place
from gdnsq_fx.quantize.frozen import FrozenActivation, FrozenWeight
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.state import in_evaluation


def weight_values(graph_module: GraphModule) -> set[Node]:
    """Nodes that depend on parameters and buffers alone, in one walk over the graph.

    Not among them: what depends on an input of the model, is drawn at random, changes
    with the mode, or holds a tensor that is written into.
    """
    written = _written(graph_module)
    fixed: set[Node] = set()
    found: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node not in written:
            fixed.add(node)
            found.add(node)
        elif node.op.startswith("call_") and _is_fixed(node, graph_module, fixed):
            fixed.add(node)
            if _reads_stored(node, graph_module, found):
                found.add(node)
    return found


def ancestors(nodes: list[Node]) -> set[Node]:
    """The nodes and all that they are computed from."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def stored_value(owner: GraphModule, node: Node) -> Tensor:
    """The value of a node of `weight_values`, with its autograd graph.

    Modules run in evaluation: a look must not move their buffers (spectral norm).
    """
    if node.op == "get_attr":  # as nearly all are, which training asks for every step
        found: Tensor = attribute(owner, str(node.target))
        return found
    values: dict[Node, Any] = {}
    for one in sorted(ancestors([node])):
        values[one] = computed(owner, one, values)
    return values[node]


def computed(owner: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    """What one node makes of the values of its inputs."""
    if node.op == "get_attr":
        return attribute(owner, str(node.target))
    args: Any = map_arg(node.args, values.__getitem__)
    kwargs: Any = map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        with in_evaluation(module):
            return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def attribute(owner: nn.Module, path: str) -> Any:
    """The attribute that a ``get_attr`` node names."""
    found: Any = reduce(getattr, path.split("."), owner)
    return found


def stored_name(node: Node, position: int) -> str:
    """Name of the stored tensor that a node reads as an argument."""
    source = node.args[position]
    assert isinstance(source, Node) and source.op == "get_attr"
    return str(source.target)


def _is_fixed(node: Node, owner: GraphModule, fixed: set[Node]) -> bool:
    if not fixed.issuperset(node.all_input_nodes):
        return False
    if node.op == "call_module":
        return _is_fixed_module(owner.get_submodule(str(node.target)), node)
    name = str(getattr(node.target, "__name__", node.target))
    if "dropout" in name or writes_in_place(node):
        return False
    return not draws_randomly(node)


def _is_fixed_module(module: nn.Module, node: Node) -> bool:
    """Dropout is random; a module that takes and holds nothing tells the mode."""
    if isinstance(module, Quantizer | FrozenActivation | FrozenWeight):
        return False
    if "Dropout" in type(module).__name__:
        return False
    return bool(node.all_input_nodes) or _holds_tensors(module)


def _reads_stored(node: Node, owner: GraphModule, found: set[Node]) -> bool:
    if not found.isdisjoint(node.all_input_nodes):
        return True
    if node.op != "call_module":
        return False
    return _holds_tensors(owner.get_submodule(str(node.target)))


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _written(graph_module: GraphModule) -> set[Node]:
    """Stored tensors that something writes into, directly or through views."""
    return {
        storage_root(node.all_input_nodes[0])
        for node in graph_module.graph.nodes
        if writes_in_place(node) and node.all_input_nodes
    }


def storage_root(node: Node) -> Node:
    """The value whose memory a value may share: back through views and in-place calls.

    Conservative: what the table does not know may return a view of its first argument.
    """
    while node.op in ("call_function", "call_method") and node.all_input_nodes:
        op = facts(node).op
        if op is not None and not op.may_alias and not writes_in_place(node):
            break
        node = node.all_input_nodes[0]
    return node
