"""An interpreter that runs a prepared graph at identity precision and probes edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from gdnsq_fx.analysis.divergence import sample_products
from gdnsq_fx.analysis.edge_statistics import EdgeStatistics
from gdnsq_fx.annotations import facts
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.quantize.quantizer import ActivationQuantizer, WeightQuantizer


class EdgeProbe(Interpreter):
    """Runs the graph; notes ``(tensor, error, edge)`` wherever a quantizer acts.

    An activation edge is probed at the quantizer, a weight edge at the output of the
    operation that reads it, where its error has the effect ``op(x, weight error)``.
    Values handed on are clones, so that in-place operations do not disturb a probe.
    """

    def __init__(
        self, graph_module: GraphModule, statistics: dict[str, EdgeStatistics]
    ) -> None:
        super().__init__(graph_module)
        self.statistics = statistics
        self.probes: list[tuple[Tensor, Tensor, str]] = []
        self._weights: dict[Node, tuple[str, Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node; quantizers pass their input on."""
        module = self._module_of(n)
        if isinstance(module, WeightQuantizer):
            return self._weight(n, module)
        if isinstance(module, ActivationQuantizer):
            return self._activation(n, module)
        value = super().run_node(n)
        op = facts(n).op
        if op is not None and op.is_compute and isinstance(value, Tensor):
            return self._output(n, op, value)
        return value

    def add_products(
        self, gradients: Sequence[Tensor | None], batch: int, weight: float
    ) -> None:
        """Square the per-sample products of one draw and add them to the statistics.

        A weight that several layers share has several probes: their products add up
        before squaring.
        """
        products: dict[str, Tensor] = {}
        for (_, error, edge), gradient in zip(self.probes, gradients, strict=True):
            if gradient is None:
                continue
            product = sample_products(gradient, error, batch)
            known = products.get(edge)
            if known is None:
                products[edge] = product
            elif known.shape == product.shape:
                products[edge] = known + product
            else:
                products[edge] = (known.sum() + product.sum()).reshape(1)
        for edge, product in products.items():
            self.statistics[edge].add_divergence(product, weight)

    def _module_of(self, node: Node) -> object:
        return (
            self.submodules.get(str(node.target)) if node.op == "call_module" else None
        )

    def _input(self, node: Node) -> Tensor:
        """What flows into a quantizer node."""
        args, _ = self.fetch_args_kwargs_from_env(node)
        return args[0]

    def _weight(self, node: Node, quantizer: WeightQuantizer) -> Tensor:
        weight = self._input(node)
        with torch.no_grad():
            self._weights[node] = (quantizer.edge, quantizer.quantize(weight) - weight)
        return weight

    def _activation(self, node: Node, quantizer: ActivationQuantizer) -> Tensor:
        value = self._input(node)
        with torch.no_grad():
            error = self.statistics[quantizer.edge].add_activation(quantizer, value)
        probe = _probed(value.clone())
        self.probes.append((probe, error, quantizer.edge))
        return probe

    def _output(self, node: Node, op: OpInfo, value: Tensor) -> Tensor:
        weights = [
            (name, *self._weights[source])
            for name, source in op.bind(node).items()
            if isinstance(source, Node) and source in self._weights
        ]
        if not weights:
            return value
        value = _probed(value)
        for name, edge, error in weights:
            effect = self._effect(node, op, name, error)
            self.probes.append((value, effect, edge))
        return value.clone()

    @torch.no_grad()
    def _effect(self, node: Node, op: OpInfo, name: str, error: Tensor) -> Tensor:
        """The operation applied to the error of one argument, without bias."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        args, kwargs = op.replaced(args, kwargs, name, error)
        for argument, role in op.roles.items():
            if role == "bias" and op.named(args, kwargs).get(argument) is not None:
                args, kwargs = op.replaced(args, kwargs, argument, None)
        if node.op == "call_method":
            return self.call_method(str(node.target), args, kwargs)
        return self.call_function(cast(Any, node.target), args, kwargs)


def _probed(value: Tensor) -> Tensor:
    """A tensor that a gradient can be taken for."""
    return value if value.requires_grad else value.detach().requires_grad_()
