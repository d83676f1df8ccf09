"""FoldIntoScales: in a converted graph, BatchNorm goes into steps, offsets and bias.

With gamma, beta, running mean m and variance v of the BatchNorm, and a weight
``w = step * k + offset`` of whole codes k,

    step' = step * g,  offset' = offset * g,  b' = (b - m) * g + beta,
    g = gamma / sqrt(v + eps)  (per output channel)

so that ``conv(x, w', b') == bn(conv(x, w, b))`` up to rounding, with the same codes: no
weight is quantized again. A step is negative where gamma is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import annotate, compute_nodes, facts
from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.deploy.integer import dequantize
from gdnsq_fx.errors import PassError
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.stored import attribute, stored_name

from ._base import Pass, rewrite_each
from ._norms import affine, norm_after, not_foldable, over_channels


@dataclass(frozen=True, eq=False)
class FoldIntoScales(Pass):
    """Fold what can be folded; a BatchNorm that cannot keeps its reason in ``skip``."""

    def requires(self, graph_module: GraphModule) -> None:
        """A converted model, in evaluation."""
        self.require_annotations(graph_module)
        if graph_module.training:
            raise PassError(
                f"{self.name} freezes running statistics, so it is off while training; "
                "call eval() on the model first"
            )

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Fold each BatchNorm that follows an integer weight; True if there was one."""
        return rewrite_each(graph_module, _fold_in)


def _fold_in(owner: GraphModule) -> bool:
    modified = False
    for node in compute_nodes(owner):
        norm_node = norm_after(owner, node)
        op = facts(node).op
        if norm_node is None or op is None:
            continue
        reason = _refusal(owner, node, norm_node, op)
        if reason is not None:
            annotate(norm_node, skip=f"BatchNorm not folded: {reason}")
            continue
        _fold(owner, node, norm_node, op)
        modified = True
    return modified


def _refusal(owner: GraphModule, node: Node, norm_node: Node, op: OpInfo) -> str | None:
    """Why this BatchNorm must stay, None where it need not."""
    weight = op.bind(node).get("weight")
    if not isinstance(weight, Node) or not _is_of_one_layer(weight):
        return "the weight is no integer weight of this layer alone"
    return not_foldable(owner, node, norm_node, op)


def _is_of_one_layer(weight: Node) -> bool:
    """Whether a value is an integer weight that nothing else reads."""
    if weight.target is not dequantize or len(weight.users) > 1:
        return False
    codes = weight.args[0]
    if not isinstance(codes, Node) or codes.op != "get_attr":
        return False
    nodes = weight.graph.find_nodes(op="get_attr")
    return sum(node.target == codes.target for node in nodes) == 1


@torch.no_grad()
def _fold(owner: GraphModule, node: Node, norm_node: Node, op: OpInfo) -> None:
    bound = op.bind(node)
    norm: Any = owner.get_submodule(str(norm_node.target))
    (operand,) = [o for o in op.operands(bound) if o.role == "weight"]
    weight: Node = bound["weight"]
    scale, shift = affine(norm)
    layout = op.layout_of(bound, operand)
    prefix = stored_name(weight, 0).removesuffix(".codes")
    _scale_grid(owner, weight, scale, layout)
    bias = bound.get("bias")
    old: Tensor | float = 0.0
    if isinstance(bias, Node):
        old = attribute(owner, str(bias.target)).double()
    folded = (old - norm.running_mean.double()) * scale + shift
    kind = weight.args[3]
    assert isinstance(kind, torch.dtype)
    holder = owner.get_submodule(prefix)
    holder.register_buffer("folded_bias", folded.to(kind))
    with owner.graph.inserting_before(node):
        source = owner.graph.get_attr(f"{prefix}.folded_bias")
    op.with_argument(node, "bias", source)
    if isinstance(bias, Node) and not bias.users:
        owner.graph.erase_node(bias)
    norm_node.replace_all_uses_with(node)
    owner.graph.erase_node(norm_node)


def _scale_grid(
    owner: GraphModule, weight: Node, scale: Tensor, layout: ChannelLayout
) -> None:
    """Multiply the steps and offsets of a weight; one step becomes one per channel."""
    codes = attribute(owner, stored_name(weight, 0))
    factor = over_channels(scale, layout, codes)
    for position in (1, 2):
        prefix, _, name = stored_name(weight, position).rpartition(".")
        holder = owner.get_submodule(prefix)
        old = getattr(holder, name)
        setattr(holder, name, (old.double() * factor).to(old.dtype))
