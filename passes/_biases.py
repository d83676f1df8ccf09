"""Biases as whole multiples of the scale of the accumulator.

A layer computes ``s_x * s_w[c] * (sum of codes) + bias[c]``. With a bias of
``n * s_x * s_w[c]``, n whole, it is an integer times a scale, and every runtime that
accumulates in integers has the same value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import compute_nodes, facts
from gdnsq_fx.deploy.qdq import calls, is_activation, is_weight
from gdnsq_fx.stored import attribute, stored_name

# Half of what int32 holds: the other half is left to the sum of products.
_LARGEST = float(1 << 30)


def snap_biases(owner: GraphModule) -> None:
    """Move each bias of a layer with integer operands to the nearest multiple."""
    for node in compute_nodes(owner):
        op = facts(node).op
        if op is None:
            continue
        bound = op.bind(node)
        value: Any = bound.get("input")
        weight: Any = bound.get("weight")
        bias = bound.get("bias")
        if not isinstance(bias, Node) or bias.op != "get_attr":
            continue
        if not is_activation(value) or not is_weight(weight):
            continue
        snapped = _snapped(owner, value, weight, attribute(owner, str(bias.target)))
        if snapped is None:
            continue
        name = stored_name(weight, 0).rpartition(".")[0] + f".{node.name}_bias"
        prefix, _, attribute_name = name.rpartition(".")
        owner.get_submodule(prefix).register_buffer(attribute_name, snapped)
        with owner.graph.inserting_before(node):
            source = owner.graph.get_attr(name)
        op.with_argument(node, "bias", source)


def _snapped(
    owner: GraphModule, value: Any, weight: Any, bias: Tensor
) -> Tensor | None:
    """The bias on its grid; None where its scales are not along the bias."""
    step = float(value.args[1])
    if calls(weight, "dequantize_per_tensor"):
        scale = torch.tensor(float(weight.args[1]))
    else:
        scale = attribute(owner, stored_name(weight, 1))
        if scale.shape != bias.shape:
            return None
        _make_room(owner, weight, step, bias)
        scale = attribute(owner, stored_name(weight, 1))
    unit = step * scale.double()
    if bool((bias.double().abs() > _LARGEST * unit).any()):
        return None
    return on_multiples(bias, unit).to(bias.dtype)


def on_multiples(bias: Tensor, unit: Tensor) -> Tensor:
    """The nearest whole multiples of the unit, in float64."""
    return torch.round(bias.double() / unit) * unit


def _make_room(owner: GraphModule, weight: Node, step: float, bias: Tensor) -> None:
    """Coarsen channels so fine that their bias would overflow an accumulator.

    What such a channel adds to its bias is below the precision of a float32 bias, as
    where a normalization multiplies it by nearly 0.
    """
    if len(weight.users) > 1:
        return
    prefix, _, name = stored_name(weight, 1).rpartition(".")
    holder = owner.get_submodule(prefix)
    scale: Tensor = getattr(holder, name)
    least = (bias.double().abs() / (step * _LARGEST)).float() * (1.0 + 1e-6)
    coarser = torch.maximum(scale, least)
    if torch.equal(coarser, scale):
        return
    axis: Any = weight.args[3]
    codes: Tensor = attribute(owner, stored_name(weight, 0))
    shape = [1] * codes.ndim
    shape[axis] = -1
    ratio = (scale.double() / coarser.double()).reshape(shape)
    holder.codes = torch.round(codes.double() * ratio).to(codes.dtype)
    setattr(holder, name, coarser)
