"""Run a model while a `Recorder` watches, and decide what stays a module."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from gdnsq_fx.capture.data_readers import Reader, is_self_contained, replaced
from gdnsq_fx.capture.entry import Entry
from gdnsq_fx.capture.helpers import AppliedFunction, ReplacedBuffer, add_helper
from gdnsq_fx.capture.leaves import (
    has_backward_hooks,
    is_bare,
    is_like_input,
    stays_whole,
)
from gdnsq_fx.capture.ledger import Mark, NeedsRealValues
from gdnsq_fx.capture.python_functions import recorded_builtins
from gdnsq_fx.capture.recorder import Recorder, Specialization
from gdnsq_fx.capture.scalars import plain
from gdnsq_fx.capture.sequences import join_whole_sequences
from gdnsq_fx.capture.values import Untraceable
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.state import preserved_state


@dataclass(frozen=True)
class Trace:
    """A recorded graph and what was learnt on the way.

    Attributes:
        graph: one node for each call.
        specialized: what the graph keeps as it was on the example.
        opaque: path of a module that could not be looked into -> why.
        constants: tensors that are neither parameters nor buffers, by their new name.
        real: real values were needed.
        numbers: what each node that stands for a number was on the example.
        disposable: nodes without effect, to be dropped where nothing reads them.
    """

    graph: Graph
    specialized: tuple[Specialization, ...]
    opaque: dict[str, str]
    constants: dict[str, Tensor]
    real: bool
    numbers: dict[Node, Any]
    disposable: set[Node]

    def pruned(self) -> Graph:
        """The graph without numbers, attributes and parameters that nothing reads."""
        for node in reversed(self.graph.nodes):
            idle = node in self.disposable or node.op == "get_attr"
            if idle and not node.users:
                self.graph.erase_node(node)
        return self.graph


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OpTable,
    constants: Mapping[str, Tensor] = MappingProxyType({}),
    values: Literal["fake first", "fake", "real"] = "fake first",
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
    """
    on_meta = any(p.is_meta for p in model.parameters())
    if values != "real" and not on_meta:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        tracer = _Tracer(model, Recorder(model, fake, constants), table)
        try:
            return tracer.run(args, kwargs)
        except Exception:
            if values == "fake" or not tracer.recorder.ledger.needs_real:
                raise
    tracer = _Tracer(model, Recorder(model, None, constants), table)
    recorded = tracer.run(args, kwargs)
    readers = tracer.recorder.readers
    if not readers:
        return recorded
    recorder = Recorder(model, None, recorded.constants)
    return _Tracer(model, recorder, table, readers).run(args, kwargs)


