"""Penalty and projection on a model of two edges, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import activation_sites, hard_bits, weight_sites
from gdnsq_fx.training.constraint import (
    LOSS_FLOOR,
    LOSS_MEMORY,
    SMOOTHING,
    Constraint,
)
from gdnsq_fx.training.side_by_side import EPSILON

EPS = 1e-3


def _model(
    *,
    weight_bits: int = 1,
    act_bits: int = 1,
    weight_capacity: float = 2.0,
    act_capacity: float = 3.0,
) -> GraphModule:
    """One linear layer: a weight edge of span 3, an activation edge of range 4."""
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 3.0], [1.0, 2.0]]))
    x = torch.tensor([[-1.0, 1.0], [2.0, 3.0]])
    config = gdnsq_fx.QuantConfig(
        weight_bits, act_bits, per_channel=False, first_last=None, offset="free"
    )
    qmodel = gdnsq_fx.prepare(model, x, config, [x])
    with torch.no_grad():
        _weight(qmodel).log2_step.fill_(math.log2(3.0 / (2.0**weight_capacity - 1.0)))
        _activation(qmodel).log2_range.fill_(2.0)
        _activation(qmodel).log2_step.fill_(2.0 - act_capacity)
    return qmodel


def _weight(qmodel: GraphModule) -> WeightQuantizer:
    (site,) = weight_sites(qmodel)
    return site.quantizer


def _activation(qmodel: GraphModule) -> ActivationQuantizer:
    (site,) = activation_sites(qmodel)
    return site.quantizer


def test_constants_are_those_of_the_method() -> None:
    assert (EPSILON, SMOOTHING) == (1e-3, 1e-3)


def test_targets() -> None:
    found = Constraint(_model(weight_bits=2, act_bits=5)).targets
    assert found == {"0.weight": 2, "0.input": 5}


def test_penalty_where_both_sides_violate() -> None:
    """Capacities 2 and 3, targets 1: m_w = m_a = 1/2, excesses 1 + eps and 2 + eps."""
    constraint = Constraint(_model())
    constraint.observe_loss(torch.tensor(2.0))
    wanted = 2.0 * 0.5 * (0.5 * (1 + EPS) + 0.5 * (2 + EPS))
    assert constraint.penalty(0.5).item() == pytest.approx(wanted, rel=1e-5)


def test_penalty_where_one_side_violates() -> None:
    """m_w = (1 + 1e-3) / (1 + 2e-3): the violated side gets all but the smoothing."""
    constraint = Constraint(_model(act_bits=4))
    constraint.observe_loss(torch.tensor(1.0))
    share = (1 + EPS) / (1 + 2 * EPS)
    assert constraint.penalty(1.0).item() == pytest.approx(share * (1 + EPS), rel=1e-5)


def test_penalty_at_the_target_is_the_margin() -> None:
    """cap = T: not violated, but within eps of it."""
    constraint = Constraint(_model(weight_bits=2, act_bits=3))
    constraint.observe_loss(torch.tensor(1.0))
    assert constraint.penalty(1.0).item() == pytest.approx(EPS, rel=1e-2)


def test_no_penalty_below_the_margin() -> None:
    constraint = Constraint(_model(weight_bits=3, act_bits=4))
    constraint.observe_loss(torch.tensor(1.0))
    assert constraint.penalty(1.0).item() == 0.0


def test_penalty_grows_with_t_and_has_a_floor() -> None:
    constraint = Constraint(_model())
    unit = 0.5 * (1 + EPS) + 0.5 * (2 + EPS)
    assert constraint.penalty(0.0).item() == 0.0
    assert constraint.penalty(1.0).item() == pytest.approx(LOSS_FLOOR * unit, rel=1e-5)
    constraint.observe_loss(torch.tensor(1e-6))
    assert constraint.penalty(1.0).item() == pytest.approx(LOSS_FLOOR * unit, rel=1e-5)


def test_penalty_is_in_units_of_the_running_loss() -> None:
    constraint = Constraint(_model())
    unit = 0.5 * (1 + EPS) + 0.5 * (2 + EPS)
    constraint.observe_loss(torch.tensor(1.0))
    loss = torch.tensor(3.0, requires_grad=True)
    constraint.observe_loss(loss)
    mean = LOSS_MEMORY * 1.0 + (1 - LOSS_MEMORY) * 3.0
    penalty = constraint.penalty(1.0)
    assert penalty.item() == pytest.approx(mean * unit, rel=1e-5)
    penalty.backward()
    assert loss.grad is None  # C is a number, not a path to the loss


def test_penalty_gradient_by_hand() -> None:
    """dP/dlog2_step = -1/2 for the activation; span/s / (span/s + 1) for the weight."""
    qmodel = _model()
    constraint = Constraint(qmodel)
    constraint.observe_loss(torch.tensor(1.0))
    constraint.penalty(1.0).backward()
    activation, weight = _activation(qmodel), _weight(qmodel)
    assert activation.log2_step.grad is not None
    assert activation.log2_range.grad is not None
    assert activation.log2_step.grad.item() == pytest.approx(-0.5)
    assert activation.log2_range.grad.item() == pytest.approx(0.5)
    # span / s = 3: d cap / dlog2_step = -3/4; d cap / dmax = 1 / (1 * 4 * ln 2).
    assert weight.log2_step.grad is not None
    assert weight.log2_step.grad.item() == pytest.approx(-0.5 * 3 / 4)
    pull = 0.5 / (4 * math.log(2.0))
    parameter = qmodel.get_parameter("0.weight")
    assert parameter.grad is not None
    wanted = torch.tensor([[-pull, pull], [0.0, 0.0]])
    assert torch.allclose(parameter.grad, wanted, rtol=1e-5)


def test_shares_count_violated_constraints_not_their_size() -> None:
    """Two activations and one weight violated: m_a is twice m_w."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    x = torch.tensor([[-1.0, 1.0], [2.0, 3.0]])
    overrides = {"2": {"weight_bits": 8}}
    config = gdnsq_fx.QuantConfig(
        2, 2, per_channel=False, first_last=None, overrides=overrides
    )
    qmodel = gdnsq_fx.prepare(model, x, config, [x])
    constraint = Constraint(qmodel)
    for site in weight_sites(qmodel):
        site.quantizer.open_to(site.weight(), 5.0)
    for found, capacity in zip(activation_sites(qmodel), (3.0, 6.0), strict=True):
        found.quantizer.open_to(capacity)
    constraint.observe_loss(torch.tensor(1.0))
    share_w, share_a = (1 + EPS) / (3 + 2 * EPS), (2 + EPS) / (3 + 2 * EPS)
    wanted = share_w * (3 + EPS) / 2 + share_a * ((1 + EPS) + (4 + EPS)) / 2
    assert constraint.penalty(1.0).item() == pytest.approx(wanted, rel=1e-4)


