"""A quantizer at another width is a copy with levels of its own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.quantize.widths import at_width
from gdnsq_fx.sites import activation_sites, weight_sites


def _values(count: int = 4096) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def qmodel() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(3, 3, first_last=None)
    return gdnsq_fx.prepare(nn.Linear(4, 8), _values(), config, [_values()])


def _noise(quantizer: ActivationQuantizer | WeightQuantizer, value: Tensor) -> float:
    with torch.no_grad():
        return float((quantizer.quantize(value) - value).square().mean())


@pytest.mark.parametrize("bits", [1, 2, 5, 8, 12])
def test_levels_and_the_original(qmodel: torch.fx.GraphModule, bits: int) -> None:
    (weight,), (activation,) = weight_sites(qmodel), activation_sites(qmodel)
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    kernel = weight.weight().detach()
    one = at_width(weight.quantizer, kernel, bits)
    other = at_width(activation.quantizer, _values(), bits)
    assert isinstance(one, WeightQuantizer) and isinstance(other, ActivationQuantizer)
    assert other.levels() == 2**bits
    # Eight bits of a weight are int8 around 0: fewer levels where it is lopsided.
    levels = int(one.levels(kernel).max())
    assert levels == 2**bits if bits != 8 else 2**7 < levels <= 2**8
    assert one.spec.bits == other.spec.bits == bits
    assert all(torch.equal(qmodel.state_dict()[k], v) for k, v in before.items())
    assert weight.quantizer.spec.bits == activation.quantizer.spec.bits == 3


def test_error_falls_with_the_width(qmodel: torch.fx.GraphModule) -> None:
    """Also far above the width of calibration, whose clamp would cut off the tails."""
    (weight,), (activation,) = weight_sites(qmodel), activation_sites(qmodel)
    for quantizer, value in (
        (weight.quantizer, weight.weight().detach()),
        (activation.quantizer, _values()),
    ):
        noise = [_noise(at_width(quantizer, value, b), value) for b in range(1, 9)]
        assert all(after < before for before, after in pairwise(noise))
        # Five bits are 30 dB, less what tails cost; the clamp of three bits, which
        # cuts off a quarter of its own noise, would stop at 6 dB.
        assert noise[7] < noise[2] / 4**4


def test_a_width_out_of_range_is_an_error(qmodel: torch.fx.GraphModule) -> None:
    (activation,) = activation_sites(qmodel)
    with pytest.raises(ConfigError):
        at_width(activation.quantizer, _values(), 17)
