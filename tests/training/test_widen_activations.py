"""Which activations start wider, and when."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.sites import activation_sites, assign_targets
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.widen_activations import WIDER


def _prepared() -> GraphModule:
    """Behind one ReLU each, but for the first, which is signed."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)]
    example = torch.randn(64, 8)
    config = gdnsq_fx.QuantConfig(1, 1, first_last=None)
    return gdnsq_fx.prepare(nn.Sequential(*layers).eval(), example, config, [example])


def _levels(qmodel: GraphModule) -> dict[str, tuple[float, float, int]]:
    quantizers = [site.quantizer for site in activation_sites(qmodel)]
    with torch.no_grad():
        return {
            q.edge: (float(q.offset), float(q.step), q.levels()) for q in quantizers
        }


@pytest.mark.parametrize("start", [1.0, 8.0])
def test_binary_ones_that_start_at_their_target(start: float) -> None:
    qmodel = _prepared()
    assign_targets(qmodel, {"4.input": 2})
    before = _levels(qmodel)
    Constraint(qmodel).open_to(start)
    after = _levels(qmodel)
    if start > 1.0:  # all come down from there, and are placed anew
        assert {levels for _, _, levels in after.values()} == {256}
        return
    assert after["0.input"] == before["0.input"]  # signed
    assert after["4.input"] == before["4.input"]  # two bits
    lowest, step, levels = before["2.input"]
    assert lowest == 0.0 and after["2.input"] == (
        0.0,
        pytest.approx(WIDER * step),
        levels,
    )


def test_a_plan_of_one_bit_starts_wider_too() -> None:
    qmodel = _prepared()
    before = _levels(qmodel)
    example = torch.randn(64, 8)
    budget = gdnsq_fx.Budget(mean_act_bits=1.0, mean_weight_bits=1.0)
    schedule = gdnsq_fx.Schedule(1, start_bits=1.0)
    gdnsq_fx.finetune(
        qmodel,
        [example],
        steps=1,
        budget=budget,
        schedule=schedule,
        lr=1e-9,
        progress=False,
    )
    after = _levels(qmodel)
    assert after["2.input"][1] > 1.4 * before["2.input"][1]
    assert after["0.input"][1] < 1.1 * before["0.input"][1]
