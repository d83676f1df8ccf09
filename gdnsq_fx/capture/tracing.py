"""Run a model while a `Recorder` watches, and decide what stays a module."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from gdnsq_fx.capture.helpers import AppliedFunction, add_helper
from gdnsq_fx.capture.leaves import is_bare, stays_whole
from gdnsq_fx.capture.recorder import (
    Mark,
    NeedsRealValues,
    Recorder,
    Specialization,
)
from gdnsq_fx.capture.scalars import plain, traced
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
    *,
    real: bool = False,
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
        real: begin with real values.
    """
    on_meta = any(p.is_meta for p in model.parameters())
    if not real and not on_meta:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        tracer = _Tracer(model, Recorder(model, fake, constants), table)
        try:
            return tracer.run(args, kwargs)
        except Exception:
            if not tracer.recorder.needs_real:
                raise
    return _Tracer(model, Recorder(model, None, constants), table).run(args, kwargs)


class _Tracer:
    """One recording: the entry, and what happens at each call of a module."""

    def __init__(self, root: nn.Module, recorder: Recorder, table: OpTable) -> None:
        self.root = root
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
            args, kwargs = self._inputs(args, kwargs)
            stack.enter_context(self._watched())
            stack.enter_context(recorder)
            output = self.root(*args, **kwargs)
            self._write_back_buffers()
            if recorder.needs_real:
                raise NeedsRealValues
            graph = recorder.finish(output)
        _follow_device(graph, recorder)
        return Trace(
            graph,
            tuple(dict.fromkeys(recorder.specialized)),
            self.opaque,
            recorder.constants,
            recorder.fake is None,
            {node: plain(value) for node, value in recorder.numbers.items()},
            recorder.disposable,
        )

    # --- inputs ------------------------------------------------------------------

    def _inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A placeholder for each argument, and values that the recorder knows."""
        signature = inspect.signature(self.root.forward)
        bound = signature.bind(*args, **kwargs)
        for name, given in list(bound.arguments.items()):
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                values = tuple(
                    self._input(f"{name}_{i}", v) for i, v in enumerate(given)
                )
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values = {key: self._input(key, v) for key, v in given.items()}
            else:
                values = self._input(name, given)
            bound.arguments[name] = values
        return bound.args, bound.kwargs

    def _input(self, name: str, value: Any) -> Any:
        return self._known(value, self.recorder.placeholder(name))

    def _known(self, value: Any, node: Node) -> Any:
        """A twin of an input, each tensor of which stands for its node."""
        recorder = self.recorder
        if isinstance(value, Tensor):
            twin = value.detach().clone()
            if recorder.fake is not None:
                twin = recorder.fake.from_tensor(twin)
            recorder.anchor = recorder.anchor or (twin, node)
            return recorder.track(twin, node, {})
        if isinstance(value, tuple | list):
            items = [
                self._known(v, recorder.part(node, i)) for i, v in enumerate(value)
            ]
            if hasattr(value, "_make"):
                return cast(Any, type(value))._make(items)
            return cast(Any, type(value))(items)
        if isinstance(value, dict):
            entries = cast(dict[Any, Any], value).items()
            return cast(Any, type(value))(
                {key: self._known(v, recorder.part(node, key)) for key, v in entries}
            )
        if is_dataclass(value) and not isinstance(value, type):
            parts = {
                f.name: self._known(
                    getattr(value, f.name), recorder.field(node, f.name)
                )
                for f in fields(value)
                if f.init
            }
            return replace(value, **parts)
        if value is not None and not isinstance(value, int | float):
            recorder.specialize("argument", f"{node.name} = {value!r}")
        if isinstance(value, bool):
            recorder.specialize("argument", f"{node.name} = {value}")
        return traced(value, node, recorder)

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
        ):
            yield

    def _module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.paths.get(id(module))
        if self.recorder.hidden or path is None:  # within a leaf, or made in forward
            return self.call_module(module, *args, **kwargs)
        scopes = self.recorder.scopes
        key = path
        while key in scopes:
            key += "'"
        scopes[key] = path, type(module)
        mark = self.recorder.mark()
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
        if stays_whole(module) and path:
            return self._whole(module, path, args, kwargs)
        before = self.recorder.versions((args, kwargs))
        try:
            output = self.call_module(module, *args, **kwargs)
        except Exception as error:
            if not path or self.recorder.needs_real:
                raise
            return self._opaque(module, path, mark, args, kwargs, error)
        if path and is_bare(module) and self._can_close(mark, output):
            return self._closed(path, mark, args, kwargs, output, before)
        return output

    def _whole(
        self,
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The call of a module as one node."""
        recorder = self.recorder
        before = recorder.versions((args, kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.call_module(module, *args, **kwargs)

        output = recorder.compute(run, args, kwargs)
        node = recorder.call_node("call_module", path, args, kwargs)
        return recorder.track(output, node, before)

    def _can_close(self, mark: Mark, output: Any) -> bool:
        """Whether what a bare module did may be one node: nothing to quantize inside."""
        if not _is_tensors(output):
            return False
        for node in self.recorder.nodes_since(mark):
            op = None if node.op == "call_module" else self.table.find(node, self.root)
            if op is not None and op.is_compute:
                return False
        return True

    def _closed(
        self,
        path: str,
        mark: Mark,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: dict[int, int],
    ) -> Any:
        try:
            self.recorder.argument((args, kwargs))
        except Untraceable:
            return output
        self.recorder.undo(mark)
        node = self.recorder.call_node("call_module", path, args, kwargs)
        return self.recorder.track(output, node, before)

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
        self.recorder.undo(mark)
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
        before = recorder.versions((args, kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.apply.__get__(None, function)(*args, **kwargs)

        output = recorder.compute(run, args, kwargs)
        name = f"{function.__module__}.{function.__qualname__}"
        helper = add_helper(self.root, name, AppliedFunction(function))
        node = recorder.call_node("call_module", helper, args, kwargs)
        return recorder.track(output, node, before)

    # --- buffers -----------------------------------------------------------------

    def _write_back_buffers(self) -> None:
        """A buffer that forward replaced by a new tensor is written into instead."""
        for path, module in self.root.named_modules():
            for name, value in module._buffers.items():
                full = f"{path}.{name}" if path else name
                if value is not self.buffers.get(full) and self.recorder.knows(value):
                    get = self.recorder.attribute(full)
                    self.recorder.call_node("call_method", "copy_", (get, value), {})


def _is_tensors(output: Any) -> bool:
    if isinstance(output, tuple | list):
        items = cast(tuple[Any, ...], output)
        return type(output) in (tuple, list) and all(map(_is_tensors, items))
    return isinstance(output, Tensor)


def _follow_device(graph: Graph, recorder: Recorder) -> None:
    """Devices that the model asked of its tensors follow the input from now on."""
    anchor = recorder.anchor
    if anchor is None:
        return
    value, node = anchor
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        device = graph.call_function(getattr, (node, "device"))
    if node.op != "placeholder":
        device.prepend(node)
    for other in list(graph.nodes):
        if other is device:
            continue

        def follow(argument: Any) -> Any:
            same = isinstance(argument, torch.device) and argument == value.device
            return device if same else argument

        other.args = map_aggregate(other.args, follow)
        other.kwargs = map_aggregate(other.kwargs, follow)
    if not device.users:
        graph.erase_node(device)
