"""Budgets met by whole bits from the first step on, revised once where that pays."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.sites import activation_sites, hard_bits
from gdnsq_fx.training.edges import capacity
from gdnsq_fx.training.planned_bits import PlannedBits

SCHEDULE = gdnsq_fx.Schedule(20, start_bits=1.0)
REVISED_AFTER = 5  # half of the descent of 10 steps


class Branches(nn.Module):
    """Two alike, of which the second hardly reaches the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.strong, self.weak = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return 4.0 * self.strong(x) + 0.004 * self.weak(torch.tanh(x))


@pytest.fixture
def prepared() -> tuple[GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    batches = list(torch.randn(4, 32, 16))
    config = gdnsq_fx.QuantConfig(4, 4, first_last=None)
    return gdnsq_fx.prepare(Branches().eval(), batches[0], config, batches), batches


def _planned(qmodel: GraphModule, budget: gdnsq_fx.Budget) -> PlannedBits:
    made = PlannedBits(qmodel, budget, SCHEDULE)
    made.open_to(SCHEDULE.start_bits)
    return made


def _step(plan: PlannedBits, worth: Mapping[str, float]) -> None:
    """A step whose gradients say what a bit of each edge is worth."""
    for edge in plan._edges:
        gradient = torch.full_like(edge.quantizer.log2_step, worth[edge.edge])
        edge.quantizer.log2_step.grad = gradient
    plan.observe_gradients()
    plan.project(float)


def test_it_is_met_before_the_first_step(
    prepared: tuple[GraphModule, list[Tensor]],
) -> None:
    qmodel, _ = prepared
    cost = CostModel.of(qmodel)
    for bits in (2, 3):
        budget = gdnsq_fx.Budget(bops=cost.bops(dict.fromkeys(cost.edges, bits)))
        plan = _planned(qmodel, budget)
        assert set(plan.targets.values()) == {bits}  # blind, so uniform
        assert hard_bits(qmodel) == plan.targets
        plan.undo()


def test_predictions_make_the_first_plan(
    prepared: tuple[GraphModule, list[Tensor]],
) -> None:
    qmodel, batches = prepared
    gdnsq_fx.analyze(qmodel, batches, widths=range(1, 9))
    targets = _planned(qmodel, gdnsq_fx.Budget(mean_weight_bits=3)).targets
    assert targets["strong.weight"] > 3 > targets["weak.weight"]


def test_an_activation_starts_where_calibration_would_place_it(
    prepared: tuple[GraphModule, list[Tensor]],
) -> None:
    qmodel, batches = prepared
    plan = _planned(qmodel, gdnsq_fx.Budget(weight_bits=4, act_bits=2))
    placed = {s.edge: s.quantizer for s in activation_sites(qmodel)}
    torch.manual_seed(0)
    other = gdnsq_fx.prepare(Branches().eval(), batches[0], calibration=batches)
    gdnsq_fx.assign_bits(other, plan.targets, batches)
    for site in activation_sites(other):
        mine = placed[site.edge]
        torch.testing.assert_close(mine.step, site.quantizer.step)
        torch.testing.assert_close(mine.range, site.quantizer.range)


def test_gradients_revise_the_plan_once(
    prepared: tuple[GraphModule, list[Tensor]],
) -> None:
    qmodel, _ = prepared
    plan = _planned(qmodel, gdnsq_fx.Budget(mean_weight_bits=3, act_bits=4))
    worth = {e: 1.0 if e.startswith("strong") else 1e-4 for e in plan.targets}
    for _ in range(REVISED_AFTER - 1):
        _step(plan, worth)
        assert not plan.is_final and plan.targets["strong.weight"] == 3
        assert set(plan.violations()) == set(plan.targets)  # nothing is best yet
    _step(plan, worth)
    assert plan.is_final and not plan.violations()
    assert plan.targets["strong.weight"] > 3 > plan.targets["weak.weight"]
    for edge in plan._edges:
        bits = float(capacity(edge).detach().max())
        assert bits == pytest.approx(plan.targets[edge.edge], abs=0.1)
    settled = plan.targets
    for _ in range(REVISED_AFTER):
        _step(plan, {e: 1.0 if e.startswith("weak") else 1e-4 for e in settled})
    assert plan.targets == settled


def test_what_is_hardly_better_leaves_the_plan(
    prepared: tuple[GraphModule, list[Tensor]],
) -> None:
    qmodel, _ = prepared
    plan = _planned(qmodel, gdnsq_fx.Budget(mean_weight_bits=3))
    first = plan.targets
    worth = {e: 1.2 if e.startswith("strong") else 1.0 for e in first}
    for _ in range(REVISED_AFTER):
        _step(plan, worth)
    assert plan.is_final and plan.targets == first


def test_state_goes_on_where_it_was_taken(
    prepared: tuple[GraphModule, list[Tensor]],
) -> None:
    qmodel, _ = prepared
    budget = gdnsq_fx.Budget(mean_weight_bits=3)
    plan = _planned(qmodel, budget)
    worth = {e: 1.0 if e.startswith("strong") else 1e-4 for e in plan.targets}
    for _ in range(REVISED_AFTER - 1):
        _step(plan, worth)
    state, before = plan.state(), plan.targets
    plan.undo()
    other = PlannedBits(qmodel, budget, SCHEDULE)
    other.load_state(state)
    assert not other.is_final and other.targets == before
    _step(other, worth)
    assert other.is_final and other.targets != before


def test_the_best_state_has_the_bits_of_the_end(
    prepared: tuple[GraphModule, list[Tensor]],
) -> None:
    """A metric that falls from the first step on must not keep the first plan."""
    qmodel, batches = prepared
    metrics = iter(range(100, 0, -1))
    result = gdnsq_fx.finetune(
        qmodel,
        batches,
        steps=40,
        budget=gdnsq_fx.Budget(mean_weight_bits=3),
        validate=lambda _: float(next(metrics)),
        validate_every=1,
        best="max",
        progress=False,
    )
    assert result.bits == hard_bits(qmodel)
    assert result.best_step is not None and result.best_step >= 9
