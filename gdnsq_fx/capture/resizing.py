"""Numbers that a recording lost, found again by recording at other sizes.

``len(x)``, ``int(x.shape[1] / 2)`` and ``math.sqrt(x.shape[1])`` hand out plain numbers,
so that the graph holds what they were on the example. Recorded again on larger inputs, a
number that depends on a size shows another value; the node that has the same values in
every recording is what it came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from gdnsq_fx.capture.alignment import aligned
from gdnsq_fx.capture.tracing import Trace, trace
from gdnsq_fx.opinfo import OpTable

_FUNCTIONS: tuple[Callable[[float], float], ...] = (
    math.sqrt,
    math.log,
    math.log2,
    math.exp,
    float,
)


def restore_sizes(
    model: nn.Module,
    recorded: Trace,
    training: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OpTable,
) -> None:
    """Replace lost numbers in a recorded graph by the nodes they came from.

    Nothing is done where no number was lost. Sizes that the model refuses are left out.

    Args:
        model: the model; ``training`` is the mode that was recorded.
        recorded: the recording; its graph is changed.
        args, kwargs: the example input.
        table: as for `trace`.
    """
    if not any(s.kind == "number" for s in recorded.specialized):
        return
    pairs: list[dict[Node, Node]] = []
    others: list[Trace] = []
    for change in (_more_samples, _longer):
        other_args, other_kwargs = tree_map(change, (args, kwargs))
        try:
            model.train(training)
            other = trace(
                model,
                other_args,
                other_kwargs,
                table,
                recorded.constants,
                real=recorded.real,
            )
        except Exception:  # the model refuses this size
            continue
        found = _matched(recorded.graph, other.graph)
        if found is not None:
            pairs.append(found)
            others.append(other)
    if pairs:
        _Restorer(recorded, others, pairs).run()


def _matched(first: Graph, second: Graph) -> dict[Node, Node] | None:
    """The nodes of two recordings in pairs; None where they took different ways."""
    found: dict[Node, Node] = {}
    for block in aligned(first, second):
        if not block.matched:
            return None
        found.update(zip(block.first, block.second, strict=True))
    outputs = [next(iter(g.find_nodes(op="output"))) for g in (first, second)]
    found[outputs[0]] = outputs[1]
    return found


class _Restorer:
    def __init__(
        self, recorded: Trace, others: list[Trace], pairs: list[dict[Node, Node]]
    ) -> None:
        self.graph = recorded.graph
        self.pairs = pairs
        # Values over all recordings -> the first node that has them.
        self.sources: dict[tuple[Any, ...], Node] = {}
        self.values = {
            node: (value, *(o.numbers.get(p[node]) for o, p in zip(others, pairs, strict=True)))
            for node, value in recorded.numbers.items()
            if all(node in p for p in pairs)
        }

    def run(self) -> None:
        """Walk the graph in order, so that a number comes from an earlier node."""
        for node in list(self.graph.nodes):
            twins = [p[node] for p in self.pairs if node in p]
            if len(twins) == len(self.pairs):
                self._restore(node, twins)
            values = self.values.get(node, ())
            if len(set(values)) > 1 and None not in values:
                self.sources.setdefault(values, node)

    def _restore(self, node: Node, twins: list[Node]) -> None:
        with self.graph.inserting_before(node):
            args = self._argument([node.args, *(t.args for t in twins)])
            kwargs = self._argument([node.kwargs, *(t.kwargs for t in twins)])
        node.args, node.kwargs = args, kwargs

    def _argument(self, values: list[Any]) -> Any:
        """An argument with every number that differs replaced by its source."""
        one = values[0]
        if isinstance(one, int | float) and not isinstance(one, bool):
            return self._number(tuple(values))
        if any(type(value) is not type(one) for value in values):
            return one
        if isinstance(one, tuple | list):
            if any(len(value) != len(one) for value in values):
                return one
            parts = [self._argument(list(p)) for p in zip(*values, strict=True)]
            kind: Any = type(one)
            return kind._make(parts) if hasattr(one, "_make") else kind(parts)
        if isinstance(one, dict):
            return {key: self._argument([v.get(key) for v in values]) for key in one}
        if isinstance(one, slice):
            ends = ("start", "stop", "step")
            return slice(*(self._argument([getattr(v, e) for v in values]) for e in ends))
        return one

    def _number(self, values: tuple[Any, ...]) -> Any:
        if len(set(values)) == 1 or any(isinstance(v, Node) for v in values):
            return values[0]
        known = self.sources.get(values)
        if known is not None:
            return known
        for function, key, node in self._images():
            if key == values:
                made = self.graph.call_function(function, (node,))
                self.sources[values] = made
                return made
        return values[0]

    def _images(self) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...], Node]]:
        for function in _FUNCTIONS:
            for key, node in list(self.sources.items()):
                if all(isinstance(v, int | float) and v > 0 for v in key):
                    yield function, tuple(map(function, key)), node


def _more_samples(value: Any) -> Any:
    """Twice as many along the first dimension."""
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim else value


def _longer(value: Any) -> Any:
    """Longer sequences, or larger images, volumes and videos."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    for dim in range(2, value.ndim) if value.ndim > 3 else (1,):
        value = torch.cat([value, value], dim)
    return value
