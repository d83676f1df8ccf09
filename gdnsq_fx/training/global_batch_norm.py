"""BatchNorm with the statistics of the global batch, on any device.

Torch's ``SyncBatchNorm`` has kernels for accelerators and refuses the CPU, where
`GlobalBatchNorm` takes its place.
With n values of a channel over all processes, mean m and variance v,

    y = (x - m) / sqrt(v + eps) * weight + bias,  m = sum x / n,  v = sum (x - m)^2 / n

and the running variance takes n / (n - 1) v (Ioffe & Szegedy, arXiv 1502.03167).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from gdnsq_fx.inputs import model_device

# A subclass may do more than normalize (an activation): it keeps its own forward.
_REPLACED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over all processes, on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``[batch, channels, ...]``; only training is collective."""
        mean, variance = self.running_mean, self.running_var
        if self.training or mean is None or variance is None:
            mean, variance = self._observed(input.float())
        shape = (1, -1) + (1,) * (input.dim() - 2)
        scale = torch.rsqrt(variance + self.eps)
        normalized = (input.float() - mean.view(shape)) * scale.view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(input.dtype)

    def _observed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel over all processes, ``[channels]``."""
        dims = [0, *range(2, values.dim())]
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = _Sum.apply(torch.cat([values.sum(dims), count]))
        mean, total = sums[:-1] / sums[-1], float(sums[-1].detach())
        shape = (1, -1) + (1,) * (values.dim() - 2)
        squares = (values - mean.view(shape)).square().sum(dims)
        variance = _Sum.apply(squares) / total
        self._track(mean.detach(), variance.detach() * (total / max(total - 1, 1)))
        return mean, variance

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not (self.training and self.track_running_stats):
            return
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # torch's sign for a plain average
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Replace the BatchNorm layers of a model, in place; tensors are shared."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in _REPLACED:
                setattr(parent, name, _over_processes(child))


def _over_processes(layer: Any) -> _BatchNorm:
    """A layer with the parameters and buffers of the given one, which both share."""
    device = model_device(layer)
    on_cpu = device is None or device.type == "cpu"
    made = (GlobalBatchNorm if on_cpu else nn.SyncBatchNorm)(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        device="meta",
    )
    for name in _TENSORS:
        setattr(made, name, getattr(layer, name))
    made.training = layer.training
    return made


class _Sum(Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total)
        return total
