"""Layers that depend on no input of an exported program, in plain arithmetic.

    linear(dequantize(codes, s, z), dequantize(weight, s_w, z_w), bias)
      ->
    linear((codes - z) * s, (weight - z_w) * s_w, bias)

Embeddings of positions and learned queries lead to such layers. Of operations that it
knows nothing special of a runtime folds constants at load, and the file stays small.
Of dequantizations onnxruntime 1.32 folds those of the first operand alone, takes the
layer for one of quantized weights only, and quantizes that operand again, with loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from gdnsq_fx.deploy.qdq import calls


def write_out_constants(program: ExportedProgram) -> None:
    """Replace the dequantizations that such layers read, in place.

    Values that depend on an input meet those that were there: of a weight that is split
    among layers of both kinds there are two then.
    """
    written: dict[Node, Node] = {}
    for node in _constants(program):
        if len(node.all_input_nodes) > 1 and not _is_dequantization(node):
            for value in node.all_input_nodes:
                node.replace_input_with(value, _plain(value, written))
    for node in reversed(written):
        if not node.users:
            program.graph.erase_node(node)


def _plain(value: Node, written: dict[Node, Node]) -> Node:
    """A constant without dequantizations on the way to it from the last layer.

    Args:
        value: of the graph.
        written: what was found before, and what is found here.
    """
    if value in written:
        return written[value]
    if _is_dequantization(value):
        written[value] = _written_out(value)
        return written[value]
    if len(value.all_input_nodes) != 1:
        return value
    (source,) = value.all_input_nodes
    plain = _plain(source, written)
    if plain is source:
        return value
    with value.graph.inserting_after(value):
        written[value] = value.graph.node_copy(value, lambda _: plain)
    return written[value]


def _constants(program: ExportedProgram) -> dict[Node, None]:
    """Nodes that depend on no input, in the order of the graph."""
    given = set(program.graph_signature.user_inputs)
    found: dict[Node, None] = {}
    for node in program.graph.nodes:
        if node.op == "output" or (node.op == "placeholder" and node.name in given):
            continue
        if all(one in found for one in node.all_input_nodes):
            found[node] = None
    return found


def _is_dequantization(node: Node) -> bool:
    names = ("dequantize_per_tensor", "dequantize_per_channel")
    return any(calls(node, name) for name in names)


def _written_out(node: Node) -> Node:
    """``(codes - zero_point) * scale``, of the precision that the node has."""
    graph = node.graph
    aten = torch.ops.aten
    dtype = node.meta["val"].dtype

    def call(target: Any, *args: Any) -> Node:
        made = graph.call_function(target, args)
        values = [one.meta["val"] if isinstance(one, Node) else one for one in args]
        made.meta["val"] = target(*values)
        return made

    with graph.inserting_before(node):
        codes, scale, zero_point = node.args[:3]
        if calls(node, "dequantize_per_channel"):
            shape = _of_channels(node)
            scale = call(aten.reshape.default, scale, shape)
            scale = call(aten.to.dtype, scale, dtype)
            zero_point = call(aten.reshape.default, zero_point, shape)
        levels = call(aten.to.dtype, codes, dtype)
        levels = call(aten.sub.Tensor, levels, zero_point)
        return call(aten.mul.Tensor, levels, scale)


def _of_channels(node: Node) -> list[int]:
    """The shape of scales that broadcast over the codes."""
    axis: Any = node.args[3]
    return [-1 if dim == axis else 1 for dim in range(node.meta["val"].ndim)]
