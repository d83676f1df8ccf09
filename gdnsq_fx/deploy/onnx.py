"""A model in deployable form as an ONNX file of QuantizeLinear / DequantizeLinear."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule

from gdnsq_fx.deploy.edges import coded_edges, with_codes
from gdnsq_fx.deploy.onnx_batched_weights import rewrite_batched_weights
from gdnsq_fx.deploy.onnx_constants import write_out_constants
from gdnsq_fx.deploy.onnx_edges import name_edges
from gdnsq_fx.deploy.onnx_outputs import copy_outputs
from gdnsq_fx.deploy.onnx_storage import EXTRA, onnx_ir, pack_weights, shrink
from gdnsq_fx.deploy.program import Example, exported
from gdnsq_fx.deploy.qdq import deploy_facts
from gdnsq_fx.errors import ExportError
from gdnsq_fx.extras import required

OPSET = 21
# One message of protobuf holds less than 2 GiB; leave room for the graph.
_LARGEST = 1_800_000_000
_NONE: Mapping[str, str] = MappingProxyType({})
# Who remarks on what is no matter for a user.
_REMARKS = (
    "torch.onnx._internal.exporter._registration",
    "onnxscript.optimizer._constant_folding",
)


def write_onnx(
    model: GraphModule, example: Example, path: Path, *, packed: bool = True
) -> None:
    """Write a model in deployable form; above 1.8 GB, weights go to ``path.data``.

    Args:
        model: in evaluation.
        example: inputs to export with.
        path: file to write.
        packed: weights below 8 bits are stored in their bits, and unpacked by
            operations that a runtime folds at load; False: all as int8.

    Raises:
        PassError: not in deployable form.
        ExportError: ``torch.export`` or ``torch.onnx`` refuses the model.
        MissingExtraError: ``onnx`` or ``onnxscript`` is not installed.
    """
    deploy_facts(model)
    edges = coded_edges(model)
    written = onnx_model(with_codes(model, edges), example)
    notes = name_edges(written, [edge.name for edge in edges])
    if packed:
        pack_weights(written)
    rewrite_batched_weights(written)
    copy_outputs(written)
    save(written, path, notes=notes)


def onnx_model(model: GraphModule, example: Example) -> Any:
    """An ``onnx_ir.Model`` of a model in evaluation."""
    required("onnx", "writing ONNX", EXTRA)
    required("onnxscript", "writing ONNX", EXTRA)
    found = _translated(model, example, optimize=True)
    if not _is_whole(found):
        # Torch's optimizer drops bounds of clamps that it takes for copies of others.
        found = _translated(model, example, optimize=False)
    return found


def _translated(model: GraphModule, example: Example, *, optimize: bool) -> Any:
    program = exported(model, example)
    write_out_constants(program)
    try:
        with _quiet():
            found = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=optimize,
            )
    # The exporter lets pass what its decompositions and translations raise.
    except Exception as error:
        raise ExportError(f"torch.onnx refuses the model: {error}") from error
    assert found is not None  # only the old exporter, which writes itself, has none
    return found.model


def _is_whole(model: Any) -> bool:
    """Whether all that nodes read is there: inputs, constants, results of others."""
    graph = model.graph
    known = {*graph.inputs, *graph.initializers.values()}
    known |= {value for node in graph for value in node.outputs}
    return all(
        value is None or value in known for node in graph for value in node.inputs
    )


def save(
    model: Any, path: Path, *, shapes: bool = False, notes: Mapping[str, str] = _NONE
) -> None:
    """Write an ``onnx_ir.Model``.

    Args:
        model: is changed: what no runtime reads is taken out of it.
        path: file to write.
        shapes: keep those of inner values.
        notes: metadata of the file.
    """
    shrink(model, shapes=shapes)
    model.metadata_props.update(notes)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    beside = f"{path.name}.data" if size > _LARGEST else None
    onnx_ir().save(model, path, external_data=beside)


@contextmanager
def _quiet() -> Generator[None]:
    """Without remarks that torchvision is not there, or a constant was not folded."""
    loggers = [logging.getLogger(name) for name in _REMARKS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
