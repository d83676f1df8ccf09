"""What the passes that fold BatchNorm share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from gdnsq_fx.channels import ChannelLayout

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


def over_channels(scale: Tensor, layout: ChannelLayout, weight: Tensor) -> Tensor:
    """A vector over output channels, broadcastable to the weight."""
    grouped = layout.grouped(weight)
    reduced = layout.reduced_dims(weight.ndim)
    shape = [1 if d in reduced else n for d, n in enumerate(grouped.shape)]
    return layout.expanded(scale.reshape(shape), weight.shape)
