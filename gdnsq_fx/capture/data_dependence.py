"""Modules whose control flow reads data in a way that one graph cannot hold.

That a module reads data proves nothing: most compare a mask, or check a value. One that
reads data becomes opaque where there is evidence that a graph fixes what it decides:

* of several children alike it called some on the example and not the others, as a
  mixture does with experts that no token was routed to; or
* on other values of the same shape the graph computes something else than the model,
  and recorded on those, the module makes other calls.

What holds for one module holds for those of its class that read data as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from gdnsq_fx.capture.alignment import aligned, plain_numbers
from gdnsq_fx.capture.child_calls import Arguments
from gdnsq_fx.capture.self_check import disagreement
from gdnsq_fx.capture.trace import Trace
from gdnsq_fx.capture.tracing import trace
from gdnsq_fx.errors import CaptureError
from gdnsq_fx.nested import joined
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.state import preserved_modes

Reasons = dict[str, str]
_CHOOSES = "its control flow reads data: it runs some of its children and not others"
_PARTS = "its control flow reads data: on other values it makes other calls"


class ReadsData(CaptureError):
    """A module inside an opaque one is of this kind itself, so no graph holds it."""


def choosing_modules(model: nn.Module, recorded: Trace) -> Reasons:
    """Modules that read data and called some of several children alike.

    Args:
        model: the model.
        recorded: the recording, not pruned yet. Only of modules that its ``readers``
            name is anything found.
    """
    called = called_modules(recorded)
    found = {
        path: _CHOOSES
        for path in recorded.readers
        if _chooses(model.get_submodule(path), path, called)
    }
    return _with_their_class(model, recorded, found)


def parting_modules(
    model: nn.Module,
    captured: GraphModule,
    recorded: Trace,
    arguments: Arguments,
    table: OpTable,
    kept: Mapping[str, str],
) -> Reasons:
    """Modules that read data and go another way on other values.

    Args:
        model: the model.
        captured: its graph.
        recorded: the recording in one mode, in which values are compared.
        arguments: the example input, ``(args, kwargs)``.
        table: as for `trace`.
        kept: modules that are opaque by now.
    """
    leaves = tree_leaves(arguments)
    if not recorded.readers or any(map(_is_meta, leaves)):
        return {}
    found: Reasons = {}
    for values in _other_values(arguments):
        if disagreement(model, captured, values, modes=(recorded.training,)) is None:
            continue
        with preserved_modes(model):
            model.train(recorded.training)
            one, two = (
                _recorded(model, example, recorded, table, kept)
                for example in (arguments, values)
            )
        if one is not None and two is not None:
            found |= dict.fromkeys(_parted(one, two), _PARTS)
    if "" not in recorded.readers:
        found.pop("", None)
    return _with_their_class(model, recorded, found)


def _recorded(
    model: nn.Module,
    arguments: Arguments,
    recorded: Trace,
    table: OpTable,
    kept: Mapping[str, str],
) -> Trace | None:
    try:
        return trace(model, *arguments, table, recorded.constants, "real", kept)
    except Exception:  # the model refuses these values
        return None


def called_modules(recorded: Trace) -> set[str]:
    """Paths of all modules that the recording entered or calls."""
    found: set[str] = set()
    for node in recorded.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        found |= {str(path) for path, _ in stack.values()}
        if node.op == "call_module":
            found.add(str(node.target))
    return found


def _chooses(module: nn.Module, path: str, called: set[str]) -> bool:
    groups: dict[type, list[bool]] = {}
    for name, child in module.named_children():
        below = joined(path, name)
        if below not in called and isinstance(child, nn.ModuleList | nn.ModuleDict):
            if _chooses(child, below, called):
                return True
        elif next(child.parameters(), None) is not None:
            groups.setdefault(type(child), []).append(below in called)
    return any(len(set(hits)) > 1 for hits in groups.values())


def _parted(one: Trace, two: Trace) -> set[str]:
    """The innermost readers whose calls differ between two recordings."""
    readers = one.readers | two.readers
    differing: list[Node] = []
    for block in aligned(one.graph, two.graph):
        if not block.matched:
            differing += [*block.first, *block.second]
            continue
        pairs = zip(block.first, block.second, strict=True)
        differing += [n for n, m in pairs if plain_numbers(n) != plain_numbers(m)]
    found = {_reader_of(node, readers) for node in differing}
    return {path for path in found if path is not None}


def _reader_of(node: Node, readers: frozenset[str]) -> str | None:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values() if path != node.target]
    return next((path for path in reversed(paths) if path in readers), None)


def _with_their_class(model: nn.Module, recorded: Trace, found: Reasons) -> Reasons:
    kinds = {type(model.get_submodule(p)): why for p, why in found.items()}
    alike = {
        path: kinds[kind]
        for path in recorded.readers
        if (kind := type(model.get_submodule(path))) in kinds
    }
    return {**alike, **found}


def _other_values(arguments: Arguments) -> Iterator[Arguments]:
    """Inputs of the same shapes: the first or last sample only, or other positions."""
    for change in (_first_only, _last_only, _moved):
        other = tree_map(change, arguments)
        pairs = zip(tree_leaves(arguments), tree_leaves(other), strict=True)
        if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs):
            yield other


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _first_only(value: Any) -> Any:
    is_batch = isinstance(value, Tensor) and value.ndim
    return value[:1].expand_as(value).clone() if is_batch else value


def _last_only(value: Any) -> Any:
    is_batch = isinstance(value, Tensor) and value.ndim
    return value[-1:].expand_as(value).clone() if is_batch else value


def _moved(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    return value.roll(1, -1) if value.is_floating_point() else value.flip(-1)
