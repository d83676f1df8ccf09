"""Lists of all parts of a value become the value itself.

    %u = unbind(%x);  %a = %u[0];  %b = %u[1];  cat([%a, %b])   ->   cat(%u)

``torch.cat(list(x))`` and ``torch.stack([*x])`` hold for any number of rows that way.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import Graph, Node

# They take a tuple as well as a list, of any length.
_JOINS = frozenset(
    {
        torch.cat,
        torch.concat,
        torch.concatenate,
        torch.stack,
        torch.hstack,
        torch.vstack,
        torch.dstack,
    }
)
_SEQUENCES = frozenset({"unbind", "split", "chunk", "tensor_split", "split_with_sizes"})


def join_whole_sequences(graph: Graph, disposable: set[Node]) -> None:
    """Let joins read sequences whole where they read all parts in order.

    Args:
        graph: a recording, with a node for each part, be it read or not.
        disposable: nodes without effect; parts that nothing reads any more are erased.
    """
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _JOINS or not node.args:
            continue
        whole = _whole(node.args[0])
        if whole is None:
            continue
        parts = cast(tuple[Node, ...], node.args[0])
        node.args = (whole, *node.args[1:])
        for part in parts:
            if not part.users and part in disposable:
                graph.erase_node(part)
                disposable.discard(part)


def _whole(parts: Any) -> Node | None:
    """The value of which a list holds all parts in order; None where there is none."""
    if not isinstance(parts, tuple | list) or not all(map(_is_part, parts)):
        return None
    items = cast(list[Node], parts)
    if not items:
        return None
    source = items[0].args[0]
    if not isinstance(source, Node) or not _is_sequence(source):
        return None
    # Only the source's own parts are made with these keys, and each of them is.
    count = sum(map(_is_part, source.users))
    wanted = [(source, index) for index in range(count)]
    return source if [item.args for item in items] == wanted else None


def _is_part(value: object) -> bool:
    return (
        isinstance(value, Node)
        and value.target is operator.getitem
        and isinstance(value.args[1], int)
    )


def _is_sequence(node: Node) -> bool:
    name = getattr(node.target, "__name__", node.target)
    return node.op in ("call_function", "call_method") and name in _SEQUENCES
