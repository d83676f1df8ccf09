"""What layers hand to each other lies on eight bits, each tensor on its own grid."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

import gdnsq_fx
from gdnsq_fx.annotations import model_facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import Calibrate, QuantizeBetweenLayers, run_passes
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.sites import activation_sites

_X = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))


class _Block(nn.Module):
    """A sum that writes in place, of a normalized convolution and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y = self.norm(self.conv(x))
        y += x
        return self.last(F.relu(y, inplace=True))


def _prepared(net: nn.Module, **settings: Any) -> GraphModule:
    given: dict[str, Any] = {"weight_bits": 4, "act_bits": 4, "first_last": None}
    config = gdnsq_fx.QuantConfig(**{**given, **settings})
    return gdnsq_fx.prepare(net.eval(), _X, config, [_X])


def _added(qmodel: GraphModule) -> set[str]:
    before = {site.edge for site in activation_sites(qmodel)}
    place = Calibrate([_X], model_facts(qmodel).inputs, added=True)
    run_passes(qmodel, (QuantizeBetweenLayers(), place))
    return {site.edge for site in activation_sites(qmodel)} - before


_AFTER = """\
%0 = x
%1 = self.quantizers.stem_input(%0)
%2 = stem.weight
%3 = self.quantizers.stem_weight(%2)
%4 = stem.bias
%5 = conv2d(%1, %3, %4, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%6 = relu(%5, inplace=True)
%7 = self.quantizers.add__other(%6)
%8 = self.quantizers.conv_input(%7)
%9 = conv.weight
%10 = self.quantizers.conv_weight(%9)
%11 = conv.bias
%12 = conv2d(%8, %10, %11, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
%13 = self.norm(%12)
%14 = self.quantizers.add__input(%13)
%15 = .add_(%14, %7)
%16 = relu(%15, inplace=True)
%17 = self.quantizers.last_input(%16)
%18 = last.weight
%19 = self.quantizers.last_weight(%18)
%20 = last.bias
%21 = conv2d(%17, %19, %20, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
return %21"""


def test_before_and_after(show: Callable[[GraphModule], str]) -> None:
    qmodel = _prepared(_Block())
    result = QuantizeBetweenLayers()(qmodel)
    assert result.modified and show(result.graph_module) == _AFTER
    again = QuantizeBetweenLayers()(qmodel)
    assert again.modified is False and show(qmodel) == _AFTER


def test_only_what_is_new_is_placed_and_little_is_lost() -> None:
    net = _Block()
    qmodel = _prepared(net)
    wanted = qmodel(_X).detach()
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    added = _added(qmodel)
    assert len(added) == 2
    for name, value in before.items():
        assert torch.equal(qmodel.state_dict()[name], value), name
    sites = [s.quantizer for s in activation_sites(qmodel) if s.edge in added]
    assert all(one.levels() == 256 for one in sites)
    for one in sites:  # 0 is a level
        steps = float((one.offset / one.step).detach())
        assert steps == pytest.approx(round(steps), abs=1e-3) and steps <= 0
    error = (qmodel(_X) - wanted).abs().mean() / wanted.abs().mean()
    assert 0 < float(error) < 0.02
    with quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel(_X), net(_X))


def test_a_quantizer_of_eight_bits_serves_others_too() -> None:
    qmodel = _prepared(_Block(), act_bits=8)
    conv_input = qmodel.quantizers.conv_input
    assert _added(qmodel) == {"add_.input"}
    (call,) = [n for n in qmodel.graph.nodes if n.target == "quantizers.conv_input"]
    assert len(call.users) == 2 and len(call.args[0].users) == 1
    assert model_facts(qmodel).between == ("quantizers.conv_input",)
    assert qmodel.quantizers.conv_input is conv_input


class _Two(nn.Module):
    """A concatenation behind a smooth function; a sum that is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = F.silu(self.conv(x))
        total = left + x
        return self.other(torch.cat([left, total], 1)), total


def test_outputs_stay_in_floating_point() -> None:
    qmodel = _prepared(_Two())
    _added(qmodel)
    _, total = qmodel.graph.output_node().args[0]
    assert total.target is operator.add
    read = {str(n.target) for n in total.all_input_nodes}
    assert all(name.startswith("quantizers.") for name in read)
    (cat,) = [n for n in qmodel.graph.nodes if n.target is torch.cat]
    assert {n.op for n in cat.args[0]} == {"call_module"}


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Block()
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x) + x)


def test_what_is_excluded_stays() -> None:
    assert "inner.add_.input" in _added(_prepared(_Outer()))
    added = _added(_prepared(_Outer(), exclude=("inner.*",)))
    assert added == {"add.input", "add.other"}


def test_the_scope_full_has_its_grids() -> None:
    qmodel = _prepared(_Block(), scope="full", act_bits=8)
    assert _added(qmodel) == set()


def test_refusals() -> None:
    with pytest.raises(PassError, match=r"gdnsq_fx\.prepare"):
        QuantizeBetweenLayers()(symbolic_trace(_Block()))
    qmodel = _prepared(_Block())
    with pytest.raises(gdnsq_fx.errors.CalibrationError, match="no batch"):
        gdnsq_fx.convert(qmodel, calibration=[])
