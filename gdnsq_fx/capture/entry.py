"""The inputs of a graph: one placeholder for each argument that the example gives."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from gdnsq_fx.capture.recorder import Recorder
from gdnsq_fx.capture.scalars import traced


class Entry:
    """Twins of the example's values, each tensor and number of which has its node.

    Arguments that the example leaves out are no inputs of the graph: they are fixed to
    their defaults.

    Args:
        recorder: what records; `bind` adds placeholders to its graph.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._ledger = recorder.ledger
        self._tensor: tuple[Tensor, Node] | None = None

    def bind(
        self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a call of ``forward``, each with its placeholder."""
        signature = inspect.signature(forward)
        bound = signature.bind(*args, **kwargs)
        for name, given in list(bound.arguments.items()):
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                pairs = enumerate(given)
                value: Any = tuple(self._input(f"{name}_{i}", v) for i, v in pairs)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                value = {key: self._input(key, v) for key, v in given.items()}
            else:
                value = self._input(name, given)
            bound.arguments[name] = value
        return bound.args, bound.kwargs

    def follow_device(self, graph: Graph) -> None:
        """Devices that the model asked of its tensors are asked of an input instead.

        So the graph can be moved: ``torch.zeros(n, device=x.device)``.
        """
        if self._tensor is None:
            return
        value, node = self._tensor
        last = list(graph.find_nodes(op="placeholder"))[-1]
        with graph.inserting_after(last if node < last else node):
            device = graph.call_function(getattr, (node, "device"))
        if node.op != "placeholder":
            last.append(node)

        def follow(argument: Any) -> Any:
            same = isinstance(argument, torch.device) and argument == value.device
            return device if same else argument

        for other in list(graph.nodes):
            if other is not device:
                other.args = map_aggregate(other.args, follow)
                other.kwargs = map_aggregate(other.kwargs, follow)
        if not device.users:
            graph.erase_node(device)

    def _input(self, name: str, value: Any) -> Any:
        return self._twin(value, self._ledger.placeholder(name))

    def _twin(self, value: Any, node: Node) -> Any:
        part, field = self._ledger.part, self._ledger.field
        if isinstance(value, Tensor):
            return self._tensor_twin(value, node)
        if isinstance(value, tuple | list):
            kind: Any = type(value)
            items = [self._twin(v, part(node, i)) for i, v in enumerate(value)]
            return kind._make(items) if hasattr(value, "_make") else kind(items)
        if isinstance(value, dict):
            entries = cast(dict[Any, Any], value).items()
            twins = {key: self._twin(v, part(node, key)) for key, v in entries}
            return cast(Any, type(value))(twins)
        if is_dataclass(value) and not isinstance(value, type):
            names = [f.name for f in fields(value) if f.init]
            given = {n: self._twin(getattr(value, n), field(node, n)) for n in names}
            return replace(value, **given)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not is_number:
            self._recorder.specialize("argument", f"{node.name} = {value!r}")
        return traced(value, node, self._recorder)

    def _tensor_twin(self, value: Tensor, node: Node) -> Tensor:
        twin = value.detach().clone()
        if self._recorder.fake is not None:
            twin = self._recorder.fake.from_tensor(twin)
        self._tensor = self._tensor or (twin, node)
        self._ledger.track(twin, node, {})
        return twin
