"""A model recorded in evaluation and in training, and what the two say together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from gdnsq_fx.capture.child_calls import Arguments
from gdnsq_fx.capture.data_dependence import called_modules, choosing_modules
from gdnsq_fx.capture.trace import Trace
from gdnsq_fx.capture.tracing import trace
from gdnsq_fx.errors import CaptureError
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.state import preserved_modes

_DRAWS = "it draws random numbers outside torch, which a graph would fix"


class Recording(NamedTuple):
    """A recording of each mode; the same one twice where the model has one only."""

    evaluation: Trace
    training: Trace

    @property
    def opaque(self) -> dict[str, str]:
        """Modules that either could not look into -> why."""
        found = self.evaluation.opaque | self.training.opaque
        graphs = self.evaluation.graph, self.training.graph
        called = {str(n.target) for g in graphs for n in g.find_nodes(op="call_module")}
        return {path: why for path, why in found.items() if path in called}


def recorded(
    model: nn.Module,
    example: Arguments,
    table: OpTable,
    kept: Mapping[str, str],
    inside: bool,
    *,
    real: bool,
) -> Recording:
    """Record a model in evaluation and, where it takes the example, in training.

    Args:
        model: the model; helper modules may be added to it.
        example: ``(args, kwargs)``.
        table: as for `trace`.
        kept: modules that are not to be looked into -> why.
        inside: the model is a module inside an opaque one, which can stay whole.
        real: compute real values, be they needed or not.

    Raises:
        CaptureError: it cannot be recorded.
    """
    with preserved_modes(model):
        evaluation = _trace(model.eval(), example, table, real, kept)
        try:
            training = trace(
                model.train(),
                *example,
                table,
                evaluation.constants,
                "real" if evaluation.real else "fake first",
                kept,
            )
        except Exception:
            # The model itself refuses to train on this input (a detector without
            # targets), or the self-check finds the difference.
            training = evaluation
    if inside:
        return Recording(evaluation, training)
    # The model itself cannot stay whole: its graph goes as on the example.
    first = replace(evaluation, readers=evaluation.readers - {""})
    if training is evaluation:
        return Recording(first, first)
    return Recording(first, replace(training, readers=training.readers - {""}))


def unfit_modules(shell: nn.Module, recording: Recording) -> dict[str, str]:
    """Modules that no recording should look into, though one or both did."""
    modes = recording.evaluation, recording.training
    found: dict[str, str] = {}
    for one, other in (modes, modes[::-1]):
        hidden = one.opaque.keys() - other.opaque.keys()
        found |= {p: one.opaque[p] for p in hidden if p in called_modules(other)}
        found |= choosing_modules(shell, one)
        # The model itself cannot stay whole: its numbers are those of the recording.
        found |= dict.fromkeys(one.drawing - {""}, _DRAWS)
    return found


def _trace(
    model: nn.Module,
    example: Arguments,
    table: OpTable,
    real: bool,
    kept: Mapping[str, str],
) -> Trace:
    try:
        values = "real" if real else "fake first"
        return trace(model, *example, table, values=values, kept=kept)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured: {error}. Pass only tensors "
            "and plain values to its sub-modules and return tensors in tuples, lists, "
            "dicts or dataclasses, or prepare the sub-module that holds the layers"
        ) from error
