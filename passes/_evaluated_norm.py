"""BatchNorm in evaluation, with the backward pass of the affine map that it is.

With gamma, the running variance v and one number a channel, ``dy/dx`` is
``gamma / sqrt(v + eps)``. Torch's own backward pass sums up the gradients of gamma and
beta as well, whether or not they are asked for, and keeps the input for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from ._base import has_hooks


def is_affine_norm(module: object) -> bool:
    """Whether a module is a BatchNorm that evaluates with its running statistics."""
    return (
        isinstance(module, _BatchNorm)
        and not module.training
        and type(module).forward is _BatchNorm.forward
        and module.running_mean is not None
        and module.running_var is not None
        and not has_hooks(module)
    )


def affine_norm(norm: Any, value: Tensor) -> Tensor:
    """``norm(value)``, to the bit; its parameters get no gradient.

    Args:
        norm: see `is_affine_norm`.
        value: ``[B, C, ...]``.
    """
    return _AffineNorm.apply(value, norm)  # type: ignore[no-any-return]


class _AffineNorm(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, norm: Any) -> Tensor:
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        ctx.save_for_backward(scale.view(-1, *[1] * (value.ndim - 2)))
        return norm(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = ctx.saved_tensors
        gradient = grad_outputs[0]
        return gradient * scale.to(gradient.dtype), None
