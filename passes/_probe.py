"""An interpreter that runs a prepared graph and probes its quantized edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from gdnsq_fx.analysis.divergence import sample_products
from gdnsq_fx.analysis.edge_errors import ErrorSource
from gdnsq_fx.annotations import facts
from gdnsq_fx.nested import nested_graphs
from gdnsq_fx.operands import Operand
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import sites

from ._base import placeholder_values
from ._evaluated_norm import affine_norm, is_affine_norm
from ._nested_calls import run_by

# A tensor that gradients are taken for, the errors of the sources, the edge.
Probe = tuple[Tensor, list[Tensor], str]


class EdgeProbe(Interpreter):
    """Runs the graph; notes a `Probe` wherever a quantizer acts.

    An activation edge is probed at the quantizer, a weight edge at the output of the
    operation that reads it, where its error has the effect ``op(x, weight error)``.
    Values handed on are clones, so that in-place operations do not disturb a probe.

    Each call of a graph inside an opaque module has a probe of its own, which adds to
    the same list.

    Args:
        graph_module: a prepared one.
        sources: each gives an error of every value that reaches a quantizer.
        joint: run with every edge quantized, gradients passing straight through,
            instead of at identity precision; with the errors of the first source.
        probes: the list to add to.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        sources: Sequence[ErrorSource],
        *,
        joint: bool = False,
        probes: list[Probe] | None = None,
    ) -> None:
        super().__init__(graph_module)
        self.sources = sources
        self.joint = joint
        self.probes = [] if probes is None else probes
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
        probe = EdgeProbe(graph, self.sources, joint=self.joint, probes=self.probes)
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

    def gradients(
        self, output: Tensor, direction: Tensor, *, last: bool
    ) -> tuple[Tensor | None, ...]:
        """One backward pass: gradients of ``direction' output`` at the probes.

        Args:
            output: of this run.
            direction: of its shape.
            last: free the graph.
        """
        tensors = [tensor for tensor, _, _ in self.probes]
        return torch.autograd.grad(
            output, tensors, direction, retain_graph=not last, allow_unused=True
        )

    def products(
        self, gradients: Sequence[Tensor | None], batch: int
    ) -> Sequence[Mapping[str, Tensor]]:
        """For each source, inner product of gradient and error of each edge.

        Each is ``[batch]`` or ``[1]``. Products of the probes of a shared weight add
        up, and so do, over all rows, those inside an opaque module, whose rows need not
        be samples: the sum has the same mean.
        """
        found: list[dict[str, Tensor]] = [{} for _ in self.sources]
        for (_, errors, edge), gradient in zip(self.probes, gradients, strict=True):
            if gradient is None:
                continue
            leading = 1 if edge in self._inside else batch
            # One gradient after another, which stays in the cache for all its errors.
            for products, error in zip(found, errors, strict=True):
                product = sample_products(gradient, error, leading)
                products[edge] = _added(products.get(edge), product)
        return found

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
        probe = _probed(value.clone())
        self.probes.append((probe, errors, quantizer.edge))
        return probe + errors[0] if self.joint else probe

    @torch.no_grad()
    def _view(self, node: Node, op: OpInfo) -> None:
        """A view of a weight has the same view of its errors."""
        (operand,) = op.operands(op.bind(node))
        if operand.value in self._errors:
            edge, errors = self._errors[operand.value]
            viewed = [self._run_with(node, op, operand, error) for error in errors]
            self._errors[node] = (edge, viewed)

    def _output(self, node: Node, op: OpInfo, value: Any) -> Any:
        """Probe each tensor of the output for each weight that the node reads."""
        leaves, structure = tree_flatten(value)
        places = [i for i, leaf in enumerate(leaves) if _is_probed(leaf)]
        for place in places:
            leaves[place] = _probed(leaves[place])
        for operand in op.operands(op.bind(node)):
            if not isinstance(operand.value, Node) or operand.value not in self._errors:
                continue
            edge, errors = self._errors[operand.value]
            effects = [
                tree_leaves(self._effect(node, op, operand, error, value))
                for error in errors
            ]
            self.probes += [(leaves[i], [e[i] for e in effects], edge) for i in places]
        for place in places:
            leaves[place] = leaves[place].clone()
        return tree_unflatten(leaves, structure)

    @torch.no_grad()
    def _effect(
        self, node: Node, op: OpInfo, operand: Operand, error: Any, value: Any
    ) -> Any:
        """What the error of one weight changes in the output."""
        if op.is_compute and op.linear:
            bias = {o.argument for o in op.operands(op.bind(node)) if o.role == "bias"}
            return self._run_with(node, op, operand, error, drop=bias)
        weight: Any = self.env[cast(Node, operand.value)]
        if self.joint:
            exact = self._run_with(node, op, operand, weight - error)
            return tree_map(_difference, value, exact)
        moved = self._run_with(node, op, operand, weight + error)
        return tree_map(_difference, moved, value)

    def _run_with(
        self,
        node: Node,
        op: OpInfo,
        operand: Operand,
        value: Any,
        drop: Iterable[str] = (),
    ) -> Any:
        """The operation with another value for one operand, and without some others."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        args, kwargs = op.replaced(
            args,
            kwargs,
            operand.argument,
            value,
            index=operand.index,
            target=node.target,
        )
        for name in drop:
            if op.named(args, kwargs, target=node.target).get(name) is not None:
                args, kwargs = op.replaced(args, kwargs, name, None, target=node.target)
        if node.op == "call_method":
            return self.call_method(str(node.target), args, kwargs)
        return self.call_function(cast(Any, node.target), args, kwargs)


def _added(known: Tensor | None, product: Tensor) -> Tensor:
    """The sum of two probes, for each sample where both can tell them apart."""
    if known is None:
        return product
    if known.shape == product.shape:
        return known + product
    return (known.sum() + product.sum()).reshape(1)


def _is_probed(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _difference(moved: Any, value: Any) -> Any:
    return moved - value if _is_probed(moved) else moved


def _probed(value: Tensor) -> Tensor:
    """A tensor that a gradient can be taken for."""
    return value if value.requires_grad else value.detach().requires_grad_()
