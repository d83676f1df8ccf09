"""A model in deployable form as OpenVINO's own files, by way of ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from gdnsq_fx.deploy.onnx import write_onnx
from gdnsq_fx.deploy.program import Example
from gdnsq_fx.errors import ExportError
from gdnsq_fx.extras import required


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
        write_onnx(model, example, source, packed=False)
        try:
            converted = openvino.convert_model(source)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO refuses the model: {error}") from error
        # Halves of float32 would move biases off the grid of the accumulators.
        openvino.save_model(converted, path, compress_to_fp16=False)
        del converted  # it may map the file that goes away here
