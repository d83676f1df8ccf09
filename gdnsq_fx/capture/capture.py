"""`capture`: a model and an example input become a graph with the same parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from gdnsq_fx.annotations import annotate
from gdnsq_fx.capture.captured import CapturedModule, CaptureFacts, mode_exceptions
from gdnsq_fx.capture.child_calls import Arguments
from gdnsq_fx.capture.data_dependence import ReadsData, parting_modules
from gdnsq_fx.capture.modes import merged
from gdnsq_fx.capture.opaque_children import capture_children
from gdnsq_fx.capture.recording import Recording, recorded, unfit_modules
from gdnsq_fx.capture.resizing import at_other_sizes, same_calls
from gdnsq_fx.capture.self_check import observe, self_check
from gdnsq_fx.capture.shells import copied, shell_of
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
    opaque: Mapping[str, str] = MappingProxyType({}),
) -> CapturedModule:
    """Record what a model computes, in evaluation and in training, as one graph.

    What recording cannot look into stays a module, and its children are captured on
    their own where possible (see `capture_children`).

    Args:
        model: any module, left untouched; a plain GraphModule is taken as it is.
        args, kwargs: an example input. Arguments of ``forward`` that it leaves out are
            fixed to their defaults.
        table: operations that must stay visible (see `tracing.trace`).
        inplace: share parameters and sub-modules with the model instead of copying.
        opaque: paths of modules that are not to be looked into -> why.

    Returns:
        A graph module with every parameter, buffer and module under its old name.

    Raises:
        CaptureError: the model fails on the example, cannot be recorded, or the graph
            does not compute what the model computes.
    """
    model = shell_of(model) if inplace else copied(model)
    return _captured(model, (args, kwargs), table, opaque)


def _captured(
    model: nn.Module,
    example: Arguments,
    table: OpTable,
    opaque: Mapping[str, str],
    *,
    inside: bool = False,
) -> CapturedModule:
    """Capture the model itself, or a module inside an opaque one."""
    if isinstance(model, GraphModule) and _has_one_graph(model):
        return CapturedModule(model, model.graph)
    # The first run also builds what a model builds on its first call.
    seen = observe(model, *example)
    try:
        captured = _settled(model, example, table, opaque, inside, real=False)
        self_check(seen, model, captured, example)
    except ReadsData:
        raise
    except CaptureError:
        # Code that asks for the very class of a tensor tells fake values apart.
        captured = _settled(model, example, table, opaque, inside, real=True)
        self_check(seen, model, captured, example)
    return captured


def _settled(
    model: nn.Module,
    example: Arguments,
    table: OpTable,
    opaque: Mapping[str, str],
    inside: bool,
    *,
    real: bool,
) -> CapturedModule:
    """Record, and record again as long as modules turn out to need their own code."""
    captured, kept = None, dict(opaque)
    while True:
        shell = shell_of(model)  # what a recording adds is its own
        try:
            recording = recorded(shell, example, table, kept, inside, real=real)
            more = unfit_modules(shell, recording)
            if more.keys() <= kept.keys():
                captured = _assembled(shell, recording, example, table, kept)
                for one in dict.fromkeys(recording):
                    more |= parting_modules(model, captured, one, example, table, kept)
        except CaptureError:
            if captured is None:
                raise
            return captured  # what should be opaque cannot be: as good as it gets
        if "" in more:
            raise ReadsData(more[""])
        if captured is not None and more.keys() <= kept.keys():
            return captured
        kept |= more


def _has_one_graph(model: GraphModule) -> bool:
    """Not so in a class of somebody's own, which may change graphs in ``train()``."""
    # The class of an instance is made for it alone; the one above is what it is.
    return type(model).__mro__[1] in (GraphModule, CapturedModule)


def _assembled(
    model: nn.Module,
    recording: Recording,
    example: Arguments,
    table: OpTable,
    kept: Mapping[str, str],
) -> CapturedModule:
    """One graph for both modes, over the model's modules; opaque ones have shells."""
    evaluation, training = recording
    with preserved_modes(model):
        fixed = at_other_sizes(model.eval(), evaluation, *example, table, kept)
        # Where evaluation lost no number, the same calls in training lose none.
        other = training is not evaluation
        if other and (fixed or not same_calls(evaluation, training)):
            fixed += at_other_sizes(model.train(), training, *example, table, kept)

    def capture_child(
        child: nn.Module, arguments: Arguments, path: str
    ) -> CapturedModule:
        if path in kept:
            raise ReadsData(kept[path])
        start = len(path) + 1
        below = {p[start:]: w for p, w in kept.items() if p.startswith(f"{path}.")}
        return _captured(shell_of(child), arguments, table, below, inside=True)

    opaque = recording.opaque
    inside = capture_children(model, opaque, example, table, capture_child)
    # As plain tensors: a parameter would become one of the captured model.
    vars(model).update({n: t.detach() for n, t in training.constants.items()})
    facts = CaptureFacts(
        tuple(dict.fromkeys((*evaluation.specialized, *training.specialized, *fixed))),
        opaque | inside.opaque,
        evaluation.real,
        mode_exceptions(model),
        inside.left,
    )
    graph = merged(model, evaluation.pruned(), training.pruned())
    return _built(model, graph, facts)


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
            annotate(node, skip=_skip(path, reason, facts.left))
    return captured


def _skip(path: str, reason: str, left: Mapping[str, str]) -> str:
    """Why not all of an opaque module is quantized."""
    inside = [f"{p} {why}" for p, why in left.items() if p.startswith(f"{path}.")]
    return "; ".join([f"cannot be looked into ({reason})", *inside])
