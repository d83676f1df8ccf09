"""Where the quantizer of a weight belongs: on the tensor that views were taken of.

    %w = get_attr[attn.in_proj_weight];  %q, %k, %v = chunk(%w, 3);  linear(%x, %q)

The three linear layers share the one quantizer of ``attn.in_proj_weight``, whose axis
of output channels is that of its parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import facts
from gdnsq_fx.channels import PER_TENSOR, ChannelLayout
from gdnsq_fx.stored import computed, stored_value, weight_values


def viewed(node: Node) -> Node | None:
    """The value that a node is a view of, None where it is none."""
    op = facts(node).op
    if op is None or op.kind != "view":
        return None
    (operand,) = op.operands(op.bind(node))
    return operand.value if isinstance(operand.value, Node) else None


def view_chain(node: Node, weights: set[Node]) -> list[Node]:
    """The base of a weight, the views taken of it one after another, and the weight.

    The views may depend on the input (on its sizes, or on indices into a table); the
    base may not. An empty list where the node is no weight.
    """
    chain = [node]
    while (source := viewed(chain[0])) is not None:
        if chain[0] in weights and source not in weights:
            break
        chain.insert(0, source)
    return chain if chain[0] in weights else []


def base_layout(
    owner: GraphModule, chain: list[Node], layout: ChannelLayout
) -> ChannelLayout:
    """The layout of the base that keeps the channels of the weight apart.

    The position of each element along one axis of the base is sent through the views.
    An axis will do if all elements of each channel come from one position along it.

    Args:
        owner: the graph module.
        chain: see `view_chain`.
        layout: of the weight at the end of the chain.
    """
    base = stored_value(owner, chain[0]).detach()
    if len(chain) == 1:
        return layout.resolved(base.ndim)
    others = _other_inputs(owner, chain)
    if others is None:
        return PER_TENSOR
    channels = _channels(_through(owner, chain, base, others), layout)
    if channels is None:
        return PER_TENSOR
    best, count = PER_TENSOR, 1
    for axis, size in enumerate(base.shape):
        shape = [size if d == axis else 1 for d in range(base.ndim)]
        places = torch.arange(size, device=base.device).reshape(shape)
        places = _through(owner, chain, places.expand(base.shape), others)
        if size > count and _is_constant(places, channels):
            best, count = ChannelLayout(axis), size
    return best


def _other_inputs(owner: GraphModule, chain: list[Node]) -> dict[Node, Any] | None:
    """What the views read besides the weight: sizes as they are on the example.

    None where it is not known, as an index that the model computes.
    """
    values: dict[Node, Any] = {}
    fixed = weight_values(owner)
    for node in chain[1:]:
        for other in node.all_input_nodes:
            number = facts(other).number
            if other in chain:
                continue
            if number is None and other not in fixed:
                return None
            known = number is not None
            values[other] = number if known else stored_value(owner, other)
    return values


def _through(
    owner: GraphModule, chain: list[Node], base: Tensor, others: dict[Node, Any]
) -> Tensor:
    """What the views of a chain make of another base."""
    values: dict[Node, Any] = {**others, chain[0]: base}
    for node in chain[1:]:
        values[node] = computed(owner, node, values)
    return values[chain[-1]]


def _channels(weight: Tensor, layout: ChannelLayout) -> Tensor | None:
    """Number of the output channel of each element; None for one scale for all."""
    layout = layout.resolved(weight.ndim)
    if layout.axis is None:
        return None
    kept = layout.grouped(weight).amax(layout.reduced_dims(weight.ndim), keepdim=True)
    numbers = torch.arange(kept.numel(), device=weight.device).reshape(kept.shape)
    return layout.expanded(numbers, weight.shape).expand(weight.shape)


def _is_constant(values: Tensor, groups: Tensor) -> bool:
    """Whether all values of each group are the same."""
    groups, values = groups.reshape(-1), values.reshape(-1)
    first = torch.zeros(int(groups.max()) + 1, dtype=values.dtype, device=values.device)
    first[groups] = values
    return bool((first[groups] == values).all())
