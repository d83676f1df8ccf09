"""From the JSON of a graph to a GraphModule that computes what was written.

torch turns a graph into Python source. So whatever goes there from a file is looked up
in a table, is a name of letters and digits, or is a constant that torch writes with
``repr``; nothing of the graph runs before somebody calls it.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from gdnsq_fx.deploy.graph_description import reads_attribute
from gdnsq_fx.deploy.graph_facts import place_facts
from gdnsq_fx.deploy.graph_names import METHODS, functions, module_classes
from gdnsq_fx.deploy.graph_values import UnknownValueError, decoded, is_identifier

_ATOM = re.compile(r"\w+", re.ASCII)
_LONGEST = 1 << 10
_FAILURES = (
    *(LookupError, TypeError, AttributeError, ValueError, ArithmeticError),
    *(RuntimeError, AssertionError, SyntaxError),
)


def built(stored: Any, tensors: dict[str, Tensor], name: str) -> GraphModule:
    """The graph over its tensors, in evaluation.

    Args:
        stored: what `graph_description.described` made.
        tensors: state and constants.
        name: of the class of the result.

    Raises:
        UnknownValueError: something in it is not ours.
    """
    try:
        return _Reader(stored, dict(tensors)).module(name)
    except UnknownValueError:
        raise
    except _FAILURES as error:
        # The last line of what torch says of a state is the one that names a tensor.
        cause = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise UnknownValueError(cause[:200]) from error


class _Reader:
    def __init__(self, stored: Any, tensors: dict[str, Tensor]) -> None:
        self.stored = stored
        self.tensors = tensors
        self.root = nn.Module()
        self.taken = set(dir(GraphModule(nn.Module(), Graph())))
        self.graph = Graph()
        self.nodes: list[Node] = []

    def module(self, name: str) -> GraphModule:
        rest = set(self.tensors)
        for path, entry in self.stored["modules"].items():
            rest -= self._add_module(path, entry)
        parameters = set(self.stored["parameters"])
        constants = set(self.stored["constants"])
        if not parameters | constants <= self.tensors.keys():
            raise UnknownValueError("names of tensors that there are not")
        for path in sorted(rest):
            self._add_tensor(path, path in parameters, path not in constants)
        for entry in self.stored["nodes"]:
            self._add_node(entry)
        if not self.nodes or self.nodes[-1].op != "output":
            raise UnknownValueError("a graph without an output")
        self.graph.lint()
        made = GraphModule(self.root, self.graph, name).eval()
        for node, entry in zip(self.nodes, self.stored["nodes"], strict=True):
            place_facts(node, entry[5], made)
        self._check_read(made)
        return made.requires_grad_(False)

    def _holder(self, path: str) -> tuple[nn.Module, str]:
        """The module that is to hold what a path names, and its name there."""
        if len(path) > _LONGEST:
            raise UnknownValueError("a name that is too long")
        *above, name = path.split(".")
        for atom in (*above, name):
            if not _ATOM.fullmatch(atom) or atom in self.taken:
                raise UnknownValueError(f"the name {path[:80]!r}")
        holder = self.root
        for atom in above:
            if not hasattr(holder, atom):
                holder.add_module(atom, nn.Module())
            holder = holder.get_submodule(atom)
        return holder, name

    def _add_module(self, path: str, entry: Any) -> set[str]:
        """Add a module, filled; returns the names of its tensors."""
        cls, names = module_classes()[entry["class"]]
        given = {k: decoded(v, []) for k, v in entry["arguments"].items()}
        if given.keys() != set(names):
            raise UnknownValueError(f"arguments of {cls.__name__}")
        with torch.device("meta"):
            module = cls(**given)
        # Not one for each prefix: the number of modules may be large.
        wanted = {name: f"{path}.{name}" for name in module.state_dict()}
        found = {name: self.tensors[full] for name, full in wanted.items()}
        for name, value in module.state_dict().items():
            if value.is_floating_point() != found[name].is_floating_point():
                raise UnknownValueError(f"{wanted[name]} is {found[name].dtype}")
        module.load_state_dict(found, strict=True, assign=True)
        holder, name = self._holder(path)
        holder.add_module(name, module)
        return set(wanted.values())

    def _add_tensor(self, path: str, is_parameter: bool, persistent: bool) -> None:
        holder, name = self._holder(path)
        if is_parameter:
            value = nn.Parameter(self.tensors[path], requires_grad=False)
            holder.register_parameter(name, value)
        else:
            holder.register_buffer(name, self.tensors[path], persistent=persistent)

    def _add_node(self, entry: Any) -> None:
        op, name, target, stored_args, stored_kwargs, _ = entry
        if self.nodes and self.nodes[-1].op == "output":
            raise UnknownValueError("nodes behind the output")
        args, kwargs = (
            decoded(stored_args, self.nodes),
            decoded(stored_kwargs, self.nodes),
        )
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise UnknownValueError("arguments of another kind")
        known = cast(dict[str, Any], kwargs)
        if not is_identifier(name) or not all(map(is_identifier, known)):
            raise UnknownValueError("a name that is no identifier")
        arguments = cast(tuple[Any, ...], args)
        called = self._target(op, target, arguments, known)
        node = self.graph.create_node(op, called, arguments, known, name)
        self.nodes.append(node)

    def _target(
        self, op: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not isinstance(target, str):
            raise UnknownValueError("a target that is no name")
        if op == "call_function":
            function: Any = functions()[target]
            if function is getattr and (kwargs or not reads_attribute(args)):
                raise UnknownValueError("an attribute that may not be read")
            return function
        plain = not kwargs and len(args) < 2
        known = {
            "call_method": target in METHODS and bool(args),
            "call_module": target in self.stored["modules"],
            "get_attr": target in self.tensors and not args and not kwargs,
            "placeholder": is_identifier(target) and plain,
            "output": target == "output" and plain and bool(args),
        }
        if not known.get(str(op), False):
            raise UnknownValueError(f"a node {str(op)[:40]} of {target[:80]!r}")
        return target

    def _check_read(self, made: GraphModule) -> None:
        held = {n for n, _ in (*made.named_parameters(), *made.named_buffers())}
        if unread := sorted(set(self.tensors) - held):
            raise UnknownValueError(f"tensors that nothing reads: {unread[:3]}")
