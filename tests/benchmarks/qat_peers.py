"""Other people's quantization-aware training, for `qat_overhead.py`.

Each function takes a floating-point network and returns one whose convolutions and
linear layers are quantized to 4 bits, inputs and weights (what the peer supports of
it), or raises `Absent` with the reason.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = 4

Swap = Callable[[nn.Module], "nn.Module | None"]


class Absent(Exception):
    """A peer does not run here; the message says why."""


def brevitas(model: nn.Module) -> nn.Module:
    """Brevitas: learned-scale activations, weights with a scale for each channel."""
    try:
        import brevitas.nn as quantized
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
    except ImportError as error:
        raise Absent(f"not installed ({error.name})") from error
    options = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": BITS,
        "input_quant": Int8ActPerTensorFloat,
        "input_bit_width": BITS,
    }

    def swap(layer: nn.Module) -> nn.Module | None:
        if type(layer) is nn.Conv2d:
            made = quantized.QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                groups=layer.groups,
                bias=layer.bias is not None,
                **options,
            )
        elif type(layer) is nn.Linear:
            bias = layer.bias is not None
            made = quantized.QuantLinear(
                layer.in_features, layer.out_features, bias, **options
            )
        else:
            return None
        made.load_state_dict(layer.state_dict(), strict=False)
        return made

    return swapped(model, swap)


def torchao(model: nn.Module) -> nn.Module:
    """torchao: fake-quantized linear layers; it has nothing for convolutions."""
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError as error:
        raise Absent(f"not installed ({error.name})") from error
    if any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if len(linear) < 5:
            raise Absent("no convolutions")
    model = copy.deepcopy(model)
    inputs = IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, "per_channel")
    quantize_(
        model,
        QATConfig(activation_config=inputs, weight_config=weights, step="prepare"),
    )
    return model


def lsq(model: nn.Module) -> nn.Module:
    """LSQ (Esser et al., arXiv 1902.08153) written as a composition of operations."""

    def swap(layer: nn.Module) -> nn.Module | None:
        if type(layer) in (nn.Conv2d, nn.Linear):
            return _Lsq(layer)
        return None

    return swapped(model, swap)


def swapped(model: nn.Module, swap: Swap) -> nn.Module:
    """A copy with every layer replaced for which ``swap`` returns another."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            replacement = swap(child)
            if replacement is not None:
                setattr(module, name, replacement)
    return model


class _Lsq(nn.Module):
    """A convolution or linear layer between two LSQ quantizers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight
        assert isinstance(weight, Tensor)
        shape = [len(weight)] + [1] * (weight.ndim - 1)
        start = 2 * weight.detach().abs().mean() / math.sqrt(2 ** (BITS - 1) - 1)
        self.weight_step = nn.Parameter(start.expand(shape).clone())
        self.input_step = nn.Parameter(torch.tensor(2.0 / 2**BITS))

    def forward(self, x: Tensor) -> Tensor:
        """The layer on quantized input and weight."""
        x = _fake_quantized(x, self.input_step)
        layer = self.layer
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        weight = _fake_quantized(layer.weight, self.weight_step)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)


def _fake_quantized(value: Tensor, step: Tensor) -> Tensor:
    """Equations 1 to 3 and the gradient scale of section 2.2 of the paper."""
    low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
    scale = 1.0 / math.sqrt(value.numel() * high)
    step = (step - step * scale).detach() + step * scale
    codes = (value / step).clamp(low, high)
    codes = (codes.round() - codes).detach() + codes
    return codes * step


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Brevitas": brevitas,
    "torchao": torchao,
    "LSQ, plain": lsq,
}
