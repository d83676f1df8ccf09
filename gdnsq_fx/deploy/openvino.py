"""A model in deployable form as OpenVINO's own files, by way of ONNX."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from gdnsq_fx.deploy.onnx import onnx_model, save
from gdnsq_fx.deploy.onnx_storage import onnx_ir
from gdnsq_fx.deploy.program import Example
from gdnsq_fx.deploy.qdq import deploy_facts
from gdnsq_fx.errors import ExportError
from gdnsq_fx.extras import required

# Moves no sum of float32 that is not 0 already, and is no zero that is optimized away.
_NEXT_TO_NOTHING = 1e-30


def write_openvino(model: GraphModule, example: Example, path: Path) -> None:
    """Write ``path`` (.xml) and the weights beside it (.bin), as int8.

    OpenVINO computes in bfloat16 between integer layers where the CPU can; compile with
    ``{"INFERENCE_PRECISION_HINT": "f32"}`` for the results of the other runtimes.

    Raises:
        ExportError: the model cannot be exported, or OpenVINO does not take it.
        MissingExtraError: ``openvino``, or what writes ONNX, is not installed.
    """
    openvino: Any = required("openvino", "writing OpenVINO", "gdnsq-fx[openvino]")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder) / "model.onnx"
        deploy_facts(model)
        written = onnx_model(model, example)
        _give_biases(written)
        save(written, source)
        try:
            converted = openvino.convert_model(source)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO refuses the model: {error}") from error
        # Halves of float32 would move biases off the grid of the accumulators.
        openvino.save_model(converted, path, compress_to_fp16=False)
        del converted  # it may map the file that goes away here


def _give_biases(model: Any) -> None:
    """Give convolutions with no bias, or one of zeros, one of next to nothing.

    OpenVINO (2026.4 on CPU) computes an integer convolution without a bias wrongly, by
    a tenth of the range of its output, where a skip connection reads it as well.
    """
    ir, names = onnx_ir(), count()
    for node in model.graph:
        shape = _weight_shape(node)
        if node.op_type != "Conv" or shape is None:
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            stored = bias.const_value
            if stored is None or stored.numpy().any():
                continue
        name = f"{node.name}.bias{next(names)}"
        tensor = torch.full((shape[0],), _NEXT_TO_NOTHING).numpy()
        value = ir.val(name, const_value=ir.tensor(tensor, name=name))
        model.graph.register_initializer(value)
        node.resize_inputs(3)
        node.replace_input_with(2, value)


def _weight_shape(node: Any) -> Any:
    """Shape of the integer weight of a node, None where it has none."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    source = None if weight is None else weight.producer()
    if source is None or source.op_type != "DequantizeLinear":
        return None
    codes = source.inputs[0].const_value
    return None if codes is None else codes.shape
