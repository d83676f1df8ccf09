"""Which tensors of a converted model are codes, and in how many bits they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch.fx import GraphModule, Node

from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.deploy.qdq import calls, is_deployable, is_weight
from gdnsq_fx.nested import graphs_of, joined, path_of
from gdnsq_fx.sites import bit_width
from gdnsq_fx.stored import stored_name


def has_integer_nodes(imodel: GraphModule) -> bool:
    """Whether it is the integer graph that `LowerToInteger` emits."""
    return bool(_calls_of(imodel, dequantize))


def _calls_of(imodel: GraphModule, function: Any) -> list[tuple[str, Node]]:
    """Nodes that call a function, with the path of the graph they stand in."""
    return [
        (path_of(one), node)
        for one in graphs_of(imodel)
        for node in one.graph.find_nodes(op="call_function", target=function)
    ]


def weight_codes(imodel: GraphModule) -> dict[str, int]:
    """Name of each tensor of weight codes -> bits that hold them."""
    found: dict[str, int] = {}
    for path, node in _calls_of(imodel, dequantize):
        source = node.args[0]
        if isinstance(source, Node) and source.op == "get_attr":
            name = joined(path, str(source.target))
            codes = imodel.state_dict()[name]
            found[name] = bit_width(int(codes.max()) + 1)
    return found


def max_codes(imodel: GraphModule) -> dict[str, int]:
    """Path of each activation quantizer -> its largest code."""
    found: dict[str, int] = {}
    for path, node in _calls_of(imodel, quantize):
        step: Any = node.args[1]
        name = joined(path, str(step.target).removesuffix(".step"))
        found[name] = int(cast(int, node.args[3]))
    return found


def int8_codes(imodel: GraphModule) -> Mapping[str, int | None]:
    """Of the deployable form: name of each tensor of codes -> channel dimension."""
    if not is_deployable(imodel):
        return {}
    found: dict[str, int | None] = {}
    for one in graphs_of(imodel):
        for node in one.graph.nodes:
            if is_weight(node):
                arguments: tuple[Any, ...] = node.args
                name = joined(path_of(one), stored_name(node, 0))
                per_channel = calls(node, "dequantize_per_channel")
                found[name] = int(arguments[3]) if per_channel else None
    return found
