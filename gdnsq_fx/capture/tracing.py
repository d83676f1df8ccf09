"""`trace`: run a model once and write down what it calls."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gdnsq_fx.capture.recorder import Recorder
from gdnsq_fx.capture.trace import Trace
from gdnsq_fx.capture.tracer import Tracer
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.state import is_on_meta


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OpTable,
    constants: Mapping[str, Tensor] = MappingProxyType({}),
    values: Literal["fake first", "fake", "real"] = "fake first",
    kept: Mapping[str, str] = MappingProxyType({}),
) -> Trace:
    """Record the model, in the mode it is in, on an example input.

    Values are fake (shapes without data) until the model reads data; then everything is
    recorded anew with real values. The model's buffers, attributes and random state are
    left as they were.

    Args:
        model: the model; AppliedFunction helpers may be added to it.
        args, kwargs: the example input.
        table: which operations must not be hidden in a module.
        constants: tensors that an earlier recording found and named.
        values: whether to compute real values: only where needed, never, or always.
        kept: paths of modules that are not to be looked into -> why.
    """
    if values != "real" and not is_on_meta(model):
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        tracer = Tracer(model, Recorder(model, fake, constants), table, kept)
        try:
            return tracer.run(args, kwargs)
        except Exception:
            if values == "fake" or not tracer.recorder.ledger.needs_real:
                raise
    tracer = Tracer(model, Recorder(model, None, constants), table, kept)
    recorded = tracer.run(args, kwargs)
    functions = tracer.recorder.specialized.functions
    if not functions:
        return recorded
    recorder = Recorder(model, None, recorded.constants)
    return Tracer(model, recorder, table, kept, functions).run(args, kwargs)
