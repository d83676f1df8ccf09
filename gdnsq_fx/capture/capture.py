"""`capture`: a model and an example input become a graph with the same parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Tracer

from gdnsq_fx.annotations import source_of
from gdnsq_fx.capture.captured import CapturedModule
from gdnsq_fx.capture.self_check import self_check
from gdnsq_fx.capture.tracer import ModelTracer
from gdnsq_fx.errors import CaptureError
from gdnsq_fx.state import cloned, preserved_state


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CapturedModule:
    """Trace a copy of the model; the model itself is left untouched.

    Args:
        model: any module; a GraphModule is taken as it is.
        args, kwargs: an example input. Arguments of ``forward`` that it leaves out are
            fixed to their defaults.

    Returns:
        A graph module with every parameter, buffer and module under its old name.

    Raises:
        CaptureError: the model fails on the example, cannot be traced, or the graph
            does not compute what the model computes.
    """
    model = _copied(model)
    _run_once(model, args, kwargs)
    if isinstance(model, GraphModule):
        return CapturedModule(model, model.graph)
    graph = _trace(model, args, kwargs)
    captured = _built(model, graph)
    self_check(model, captured, args, kwargs)
    return captured


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}. A tensor that is "
            "computed from others and kept on a module is the usual cause, as by the "
            "old torch.nn.utils.weight_norm; use torch.nn.utils.parametrizations"
        ) from error


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the model, so that what is built on the first call exists before tracing."""
    with preserved_state(model), torch.no_grad():
        model.eval()
        try:
            args, kwargs = cloned((args, kwargs))
            model(*args, **kwargs)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} fails on the example input: {error}. Check "
                "example_input: a tensor, a tuple of arguments or a dict of keywords"
            ) from error


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    tracer = ModelTracer(args, kwargs)
    with preserved_state(model):
        try:
            graph = tracer.trace(model)
        except Exception as error:
            raise CaptureError(_trace_failure(model, tracer, error)) from error
        constants = {
            name: value
            for name, value in vars(model).items()
            if name.startswith("_tensor_constant")
        }
    # Tensors made in forward: the tracer keeps them on the model, the graph needs them.
    vars(model).update(constants)
    return graph


def _trace_failure(model: nn.Module, tracer: Tracer, error: Exception) -> str:
    nodes = list(getattr(tracer, "graph", Graph()).nodes)
    where = source_of(nodes[-1]) if nodes else ""
    after = f" after {nodes[-1].name} ({where})" if where else ""
    return (
        f"{type(model).__name__} cannot be traced{after}: {error}. Move the part whose "
        "control flow depends on tensor values into a module of its own, or prepare "
        "the sub-module that holds the convolutions and linear layers"
    )


def _built(model: nn.Module, graph: Graph) -> CapturedModule:
    try:
        return CapturedModule(model, graph)
    except Exception as error:
        raise CaptureError(
            f"no graph module can hold {type(model).__name__}: {error}. A sub-module "
            "named like an attribute of torch.fx.GraphModule (graph, code, meta) is "
            "the usual cause; rename it"
        ) from error
