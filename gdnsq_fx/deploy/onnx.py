"""A model in deployable form as an ONNX file of QuantizeLinear / DequantizeLinear."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from gdnsq_fx.deploy.qdq import deploy_facts
from gdnsq_fx.extras import required

OPSET = 21
_EXTRA = "gdnsq-fx[onnx]"


def write_onnx(
    model: GraphModule,
    path: str | os.PathLike[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int:
    """Write a model in deployable form.

    Args:
        model: in evaluation.
        path: file to write.
        args, kwargs: an example of its inputs, with a batch of two samples or more;
            dimension 0 of each tensor becomes the batch, of any size.

    Returns:
        Size of the file in bytes.

    Raises:
        PassError: not in deployable form.
        MissingExtraError: ``onnx`` or ``onnxscript`` is not installed.
    """
    deploy_facts(model)
    required("onnx", "writing ONNX", _EXTRA)
    required("onnxscript", "writing ONNX", _EXTRA)
    program = torch.onnx.export(
        model.eval(),
        args,
        kwargs=kwargs,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=_batches(model, args, kwargs),
        verbose=False,
    )
    assert program is not None  # only the old exporter, which writes itself, has none
    program.save(path)
    return os.path.getsize(path)


def _batches(
    model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Which dimensions vary: the first of every tensor, by name of the input."""
    names = [str(n.target) for n in model.graph.find_nodes(op="placeholder")]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: tree_map(_first, value) for name, value in given.items()}


def _first(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return {0: Dim.DYNAMIC}
    return None
