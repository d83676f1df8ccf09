"""An interpreter that runs a prepared graph and probes its quantized edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from gdnsq_fx.analysis.divergence import sample_products
from gdnsq_fx.analysis.edge_errors import ErrorSource
from gdnsq_fx.annotations import facts
from gdnsq_fx.nested import nested_graphs
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import sites

from ._base import placeholder_values
from ._error_effects import bears_error, error_effect, run_with
from ._evaluated_norm import affine_norm, is_affine_norm
from ._memory import written_values
from ._nested_calls import run_by
from ._taps import Taps

# The errors of the sources where a tap is set, and the edge.
Probe = tuple[list[Tensor], str]


class EdgeProbe(Interpreter):
    """Runs the graph; notes a `Probe` wherever a quantizer acts.

    An activation edge is probed at the quantizer, a weight edge at the output of the
    operation that reads it, where its error has the effect ``op(x, weight error)``.
    Values that may be written into are handed on as clones, so that in-place operations
    do not disturb a probe.

    Each call of a graph inside an opaque module has a probe of its own, which adds to
    those of the whole run.

    Args:
        graph_module: a prepared one.
        sources: each gives an error of every value that reaches a quantizer.
        joint: run with every edge quantized, gradients passing straight through,
            instead of at identity precision; with the errors of the first source.
        outer: the probe of the graph that this one is inside of.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        sources: Sequence[ErrorSource],
        *,
        joint: bool = False,
        outer: EdgeProbe | None = None,
    ) -> None:
        super().__init__(graph_module)
        self.sources = sources
        self.joint = joint
        self.probes: list[Probe] = [] if outer is None else outer.probes
        self._taps = Taps() if outer is None else outer._taps
        # What an opaque module does with the values of a graph inside is not known.
        self._written = None if outer else written_values(graph_module)
        self._inside: set[str] = set()
        self._errors: dict[Node, tuple[str, list[Any]]] = {}

    def run_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph, with the graphs inside it probed as well."""
        owner = self.module
        assert isinstance(owner, GraphModule)
        graphs = nested_graphs(owner)
        self._inside = {site.edge for one in graphs for site in sites(one)}
        with run_by(graphs, self._run_inside):
            return self.run(*placeholder_values(owner, args, kwargs))

    def _run_inside(
        self, graph: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        probe = EdgeProbe(graph, self.sources, joint=self.joint, outer=self)
        return probe.run(*placeholder_values(graph, args, kwargs))

    def run_node(self, n: Node) -> Any:
        """Run one node; at identity precision quantizers pass their input on."""
        module = self._module_of(n)
        if isinstance(module, WeightQuantizer):
            return self._weight(n, module)
        if isinstance(module, ActivationQuantizer):
            return self._activation(n, module)
        if is_affine_norm(module) and len(n.args) == 1 and not n.kwargs:
            value: Any = affine_norm(module, self._input(n))
        else:
            value = super().run_node(n)
        op = facts(n).op
        if op is None or self._errors.keys().isdisjoint(n.all_input_nodes):
            return value
        if op.kind == "view":
            self._view(n, op)
            return value
        return self._output(n, op, value)

    def products(
        self, output: Tensor, direction: Tensor, batch: int, *, last: bool
    ) -> Sequence[Mapping[str, Tensor]]:
        """One backward pass: for each source, products of gradient and error.

        Args:
            output: of this run.
            direction: of its shape; gradients are those of ``direction' output``.
            batch: number of samples.
            last: free the graph.

        Returns:
            By edge, ``[batch]`` or ``[1]``. Products of the probes of a shared weight
            add up, and so do, over all rows, those inside an opaque module, whose rows
            need not be samples: the sum has the same mean.
        """
        found: list[dict[str, Tensor]] = [{} for _ in self.sources]
        receiver = partial(self._add_products, found, batch)
        self._taps.backward(output, direction, receiver, last=last)
        return found

    def gradients(
        self, output: Tensor, direction: Tensor, *, last: bool
    ) -> Sequence[Tensor | None]:
        """The gradients of one backward pass, for `products_of` another run."""
        found: list[Tensor | None] = [None] * len(self.probes)
        self._taps.backward(output, direction, found.__setitem__, last=last)
        return found

    def products_of(
        self, gradients: Sequence[Tensor | None], batch: int
    ) -> Sequence[Mapping[str, Tensor]]:
        """The `products` with the errors of this run and gradients of one like it."""
        found: list[dict[str, Tensor]] = [{} for _ in self.sources]
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                self._add_products(found, batch, number, gradient)
        return found

    def _add_products(
        self,
        found: Sequence[dict[str, Tensor]],
        batch: int,
        number: int,
        gradient: Tensor,
    ) -> None:
        errors, edge = self.probes[number]
        leading = 1 if edge in self._inside else batch
        products = sample_products(gradient, errors, leading)
        for known, product in zip(found, products, strict=True):
            known[edge] = _added(known.get(edge), product)

    def _module_of(self, node: Node) -> object:
        return (
            self.submodules.get(str(node.target)) if node.op == "call_module" else None
        )

    def _input(self, node: Node) -> Tensor:
        """What flows into the node of a module with one input."""
        args, _ = self.fetch_args_kwargs_from_env(node)
        return args[0]

    def _errors_of(self, quantizer: Quantizer, value: Tensor) -> list[Tensor]:
        return [source(quantizer, value) for source in self.sources]

    def _weight(self, node: Node, quantizer: WeightQuantizer) -> Tensor:
        weight = self._input(node)
        errors = self._errors_of(quantizer, weight)
        self._errors[node] = (quantizer.edge, list(errors))
        return weight + errors[0] if self.joint else weight

    def _activation(self, node: Node, quantizer: ActivationQuantizer) -> Tensor:
        value = self._input(node)
        errors = self._errors_of(quantizer, value)
        self.probes.append((errors, quantizer.edge))
        return self._tapped(value + errors[0] if self.joint else value, node)

    def _tapped(self, value: Tensor, node: Node) -> Tensor:
        """The value of a node with a tap for the probe noted last."""
        copy = self._written is None or node in self._written
        return self._taps.set(value, copy=copy)

    @torch.no_grad()
    def _view(self, node: Node, op: OpInfo) -> None:
        """A view of a weight has the same view of its errors."""
        (operand,) = op.operands(op.bind(node))
        if operand.value in self._errors:
            edge, errors = self._errors[operand.value]
            viewed = [run_with(self, node, op, operand, error) for error in errors]
            self._errors[node] = (edge, viewed)

    def _output(self, node: Node, op: OpInfo, value: Any) -> Any:
        """Probe each tensor of the output for each weight that the node reads."""
        leaves, structure = tree_flatten(value)
        effect = partial(error_effect, self, joint=self.joint)
        places = [i for i, leaf in enumerate(leaves) if bears_error(leaf)]
        for operand in op.operands(op.bind(node)):
            if not isinstance(operand.value, Node) or operand.value not in self._errors:
                continue
            edge, errors = self._errors[operand.value]
            effects = [
                tree_leaves(effect(node, op, operand, error, value)) for error in errors
            ]
            for i in places:
                self.probes.append(([e[i] for e in effects], edge))
                leaves[i] = self._tapped(leaves[i], node)
        return tree_unflatten(leaves, structure)


def _added(known: Tensor | None, product: Tensor) -> Tensor:
    """The sum of two probes, for each sample where both can tell them apart."""
    if known is None:
        return product
    if known.shape == product.shape:
        return known + product
    return (known.sum() + product.sum()).reshape(1)
