"""Children of opaque modules, captured on their own.

An opaque module keeps its Python code: which experts run, and on how many tokens, it
decides anew on every call. What it calls has a graph of its own wherever one graph can
stand for all calls, be it the whole child or, where that fails, its children in turn.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.capture.captured import CapturedModule
from gdnsq_fx.capture.child_calls import Arguments, Calls, calls_within
from gdnsq_fx.capture.child_graph import ChildGraph, StandIn, child_graph, place
from gdnsq_fx.capture.data_dependence import ReadsData
from gdnsq_fx.capture.leaves import has_backward_hooks, stays_whole
from gdnsq_fx.capture.self_check import disagreement
from gdnsq_fx.capture.shells import own_path, shell_of
from gdnsq_fx.errors import CaptureWarning
from gdnsq_fx.nested import counterparts, joined, nested_graphs
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.state import preserved_modes

Capture = Callable[[nn.Module, Arguments, str], CapturedModule]


class Inside(NamedTuple):
    """What was learnt about opaque modules.

    Attributes:
        left: path of each module with weights that stays as it is inside -> why.
        opaque: path of each module inside that no graph can hold either -> why.
    """

    left: dict[str, str]
    opaque: dict[str, str]


def capture_children(
    shell: nn.Module,
    opaque: Iterable[str],
    arguments: Arguments,
    table: OpTable,
    capture: Capture,
) -> Inside:
    """Put graphs in the place of children of opaque modules.

    The modules along the way become shells: whoever else holds them sees no change. All
    parameters and buffers keep their names.

    Args:
        shell: the model, a shell of it that may be changed.
        opaque: paths of opaque modules, none inside another.
        arguments: the example input, ``(args, kwargs)``.
        table: tells what is worth a graph of its own.
        capture: captures one child, sharing what it holds, on example arguments, given
            its path.
    """
    modules = {path: shell.get_submodule(path) for path in opaque}
    modules = {path: m for path, m in modules.items() if _may_be_entered(m)}
    modules = {path: m for path, m in modules.items() if _may_be_reached(shell, path)}
    found = Inside({}, {})
    if not modules:
        return found
    calls = calls_within(shell, modules, arguments)
    for path, module in modules.items():
        finder = _Finder(module, path, calls, table, capture)
        finder.search(module, "")
        _keep_what_works(finder)
        found.left.update({f"{path}.{p}": why for p, why in finder.left.items()})
        found.opaque.update({f"{path}.{p}": why for p, why in finder.opaque.items()})
        if finder.graphs:
            _exchange(own_path(shell, path), finder.graphs)
        for inner, graph in finder.graphs.items():
            place(graph, path, inner)
    return found


class _Finder:
    """Looks for children of one opaque module that have a graph."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        calls: Mapping[str, Calls],
        table: OpTable,
        capture: Capture,
    ) -> None:
        self.module = module
        self.path = path
        self.call = calls.get(path)
        inner = {p: calls.get(f"{path}.{p}") for p, _ in module.named_modules() if p}
        self.calls = {p: found for p, found in inner.items() if found is not None}
        self.kinds = {p: type(m) for p, m in module.named_modules() if p}
        self.table = table
        self.capture = capture
        self.graphs: dict[str, ChildGraph] = {}
        self.left: dict[str, str] = {}
        self.opaque: dict[str, str] = {}

    def search(self, module: nn.Module, inner: str) -> None:
        """Capture the children of a module, or else theirs."""
        for name, child in module.named_children():
            path = joined(inner, name)
            if path not in self.kinds or self._is_plain(child):
                continue  # stands elsewhere as well, or holds no operation
            known = len(self.graphs) + len(self.left)
            reason = self._capture(child, path)
            if reason is None:
                continue
            if _may_be_entered(child):
                self.search(child, path)
            if len(self.graphs) + len(self.left) == known and _has_weights(child):
                self.left[path] = reason

    def _is_plain(self, child: nn.Module) -> bool:
        """A layer of torch that computes nothing which could be quantized."""
        row = self.table.find_module(child)
        return stays_whole(child) and (row is None or not row.is_compute)

    def _capture(self, child: nn.Module, path: str) -> str | None:
        """Capture one child; the reason where that fails."""
        if any(map(has_backward_hooks, child.modules())):
            return "has backward hooks"
        own = self.calls.get(path)
        beside = counterparts(path, self.kinds) if own is None else []
        others = [other for group in beside for other in group]
        examples = [own, *map(self.calls.get, others)]
        reason = "the example runs neither it nor anything of its kind beside it"
        for calls in examples:
            if calls is None:
                continue
            reason = calls.refusal or self._capture_on(child, path, calls)
            if reason is None:
                break
        return reason

    def _capture_on(self, child: nn.Module, path: str, calls: Calls) -> str | None:
        try:
            with warnings.catch_warnings():
                # It will be called with other numbers of tokens.
                warnings.simplefilter("error", CaptureWarning)
                captured = self.capture(child, calls.example, f"{self.path}.{path}")
        except ReadsData as error:
            self.opaque[path] = str(error)
            return str(error)
        except Exception as error:  # any error of the user's code is data here
            return f"cannot be captured ({error})"
        if not _computes(captured, self.table):
            return "holds no operation that can be quantized"
        self.graphs[path] = child_graph(captured, child)
        below = captured.facts
        self.opaque |= {f"{path}.{p}": why for p, why in below.opaque.items()}
        self.left |= {f"{path}.{p}": why for p, why in below.left.items()}
        return None


