"""FoldBatchNorm: a BatchNorm in evaluation becomes part of the layer before it.

With gamma, beta, running mean m and variance v of the BatchNorm,

    w' = w * gamma / sqrt(v + eps)  (per output channel)
    b' = (b - m) * gamma / sqrt(v + eps) + beta

so that ``conv(x, w', b') == bn(conv(x, w, b))`` up to rounding. Only where nothing else
reads the layer's output, its weight belongs to it alone, and the model is in
evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import annotate, compute_nodes, facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.opinfo import OpInfo

from ._base import Pass, rewrite_each
from ._norms import kept_as_module, norm_after, over_channels


@dataclass(frozen=True, eq=False)
class FoldBatchNorm(Pass):
    """Fold what can be folded; a BatchNorm that cannot keeps its reason in ``skip``."""

    def requires(self, graph_module: GraphModule) -> None:
        """Operations must be annotated, and the model in evaluation."""
        self.require_annotations(graph_module)
        if graph_module.training:
            raise PassError(
                "FoldBatchNorm freezes running statistics, so it is off while "
                "training; call eval() on the model first"
            )

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Fold each BatchNorm that follows an exposed layer; True if there was one."""
        return rewrite_each(graph_module, self._fold_in)

    def _fold_in(self, graph_module: GraphModule) -> bool:
        modified = False
        for node in compute_nodes(graph_module):
            norm_node = norm_after(graph_module, node)
            if norm_node is None:
                continue
            op = facts(node).op
            assert op is not None
            reason = _refusal(graph_module, node, norm_node, op)
            if reason is not None:
                annotate(norm_node, skip=reason)
                continue
            _fold(graph_module, node, norm_node, op)
            modified = True
        return modified


def _refusal(owner: GraphModule, node: Node, norm_node: Node, op: OpInfo) -> str | None:
    """Why this BatchNorm must stay, None where it need not."""
    norm: Any = owner.get_submodule(str(norm_node.target))
    bound = op.bind(node)
    sources = [bound.get("weight"), bound.get("bias")]
    parameters = [s for s in sources if isinstance(s, Node)]
    kept = kept_as_module(norm)
    if kept is not None:
        return f"BatchNorm not folded: it {kept}"
    shape = facts(node).shape
    if op.channel_dim is None:
        return "BatchNorm not folded: its channels are not those of the layer's weight"
    if op.channel_dim != 1 and (shape is None or len(shape) != 2):
        return "BatchNorm not folded: its channels are not those of the layer"
    if norm.running_mean is None or norm.running_var is None:
        return "BatchNorm not folded: it keeps no running statistics"
    if len(node.users) > 1:
        return "BatchNorm not folded: others read the layer's output as well"
    if not parameters or any(p.op != "get_attr" for p in parameters):
        return "BatchNorm not folded: the weight is quantized or parametrized"
    if any(len(p.users) > 1 for p in parameters):
        return "BatchNorm not folded: its layer shares a parameter with another"
    return None


@torch.no_grad()
def _fold(owner: GraphModule, node: Node, norm_node: Node, op: OpInfo) -> None:
    bound = op.bind(node)
    norm: Any = owner.get_submodule(str(norm_node.target))
    (operand,) = [o for o in op.operands(bound) if o.role == "weight"]
    weight = owner.get_parameter(str(bound["weight"].target))
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = 0.0 if norm.bias is None else norm.bias
    has_bias = isinstance(bound.get("bias"), Node)
    old = owner.get_parameter(str(bound["bias"].target)) if has_bias else 0.0
    bias = (old - norm.running_mean) * scale + shift
    weight.mul_(over_channels(scale, op.layout_of(bound, operand), weight))
    if has_bias:
        owner.get_parameter(str(bound["bias"].target)).copy_(bias)
    else:
        _add_bias(owner, node, op, bias)
    norm_node.replace_all_uses_with(node)
    owner.graph.erase_node(norm_node)


def _add_bias(owner: GraphModule, node: Node, op: OpInfo, bias: Tensor) -> None:
    """Register the new bias beside its weight and pass it to the call."""
    prefix, _, _ = str(op.bind(node)["weight"].target).rpartition(".")
    parent = owner.get_submodule(prefix)
    name = "bias"
    while getattr(parent, name, None) is not None:
        name = f"folded_{name}"
    setattr(parent, name, nn.Parameter(bias))
    target = f"{prefix}.{name}" if prefix else name
    with owner.graph.inserting_before(node):
        source = owner.graph.get_attr(target)
    op.with_argument(node, "bias", source)
