"""A quantizer as it would be at another bit-width; the original stays untouched."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.observer import Observer
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer

SAMPLE_SIZE = 1 << 13


@torch.no_grad()
def at_width(
    quantizer: Quantizer, value: Tensor, bits: int, *, as_calibrated: bool = False
) -> Quantizer:
    """A copy with its levels placed anew for ``bits``, by the rules of `Calibrate`.

    The range of an activation depends on the width: with few levels the least squared
    error asks for clipping that many levels do not need. It is placed on a sample of
    the value, and on the extremes that calibration met.

    Args:
        quantizer: a calibrated one.
        value: what it quantizes; the weight, or a batch of the activation.
        bits: bit-width, 1..16.
        as_calibrated: place the levels of an activation by what calibration found,
            as fine-tuning does, instead of on the value.

    Raises:
        ConfigError: ``bits`` is out of range.
        CalibrationError: the value is not finite.
    """
    placed = copy.deepcopy(quantizer)
    placed.spec = replace(quantizer.spec, bits=bits)
    if isinstance(placed, WeightQuantizer):
        placed.open_to(value, bits)
    elif isinstance(placed, ActivationQuantizer) and as_calibrated:
        placed.change_width(bits)
    elif isinstance(placed, ActivationQuantizer):
        observer = Observer(placed.edge)
        observer.add(_sample(value))
        low, high = placed.observed.tolist()
        observer.low = min(observer.low, low)
        observer.high = max(observer.high, high)
        observer.place(placed)
    return placed


def _sample(value: Tensor) -> Tensor:
    """Some of the values, and the extremes of all."""
    flat = value.detach().reshape(-1)
    if flat.numel() <= SAMPLE_SIZE:
        return flat
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(flat.numel(), (SAMPLE_SIZE,), generator=generator)
    return torch.cat([flat[places.to(flat.device)], torch.stack(torch.aminmax(flat))])
