"""A model as a program of ``torch.export``: what every format of files starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from gdnsq_fx.errors import ExportError
from gdnsq_fx.inputs import batch_size


@dataclass(frozen=True, eq=False)
class Example:
    """Inputs to export with.

    Attributes:
        args, kwargs: arguments of the model.
        dynamic_batch: dimension 0 of the tensors whose size there is that of the batch
            may have any size; False: all sizes are those of the example.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_batch: bool = True


def exported(model: GraphModule, example: Example) -> ExportedProgram:
    """The program of a model in evaluation.

    Raises:
        ExportError: ``torch.export`` cannot export it, or not with any batch.
    """
    if not example.dynamic_batch:
        return _exported(model, example)
    # torch takes a size of 1 for a constant.
    several = _repeated(example)
    try:
        return _exported(model, several)
    except ExportError as error:
        fixed = Example(example.args, example.kwargs, dynamic_batch=False)
        _exported(model, fixed)  # where this fails as well, the batch is not the cause
        raise ExportError(
            "the model cannot be exported for batches of any size; give "
            "dynamic_batch=False to export for that of the example alone "
            f"(`facts.specialized` of the prepared model says what it keeps): {error}"
        ) from error


def write_program(model: GraphModule, example: Example, path: Path) -> None:
    """Write what ``torch.export.load`` reads.

    The program calls operations of ``torch.ops.quantized_decomposed``, which torch
    registers when ``torch.ao.quantization.fx._decomposed`` is first imported.
    """
    torch.export.save(exported(model, example), path)


def _exported(model: GraphModule, example: Example) -> ExportedProgram:
    shapes = _dynamic_shapes(model, example) if example.dynamic_batch else None
    try:
        with torch.no_grad():
            return torch.export.export(
                model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False
            )
    # torch raises what its own passes and the model's operations happen to raise.
    except Exception as error:
        raise ExportError(f"torch.export refuses the model: {error}") from error


def _dynamic_shapes(model: GraphModule, example: Example) -> dict[str, Any]:
    """Which dimensions vary, by name of the input."""
    size = batch_size(example.args, example.kwargs)

    def first(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == size:
            return {0: Dim.DYNAMIC}
        return None

    names = [str(n.target) for n in model.graph.find_nodes(op="placeholder")]
    given = {**dict(zip(names, example.args, strict=False)), **example.kwargs}
    return {name: tree_map(first, value) for name, value in given.items()}


def _repeated(example: Example) -> Example:
    """The example with two samples where it has one."""
    if batch_size(example.args, example.kwargs) != 1:
        return example

    def twice(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1:
            return torch.cat([value, value])
        return value

    args, kwargs = tree_map(twice, (example.args, example.kwargs))
    return Example(args, kwargs)
