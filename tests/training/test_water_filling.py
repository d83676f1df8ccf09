"""Continuous costs, water-filling and sensitivities against what they stand for."""

from __future__ import annotations

import random

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.analysis.continuous_cost import ContinuousCost
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.sites import sites
from gdnsq_fx.training.edges import mean_capacities, slope
from gdnsq_fx.training.sensitivity import Sensitivity
from gdnsq_fx.training.water_filling import water_filled

MODEL = CostModel(
    {"w0": 320, "w1": 80},
    {"w0": 3, "w1": 1},
    {"a0": 40, "a1": 16, "a2": 64},
    {
        ("a0", "w0"): 900,
        ("a1", "w1"): 2500,
        ("a1", "a2"): 300,
        ("a2", "a2"): 70,
        ("a2", None): 11,
        (None, None): 7,
    },
)
COST = ContinuousCost(MODEL)
TOTALS = ["weight_bytes", "bops", "mean_weight_bits", "mean_act_bits"]


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", TOTALS)
def test_whole_bits_cost_what_the_cost_model_says(name: str, seed: int) -> None:
    draw = random.Random(seed)
    bits = {edge: draw.randint(1, 8) for edge in MODEL.edges}
    found = COST(name, _vector(list(bits.values())))
    assert float(found) == pytest.approx(MODEL.costs(bits)[name], rel=1e-12)


@pytest.mark.parametrize("name", TOTALS)
def test_marginal_is_the_derivative(name: str) -> None:
    bits = _vector([2.0, 3.0, 1.5, 4.0, 2.5])
    for place, found in enumerate(COST.marginal(name, bits).tolist()):
        more, less = bits.clone(), bits.clone()
        more[place] += 1e-3
        less[place] -= 1e-3
        wanted = float(COST(name, more) - COST(name, less)) / 2e-3
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["weight_bytes", "mean_act_bits"])
def test_water_filling_loses_least(name: str, seed: int) -> None:
    """Against a solver that knows nothing of water, for costs that are sums."""
    generator = torch.Generator().manual_seed(seed)
    sensitivities = torch.rand(5, generator=generator).double() * 30.0 + 0.1
    capacities = torch.rand(5, generator=generator).double() * 4.0 + 3.0
    floors = torch.full((5,), 1.0, dtype=torch.float64)
    low, high = float(COST(name, floors)), float(COST(name, capacities))
    limit = 0.6 * low + 0.4 * high
    found = water_filled(
        COST,
        name,
        limit,
        capacities=capacities,
        floors=floors,
        sensitivities=sensitivities,
    )
    assert float(COST(name, found)) == pytest.approx(limit, rel=1e-9)
    assert float(COST(name, found)) <= limit

    def loss(bits: Tensor) -> float:
        return float((sensitivities * torch.exp2(-2.0 * bits)).sum())

    solved = minimize(
        lambda x: loss(_vector(list(x))),
        floors.numpy() + 0.1,
        bounds=list(zip(floors.tolist(), capacities.tolist(), strict=True)),
        constraints={
            "type": "ineq",
            "fun": lambda x: limit - float(COST(name, _vector(list(x)))),
        },
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert solved.success
    assert loss(found) <= float(solved.fun) * (1.0 + 1e-5)


def test_what_costs_nothing_stays() -> None:
    capacities = torch.full((5,), 6.0, dtype=torch.float64)
    found = water_filled(
        COST,
        "weight_bytes",
        float(COST("weight_bytes", capacities)) / 2.0,
        capacities=capacities,
        floors=torch.ones(5, dtype=torch.float64),
        sensitivities=torch.ones(5, dtype=torch.float64),
    )
    assert torch.equal(found[2:], capacities[2:])
    assert bool((found[:2] < 6.0).all())


def test_products_of_bits_come_under_their_limit() -> None:
    capacities = torch.full((5,), 8.0, dtype=torch.float64)
    limit = float(COST("bops", torch.full((5,), 2.0, dtype=torch.float64)))
    found = water_filled(
        COST,
        "bops",
        limit,
        capacities=capacities,
        floors=torch.ones(5, dtype=torch.float64),
        sensitivities=_vector([1e-6, 1.0, 1e3, 1e-2, 1.0]),
    )
    assert 0.999 * limit <= float(COST("bops", found)) <= limit


def test_sensitivity_is_found_through_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = _vector([0.01, 1.0, 30.0])
    learned = Sensitivity(3, memory=100.0)
    for step in range(400):
        bits = torch.full((3,), 8.0 - 6.0 * step / 400.0, dtype=torch.float64)
        slopes = wanted * torch.log(torch.tensor(4.0)) * torch.exp2(-2.0 * bits)
        noise = 0.002 * torch.randn(3, generator=generator, dtype=torch.float64)
        learned.observe(slopes + noise, bits)
    assert torch.allclose(learned.values(), wanted, rtol=0.2)


def test_sensitivity_without_slopes_is_even_and_never_below_zero() -> None:
    learned = Sensitivity(3, memory=10.0)
    assert torch.equal(learned.values(), torch.ones(3, dtype=torch.float64))
    bits = torch.full((3,), 2.0, dtype=torch.float64)
    learned.observe(_vector([0.1, -0.1, float("nan")]), bits)
    first, *others = learned.values().tolist()
    assert first > 0.0 and all(0.0 < other < 0.01 * first for other in others)


@pytest.mark.parametrize("per_channel", [True, False])
def test_slope_is_minus_the_derivative_by_bits(per_channel: bool) -> None:
    """Of a loss that depends on capacities alone it must give their factors back."""
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(3, 2, first_last=None, per_channel=per_channel)
    batch = torch.randn(16, 6)
    qmodel = gdnsq_fx.prepare(nn.Linear(6, 4), batch, config, [batch])
    edges = sites(qmodel)
    factors = _vector([1.0 + place for place in range(len(edges))])
    (factors @ mean_capacities(edges)).backward()
    found = torch.stack([slope(edge) for edge in edges])
    assert torch.allclose(found, -factors, rtol=1e-5)
