"""Quantizers after training: fixed steps, whole levels, nothing to learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.levels import from_codes, to_codes, wide
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer


class FrozenActivation(nn.Module):
    """An activation quantizer with fixed buffers ``step`` and ``offset``.

    Attributes:
        edge: name of the edge.
        max_code: largest code; the levels are ``step * k + offset``, k in 0..max_code.
    """

    step: Tensor
    offset: Tensor

    @torch.no_grad()
    def __init__(self, learned: ActivationQuantizer) -> None:
        super().__init__()
        self.edge = learned.edge
        self.max_code = learned.levels() - 1
        self.register_buffer("step", learned.step.detach().clone())
        self.register_buffer("offset", learned.offset.detach().clone())

    def forward(self, value: Tensor) -> Tensor:
        """The same levels as the learned quantizer, by the same arithmetic."""
        codes = to_codes(wide(value, self.step), self.step, self.offset)
        codes = codes.clamp_(0.0, self.max_code)
        return from_codes(codes, self.step, self.offset).to(value.dtype)

    def extra_repr(self) -> str:
        """Edge and number of levels."""
        return f"{self.edge}, levels={self.max_code + 1}"


class FrozenWeight(nn.Module):
    """A weight as whole codes; the buffers broadcast over the plain weight.

    Attributes:
        edge: name of the edge.
        codes: whole numbers from 0, shape of the weight, uint8 or int32.
        step, offset: float, broadcastable to ``codes``.
        dtype: of the weight.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor

    @torch.no_grad()
    def __init__(self, learned: WeightQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.edge = learned.edge
        self.dtype = weight.dtype
        self.max_code = int(learned.levels(weight).max()) - 1
        kind = code_dtype(self.max_code)
        self.register_buffer("codes", learned.codes(weight).to(kind))
        shape = weight.shape
        self.register_buffer("step", learned.layout.expanded(learned.step, shape))
        offset = learned.layout.expanded(learned.offset(weight), shape)
        self.register_buffer("offset", offset)

    def forward(self, value: Tensor) -> Tensor:
        """The quantized weight; the floating-point one is not needed any more."""
        del value
        kind = torch.promote_types(self.dtype, self.step.dtype)
        return from_codes(self.codes.to(kind), self.step, self.offset).to(self.dtype)

    def extra_repr(self) -> str:
        """Edge, shape and number of levels."""
        return f"{self.edge}, {tuple(self.codes.shape)}, levels={self.max_code + 1}"


def code_dtype(largest: int) -> torch.dtype:
    """The integer type that holds codes from 0 to ``largest``."""
    return torch.uint8 if largest < 256 else torch.int32
