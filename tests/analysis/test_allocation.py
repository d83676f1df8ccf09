"""Allocations against every assignment there is, tried one by one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest

from gdnsq_fx.analysis.allocation import Divergences, best_allocation
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import BudgetError, ConfigError

WIDTHS = (1, 2, 3, 4)


def _case(seed: int) -> tuple[Divergences, CostModel]:
    """Two layers on one input, a product of activations, one operand left in float."""
    draw = random.Random(seed)
    weights = {f"w{i}": draw.randint(10, 400) for i in range(2)}
    activations = {f"a{i}": draw.randint(10, 400) for i in range(3)}
    cost = CostModel(
        weights,
        dict.fromkeys(weights, 3),
        activations,
        {
            ("a0", "w0"): draw.randint(100, 9000),
            ("a0", "w1"): draw.randint(100, 9000),
            ("a1", "a2"): draw.randint(100, 9000),
            ("a2", "a2"): draw.randint(100, 900),
            ("a1", None): draw.randint(10, 90),
            (None, None): 7,
        },
    )
    divergences = {
        edge: {b: draw.uniform(0.1, 9.0) * 4.0**-b for b in WIDTHS}
        for edge in cost.edges
    }
    return divergences, cost


def _best_by_trial(
    divergences: Divergences, cost: CostModel, budget: Budget
) -> Mapping[str, int]:
    choices = itertools.product(WIDTHS, repeat=len(cost.edges))
    every = (dict(zip(cost.edges, bits, strict=True)) for bits in choices)
    met = (bits for bits in every if cost.meets(bits, budget))
    return min(met, key=lambda bits: sum(divergences[e][b] for e, b in bits.items()))


@pytest.mark.parametrize("seed", range(12))
def test_no_assignment_within_the_budget_is_better(seed: int) -> None:
    divergences, cost = _case(seed)
    middle = cost.costs(dict.fromkeys(cost.edges, 2 + seed % 2))
    names = ["weight_bytes", "bops", "mean_weight_bits", "mean_act_bits"]
    chosen = random.Random(seed).sample(names, 1 + seed % 3)
    budget = Budget(**{name: middle[name] for name in chosen})
    found = best_allocation(divergences, cost, budget)
    wanted = _best_by_trial(divergences, cost, budget)
    assert cost.meets(found.bits, budget)
    assert found.predicted_divergence == pytest.approx(
        sum(divergences[e][b] for e, b in wanted.items()), rel=1e-5
    )


def test_a_budget_of_exactly_one_assignment_is_met_by_it() -> None:
    divergences, cost = _case(0)
    least = cost.costs(dict.fromkeys(cost.edges, 1))
    found = best_allocation(divergences, cost, Budget(bops=least["bops"]))
    in_products = {edge for operands in cost.macs for edge in operands if edge}
    assert all(found.bits[edge] == 1 for edge in in_products)


def test_an_infeasible_budget_names_the_smallest_feasible_value() -> None:
    divergences, cost = _case(1)
    least = cost.weight_bytes(dict.fromkeys(cost.edges, 1))
    with pytest.raises(BudgetError, match=f"weight_bytes cannot be .*take {least}"):
        best_allocation(divergences, cost, Budget(weight_bytes=least - 1))


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), True, "3"])
def test_a_bound_is_a_number_above_zero(bound: object) -> None:
    with pytest.raises(ConfigError, match="bops must be a number above 0"):
        Budget(bops=bound)  # type: ignore[arg-type]


def test_a_budget_bounds_something() -> None:
    with pytest.raises(ConfigError, match="at least one of weight_bytes"):
        Budget()
