"""A model as a program of ``torch.export``: what every format of files starts from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_map

from gdnsq_fx.errors import ExportError
from gdnsq_fx.inputs import batch_size

# What torch says of an output that is no tensor and no container that it knows.
_UNKNOWN_OUTPUT = re.compile(r"Found <class .([\w.<>]+).> in output, which is not")
# What torch adds to every message of its own.
_ADVICE = "\n\nThe error above occurred when calling torch.export"


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
    try:
        return _exported(model, example)
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
    args, kwargs = _copied(example)
    names = [str(n.target) for n in model.graph.find_nodes(op="placeholder")]
    # torch takes them for what stands there in the signature.
    kwargs = {name: kwargs[name] for name in names if name in kwargs}
    shapes = _dynamic_shapes(model, args, kwargs) if example.dynamic_batch else None
    try:
        with torch.no_grad():
            program = torch.export.export(
                model, args, kwargs, dynamic_shapes=shapes, strict=False
            )
    # torch raises what its own passes and the model's operations happen to raise.
    except Exception as error:
        cause = str(error).partition(_ADVICE)[0].strip()
        unknown = _UNKNOWN_OUTPUT.search(cause)
        if unknown is not None:
            cause = (
                f"it returns a {unknown[1]}, and a program returns tensors; let the "
                "model return none before it is prepared (a cache of transformers: "
                "model.config.use_cache = False)"
            )
        raise ExportError(f"torch.export refuses the model: {cause}") from error
    _allow_other_strides(program.graph)
    _count_in_order_of_storage(program.graph)
    return program


def _allow_other_strides(graph: Graph) -> None:
    """Copy what is reshaped of fused attention.

    An exporter notes the reshape as the view that it is on the strides of the fused
    kernel, and refuses it once it takes attention apart, which gives others.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target not in (aten.reshape.default, aten.view.default):
            continue
        value = source = node.args[0]
        while source.target in (aten.transpose.int, aten.permute.default):
            source = source.args[0]
        if source.target is aten.scaled_dot_product_attention.default:
            kwargs: dict[str, Any] = {"memory_format": torch.contiguous_format}
            with graph.inserting_before(node):
                copied = graph.call_function(aten.clone.default, (value,), kwargs)
            copied.meta = dict(value.meta)
            node.update_arg(0, copied)


def _count_in_order_of_storage(graph: Graph) -> None:
    """Permute what ``as_strided`` reads to the order that it has in memory.

    An exporter counts the elements of the tensor where the operation counts in memory.
    """
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.as_strided.default):
        value = node.args[0].meta["val"]
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        moved = value.permute(order)
        # A part of what is in memory has no such order.
        if value.is_contiguous() or not moved.is_contiguous():
            continue
        with graph.inserting_before(node):
            permuted = graph.call_function(aten.permute.default, (node.args[0], order))
        permuted.meta = {**node.args[0].meta, "val": moved}
        node.update_arg(0, permuted)


def _dynamic_shapes(
    model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Which dimensions vary, by name of the input."""
    size = batch_size(args, kwargs)

    def first(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == size:
            return {0: Dim.DYNAMIC}
        return None

    names = [str(n.target) for n in model.graph.find_nodes(op="placeholder")]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: tree_map(first, value) for name, value in given.items()}


def _copied(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as tensors of their own: torch notes dynamic sizes on what it gets.

    Where any batch is to do and the example has one sample, it is there twice: torch
    takes a size of 1 for a constant.
    """
    alone = batch_size(example.args, example.kwargs) == 1 and example.dynamic_batch

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        twice = alone and value.ndim and value.shape[0] == 1
        return torch.cat([value, value]) if twice else value.detach().clone()

    return tree_map(copied, (example.args, example.kwargs))
