"""Outputs of an ONNX model that the model reads as well.

    y = Div(a, b);  QuantizeLinear(Transpose(y))         y is an output
      ->
    y.inner = Div(a, b);  QuantizeLinear(Transpose(y.inner));  y = Identity(y.inner)

onnxruntime 1.32 quantizes before it transposes or reshapes, for all who read the value,
and counts outputs of the model among them only where there is a copy for them: CLIP
would return its embeddings on the levels of its product.
"""

from __future__ import annotations

from typing import Any

from gdnsq_fx.deploy.onnx_storage import onnx_ir


def copy_outputs(model: Any) -> None:
    """Let such outputs of an ``onnx_ir.Model`` be copies, in place, of their names."""
    ir, graph = onnx_ir(), model.graph
    for place, value in enumerate(graph.outputs):
        if not value.uses():
            continue
        node = ir.node("Identity", [value])
        copied = node.outputs[0]
        copied.name, value.name = value.name, f"{value.name}.inner"
        copied.shape, copied.type = value.shape, value.type
        graph.outputs[place] = copied
        graph.append(node)
