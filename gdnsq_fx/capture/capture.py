"""`capture`: a model and an example input become a graph with the same parameters."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn.parameter import is_lazy

from gdnsq_fx.annotations import annotate
from gdnsq_fx.capture.captured import CapturedModule, CaptureFacts, mode_exceptions
from gdnsq_fx.capture.modes import merged
from gdnsq_fx.capture.resizing import at_other_sizes, same_calls
from gdnsq_fx.capture.self_check import Observation, observe, self_check
from gdnsq_fx.capture.tracing import Trace, trace
from gdnsq_fx.errors import CaptureError
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.state import preserved_modes


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OpTable = DEFAULT_TABLE,
    *,
    inplace: bool = False,
) -> CapturedModule:
    """Record what a model computes, in evaluation and in training, as one graph.

    Args:
        model: any module, left untouched; a plain GraphModule is taken as it is.
        args, kwargs: an example input. Arguments of ``forward`` that it leaves out are
            fixed to their defaults.
        table: operations that must stay visible (see `tracing.trace`).
        inplace: share parameters and sub-modules with the model instead of copying.

    Returns:
        A graph module with every parameter, buffer and module under its old name.

    Raises:
        CaptureError: the model fails on the example, cannot be recorded, or the graph
            does not compute what the model computes.
    """
    model = _shell_of(model) if inplace else _copied(model)
    if isinstance(model, GraphModule) and _has_one_graph(model):
        return CapturedModule(model, model.graph)
    # The first run also builds what a model builds on its first call.
    seen = observe(model, args, kwargs)
    try:
        return _checked(seen, model, args, kwargs, table, real=False)
    except CaptureError:
        # Code that asks for the very class of a tensor tells fake values apart.
        return _checked(seen, model, args, kwargs, table, real=True)


def _checked(
    seen: list[Observation],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OpTable,
    *,
    real: bool,
) -> CapturedModule:
    shell = _shell_of(model)  # what a recording adds is its own
    graph, facts = _recorded(shell, args, kwargs, table, real=real)
    captured = _built(shell, graph, facts)
    self_check(seen, shell, captured, (args, kwargs))
    return captured


def _has_one_graph(model: GraphModule) -> bool:
    """Not so in a class of somebody's own, which may change graphs in ``train()``."""
    # The class of an instance is made for it alone; the one above is what it is.
    return type(model).__mro__[1] in (GraphModule, CapturedModule)


def _copied(model: nn.Module) -> nn.Module:
    # Tensors computed from others (a pruned weight) refuse to be copied as they are.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    memo |= {
        id(p): cast(Any, type(p))(device=p.device, dtype=p.dtype)
        for p in (*model.parameters(), *model.buffers())
        if is_lazy(p)
    }
    try:
        twin = copy.deepcopy(model, memo)
        for module, other in zip(twin.modules(), model.modules(), strict=False):
            module.training = other.training  # torchvision's extractors forget it
        return twin
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}. Pass inplace=True, "
            "which copies nothing"
        ) from error


def _shell_of(model: nn.Module) -> nn.Module:
    """The same parameters and sub-modules under a new root, which may be added to."""
    if isinstance(model, GraphModule):
        return model  # its own copies do not keep what a subclass adds
    # Not copy.copy: a parametrized module refuses it.
    shell = object.__new__(type(model))
    vars(shell).update(vars(model))
    for kind in ("_modules", "_parameters", "_buffers"):
        vars(shell)[kind] = dict(vars(model)[kind])
    return shell


def _recorded(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OpTable,
    *,
    real: bool,
) -> tuple[Graph, CaptureFacts]:
    """One graph for both modes."""
    with preserved_modes(model):
        evaluation = _trace(model.eval(), args, kwargs, table, real)
        try:
            training = trace(
                model.train(),
                args,
                kwargs,
                table,
                evaluation.constants,
                "real" if evaluation.real else "fake first",
            )
        except Exception:
            # The model itself refuses to train on this input (a detector without
            # targets), or the self-check finds the difference.
            training = evaluation
        fixed = at_other_sizes(model.eval(), evaluation, args, kwargs, table)
        # Where evaluation lost no number, the same calls in training lose none.
        other = training is not evaluation
        if other and (fixed or not same_calls(evaluation, training)):
            fixed += at_other_sizes(model.train(), training, args, kwargs, table)
    # As plain tensors: a parameter would become one of the captured model.
    vars(model).update({n: t.detach() for n, t in training.constants.items()})
    facts = CaptureFacts(
        tuple(dict.fromkeys((*evaluation.specialized, *training.specialized, *fixed))),
        evaluation.opaque | training.opaque,
        evaluation.real,
        mode_exceptions(model),
    )
    return merged(model, evaluation.pruned(), training.pruned()), facts


def _trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OpTable,
    real: bool,
) -> Trace:
    try:
        values = "real" if real else "fake first"
        return trace(model, args, kwargs, table, values=values)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured: {error}. Pass only tensors "
            "and plain values to its sub-modules and return tensors in tuples, lists, "
            "dicts or dataclasses, or prepare the sub-module that holds the layers"
        ) from error


def _built(model: nn.Module, graph: Graph, facts: CaptureFacts) -> CapturedModule:
    try:
        captured = CapturedModule(model, graph)
    except Exception as error:
        raise CaptureError(
            f"no graph module can hold {type(model).__name__}: {error}. A sub-module "
            "named like an attribute of torch.fx.GraphModule (graph, code, meta) is "
            "the usual cause; rename it"
        ) from error
    captured.facts = facts
    for path, reason in facts.opaque.items():
        for node in captured.graph.find_nodes(op="call_module", target=path):
            annotate(node, skip=f"cannot be looked into ({reason})")
    return captured
