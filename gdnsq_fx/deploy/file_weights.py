"""Codes of weights as an ONNX file holds them, against those of the model.

Nothing is run: one code that differs is found whatever the inputs are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.extras import required
from gdnsq_fx.annotations import facts
from gdnsq_fx.deploy.agreement import WeightAgreement
from gdnsq_fx.deploy.file_runtimes import ONNX_EXTRA, loading
from gdnsq_fx.deploy.qdq import is_weight
from gdnsq_fx.stored import attribute, stored_name


def compare_weights(model: GraphModule, path: Path) -> WeightAgreement:
    """Compare each weight that the file holds whole, under its name in the model.

    Args:
        model: in deployable form.
        path: of an ONNX file.

    Raises:
        MissingExtraError: onnx is not installed. FileFormatError: not an ONNX file.
    """
    onnx = required("onnx", "reading an ONNX file", ONNX_EXTRA)
    with loading(path, "onnx"):
        held = {t.name: t for t in onnx.load(path).graph.initializer}
    compared, differing = 0, dict[str, int]()
    unseen: list[str] = []
    for name, stored in _weights(model).items():
        codes = attribute(model, stored)
        found = _codes(onnx, held.get(stored))
        if found is None or found.shape != codes.shape:
            unseen.append(name)
            continue
        compared += codes.numel()
        if count := int((found != codes.long()).sum()):
            differing[name] = count
    return WeightAgreement(compared, differing, tuple(unseen))


def _weights(model: GraphModule) -> dict[str, str]:
    """Name of the edge -> name of its stored codes, in the order of the graph."""
    found: dict[str, str] = {}
    for node in model.graph.nodes:
        if is_weight(node):
            stored = stored_name(node, 0)
            found.setdefault(facts(node).layer or stored, stored)
    return found


def _codes(onnx: Any, tensor: Any) -> Tensor | None:
    """Whole numbers of a stored tensor, of any width; None where there are none."""
    whole = onnx.TensorProto
    kinds = {whole.INT8, whole.UINT8, whole.INT4, whole.UINT4}
    kinds |= {
        getattr(whole, name) for name in ("INT2", "UINT2") if hasattr(whole, name)
    }
    if tensor is None or tensor.data_type not in kinds:
        return None
    return torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype("int64"))
