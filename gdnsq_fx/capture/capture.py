"""`capture`: a model and an example input become a graph with the same parameters."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Tracer

from gdnsq_fx.annotations import source_of
from gdnsq_fx.capture.captured import CapturedModule
from gdnsq_fx.capture.leaves import stays_whole
from gdnsq_fx.capture.self_check import self_check
from gdnsq_fx.errors import CaptureError
from gdnsq_fx.state import preserved_state


class ModelTracer(Tracer):
    """Symbolic tracer with our leaf rule; records the source line of every node."""

    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `stays_whole`."""
        return stays_whole(m, super().is_leaf_module(m, module_qualified_name))


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
    model = copy.deepcopy(model)
    _run_once(model, args, kwargs)
    if isinstance(model, GraphModule):
        return CapturedModule(model, model.graph)
    graph = _trace(model, args, kwargs)
    captured = CapturedModule(model, graph)
    self_check(model, captured, args, kwargs)
    return captured


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the model, so that what is built on the first call exists before tracing."""
    with preserved_state(model), torch.no_grad():
        model.eval()
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} fails on the example input: {error}. Check "
                "example_input: a tensor, a tuple of arguments or a dict of keywords"
            ) from error


def _trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.fx.Graph:
    tracer = ModelTracer()
    with preserved_state(model):
        try:
            return tracer.trace(model, concrete_args=_left_out(model, args, kwargs))
        except Exception as error:
            raise CaptureError(_trace_failure(model, tracer, error)) from error


def _left_out(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Defaults of the ``forward`` arguments that the example input does not give."""
    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.kind not in variadic
    }


def _trace_failure(model: nn.Module, tracer: Tracer, error: Exception) -> str:
    nodes = list(getattr(tracer, "graph", torch.fx.Graph()).nodes)
    where = source_of(nodes[-1]) if nodes else ""
    after = f" after {nodes[-1].name} ({where})" if where else ""
    return (
        f"{type(model).__name__} cannot be traced{after}: {error}. Move the part whose "
        "control flow depends on tensor values into a module of its own, or prepare "
        "the sub-module that holds the convolutions and linear layers"
    )
