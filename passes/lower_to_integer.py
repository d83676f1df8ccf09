"""LowerToInteger: frozen quantizers become explicit integer nodes.

    %conv1_input_q = call_module[quantizers.conv1_input](%x)
      ->
    %codes = quantize(%x, %step, %offset, max_code)          # uint8 or int32
    %conv1_input_q = dequantize(%codes, %step, %offset, float32)

    %conv1_weight_q = call_module[quantizers.conv1_weight](%conv1_weight)
      ->
    %codes = get_attr[quantizers.conv1_weight.codes]         # uint8 or int32
    %conv1_weight_q = dequantize(%codes, %step, %offset, float32)

The result is a plain GraphModule that holds only what the graph uses: the
floating-point weights are gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from gdnsq_fx.annotations import facts
from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.errors import PassError
from gdnsq_fx.quantize.frozen import FrozenActivation, FrozenWeight
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.stored import ancestors

from ._base import Pass, rewrite_each
from ._rebuilt import rebuilt


@dataclass(frozen=True, eq=False)
class LowerToInteger(Pass):
    """Emit the integer graph; nothing changes where there is no frozen quantizer."""

    def requires(self, graph_module: GraphModule) -> None:
        """No quantizer is still learning."""
        if any(isinstance(m, Quantizer) for m in graph_module.modules()):
            raise PassError(
                f"{self.name} needs frozen quantizers; run FreezeQuantizers first"
            )

    def call(self, graph_module: GraphModule) -> PassResult:
        """A new graph module; the given one is used up."""
        if not self.rewrite(graph_module):
            return PassResult(graph_module, False)
        return PassResult(rebuilt(graph_module, "IntegerModel"), True)

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Replace frozen quantizer nodes in place."""
        kinds = _float_dtypes(graph_module)
        return rewrite_each(graph_module, lambda one: _replace(one, kinds))


def _replace(graph_module: GraphModule, kinds: list[torch.dtype]) -> bool:
    found = [
        (node, graph_module.get_submodule(str(node.target)))
        for node in graph_module.graph.find_nodes(op="call_module")
    ]
    sources = [n for n, m in found if isinstance(m, FrozenWeight)]
    computed = ancestors(sources) - set(sources)
    lowered = [_lower(graph_module.graph, n, m, kinds) for n, m in found]
    # What a weight was computed from: its codes stand for all of it.
    for node in sorted(computed, reverse=True):
        if not node.users:
            graph_module.graph.erase_node(node)
    return any(lowered)


def _lower(
    graph: Graph, node: Node, module: nn.Module, kinds: list[torch.dtype]
) -> bool:
    if not isinstance(module, FrozenActivation | FrozenWeight):
        return False
    path = str(node.target)
    with graph.inserting_before(node):
        step = graph.get_attr(f"{path}.step")
        offset = graph.get_attr(f"{path}.offset")
        if isinstance(module, FrozenWeight):
            codes = graph.get_attr(f"{path}.codes")
            dtype = module.dtype
        else:
            # Shapes may have been noted before the model moved to another precision.
            noted = facts(node).dtype
            dtype = next((kind for kind in kinds if kind is noted), kinds[0])
            arguments = (node.args[0], step, offset, module.max_code)
            codes = graph.call_function(quantize, arguments)
    node.op, node.target = "call_function", dequantize
    node.args = (codes, step, offset, dtype)
    return True


def _float_dtypes(graph_module: GraphModule) -> list[torch.dtype]:
    """The types in which the model computes between its integer edges."""
    weights = [m.dtype for m in graph_module.modules() if isinstance(m, FrozenWeight)]
    rest = [p.dtype for p in graph_module.parameters() if p.is_floating_point()]
    return list(dict.fromkeys([*weights, *rest])) or [torch.float32]
