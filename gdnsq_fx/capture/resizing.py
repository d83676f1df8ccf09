"""Numbers that a recording lost, found again by recording at other sizes.

``len(x)``, ``int(x.shape[1] / 2)`` and ``math.sqrt(x.shape[1])`` hand out plain
numbers, so that the graph holds what they were on the example. Recorded again on larger
inputs, a number that depends on a size shows another value; the node that has the same
values in every recording is what it came from.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from gdnsq_fx.annotations import source_of
from gdnsq_fx.capture.alignment import aligned, plain_numbers
from gdnsq_fx.capture.specialized import Specialization
from gdnsq_fx.capture.trace import Trace
from gdnsq_fx.capture.tracing import trace
from gdnsq_fx.opinfo import OpTable

_FUNCTIONS: tuple[Callable[[float], float], ...] = (
    math.sqrt,
    math.log,
    math.log2,
    math.exp,
    float,
)


def at_other_sizes(
    model: nn.Module,
    recorded: Trace,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OpTable,
    kept: Mapping[str, str],
) -> list[Specialization]:
    """Record the model at a larger size, and replace the numbers that it shows lost.

    Args:
        model: the model, in the mode that was recorded.
        recorded: the recording; numbers in its graph are replaced by their source.
        args, kwargs: the example input.
        table, kept: as for `trace`.

    Returns:
        Places where the model went another way, such as a loop over ``range(len(x))``,
        or where the source of a number was not found.
    """

    def again(change: Callable[[Any], Any]) -> Trace | None:
        other_args, other_kwargs = tree_map(change, (args, kwargs))
        constants, real = recorded.constants, recorded.real
        try:
            values = "real" if real else "fake"
            with _quiet():
                return trace(
                    model, other_args, other_kwargs, table, constants, values, kept
                )
        except Exception:  # the model refuses this size
            return None

    one = again(lambda value: _longer(_more(value))) or again(_more)
    if one is None:
        return []
    node = _first_parting(recorded.graph, one.graph)
    if node is not None:
        return [Specialization("iteration", node.name, source_of(node))]
    if _Restorer(recorded, [one]).lost():
        # One change at a time tells sizes apart that the first recording doubled alike.
        others = [one, *(again(change) for change in _CHANGES)]
        alike = [o for o in others if o is not None and _alike(recorded, o)]
        restorer = _Restorer(recorded, alike)
        restorer.run()
        return restorer.notes
    return []


def same_calls(first: Trace, second: Trace) -> bool:
    """Whether two recordings make the same calls with the same numbers."""
    if _first_parting(first.graph, second.graph) is not None:
        return False
    pairs = _matched(first.graph, second.graph)
    return all(plain_numbers(n) == plain_numbers(twin) for n, twin in pairs.items())


@contextmanager
def _quiet() -> Generator[None]:
    """Torch logs a traceback where a model refuses a size; here that is no news."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _alike(recorded: Trace, other: Trace) -> bool:
    return _first_parting(recorded.graph, other.graph) is None


def _first_parting(first: Graph, second: Graph) -> Node | None:
    """The first call that one recording makes and the other does not."""
    blocks = (block for block in aligned(first, second) if not block.matched)
    block = next(blocks, None)
    return None if block is None else (block.first or block.second)[0]


def _matched(first: Graph, second: Graph) -> dict[Node, Node]:
    """The nodes of two recordings that took the same way, in pairs."""
    found: dict[Node, Node] = {}
    for block in aligned(first, second):
        found.update(zip(block.first, block.second, strict=True))
    outputs = [next(iter(g.find_nodes(op="output"))) for g in (first, second)]
    found[outputs[0]] = outputs[1]
    return found


