"""What runs a model in deployable form, each behind the same two questions.

`Runtime.outputs` is what users run. `Runtime.observe` runs a second, instrumented form
that shows the codes of quantized activations as well; kernels may differ between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from gdnsq_fx.deploy.edges import CodedEdge, with_codes
from gdnsq_fx.deploy.inductor import CompiledModel, compile_int8, require_inductor
from gdnsq_fx.state import cloned

Values = Sequence[Any]
"""One value for each placeholder of the graph, in its order."""


class Observation(NamedTuple):
    """Outputs as a flat list of tensors, and codes by name of the edge."""

    outputs: list[Tensor]
    codes: dict[str, Tensor]


class Runtime(ABC):
    """Runs one model.

    Attributes:
        name: of the runtime.
        note: how it is set where that is not its default, else empty.
    """

    name: str
    note: str = ""

    @abstractmethod
    def outputs(self, values: Values) -> list[Tensor]:
        """The tensors that the model returns, in the form that users run."""

    @abstractmethod
    def observe(self, values: Values) -> Observation:
        """The same, and the codes of the edges that can be seen."""


@final
class TorchRuntime(Runtime):
    """torch, operation by operation."""

    name = "torch"

    def __init__(self, model: GraphModule, edges: Sequence[CodedEdge]) -> None:
        self._model = model
        self._edges = edges

    @torch.no_grad()
    def outputs(self, values: Values) -> list[Tensor]:
        """As `Runtime.outputs`."""
        return tensors(self._model(*cloned(values)))

    @torch.no_grad()
    def observe(self, values: Values) -> Observation:
        """As `Runtime.observe`."""
        recorder = _Recorder(self._model, self._edges)
        outputs = tensors(recorder.run(*cloned(values)))
        return Observation(outputs, recorder.codes)


@final
class InductorRuntime(Runtime):
    """torch.compile to int8 kernels; raises as `require_inductor`."""

    name = "inductor"

    def __init__(self, model: GraphModule, edges: Sequence[CodedEdge]) -> None:
        require_inductor()
        self._model = model
        self._edges = edges
        self._compiled: CompiledModel | None = None
        self._seen: CompiledModel | None = None

    def outputs(self, values: Values) -> list[Tensor]:
        """As `Runtime.outputs`."""
        if self._compiled is None:
            self._compiled = compile_int8(self._model, tuple(values), {})
            self.note = f"{sum(self._compiled.kernels.values())} int8 layers"
        return tensors(self._compiled(*values))

    def observe(self, values: Values) -> Observation:
        """As `Runtime.observe`."""
        if self._seen is None:
            seen = with_codes(self._model, list(self._edges))
            self._seen = compile_int8(seen, tuple(values), {})
        outputs, codes = self._seen(*values)
        names = [edge.name for edge in self._edges]
        return Observation(tensors(outputs), dict(zip(names, codes, strict=True)))


class _Recorder(Interpreter):
    def __init__(self, model: GraphModule, edges: Sequence[CodedEdge]) -> None:
        super().__init__(model)
        self._names = {edge.codes: edge.name for edge in edges}
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        name = self._names.get(n)
        if name is not None:
            self.codes[name] = value
        return value


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in the order of its structure."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
