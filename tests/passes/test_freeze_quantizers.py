"""Learned quantizers become fixed ones with whole levels; values stay the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import (
    FreezeQuantizers,
    InsertQuantizers,
    PropagateShapes,
    run_passes,
)
from gdnsq_fx.quantize.frozen import FrozenActivation, FrozenWeight
from gdnsq_fx.sites import activation_sites, sites, weight_sites

_X = torch.randn(8, 4, 5, 5)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.conv(x).relu()).mean((2, 3)))


@pytest.fixture
def prepared(calibrated) -> Any:
    def make(model: nn.Module, x: Tensor = _X, **settings: Any) -> GraphModule:
        return calibrated(model, x, **settings)

    return make


def _frozen(module: GraphModule) -> dict[str, Any]:
    return dict(module.quantizers.named_children())


def test_the_graph_stays_and_the_modules_change(prepared, show) -> None:
    module = prepared(_Net(), weight_bits=3, act_bits=2)
    before = show(module)
    assert FreezeQuantizers()(module).modified is True
    assert show(module) == before
    assert {k: repr(v) for k, v in _frozen(module).items()} == {
        "conv_input": "FrozenActivation(conv.input, levels=4)",
        "conv_weight": "FrozenWeight(conv.weight, (4, 4, 3, 3), levels=8)",
        "up_input": "FrozenActivation(up.input, levels=4)",
        "up_weight": "FrozenWeight(up.weight, (4, 2, 2, 2), levels=8)",
        "fc_input": "FrozenActivation(fc.input, levels=4)",
        "fc_weight": "FrozenWeight(fc.weight, (3, 4), levels=8)",
    }


def test_second_run_changes_nothing(prepared) -> None:
    module = prepared(_Net())
    FreezeQuantizers()(module)
    first = _frozen(module)
    assert FreezeQuantizers()(module).modified is False
    assert all(_frozen(module)[k] is v for k, v in first.items())


def test_a_graph_without_quantizers_stays(exposed) -> None:
    assert FreezeQuantizers()(exposed(_Net(), _X)).modified is False


@pytest.mark.parametrize("offset", ["free", "half_step", "integer"])
@pytest.mark.parametrize("bits", [1, 2, 5, 8, 16])
def test_computes_exactly_what_the_learned_quantizers_did(
    prepared, alone, bits: int, offset: str
) -> None:
    settings = {"weight_bits": bits, "act_bits": bits, "offset": offset}
    module = prepared(_Net(), **settings)
    wanted = module(_X)
    result = alone(FreezeQuantizers(), module)
    assert result.modified and torch.equal(result.graph_module(_X), wanted)


def test_a_range_between_whole_levels(prepared) -> None:
    """q/s = 5.6 has round(4.6) + 1 = 6 levels before freezing and after."""
    module = prepared(_Net())
    for site in activation_sites(module):
        site.quantizer.log2_range.data = site.quantizer.log2_step + math.log2(5.6)
    for site in weight_sites(module):
        site.quantizer.log2_step.data += 0.3
    wanted = module(_X)
    FreezeQuantizers()(module)
    assert torch.equal(module(_X), wanted)
    assert _frozen(module)["conv_input"].max_code == 5


def test_codes_are_whole_and_the_smallest_type_that_holds_them(prepared) -> None:
    wide = {"fc": {"weight_bits": 9}}
    module = prepared(_Net(), weight_bits=8, overrides=wide, offset="free")
    FreezeQuantizers()(module)
    found = {k: v for k, v in _frozen(module).items() if isinstance(v, FrozenWeight)}
    types = {name: frozen.codes.dtype for name, frozen in found.items()}
    assert types == {
        "conv_weight": torch.uint8, "up_weight": torch.uint8, "fc_weight": torch.int32
    }  # fmt: skip
    assert {int(frozen.codes.min()) for frozen in found.values()} == {0}
    assert {int(frozen.codes.max()) for frozen in found.values()} == {255, 511}


def test_nothing_is_left_to_learn(prepared) -> None:
    module = prepared(_Net())
    FreezeQuantizers()(module)
    assert sites(module) == []
    assert not list(module.quantizers.parameters())
    kinds = {type(frozen) for frozen in _frozen(module).values()}
    assert kinds == {FrozenActivation, FrozenWeight}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(prepared, dtype: torch.dtype) -> None:
    x = _X.to(dtype)
    module = prepared(_Net().to(dtype), x)
    wanted = module(x)
    FreezeQuantizers()(module)
    got = module(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_a_double_weight_just_below_a_tie(prepared) -> None:
    """In single precision it is a tie, and would round to another code."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    weight = torch.tensor([[0.0, 1.5 - 1e-10, 3.0, 1.0]], dtype=torch.float64)
    model[0].weight.data = weight
    x = torch.randn(8, 4, dtype=torch.float64)
    module = prepared(model, x, weight_bits=2)
    (site,) = weight_sites(module)
    site.quantizer.log2_step.data.zero_()
    wanted = site.quantizer(weight)
    FreezeQuantizers()(module)
    assert torch.equal(_frozen(module)["0_weight"](weight), wanted)


def test_refuses_what_is_not_calibrated(exposed) -> None:
    steps = (PropagateShapes((_X,)), InsertQuantizers())
    module = run_passes(exposed(_Net(), _X), steps)
    with pytest.raises(PassError, match=r"conv\.\w+ has no finite step; calibrate or"):
        FreezeQuantizers()(module)


def test_refuses_weights_that_are_not_finite(prepared) -> None:
    module = prepared(_Net())
    module.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(PassError, match=r"fc\.weight holds NaN or infinite values"):
        FreezeQuantizers()(module)
    assert len(sites(module)) == 6
