"""A converted graph as JSON: its nodes, and how the modules that it calls are made.

What stands in the file is what evaluation computes: a choice between evaluation and
training is made when the graph is written.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from gdnsq_fx.capture.helpers import ByMode, InMode
from gdnsq_fx.deploy.graph_facts import stored_deployment, stored_facts, stored_inputs
from gdnsq_fx.deploy.graph_names import (
    ATTRIBUTES,
    METHODS,
    function_names,
    module_classes,
)
from gdnsq_fx.deploy.graph_values import UnknownValueError, encoded, is_identifier
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.nested import nested_graphs
from gdnsq_fx.stored import attribute

_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def described(imodel: GraphModule, inputs: InputStructure) -> dict[str, Any]:
    """The graph as JSON.

    Args:
        imodel: a converted model, in evaluation.
        inputs: structure of its example input.

    Raises:
        UnknownValueError: it has what no file can hold; the message says what.
    """
    if nested_graphs(imodel):
        raise UnknownValueError("it keeps modules that could not be looked into")
    writer = _Writer(imodel)
    for node in imodel.graph.nodes:
        writer.add(node)
    return {
        "nodes": writer.nodes,
        "modules": writer.modules,
        "parameters": [name for name, _ in imodel.named_parameters()],
        "constants": sorted(constants(imodel)),
        "inputs": stored_inputs(inputs),
        "deployable": stored_deployment(imodel),
    }


def constants(imodel: GraphModule) -> dict[str, Tensor]:
    """Tensors that the graph reads and ``state_dict()`` leaves out."""
    state = imodel.state_dict()
    names = {str(n.target) for n in imodel.graph.find_nodes(op="get_attr")}
    found = {name: attribute(imodel, name) for name in names - state.keys()}
    return {n: v for n, v in found.items() if isinstance(v, Tensor)}


class _Writer:
    def __init__(self, imodel: GraphModule) -> None:
        self.imodel = imodel
        self.nodes: list[list[Any]] = []
        self.modules: dict[str, Any] = {}
        self.numbers: dict[Node, int] = {}
        self.chosen: dict[Node, Any] = {}
        """Node that depends on the mode -> what it is in evaluation."""

    def add(self, node: Node) -> None:
        if self._is_chosen(node):
            return
        try:
            target = self._target(node)
            args = encoded(map_aggregate(node.args, self._resolved), self.numbers)
            kwargs = encoded(map_aggregate(node.kwargs, self._resolved), self.numbers)
            known = stored_facts(node, self.imodel)
        except UnknownValueError as error:
            raise UnknownValueError(f"{node.name}: {error}") from error
        self.numbers[node] = len(self.nodes)
        self.nodes.append([node.op, node.name, target, args, kwargs, known])

    def _resolved(self, value: Any) -> Any:
        return self.chosen.get(value, value) if isinstance(value, Node) else value

    def _is_chosen(self, node: Node) -> bool:
        source = node.args[0] if node.args else None
        if node.op == "call_module":
            module = self.imodel.get_submodule(str(node.target))
            if isinstance(module, ByMode) and not module.in_training:
                self.chosen[node] = map_aggregate(node.args[0], self._resolved)
                return True
            if isinstance(module, InMode) and module.mode and not module.in_training:
                self.chosen[node] = None
                return True
        # A part of what only training has: nothing in evaluation reads it.
        part = node.target is operator.getitem and isinstance(source, Node)
        if part and source in self.chosen and self.chosen[source] is None:
            self.chosen[node] = None
            return True
        return False

    def _target(self, node: Node) -> str:
        name = str(node.target)
        if node.op == "call_function":
            return _function(node)
        if node.op == "call_method" and name not in METHODS:
            raise UnknownValueError(f"the method {name}")
        if node.op == "call_module":
            module = self.imodel.get_submodule(name)
            self.modules[name] = described_module(module)
        if node.op == "get_attr" and not isinstance(
            attribute(self.imodel, name), Tensor
        ):
            raise UnknownValueError(f"{name}, which is no tensor")
        if node.op == "placeholder" and not is_identifier(name):
            raise UnknownValueError(f"an input named {name}")
        return name


def _function(node: Node) -> str:
    function: Any = node.target
    try:
        name = function_names().get(function)
    except TypeError:  # not hashable, and so none of ours
        name = None
    if name is None:
        room = getattr(function, "__module__", None) or type(function).__module__
        shown = getattr(function, "__qualname__", None) or type(function).__name__
        raise UnknownValueError(f"the function {room}.{shown}")
    if function is getattr and not reads_attribute(node.args):
        raise UnknownValueError(f"the attribute {node.args[1]!r}")
    return name


def reads_attribute(args: tuple[Any, ...]) -> bool:
    """Whether arguments of ``getattr`` are a node and an attribute of `ATTRIBUTES`."""
    named = len(args) == 2 and isinstance(args[0], Node) and isinstance(args[1], str)
    return named and args[1] in ATTRIBUTES


def described_module(module: nn.Module) -> dict[str, Any]:
    """How a module of torch.nn is made again.

    Raises:
        UnknownValueError: it is another, or has what its constructor does not give.
    """
    kind = type(module)
    cls, names = module_classes().get(kind.__name__, (nn.Module, ()))
    if cls is not kind:
        raise UnknownValueError(f"the module {kind.__module__}.{kind.__qualname__}")
    if module.training or any(getattr(module, f"_{hook}_hooks") for hook in _HOOKS):
        raise UnknownValueError(f"a {kind.__name__} in training, or with hooks")
    given = {name: _argument(module, name) for name in names}
    described: dict[str, Any] = {
        "class": kind.__name__,
        "arguments": {name: encoded(value, {}) for name, value in given.items()},
    }
    with torch.device("meta"):
        twin = cls(**given).eval()
    if _plain(twin) != _plain(module) or set(twin.state_dict()) != set(
        module.state_dict()
    ):
        raise UnknownValueError(f"a {kind.__name__} with attributes of its own")
    return described


def _argument(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return value is not None if name == "bias" else value


def _plain(module: nn.Module) -> Mapping[str, Any]:
    known = vars(module).items()
    return {k: v for k, v in known if not k.startswith("_")}
