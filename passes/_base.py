"""What every pass is: a frozen dataclass whose fields are its options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils._pytree import tree_leaves

from gdnsq_fx.annotations import KEY
from gdnsq_fx.errors import CalibrationError, PassError
from gdnsq_fx.inputs import Batch
from gdnsq_fx.nested import graphs_of


@dataclass(frozen=True, eq=False)  # by identity: options may be unhashable
class Pass(PassBase):
    """A graph -> graph (or graph -> facts) step for any `torch.fx` ``PassManager``.

    Subclasses implement `rewrite`, and `requires` / `ensures` where there is something
    to check. `ensures` sees the result (torch's own base checks the input instead), and
    a pass that changed nothing reports ``modified=False``.
    """

    @property
    def name(self) -> str:
        """Name for messages."""
        return type(self).__name__

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Check, run, lint, check the result."""
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite in place; lint and recompile if anything changed."""
        modified = self.rewrite(graph_module)
        for one in graphs_of(graph_module) if modified else ():
            one.graph.lint()
            one.recompile()
        return PassResult(graph_module, modified)

    @abstractmethod
    def rewrite(self, graph_module: GraphModule) -> bool:
        """Do the work in place; return whether the graph or a module changed."""

    def require_annotations(self, graph_module: GraphModule) -> None:
        """Raise where `AnnotateOperations` has not run.

        Raises:
            PassError: names this pass and the one to run first.
        """
        if not any(KEY in node.meta for node in graph_module.graph.nodes):
            raise PassError(
                f"{self.name} needs annotated operations, and this graph has none; "
                "run AnnotateOperations first"
            )


def rewrite_each(
    graph_module: GraphModule, rewrite: Callable[[GraphModule], bool]
) -> bool:
    """Rewrite a graph and the graphs inside, one by one; True if one changed."""
    return any([rewrite(one) for one in graphs_of(graph_module)])


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called along with the module."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)


def forward_parameters(graph_module: GraphModule) -> list[Node]:
    """Placeholders of a graph, in the order of the arguments of ``forward``."""
    return list(graph_module.graph.find_nodes(op="placeholder"))


def placeholder_values(
    graph_module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """Values for `torch.fx.Interpreter.run`, one for each placeholder.

    Raises:
        PassError: an argument without a default is missing.
    """
    values = list(args)
    for node in forward_parameters(graph_module)[len(values) :]:
        name = str(node.target)
        if name in kwargs:
            values.append(kwargs[name])
        elif node.args:
            values.append(node.args[0])
        else:
            raise PassError(f"no value for the input {name!r} of the graph")
    return values


def check_finite(batch: Batch, name: str) -> None:
    """Refuse a batch with NaN or infinite inputs.

    Raises:
        CalibrationError: names the batch and the shape of the input.
    """
    for leaf in tree_leaves((batch.args, batch.kwargs)):
        if isinstance(leaf, Tensor) and not torch.isfinite(leaf).all():
            raise CalibrationError(
                f"{name} holds NaN or infinite values in an input of shape "
                f"{tuple(leaf.shape)}; remove or repair that sample"
            )
