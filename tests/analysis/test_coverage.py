"""Coverage, size and bit operations on a model small enough to count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations

import gdnsq_fx
from gdnsq_fx.analysis.coverage import Coverage, Totals, coverage_of, totals_of


class Net(nn.Module):
    """MACs: conv 4*3*3*2 * 16 = 1152, fc 5 * 64 = 320. Parameters: 72+4, 8, 320+5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


def _analyzed(model: nn.Module | None = None, **options: Any) -> GraphModule:
    torch.manual_seed(0)
    x = torch.randn(8, 2, 4, 4)
    config = gdnsq_fx.QuantConfig(**{"first_last": None, **options})
    qmodel = gdnsq_fx.prepare(model or Net(), x, config, [x])
    gdnsq_fx.analyze(qmodel, [x], draws=1)
    return qmodel


def test_everything_quantized() -> None:
    assert coverage_of(_analyzed()) == Coverage(1.0, 1.0, ())


@pytest.mark.parametrize(
    ("exclude", "macs", "weights"),
    [("fc", 1152 / 1472, 72 / 392), ("conv", 320 / 1472, 320 / 392)],
)
def test_excluded_layer(exclude: str, macs: float, weights: float) -> None:
    found = coverage_of(_analyzed(exclude=(exclude,)))
    assert (found.macs, found.weights) == pytest.approx((macs, weights))
    (skip,) = found.skipped
    assert skip.name == exclude
    assert "excluded" in skip.reason
    assert skip.source.startswith("test_coverage.py:")


def test_totals_per_channel() -> None:
    """W4A2: codes of 4 bits; a step and an offset of 8 bytes for each channel."""
    found = totals_of(_analyzed(weight_bits=4, act_bits=2))
    floats = 4 + 8 + 5
    packed = 72 // 2 + 8 * 4 + 320 // 2 + 8 * 5
    assert found == Totals(
        size_bytes=packed + 4 * floats,
        float_size_bytes=4 * (72 + 320 + floats),
        macs=1472,
        bops=1472 * 4 * 2,
        float_bops=1472 * 32 * 32,
    )


def test_totals_per_tensor_and_mixed() -> None:
    overrides = {"fc": {"weight_bits": 3, "act_bits": 8}}
    found = totals_of(
        _analyzed(weight_bits=2, act_bits=1, per_channel=False, overrides=overrides)
    )
    assert found.size_bytes == 72 // 4 + 8 + 320 * 3 // 8 + 8 + 4 * 17
    assert found.bops == 1152 * 2 * 1 + 320 * 3 * 8


def test_floating_point_operands_count_as_32_bits() -> None:
    found = totals_of(_analyzed(weight_bits=4, act_bits=2, exclude=("fc",)))
    assert found.bops == 1152 * 8 + 320 * 32 * 32
    assert found.size_bytes == 36 + 32 + 4 * (4 + 8 + 325)


class Tied(nn.Module):
    """One weight of 16 elements, used twice, and an embedding of 24."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.mix(self.embed(x))))


def test_shared_weight_counts_once_and_its_macs_twice() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 6, (8, 3))
    config = gdnsq_fx.QuantConfig(4, 4, first_last=None, per_channel=False)
    qmodel = gdnsq_fx.prepare(Tied(), x, config, [x])
    gdnsq_fx.analyze(qmodel, [x], draws=1)
    totals, coverage = totals_of(qmodel), coverage_of(qmodel)
    assert totals.macs == 2 * 3 * 16
    assert totals.size_bytes == 16 // 2 + 8 + 24 // 2 + 8
    assert totals.float_size_bytes == 4 * (16 + 24)
    assert coverage.macs == 1.0
    assert coverage.weights == 1.0
    assert coverage.skipped == ()


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, None])
def test_shares_stay_within_one(wrap: Any) -> None:
    model = Net()
    if wrap is not None:
        wrap(model.fc)
    found = coverage_of(_analyzed(model))
    assert 0.0 <= found.macs <= 1.0
    assert 0.0 <= found.weights <= 1.0


class LowRank(nn.Module):
    """A weight of 20 x 20 made of 2 * 20 parameters."""

    def forward(self, row: Tensor) -> Tensor:
        return row.outer(row)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight[0].clone()


def test_weight_larger_than_its_parameters() -> None:
    layer = nn.Linear(20, 20, bias=False)
    nn.utils.parametrize.register_parametrization(
        layer, "weight", LowRank(), unsafe=True
    )
    torch.manual_seed(0)
    x = torch.randn(4, 20)
    config = gdnsq_fx.QuantConfig(4, 4, first_last=None)
    qmodel = gdnsq_fx.prepare(nn.Sequential(layer), x, config, [x])
    report = gdnsq_fx.analyze(qmodel, [x], draws=1)
    assert 0.0 <= report.coverage.weights <= 1.0
    assert report.totals.size_bytes > 0
