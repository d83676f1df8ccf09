"""What the passes that fold BatchNorm share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from gdnsq_fx.annotations import facts
from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.opinfo import OpInfo

from ._base import has_hooks


def norm_after(owner: GraphModule, node: Node) -> Node | None:
    """The BatchNorm that reads a node's value, None where there is none."""
    for user in node.users:
        if user.op == "call_module":
            module = owner.get_submodule(str(user.target))
            if isinstance(module, _BatchNorm):
                return user
    return None


def kept_as_module(norm: nn.Module) -> str | None:
    """What a norm does besides normalizing with running statistics."""
    if norm.training:
        return "is in training"
    if type(norm).forward is not _BatchNorm.forward:
        return "has a forward of its own"
    if has_hooks(norm):
        return "has hooks"
    return None


def not_foldable(
    owner: GraphModule, node: Node, norm_node: Node, op: OpInfo
) -> str | None:
    """Why a BatchNorm cannot become part of the scales of the layer before it.

    None where it can, provided that the weight belongs to that layer alone.
    """
    norm: Any = owner.get_submodule(str(norm_node.target))
    bias = op.bind(node).get("bias")
    if (kept := kept_as_module(norm)) is not None:
        return f"it {kept}"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    shape = facts(node).shape
    if op.channel_dim != 1 and (
        op.channel_dim is None or shape is None or len(shape) != 2
    ):
        return "its channels are not those of the layer"
    if len(node.users) > 1:
        return "others read the layer's output as well"
    if isinstance(bias, Node) and bias.op != "get_attr":
        return "the bias is computed"
    return None


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies by, and its shift, per channel, in float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.double()
    return scale, shift


def over_channels(scale: Tensor, layout: ChannelLayout, weight: Tensor) -> Tensor:
    """A vector over output channels, broadcastable to the weight."""
    grouped = layout.grouped(weight)
    reduced = layout.reduced_dims(weight.ndim)
    shape = [1 if d in reduced else n for d, n in enumerate(grouped.shape)]
    return layout.expanded(scale.reshape(shape), weight.shape)
