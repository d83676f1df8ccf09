"""What a run does where nothing is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gdnsq_fx
from gdnsq_fx.sites import assign_targets, hard_bits
from gdnsq_fx.training.recipe import default_rate, default_schedule


def _prepared(bits: int) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(32, 6)
    config = gdnsq_fx.QuantConfig(bits, bits, first_last=None)
    return gdnsq_fx.prepare(model, x, config, [x])


@pytest.mark.parametrize(("bits", "rate"), [(1, 3e-3), (2, 1e-3), (3, 3e-4), (8, 1e-4)])
def test_rate_by_the_median_target_of_weights(bits: int, rate: float) -> None:
    qmodel = _prepared(bits)
    assign_targets(qmodel, {"0.input": 1, "2.weight": 8})
    assert default_rate(qmodel, come_down=False) == rate
    assert default_rate(qmodel, come_down=True) == 1e-3


def test_fixed_targets_are_held_from_the_first_step() -> None:
    schedule = default_schedule(100)
    assert {schedule.cap(step, 2) for step in range(100)} == {2.0}
    qmodel = _prepared(2)
    x = torch.randn(32, 6)
    result = gdnsq_fx.finetune(qmodel, [x], steps=5, progress=False)
    assert all(record.mean_bits <= 2.0 + 1e-4 for record in result.history)
    assert set(hard_bits(qmodel).values()) == {2}
