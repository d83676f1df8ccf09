"""The integer graph in the quantizers of QONNX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy.integer import quantize
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import LowerToQonnx

_X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _converted(**settings: Any) -> GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    config = gdnsq_fx.QuantConfig(**{"first_last": None, **settings})
    return gdnsq_fx.convert(gdnsq_fx.prepare(net, _X, config, [_X]))


_AFTER = """\
%0 = input
%1 = quantizers.0_input.scale
%2 = quantizers.0_input.zero_point
%3 = quantizers.0_input.bit_width
%4 = quant(%0, %1, %2, %3, True, False)
%5 = quantizers.0_weight.values
%6 = quantizers.0_weight.scale
%7 = bipolar_quant(%5, %6)
%8 = 0.bias
%9 = conv2d(%4, %7, %8, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
return %9"""


def test_signed_codes_and_two_levels_about_zero(show) -> None:
    imodel = _converted(weight_bits=1, act_bits=2)
    given = imodel.quantizers.get_submodule("0_input")
    given.offset.copy_(-2 * given.step)
    weight = imodel.quantizers.get_submodule("0_weight")
    weight.offset.copy_(-weight.step / 2)
    step, half = given.step.clone(), weight.step / 2
    values = (weight.codes * 2.0 - 1.0) * half
    model = LowerToQonnx()(imodel).graph_module
    assert show(model) == _AFTER
    grid = model.quantizers.get_submodule("0_input")
    assert torch.equal(grid.scale, step)
    assert float(grid.zero_point) == 0.0 and float(grid.bit_width) == 2.0
    signs = model.quantizers.get_submodule("0_weight")
    assert torch.equal(signs.scale, half) and torch.equal(signs.values, values)
    assert not any(n.endswith(("codes", "step")) for n in model.state_dict())


def test_levels_that_fill_no_power_of_two_are_clamped() -> None:
    imodel = _converted(weight_bits=4, act_bits=3)
    (codes,) = [n for n in imodel.graph.nodes if n.target is quantize]
    codes.args = (*codes.args[:3], 4)
    grid = imodel.quantizers.get_submodule("0_input")
    top = float(grid.step * 4 + grid.offset)
    model = LowerToQonnx()(imodel).graph_module
    (clamp,) = [n for n in model.graph.nodes if n.target is torch.clamp]
    assert clamp.kwargs == {"max": top}


def test_refusals() -> None:
    x = _X[:, 0, 0, :4]
    qmodel = gdnsq_fx.prepare(nn.Linear(4, 2), x, calibration=[x])
    with pytest.raises(PassError, match="needs a converted model"):
        LowerToQonnx()(qmodel)