class _Restorer:
    def __init__(self, recorded: Trace, others: list[Trace]) -> None:
        self.graph = recorded.graph
        self.pairs = [_matched(recorded.graph, o.graph) for o in others]
        self.reader = next(iter(self.graph.nodes))
        self.notes: list[Specialization] = []
        # Values over all recordings -> the first node that has them.
        self.sources: dict[tuple[Any, ...], Node] = {}
        numbers = [other.numbers for other in others]
        sides = list(zip(numbers, self.pairs, strict=True))
        self.values = {
            node: (value, *(known[pairs[node]] for known, pairs in sides))
            for node, value in recorded.numbers.items()
            if all(pairs.get(node) in known for known, pairs in sides)
        }

    def run(self) -> None:
        """Walk the graph in order, so that a number comes from an earlier node."""
        for node in list(self.graph.nodes):
            twins = [p[node] for p in self.pairs if node in p]
            if len(twins) == len(self.pairs):
                self._restore(node, twins)
            values = self.values.get(node, ())
            if len(set(values)) > 1:
                self.sources.setdefault(_key(values), node)

    def lost(self) -> bool:
        """Whether a plain number differs between the recordings."""
        return any(
            plain_numbers(node) != plain_numbers(twin)
            for pairs in self.pairs
            for node, twin in pairs.items()
        )

    def _restore(self, node: Node, twins: list[Node]) -> None:
        self.reader = node
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
                source = source_of(self.reader)
                self.notes.append(Specialization("number", str(one), source))
                return one
            parts = [self._argument(list(p)) for p in zip(*values, strict=True)]
            kind: Any = type(one)
            return kind._make(parts) if hasattr(one, "_make") else kind(parts)
        if isinstance(one, dict):
            return {key: self._argument([v.get(key) for v in values]) for key in one}
        if isinstance(one, slice):
            ends = ("start", "stop", "step")
            return slice(
                *(self._argument([getattr(v, e) for v in values]) for e in ends)
            )
        return one

    def _number(self, values: tuple[Any, ...]) -> Any:
        if len(set(values)) == 1 or any(isinstance(v, Node) for v in values):
            return values[0]
        known = self.sources.get(_key(values))
        if known is not None:
            return known
        made, source = self._made(values), source_of(self.reader)
        if made is None:
            self.notes.append(Specialization("number", str(values[0]), source))
            return values[0]
        text = f"{values[0]}, taken for {made.name}({made.args})"
        self.notes.append(Specialization("number", text, source))
        self.sources[_key(values)] = made
        return made

    def _made(self, values: tuple[Any, ...]) -> Node | None:
        """A node that computes a number with these values from one that is known.

        A formula counts only where it holds for three values or more.
        """
        if len(set(values)) < 3:
            return None
        for (_, *key), node in list(self.sources.items()):
            for function, inverse, swapped in _WITH_CONSTANT:
                if 0 in key:
                    continue
                constant = inverse(values[0], key[0])
                pairs = [(constant, k) if swapped else (k, constant) for k in key]
                if _same(values, (function(*pair) for pair in pairs)):
                    args = (constant, node) if swapped else (node, constant)
                    return self.graph.call_function(function, args)
            for function in _FUNCTIONS:
                if min(key) > 0 and _same(values, map(function, key)):
                    return self.graph.call_function(function, (node,))
        return None


# function, what gives its constant from (value, source), constant stands first. Python
# computes ``0.5 * n`` and ``1.0 / n`` without asking an integer that carries a node.
_WITH_CONSTANT: tuple[tuple[Callable[..., Any], Callable[..., Any], bool], ...] = (
    (operator.mul, operator.truediv, False),
    (operator.truediv, operator.mul, True),
    (operator.add, operator.sub, False),
    (operator.sub, operator.add, True),
)


def _same(values: tuple[Any, ...], computed: Iterable[Any]) -> bool:
    """Equal to the last bit, and of the same type."""
    made = tuple(computed)
    return made == values and type(made[0]) is type(values[0])


def _key(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A float is no integer, even where they are equal."""
    return type(values[0]), *values


def _more(value: Any, extra: int | None = None) -> Any:
    """More samples: as many again, or some."""
    return _grown(value, extra, (0,))


def _longer(value: Any, extra: int | None = None) -> Any:
    """Longer sequences, or larger images, volumes and videos."""
    ndim = value.ndim if isinstance(value, Tensor) else 0
    return _grown(value, extra, tuple(range(2, ndim)) if ndim > 3 else (1,))


def _grown(value: Any, extra: int | None, dims: tuple[int, ...]) -> Any:
    if not isinstance(value, Tensor) or value.ndim <= max(dims):
        return value
    for dim in dims:
        more = value if extra is None else value.narrow(dim, 0, extra)
        value = torch.cat([value, more], dim)
    return value


# One change at a time tells sizes apart that a recording doubled alike. One more tells
# a half of a size from its half rounded down; three times as much, a line from a curve.
_CHANGES: tuple[Callable[[Any], Any], ...] = (
    _more,
    _longer,
    lambda value: _more(value, 1),
    lambda value: _longer(value, 1),
    lambda value: _more(_more(value), 1),
    lambda value: _longer(_longer(value)),
)
