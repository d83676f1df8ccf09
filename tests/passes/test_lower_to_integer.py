"""Frozen quantizers become explicit integer nodes; floating-point weights are gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations

from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import (
    FreezeQuantizers,
    InsertQuantizers,
    LowerToInteger,
    PropagateShapes,
    run_passes,
)

_X = torch.randn(8, 4)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


_BEFORE = """\
%0 = x
%1 = self.quantizers.fc_input(%0)
%2 = fc.weight
%3 = self.quantizers.fc_weight(%2)
%4 = fc.bias
%5 = linear(%1, %3, %4)
%6 = self.norm(%5)
return %6"""

_AFTER = """\
%0 = x
%1 = quantizers.fc_input.step
%2 = quantizers.fc_input.offset
%3 = quantize(%0, %1, %2, 3)
%4 = dequantize(%3, %1, %2, torch.float32)
%5 = quantizers.fc_weight.codes
%6 = quantizers.fc_weight.step
%7 = quantizers.fc_weight.offset
%8 = dequantize(%5, %6, %7, torch.float32)
%9 = fc.bias
%10 = linear(%4, %8, %9)
%11 = self.norm(%10)
return %11"""


@pytest.fixture
def frozen(calibrated) -> Any:
    def make(model: nn.Module, x: Tensor = _X, **settings: Any) -> GraphModule:
        return run_passes(calibrated(model, x, **settings), (FreezeQuantizers(),))

    return make


def test_before_and_after(frozen, show) -> None:
    module = frozen(_Net().eval())
    assert show(module) == _BEFORE
    result = LowerToInteger()(module)
    assert result.modified is True
    assert show(result.graph_module) == _AFTER


def test_second_run_changes_nothing(frozen, show) -> None:
    lowered = LowerToInteger()(frozen(_Net().eval())).graph_module
    again = LowerToInteger()(lowered)
    assert again.modified is False and again.graph_module is lowered
    assert show(lowered) == _AFTER


def test_a_graph_without_quantizers_stays(exposed) -> None:
    module = exposed(_Net(), _X)
    result = LowerToInteger()(module)
    assert result.modified is False and result.graph_module is module


@pytest.mark.parametrize("offset", ["free", "half_step", "integer"])
@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_computes_what_the_frozen_model_does(
    frozen, alone, bits: int, offset: str
) -> None:
    settings = {"weight_bits": bits, "act_bits": bits, "offset": offset}
    module = frozen(_Net().eval(), **settings)
    wanted = module(_X)
    result = alone(LowerToInteger(), module)
    assert result.modified
    torch.testing.assert_close(result.graph_module(_X), wanted, rtol=1e-6, atol=1e-6)


def test_holds_only_what_the_graph_reads(frozen) -> None:
    lowered = LowerToInteger()(frozen(_Net().eval())).graph_module
    assert set(lowered.state_dict()) == {
        "quantizers.fc_input.step",
        "quantizers.fc_input.offset",
        "quantizers.fc_weight.codes",
        "quantizers.fc_weight.step",
        "quantizers.fc_weight.offset",
        "fc.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert type(lowered).__mro__[1] is GraphModule


def test_a_parametrized_weight_is_gone_as_well(frozen) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    lowered = LowerToInteger()(frozen(model)).graph_module
    assert not any("parametrizations" in name for name in lowered.state_dict())
    assert not list(lowered.graph.find_nodes(op="call_module"))


def test_mode_and_metadata_stay(frozen) -> None:
    for training in (False, True):
        module = frozen(_Net().train(training))
        module.meta["note"] = "mine"
        lowered = LowerToInteger()(module).graph_module
        assert lowered.meta["note"] == "mine"
        assert all(m.training is training for m in lowered.modules())


def test_the_result_can_be_copied(frozen) -> None:
    lowered = LowerToInteger()(frozen(_Net().eval())).graph_module
    assert torch.equal(copy.deepcopy(lowered)(_X), lowered(_X))
    lowered.graph.lint()


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        F.relu_(y)
        return self.last(y) + y


def test_in_place_operations_that_nobody_reads_stay(frozen) -> None:
    model = _InPlace().eval()
    module = frozen(model)
    wanted = module(_X)
    got = LowerToInteger()(module).graph_module(_X)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(frozen, dtype: torch.dtype) -> None:
    x = _X.to(dtype)
    module = frozen(_Net().eval().to(dtype), x)
    wanted = module(x)
    lowered = LowerToInteger()(module).graph_module
    got = lowered(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


class _TwoPrecisions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).double())


def test_two_precisions_in_one_model(frozen) -> None:
    module = frozen(_TwoPrecisions())
    wanted = module(_X)
    lowered = LowerToInteger()(module).graph_module
    torch.testing.assert_close(lowered(_X), wanted, rtol=1e-6, atol=1e-6)


def test_codes_on_the_edges_are_integers_within_bounds(frozen) -> None:
    lowered = LowerToInteger()(frozen(_Net().eval(), act_bits=9)).graph_module
    (node,) = lowered.graph.find_nodes(op="call_function", target=quantize)
    step, offset = lowered.quantizers.fc_input.step, lowered.quantizers.fc_input.offset
    assert node.args[3] == 511
    codes = quantize(100.0 * _X, step, offset, 511)
    assert codes.dtype == torch.int32
    assert (int(codes.min()), int(codes.max())) == (0, 511)
    assert (
        len(list(lowered.graph.find_nodes(op="call_function", target=dequantize))) == 2
    )


def test_refuses_quantizers_that_still_learn(exposed) -> None:
    steps = (PropagateShapes((_X,)), InsertQuantizers())
    module = run_passes(exposed(_Net(), _X), steps)
    with pytest.raises(
        PassError, match=r"LowerToInteger needs.*FreezeQuantizers first"
    ):
        LowerToInteger()(module)
