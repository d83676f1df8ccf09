"""Codes of weights as an ONNX file holds them, against those of the model.

No input is needed: one code that differs is found whatever the inputs are. Weights in
their bits are unpacked by the operations of the file, which read stored tensors alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.annotations import facts
from gdnsq_fx.deploy.agreement import WeightAgreement
from gdnsq_fx.deploy.file_runtimes import ONNX_EXTRA, loading
from gdnsq_fx.deploy.qdq import is_weight
from gdnsq_fx.extras import required
from gdnsq_fx.stored import attribute, stored_name


def compare_weights(model: GraphModule, path: Path) -> WeightAgreement:
    """Compare each weight that the file holds under its name in the model.

    Args:
        model: in deployable form.
        path: of an ONNX file.

    Raises:
        MissingExtraError: onnx is not installed. FileFormatError: not an ONNX file.
    """
    onnx = required("onnx", "reading an ONNX file", ONNX_EXTRA)
    with loading(path, "onnx"):
        held = _Held(onnx, onnx.load(path))
    compared, differing = 0, dict[str, int]()
    unseen: list[str] = []
    for name, stored in _weights(model).items():
        codes = attribute(model, stored)
        found = held.codes(stored)
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


class _Held:
    """Constants of an ONNX model, stored or computed from what is stored."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self._onnx, self._model = onnx, model
        self._stored = {t.name: t for t in model.graph.initializer}
        self._producers = {name: n for n in model.graph.node for name in n.output}

    def codes(self, name: str) -> Tensor | None:
        """Whole numbers of a constant, of any width; None where there are none."""
        needed: dict[str, Any] = {}
        if not self._collect(name, needed):
            return None
        made = self._onnx.helper.make_graph(
            [node for node in self._model.graph.node if node.output[0] in needed],
            "constant",
            [],
            [self._onnx.helper.make_empty_tensor_value_info(name)],
            [tensor for tensor in self._stored.values() if tensor.name in needed],
        )
        found = self._evaluated(made)
        return torch.from_numpy(found.astype("int64")) if _is_whole(found) else None

    def _collect(self, name: str, needed: dict[str, Any]) -> bool:
        """Note all that a value depends on; False where that is not stored."""
        if name in needed or not name:
            return True
        found = self._stored.get(name) or self._producers.get(name)
        if found is None:
            return False
        needed[name] = found
        inputs = [] if name in self._stored else list(found.input)
        return all(self._collect(one, needed) for one in inputs)

    def _evaluated(self, graph: Any) -> Any:
        if not graph.node:  # the evaluator wants one
            return self._onnx.numpy_helper.to_array(graph.initializer[0])
        made = self._onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import
        )
        return (
            required("onnx.reference", "reading an ONNX file", ONNX_EXTRA)
            .ReferenceEvaluator(made)
            .run(None, {})[0]
        )


def _is_whole(values: Any) -> bool:
    """Integers; the few-bit ones of `ml_dtypes` have names alone to tell."""
    return values.dtype.name.lstrip("u").startswith("int")
