"""ResNet-20 with the quantizers of LSQ (Esser et al., arXiv 1902.08153) as published.

Steps are learned, weights signed and activations unsigned, the bit-width is fixed from
the start. Each step begins at 2 mean(|v|) / sqrt(Qp), of the weights and of the
calibration batches, and its gradient is scaled by 1 / sqrt(count * Qp). At one bit the
levels of a weight are -s/2 and s/2 (the paper has no such case): the two levels that
lie evenly about zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lsq(nn.Module):
    """Quantize to ``bits`` with one learned step.

    Args:
        bits: bit-width.
        signed: weights; else activations that are not negative.
    """

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__()
        self.center = 0.5 if signed and bits == 1 else 0.0
        self.least = -(2.0 ** (bits - 1)) if signed else 0.0
        self.most = (2.0 ** (bits - 1) - 1.0) if signed else 2.0**bits - 1.0
        self.step = nn.Parameter(torch.tensor(math.nan))

    def place(self, values: Tensor) -> None:
        """The initial step of the paper."""
        most = max(self.most, 1.0)
        self.step.data = 2.0 * values.abs().mean() / math.sqrt(most)

    def forward(self, value: Tensor) -> Tensor:
        """The quantized value; gradients pass the rounding straight through."""
        scale = 1.0 / math.sqrt(value.numel() * max(self.most, 1.0))
        step = (self.step * scale) + (self.step * (1.0 - scale)).detach()
        scaled = value / step - self.center
        codes = scaled.clamp(self.least, self.most)
        codes = codes + (codes.round() - codes).detach()
        return (codes + self.center) * step


class LsqConv(nn.Conv2d):
    """A convolution that quantizes its input and its weight."""

    def __init__(self, conv: nn.Conv2d, bits: int) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # pyright: ignore[reportArgumentType]
            conv.stride,  # pyright: ignore[reportArgumentType]
            conv.padding,  # pyright: ignore[reportArgumentType]
            bias=False,
        )
        self.weight.data.copy_(conv.weight.data)
        self.of_weight = Lsq(bits, signed=True)
        self.of_input = Lsq(bits, signed=False)
        self.of_weight.place(conv.weight.data)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve quantized values."""
        weight = self.of_weight(self.weight)
        return F.conv2d(self.of_input(input), weight, None, self.stride, self.padding)


@torch.no_grad()
def lsq_model(model: nn.Module, bits: int, calibration: Sequence[Tensor]) -> nn.Module:
    """Replace all convolutions but the first; returns the model with steps placed.

    Args:
        model: trained, in evaluation; its convolutions are replaced in place.
        bits: of weights and activations.
        calibration: batches that place the steps of the activations.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in found}
    hooks = [
        conv.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].abs().mean())
        )
        for name, conv in found
    ]
    for batch in calibration:
        model(batch)
    for hook in hooks:
        hook.remove()
    for name, conv in found:
        parent, _, own = name.rpartition(".")
        quantized = LsqConv(conv, bits)
        quantized.of_input.place(torch.stack(seen[name]))
        setattr(model.get_submodule(parent), own, quantized)
    return model