class _Call(NamedTuple):
    """What one node calls."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Tracer:
    """One recording: the entry, and what happens at each call of a module."""

    def __init__(
        self,
        root: nn.Module,
        recorder: Recorder,
        table: OpTable,
        readers: Sequence[Reader] = (),
    ) -> None:
        self.root = root
        self.readers = readers
        self.recorder = recorder
        self.table = table
        self.paths = {id(m): path for path, m in root.named_modules()}
        self.buffers = dict(root.named_buffers(remove_duplicate=False))
        self.opaque: dict[str, str] = {}
        self.call_module = nn.Module.__call__
        self.apply = inspect.getattr_static(torch.autograd.Function, "apply")

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        recorder = self.recorder
        with ExitStack() as stack:
            stack.enter_context(preserved_state(self.root))
            torch.manual_seed(0)
            stack.enter_context(torch.enable_grad())
            if recorder.fake is not None:
                stack.enter_context(recorder.fake)
            entry = Entry(recorder)
            args, kwargs = entry.bind(self.root.forward, args, kwargs)
            stack.enter_context(self._watched())
            stack.enter_context(recorder)
            output = self.root(*args, **kwargs)
            self._write_back_buffers()
            if recorder.ledger.needs_real:
                raise NeedsRealValues
            graph = recorder.finish(output)
        join_whole_sequences(graph, recorder.ledger.disposable)
        entry.follow_device(graph)
        return Trace(
            graph,
            tuple(dict.fromkeys(recorder.specialized)),
            self.opaque,
            recorder.ledger.constants,
            recorder.fake is None,
            {node: plain(value) for node, value in recorder.ledger.numbers.items()},
            recorder.ledger.disposable,
        )

    # --- modules -----------------------------------------------------------------

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Every call of a module or autograd function comes by here meanwhile."""
        tracer = self

        def call_module(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            return tracer._module(module, args, kwargs)

        def apply(function: Any, /, *args: Any, **kwargs: Any) -> Any:
            return tracer._function(function, args, kwargs)

        with (
            mock.patch.object(nn.Module, "__call__", call_module),
            mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)),
            recorded_builtins(self.recorder),
            replaced(self.readers, self._reader),
        ):
            yield

    def _module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.paths.get(id(module))
        if self.recorder.hidden or path is None:  # within a leaf, or made in forward
            return self.call_module(module, *args, **kwargs)
        scopes = self.recorder.ledger.scopes
        key = path
        while key in scopes:
            key += "'"
        scopes[key] = path, type(module)
        mark = self.recorder.ledger.mark()
        try:
            return self._entered(module, path, mark, args, kwargs)
        finally:
            scopes.pop(key, None)

    def _entered(
        self,
        module: nn.Module,
        path: str,
        mark: Mark,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if path and (stays_whole(module) or self._is_layer(module)):
            return self._whole(module, path, args, kwargs)
        if path and has_backward_hooks(module):
            self.opaque[path] = "has backward hooks"
            return self._whole(module, path, args, kwargs)
        before = self.recorder.ledger.versions((args, kwargs))
        notes = len(self.recorder.specialized)
        try:
            output = self.call_module(module, *args, **kwargs)
        except Exception as error:
            if not path or self.recorder.ledger.needs_real:
                raise
            return self._opaque(module, path, mark, args, kwargs, error)
        if path and is_bare(module) and self._can_close(mark, output):
            node = _Call("call_module", path, args, kwargs)
            return self._closed(node, mark, notes, output, before)
        return output

    def _is_layer(self, module: nn.Module) -> bool:
        """A module of the user's with a row of its own, which says how to open it."""
        if type(module).__module__.startswith("torch.nn."):
            return False
        row = self.table.find_module(module)
        return row is not None and type(module) in row.modules

    def _whole(
        self,
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The call of a module as one node."""
        recorder = self.recorder
        before = recorder.ledger.versions((args, kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.call_module(module, *args, **kwargs)

        if recorder.fake is not None and is_like_input(module) and len(args) == 1:
            run = torch.empty_like
        output = recorder.compute(run, args, kwargs)
        node = recorder.ledger.call_node("call_module", path, args, kwargs)
        return recorder.ledger.track(output, node, before)

    def _can_close(self, mark: Mark, output: Any) -> bool:
        """Whether a bare module may be one node: there is nothing to quantize in it."""
        if not _is_tensors(output):
            return False
        for node in self.recorder.ledger.nodes_since(mark):
            op = None if node.op == "call_module" else self.table.find(node, self.root)
            if op is not None and op.is_compute:
                return False
        return True

    def _closed(
        self,
        call: _Call,
        mark: Mark,
        notes: int,
        output: Any,
        before: dict[int, int],
    ) -> Any:
        """One node for what was recorded and noted since, if a graph can hold it."""
        ledger = self.recorder.ledger
        try:
            ledger.argument((call.args, call.kwargs))
        except Untraceable:
            return output
        ledger.undo(mark)
        del self.recorder.specialized[notes:]
        return ledger.track(output, ledger.call_node(*call), before)

    def _opaque(
        self,
        module: nn.Module,
        path: str,
        mark: Mark,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        error: Exception,
    ) -> Any:
        """What cannot be looked into stays a module, with the reason."""
        self.recorder.ledger.undo(mark)
        try:
            output = self._whole(module, path, args, kwargs)
        except Untraceable as why:
            raise why from error
        self.opaque[path] = f"{type(error).__name__}: {error}"
        return output

    def _function(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A custom autograd function stays one call, so that its backward is kept."""
        if self.recorder.hidden:
            return self.apply.__get__(None, function)(*args, **kwargs)
        recorder = self.recorder
        before = recorder.ledger.versions((args, kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.apply.__get__(None, function)(*args, **kwargs)

        output = recorder.compute(run, args, kwargs)
        name = f"{function.__module__}.{function.__qualname__}"
        helper = add_helper(self.root, name, AppliedFunction(function))
        node = recorder.ledger.call_node("call_module", helper, args, kwargs)
        return recorder.ledger.track(output, node, before)

    def _reader(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that stays one call wherever it reads data.

        It is opened nevertheless where it holds something to quantize, or hands out
        what is no tensor: then the way that the model takes hangs on the example.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            recorder = self.recorder
            if recorder.hidden or not is_self_contained((args, kwargs)):
                return function(*args, **kwargs)
            mark, notes = recorder.ledger.mark(), len(recorder.specialized)
            before = recorder.ledger.versions((args, kwargs))
            output = function(*args, **kwargs)
            reads = any(s.kind == "data" for s in recorder.specialized[notes:])
            if not reads or not self._can_close(mark, output):
                return output
            made = _Call("call_function", function, args, kwargs)
            return self._closed(made, mark, notes, output, before)

        return call

    # --- buffers -----------------------------------------------------------------

    def _write_back_buffers(self) -> None:
        """A buffer that forward replaced by a new tensor is written into instead."""
        for path, module in list(self.root.named_modules()):
            for name, value in module._buffers.items():
                full = f"{path}.{name}" if path else name
                before = self.buffers.get(full)
                if value is not before and self.recorder.ledger.knows(value):
                    self._write_back(module, name, full, value)

    def _write_back(
        self, module: nn.Module, name: str, full: str, value: Tensor | None
    ) -> None:
        ledger, before = self.recorder.ledger, self.buffers.get(full)
        if _same_form(before, value):
            get = ledger.attribute(full)
            ledger.call_node("call_method", "copy_", (get, value), {})
            return
        # The root itself is not the captured model, which takes its place.
        if module is self.root:
            raise Untraceable(f"replaces the buffer {name} by one of another shape")
        helper = add_helper(self.root, f"new_{full}", ReplacedBuffer(module, name))
        ledger.call_node("call_module", helper, (value,), {})


def _same_form(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one.shape == other.shape and one.dtype == other.dtype


def _is_tensors(output: Any) -> bool:
    if isinstance(output, tuple | list):
        items = cast(tuple[Any, ...], output)
        return type(output) in (tuple, list) and all(map(_is_tensors, items))
    return isinstance(output, Tensor)