def _keep_what_works(finder: _Finder) -> None:
    """Leave out children that the opaque module looks into instead of calling them.

    It may read ``self.proj.weight`` or call a method: a graph has no methods, and its
    weights become codes.
    """
    if _works(finder, finder.graphs):
        return
    for path, graph in list(finder.graphs.items()):
        if not _works(finder, {path: graph}):
            del finder.graphs[path]
            finder.left[path] = "is looked into from outside, not only called"


def _works(finder: _Finder, graphs: Mapping[str, ChildGraph]) -> bool:
    if finder.call is None:
        return True
    stand_ins = {path: StandIn(graph) for path, graph in graphs.items()}
    twin = shell_of(finder.module)
    _exchange(twin, stand_ins)
    with ExitStack() as stack:
        for graph in graphs.values():
            stack.enter_context(preserved_modes(graph))
        return disagreement(finder.module, twin, finder.call.example) is None


def _exchange(shell: nn.Module, made: Mapping[str, nn.Module]) -> None:
    """Put modules into a shell, at every path where those that they replace stand."""
    by_identity = {id(shell.get_submodule(path)): m for path, m in made.items()}
    paths = {
        path: by_identity[id(module)]
        for path, module in shell.named_modules(remove_duplicate=False)
        if id(module) in by_identity
    }
    outermost = [
        p for p in paths if not any(p.startswith(f"{other}.") for other in paths)
    ]
    for path in outermost:
        above, _, name = path.rpartition(".")
        owner = own_path(shell, above) if above else shell
        owner._modules[name] = paths[path]


def _may_be_entered(module: nn.Module) -> bool:
    """Whether shells of a module can hold other children."""
    return not isinstance(module, GraphModule | torch.jit.ScriptModule)


def _may_be_reached(shell: nn.Module, path: str) -> bool:
    """Whether all that lies above a module can be a shell."""
    names = path.split(".")
    above = [shell.get_submodule(".".join(names[:n])) for n in range(len(names))]
    return all(map(_may_be_entered, above))


def _has_weights(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _computes(captured: GraphModule, table: OpTable) -> bool:
    if nested_graphs(captured):
        return True
    calls = [n for n in captured.graph.nodes if n.op.startswith("call_")]
    rows = (table.find(node, captured) for node in calls)
    return any(row is not None and row.is_compute for row in rows)
