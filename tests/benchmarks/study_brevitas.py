"""ResNet-20 with Brevitas' quantizers, whose scales are learned, in our training loop.

Weights per channel, signed, with the scale of least squared error as the start
(binary with the mean magnitude where one bit is asked); activations per tensor,
unsigned, their scale placed on the calibration batches by least squared error. Both
scales are parameters from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import brevitas.nn as qnn
import torch
from brevitas.core.function_wrapper import TensorClamp
from brevitas.inject.enum import ScalingImplType, StatsOp
from brevitas.quant.binary import SignedBinaryWeightPerTensorConst
from brevitas.quant.scaled_int import (
    Int8WeightPerChannelFloatMSE,
    Uint8ActPerTensorFloatMSE,
)
from torch import Tensor, nn


class Weight(Int8WeightPerChannelFloatMSE):
    """All 2^B levels, scale learned from its start at the least squared error."""

    narrow_range = False
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS


class BinaryWeight(SignedBinaryWeightPerTensorConst):
    """Two levels, +-scale, learned from its start at the mean magnitude."""

    tensor_clamp_impl = TensorClamp
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.AVE
    scaling_per_output_channel = True


def brevitas_model(
    model: nn.Module, bits: int, calibration: Sequence[Tensor]
) -> nn.Module:
    """Replace all convolutions but the first; returns the model, calibrated.

    Args:
        model: trained; its convolutions are replaced in place.
        bits: of weights and activations.
        calibration: batches that place the scales of the activations.
    """

    class Activation(Uint8ActPerTensorFloatMSE):
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
        collect_stats_steps = len(calibration)

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for name, conv in found[1:]:
        parent, _, own = name.rpartition(".")
        quantized = qnn.QuantConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # pyright: ignore[reportArgumentType]
            conv.stride,  # pyright: ignore[reportArgumentType]
            conv.padding,  # pyright: ignore[reportArgumentType]
            bias=False,
            weight_quant=BinaryWeight if bits == 1 else Weight,
            weight_bit_width=bits,
            input_quant=Activation,
            input_bit_width=bits,
        )
        quantized.weight.data.copy_(conv.weight.data)
        setattr(model.get_submodule(parent), own, quantized)
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for batch in calibration:
            model(batch)
    return model
