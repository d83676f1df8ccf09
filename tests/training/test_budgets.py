"""Global budgets: met exactly by learned bits, which follow what an edge is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.errors import BudgetError, ConfigError, TrainingDivergedError
from gdnsq_fx.sites import hard_bits, sites
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.constraint_choice import constraint_for
from gdnsq_fx.training.learned_bits import LearnedBits


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(x + self.conv2(x))
        return self.fc(torch.relu(self.conv3(x)).mean((2, 3)))


class Transformer(nn.Module):
    """One block with products of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).transpose(-1, -2) / 4.0
        x = x + self.out(scores.softmax(-1) @ self.value(y))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.mean(1))


class Parallel(nn.Module):
    """Two branches alike, of which the second hardly reaches the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.strong, self.weak = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return 4.0 * self.strong(x) + 0.004 * self.weak(torch.tanh(x))


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    ConvNet: (8, 1, 6, 6),
    Transformer: (8, 6, 16),
    Parallel: (32, 16),
}


def _prepared(kind: type[nn.Module]) -> tuple[GraphModule, list[Tensor], CostModel]:
    torch.manual_seed(0)
    model = kind().eval()
    batches = list(torch.randn(4, *SHAPES[kind]))
    config = gdnsq_fx.QuantConfig(3, 3, first_last=None)
    qmodel = gdnsq_fx.prepare(model, batches[0], config, batches)
    return qmodel, batches, CostModel.of(qmodel)


def _finetune(
    qmodel: GraphModule,
    batches: Sequence[Any],
    budget: gdnsq_fx.Budget | None,
    steps: int = 60,
    **options: Any,
) -> gdnsq_fx.FinetuneResult:
    return gdnsq_fx.finetune(
        qmodel, batches, steps=steps, budget=budget, progress=False, **options
    )


def _state(qmodel: GraphModule) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in qmodel.state_dict().items()}


def _targets(qmodel: GraphModule) -> dict[str, int]:
    return {site.edge: site.quantizer.spec.bits for site in sites(qmodel)}


BOUNDS = (
    ("weight_bytes",),
    ("bops",),
    ("mean_weight_bits",),
    ("mean_act_bits",),
    ("weight_bytes", "bops"),
    ("mean_weight_bits", "mean_act_bits"),
    ("weight_bytes", "bops", "mean_weight_bits", "mean_act_bits"),
)


@pytest.mark.parametrize("names", BOUNDS, ids="+".join)
@pytest.mark.parametrize("kind", [ConvNet, Transformer])
def test_every_bound_is_met(kind: type[nn.Module], names: tuple[str, ...]) -> None:
    qmodel, batches, cost = _prepared(kind)
    # Between 2 and 3 bits everywhere, so that no uniform assignment uses it up.
    two, three = (cost.costs(dict.fromkeys(cost.edges, b)) for b in (2, 3))
    bounds = {name: 0.6 * two[name] + 0.4 * three[name] for name in names}
    budget = gdnsq_fx.Budget(**bounds)
    result = _finetune(qmodel, batches, budget)
    measured = cost.costs(hard_bits(qmodel))
    assert result.costs == measured and result.bits == hard_bits(qmodel)
    assert all(measured[name] <= bound for name, bound in bounds.items()), measured
    assert result.budget_met and result.budget == budget
    assert result.target_bits == _targets(qmodel)
    # Not by giving everything away: no edge could have one bit more.
    targets = result.target_bits
    raised = [{**targets, e: bits + 1} for e, bits in targets.items() if bits < 8]
    assert not any(cost.meets(more, budget) for more in raised)
    assert len(set(result.target_bits.values())) > 1, result.target_bits
    assert f"{measured[names[0]]:,.6g} of {bounds[names[0]]:,.6g}" in str(result)


def test_ceilings_hold_beside_a_total() -> None:
    qmodel, batches, cost = _prepared(ConvNet)
    bytes_ = cost.weight_bytes(dict.fromkeys(cost.edges, 2))
    budget = gdnsq_fx.Budget(act_bits=4, weight_bytes=bytes_)
    bits = _finetune(qmodel, batches, budget).target_bits
    assert {bits[edge] for edge in cost.activations} == {4}
    assert cost.weight_bytes(bits) <= bytes_
    assert len({bits[edge] for edge in cost.weights}) > 1


def test_ceilings_alone_are_uniform() -> None:
    qmodel, batches, cost = _prepared(ConvNet)
    budget = gdnsq_fx.Budget(act_bits=3, weight_bits=2)
    bits = _finetune(qmodel, batches, budget, steps=20).target_bits
    wanted = dict.fromkeys(cost.weights, 2) | dict.fromkeys(cost.activations, 3)
    assert bits == wanted


def test_allocate_knows_ceilings() -> None:
    qmodel, batches, cost = _prepared(ConvNet)
    budget = gdnsq_fx.Budget(act_bits=2, mean_weight_bits=2.5)
    found = gdnsq_fx.allocate(qmodel, batches, budget)
    assert {found.bits[edge] for edge in cost.activations} == {2}
    assert cost.meets(found.bits, budget)


@pytest.mark.parametrize("ceiling", [2.5, 17, True, 0])
def test_a_ceiling_is_a_whole_number_of_bits(ceiling: Any) -> None:
    with pytest.raises(ConfigError, match="act_bits must be"):
        gdnsq_fx.Budget(act_bits=ceiling)


def test_a_budget_is_a_budget() -> None:
    qmodel, batches, _ = _prepared(ConvNet)
    given: Any = {"weight_bytes": 1000}
    with pytest.raises(ConfigError, match="budget must be a Budget"):
        _finetune(qmodel, batches, given)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_few_steps_meet_it_too(steps: int) -> None:
    qmodel, batches, _ = _prepared(ConvNet)
    budget = gdnsq_fx.Budget(mean_weight_bits=1.2, mean_act_bits=1.5)
    result = _finetune(qmodel, batches, budget, steps)
    assert result.costs is not None
    assert result.costs["mean_weight_bits"] <= 1.2
    assert result.costs["mean_act_bits"] <= 1.5


@pytest.mark.parametrize(
    "options", [{"descent": 1.0}, {"descent": 0.0}, {"start_bits": 4.0}]
)
def test_any_schedule_meets_it(options: dict[str, float]) -> None:
    qmodel, batches, cost = _prepared(ConvNet)
    budget = gdnsq_fx.Budget(bops=cost.bops(dict.fromkeys(cost.edges, 2)) * 1.1)
    schedule = gdnsq_fx.Schedule(30, **options)
    result = _finetune(qmodel, batches, budget, 30, schedule=schedule)
    assert cost.meets(result.bits, budget)


@pytest.mark.parametrize("name", ["weight_bytes", "bops", "mean_act_bits"])
def test_what_cannot_be_is_refused_before_training(name: str) -> None:
    qmodel, batches, cost = _prepared(ConvNet)
    least = cost.costs(dict.fromkeys(cost.edges, 1))[name]
    state, targets = _state(qmodel), _targets(qmodel)
    budget = gdnsq_fx.Budget(**{name: 0.99 * least})
    with pytest.raises(BudgetError, match=f"{name} cannot be .* take {least:,.6g}"):
        _finetune(qmodel, batches, budget)
    assert _targets(qmodel) == targets
    after = qmodel.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_the_least_budget_there_is_can_be_met() -> None:
    qmodel, batches, cost = _prepared(ConvNet)
    least = cost.weight_bytes(dict.fromkeys(cost.edges, 1))
    budget = gdnsq_fx.Budget(weight_bytes=least, act_bits=3)
    bits = _finetune(qmodel, batches, budget, steps=20).bits
    assert {bits[edge] for edge in cost.weights} == {1}


def test_a_run_that_never_began_leaves_targets_as_they_were() -> None:
    qmodel, batches, _ = _prepared(ConvNet)
    state, targets = _state(qmodel), _targets(qmodel)
    poisoned = [torch.full_like(batch, math.nan) for batch in batches]
    with pytest.raises(TrainingDivergedError):
        _finetune(qmodel, poisoned, gdnsq_fx.Budget(mean_weight_bits=2.5))
    assert _targets(qmodel) == targets
    after = qmodel.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


@pytest.mark.parametrize("seed", range(3))
def test_bits_follow_sensitivity(seed: int) -> None:
    """The branches differ in nothing but how far they reach the outputs."""
    qmodel, batches, _ = _prepared(Parallel)
    torch.manual_seed(seed)
    budget = gdnsq_fx.Budget(mean_weight_bits=3, mean_act_bits=3)
    bits = _finetune(qmodel, batches, budget, steps=100).target_bits
    assert bits["strong.weight"] >= bits["weak.weight"] + 2, bits
    assert bits["strong.input"] >= bits["weak.input"] + 2, bits


def test_predictions_make_the_first_plan() -> None:
    qmodel, batches, _ = _prepared(Parallel)
    budget = gdnsq_fx.Budget(mean_weight_bits=3)
    schedule = gdnsq_fx.Schedule(10)
    blind = LearnedBits(qmodel, budget, schedule)
    assert blind.targets["strong.weight"] == blind.targets["weak.weight"] == 3
    blind.undo()
    found = gdnsq_fx.analyze(qmodel, batches, widths=range(1, 9))
    assert found is not None
    planned = LearnedBits(qmodel, budget, schedule).targets
    assert planned["strong.weight"] > planned["weak.weight"]


def test_without_a_budget_nothing_is_learned() -> None:
    """Targets are those of the model, and the constraint is that of fixed ones."""
    qmodel, batches, _ = _prepared(ConvNet)
    targets = _targets(qmodel)
    assert type(constraint_for(qmodel, None, gdnsq_fx.Schedule(20))) is Constraint
    result = _finetune(qmodel, batches, None, steps=20)
    assert result.budget is None and result.costs is None
    assert result.target_bits == _targets(qmodel) == targets


@pytest.mark.parametrize("kind", [ConvNet, Transformer])
def test_converted_saved_and_loaded(kind: type[nn.Module], tmp_path: Path) -> None:
    qmodel, batches, cost = _prepared(kind)
    bytes_ = cost.weight_bytes(dict.fromkeys(cost.edges, 2))
    budget = gdnsq_fx.Budget(weight_bytes=bytes_, mean_act_bits=3.5)
    result = _finetune(qmodel, batches, budget)
    assert len(set(result.bits.values())) > 1
    imodel = gdnsq_fx.convert(qmodel)
    path = tmp_path / "mixed.safetensors"
    gdnsq_fx.save(imodel, path)
    again = gdnsq_fx.load(path, kind(), batches[0])
    with torch.no_grad():
        for batch in batches:
            wanted, got = qmodel(batch), imodel(batch)
            assert (got - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())
            assert torch.equal(again(batch), got)


def test_state_goes_on_where_it_was_taken() -> None:
    qmodel, _, _ = _prepared(Parallel)
    budget, schedule = gdnsq_fx.Budget(mean_weight_bits=3), gdnsq_fx.Schedule(10)
    constraint = LearnedBits(qmodel, budget, schedule)
    constraint.open_to(8.0)
    for step in range(5):
        constraint.project(lambda target, step=step: schedule.cap(step, target))
    state = constraint.state()
    assert bool(state["is_final"])
    constraint.undo()
    other = LearnedBits(qmodel, budget, schedule)
    assert not other.is_final
    other.load_state(state)
    assert other.is_final
    assert all(torch.equal(other.state()[k], v) for k, v in state.items())


def test_tracker_follows_the_targets() -> None:
    qmodel, batches, _ = _prepared(Parallel)
    tracker = gdnsq_fx.CapacityTracker()
    budget = gdnsq_fx.Budget(mean_weight_bits=3, mean_act_bits=3)
    result = _finetune(qmodel, batches, budget, steps=40, tracker=tracker)
    assert tracker.targets == result.target_bits
    assert all(step is not None for step in tracker.first_met.values())
