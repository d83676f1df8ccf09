"""Which nodes of two recordings of one model are the same call."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves


class Block(NamedTuple):
    """Calls side by side: as many on both sides, or some on one side only."""

    first: list[Node]
    second: list[Node]

    @property
    def matched(self) -> bool:
        """Whether the calls are the same, one by one."""
        return len(self.first) == len(self.second)


def calls(graph: Graph) -> list[Node]:
    """The call nodes of a graph in order."""
    return [n for n in graph.nodes if n.op.startswith("call_")]


def aligned(first: Graph, second: Graph) -> Iterator[Block]:
    """The calls of two graphs in order, as blocks that match or stand alone.

    Calls match where target, source line, module and form of the arguments agree.
    Almost all of two recordings does, from both ends; only the rest is searched.
    """
    left, right = calls(first), calls(second)
    keys, others = [_key(n) for n in left], [_key(n) for n in right]
    shorter = min(len(left), len(right))
    start = next((i for i in range(shorter) if keys[i] != others[i]), shorter)
    rest = shorter - start
    end = next((i for i in range(rest) if keys[-1 - i] != others[-1 - i]), rest)
    if start:
        yield Block(left[:start], right[:start])
    middle, other = keys[start : len(keys) - end], others[start : len(others) - end]
    codes = SequenceMatcher(None, middle, other, autojunk=False).get_opcodes()
    for tag, i, j, k, m in codes:
        one, two = left[start + i : start + j], right[start + k : start + m]
        if tag == "equal":
            yield Block(one, two)
            continue
        if one:
            yield Block(one, [])
        if two:
            yield Block([], two)
    if end:
        yield Block(left[-end:], right[-end:])


def scope_of(node: Node) -> str:
    """Path of the module whose ``forward`` made the call."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = list(stack.values())
    if node.op == "call_module" and paths and paths[-1][0] == node.target:
        paths = paths[:-1]
    return str(paths[-1][0]) if paths else ""


def plain_numbers(node: Node) -> list[Any]:
    """Numbers among the arguments of a call that no node stands for."""
    leaves = tree_leaves((tuple(node.args), dict(node.kwargs)), is_leaf=_is_slice)
    ends = [(v.start, v.stop, v.step) if isinstance(v, slice) else (v,) for v in leaves]
    return [v for end in ends for v in end if isinstance(v, int | float)]


def _is_slice(value: Any) -> bool:
    return isinstance(value, slice)


def _key(node: Node) -> tuple[Any, ...]:
    target = node.target if isinstance(node.target, str) else id(node.target)
    form = (len(node.args), tuple(node.kwargs))
    return node.op, target, node.stack_trace, scope_of(node), form
