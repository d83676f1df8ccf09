"""Batches of weights in an ONNX model, as onnxruntime can multiply with them.

    MatMul(x, Transpose(DequantizeLinear(codes, scale, zeros)))
      ->
    MatMul(x, DequantizeLinear(Transpose(codes), scale))

onnxruntime 1.32 refuses to run a product of codes whose weight has more than two
dimensions and a vector of zero points. Without them, which says that all are 0, it
does; but then it takes codes that it transposes itself for unsigned, and refuses those.
"""

from __future__ import annotations

from typing import Any

from gdnsq_fx.deploy.onnx_storage import onnx_ir


def rewrite_batched_weights(model: Any) -> None:
    """Rewrite the dequantizations of an ``onnx_ir.Model``, in place."""
    for node in list(model.graph):
        if not _is_batched_weight(node):
            continue
        for use in list(node.outputs[0].uses()):
            if use.node.op_type == "Transpose":
                _transpose_codes(model.graph, node, use.node)
        if any(use.node.op_type == "MatMul" for use in node.outputs[0].uses()):
            node.replace_input_with(2, None)
        if not node.outputs[0].uses():
            model.graph.remove(node, safe=True)


def _is_batched_weight(node: Any) -> bool:
    """Whether a node dequantizes three dimensions or more, with a vector of zeros."""
    if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
        return False
    shape, zeros = node.outputs[0].shape, node.inputs[2]
    if shape is None or len(shape) < 3 or zeros is None or zeros.const_value is None:
        return False
    stored = zeros.const_value
    return stored.dtype.name == "INT8" and stored.size > 1 and not stored.numpy().any()


def _transpose_codes(graph: Any, node: Any, transpose: Any) -> None:
    """Dequantize after the transpose what was dequantized before it."""
    ir, value = onnx_ir(), transpose.outputs[0]
    order = transpose.attributes["perm"].as_ints()
    axis = order.index(node.attributes["axis"].as_int())
    codes = ir.node("Transpose", node.inputs[:1], {"perm": order})
    moved = ir.node(
        "DequantizeLinear", (codes.outputs[0], node.inputs[1]), {"axis": axis}
    )
    moved.outputs[0].shape, moved.outputs[0].type = value.shape, value.type
    graph.insert_before(transpose, (codes, moved))
    value.replace_all_uses_with(moved.outputs[0])
    graph.remove(transpose, safe=True)