def test_one_violated_channel_of_many_is_a_violated_constraint() -> None:
    """Every channel is a constraint; their mean may hide one above its target."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4096)), torch.randn(4, 8)
    config = gdnsq_fx.QuantConfig(2, 8, first_last=None)
    qmodel = gdnsq_fx.prepare(model, x, config, [x])
    constraint = Constraint(qmodel)
    constraint.project(lambda target: target - 0.1)
    with torch.no_grad():  # one channel at 4 bits: violated by 2, by 5e-4 in the mean
        weight = qmodel.get_parameter("0.weight")
        span = weight[0].max() - weight[0].min()
        _weight(qmodel).log2_step[0] = math.log2(float(span) / 15.0)
        _activation(qmodel).log2_step.sub_(2.0)
    assert set(constraint.violations()) == {"0.weight", "0.input"}
    constraint.observe_loss(torch.tensor(1.0))
    # Activation: capacity 9.9, excess 1.9 + eps. Were the weight not counted as
    # violated, m_a would be almost 1 instead of 1/2.
    wanted = 0.5 * (2 + EPS) / 4096 + 0.5 * (1.9 + EPS)
    assert constraint.penalty(1.0).item() == pytest.approx(wanted, rel=1e-3)


def test_projection_follows_the_cap_of_each_target() -> None:
    qmodel = _model(weight_bits=1, act_bits=2, weight_capacity=6.0, act_capacity=7.0)
    constraint = Constraint(qmodel)
    constraint.project(lambda target: target + 2.0)
    (site,) = weight_sites(qmodel)
    assert site.quantizer.capacity(site.weight()).item() == pytest.approx(3.0)
    assert _activation(qmodel).capacity().item() == pytest.approx(4.0)
    assert constraint.violations() == {"0.weight": (3, 1), "0.input": (4, 2)}
    constraint.project(lambda target: target)
    assert constraint.violations() == {}
    assert hard_bits(qmodel) == {"0.weight": 1, "0.input": 2}


def test_opening_starts_over_above_the_target_only() -> None:
    qmodel = _model(weight_bits=1, act_bits=12)
    before = _activation(qmodel).log2_step.item()
    Constraint(qmodel).open_to(8.0)
    assert hard_bits(qmodel)["0.weight"] == 8
    assert _activation(qmodel).log2_step.item() == before


def test_mean_capacity() -> None:
    assert Constraint(_model()).mean_capacity() == pytest.approx(2.5)


def test_model_without_weight_quantizers() -> None:
    """A product of two activations has activation edges only."""

    class Product(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.matmul(torch.tanh(a), torch.tanh(b))

    torch.manual_seed(0)
    example = (torch.randn(3, 4), torch.randn(4, 5))
    config = gdnsq_fx.QuantConfig(2, 2, first_last=None)
    qmodel = gdnsq_fx.prepare(Product(), example, config, [example])
    constraint = Constraint(qmodel)
    constraint.open_to(4.0)
    constraint.observe_loss(torch.tensor(1.0))
    share = (2 + EPS) / (2 + 2 * EPS)
    wanted = share * (2 + EPS)
    assert constraint.penalty(1.0).item() == pytest.approx(wanted, rel=1e-4)
    constraint.project(float)
    assert constraint.violations() == {}
