"""A run under a budget predicts for its plan, and changes nothing else by it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gdnsq_fx
from gdnsq_fx.annotations import KEY, EdgeFacts, facts, model_facts
from gdnsq_fx.errors import BudgetError, CalibrationWarning
from gdnsq_fx.passes import AnalyzeCapacity
from gdnsq_fx.sites import sites
from gdnsq_fx.training import first_prediction
from gdnsq_fx.training.batches import BatchStream
from gdnsq_fx.training.budgeted_bits import predicted_divergences
from gdnsq_fx.training.constraint_choice import Limits
from gdnsq_fx.training.first_prediction import FirstPrediction
from gdnsq_fx.training.losses import distillation_loss, squared_distillation_loss
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.random_state import random_state

STEPS, SAMPLES, SIZE, FEATURES = 20, 80, 8, 12
BUDGET = gdnsq_fx.Budget(mean_weight_bits=3, mean_act_bits=3)
SCHEDULE = gdnsq_fx.Schedule(STEPS, start_bits=1.0)


class Interrupted(Exception):
    """Stands for whatever ends a run early."""


class Branches(nn.Module):
    """Two alike, of which the second hardly reaches the outputs; it draws."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.strong = nn.Linear(FEATURES, outputs)
        self.weak = nn.Linear(FEATURES, outputs)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.relu(self.norm(x)))
        return 4.0 * self.strong(x) + 0.004 * self.weak(torch.tanh(x))


def _samples() -> Tensor:
    own = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, FEATURES, generator=own)


def _prepared(model: nn.Module | None = None) -> GraphModule:
    torch.manual_seed(0)
    batches = _samples().split(SIZE)
    config = gdnsq_fx.QuantConfig(3, 3, first_last=None, estimator="ste")
    model = (Branches() if model is None else model).eval()
    return gdnsq_fx.prepare(model, batches[0], config, batches).train()


def _prediction(qmodel: GraphModule, **changes: Any) -> FirstPrediction:
    made = FirstPrediction(
        qmodel, BUDGET, SCHEDULE, ProcessGroup(), distillation_loss, None, False
    )
    return replace(made, **changes)


def _stream(qmodel: GraphModule, batches: Any, needed: int = 100) -> BatchStream:
    return BatchStream(batches, model_facts(qmodel).inputs, needed, resumable=True)


def _predicted(qmodel: GraphModule, batches: Any, **changes: Any) -> Limits:
    made = _prediction(qmodel, **changes)
    return made.limits_of_new(_stream(qmodel, batches))


# --- the plan ---


def test_the_plan_follows_what_training_begins_with() -> None:
    qmodel = _prepared()
    torch.manual_seed(1)
    # So short that the revision by gradients cannot be what finds it.
    result = gdnsq_fx.finetune(
        qmodel, _samples().split(SIZE), steps=1, budget=BUDGET, progress=False
    )
    bits = result.target_bits
    assert bits["strong.weight"] >= bits["weak.weight"] + 2, bits


def test_what_the_user_predicted_stays_what_the_plan_is_made_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qmodel, batches = _prepared(), _samples().split(SIZE)
    gdnsq_fx.analyze(qmodel, batches, widths=range(1, 9))
    monkeypatch.setattr(first_prediction, "AnalyzeCapacity", _never)
    assert _predicted(qmodel, batches) == Limits(BUDGET)


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": None},
        {"budget": gdnsq_fx.Budget(weight_bits=3, act_bits=3)},
        {"schedule": gdnsq_fx.Schedule(STEPS)},
    ],
)
def test_nothing_is_looked_at_where_no_plan_is_made_of_it(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_prediction, "AnalyzeCapacity", _never)
    assert _predicted(_prepared(), iter([]), **changes).predicted is None


def test_a_budget_that_cannot_be_is_refused_before_any_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(first_prediction, "AnalyzeCapacity", _never)
    with pytest.raises(BudgetError, match="mean_weight_bits cannot be"):
        _predicted(_prepared(), [], budget=gdnsq_fx.Budget(mean_weight_bits=0.5))


@pytest.mark.parametrize(
    ("size", "batches", "given"), [(8, 8, 64), (40, 2, 80), (80, 1, 80)]
)
def test_how_much_is_looked_at(
    size: int, batches: int, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Counting(AnalyzeCapacity):
        def __post_init__(self) -> None:
            seen.extend(len(one.args[0]) for one in self.batches)  # type: ignore[attr-defined]

    monkeypatch.setattr(first_prediction, "AnalyzeCapacity", Counting)
    _predicted(_prepared(), _samples().split(size))
    assert (len(seen), sum(seen)) == (batches, given)
    seen.clear()
    monkeypatch.setattr(first_prediction, "SAMPLES", 4 * size)
    _predicted(_prepared(), _samples().split(size))
    assert len(seen) == min(4, batches)


def _never(*args: object, **kwargs: object) -> None:
    raise AssertionError("there was an analysis")


# --- what it leaves as it was ---


def test_model_facts_and_random_state_are_as_before() -> None:
    qmodel, batches = _prepared(), _samples().split(SIZE)
    gdnsq_fx.analyze(qmodel, batches)  # a report without widths
    state = {name: t.clone() for name, t in qmodel.state_dict().items()}
    modes = [module.training for module in qmodel.modules()]
    meta = [node.meta.get(KEY) for node in qmodel.graph.nodes]
    drawn = random_state()
    assert _predicted(qmodel, batches).predicted is not None
    assert all(torch.equal(t, state[n]) for n, t in qmodel.state_dict().items())
    assert [module.training for module in qmodel.modules()] == modes
    after = [node.meta.get(KEY) for node in qmodel.graph.nodes]
    assert all(now is was for now, was in zip(after, meta, strict=True))
    assert all(parameter.grad is None for parameter in qmodel.parameters())
    assert all(torch.equal(t, drawn[n]) for n, t in random_state().items())


class Noisy(Dataset[Tensor]):
    """Samples with numbers drawn from the global generator whenever one is read."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return _samples()[index] + torch.randn(FEATURES)


def _loader(data: Dataset[Any], own: bool = False, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(3) if own else None
    return DataLoader(data, SIZE, shuffle=True, generator=generator, **options)


def _plain() -> Dataset[Any]:
    return TensorDataset(_samples())


class Streaming:
    """Goes on where the last pass ended, without ever drawing a number."""

    def __init__(self) -> None:
        self._left = itertools.cycle(_samples().split(SIZE))

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.islice(self._left, 5)


class Redrawn:
    """Any iterable whose passes draw anew."""

    def __iter__(self) -> Iterator[Tensor]:
        for batch in _samples().split(SIZE):
            yield batch + torch.randn(batch.shape)


SOURCES: dict[str, Callable[[], Iterable[Any]]] = {
    "list": lambda: list(_samples().split(SIZE)),
    "three": lambda: list(_samples().split(SIZE))[:3],
    "iterator": lambda: itertools.cycle(_samples().split(SIZE)),
    "shuffled": lambda: _loader(_plain()),
    "own generator": lambda: _loader(_plain(), own=True),
    "noisy": lambda: _loader(Noisy()),
    "noisy, own generator": lambda: _loader(Noisy(), own=True),
    "noisy, in workers": lambda: _loader(Noisy(), num_workers=1),
    "streaming": Streaming,
    "redrawn": Redrawn,
}


@pytest.mark.parametrize("source", SOURCES)
def test_training_sees_the_same_batches_and_draws_the_same_numbers(
    source: str,
) -> None:
    def seen(looked_at: bool) -> list[Tensor]:
        torch.manual_seed(7)
        qmodel = _prepared()
        stream = _stream(qmodel, SOURCES[source]())
        stream.peek()
        if looked_at:
            assert _prediction(qmodel).limits_of_new(stream).predicted is not None
        found: list[Tensor] = []
        for _ in range(23):  # more than two passes, a number drawn in each step
            found += [stream.take().args[0].clone(), torch.rand(1)]
        return found

    pairs = zip(seen(looked_at=True), seen(looked_at=False), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_an_iterator_that_draws_keeps_its_samples_and_the_random_state() -> None:
    def drawing() -> Iterator[Tensor]:
        for number in range(20):
            yield torch.full((SIZE, FEATURES), float(number)) + 0.1 * torch.rand(1)

    qmodel = _prepared()
    stream = _stream(qmodel, drawing())
    stream.peek()
    before = torch.get_rng_state()
    assert len(stream.look_ahead(8, ProcessGroup())) == 8
    assert torch.equal(torch.get_rng_state(), before)
    found = [int(stream.take().args[0][0, 0]) for _ in range(20)]
    assert found == list(range(20))


def test_no_more_is_drawn_from_an_iterator_than_the_run_needs() -> None:
    batches = iter(_samples().split(SIZE))
    gdnsq_fx.finetune(_prepared(), batches, steps=3, budget=BUDGET, progress=False)
    assert len(list(batches)) == SAMPLES // SIZE - 3


# --- checkpoints ---


@pytest.mark.parametrize("source", ["three", "noisy, own generator", "drawing"])
@pytest.mark.parametrize("after", [4, 7])
def test_a_resumed_run_is_the_same_without_another_analysis(
    source: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision, after 5 steps, weighs what was predicted before the first, and the
    learning rate goes by the plan, whose median weight is not that of a uniform one."""

    def run(folder: Path | None, stop: int | None = None) -> Any:
        qmodel, calls = _prepared(), itertools.count(1)

        def validate(model: nn.Module) -> float:
            if next(calls) == stop:
                raise Interrupted
            return 0.0

        made = SOURCES.get(source, lambda: _endless(iter(Redrawn, None)))
        torch.manual_seed(1)
        result = gdnsq_fx.finetune(
            qmodel,
            made(),
            steps=STEPS,
            budget=BUDGET,
            validate=validate,
            validate_every=1,
            checkpoint=folder,
            checkpoint_every=3,
            progress=False,
        )
        return qmodel.state_dict(), replace(result, seconds=0.0)

    wanted, of_whole = run(None)
    with pytest.raises(Interrupted):
        run(tmp_path, after)
    monkeypatch.setattr(first_prediction, "AnalyzeCapacity", _never)
    state, of_resumed = run(tmp_path)
    assert of_resumed == of_whole
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def _endless(passes: Iterable[Iterable[Tensor]]) -> Iterator[Tensor]:
    """An iterator that draws, and cannot begin anew."""
    return (batch for one in passes for batch in one)


# --- processes that share a batch ---


def _analysis(qmodel: GraphModule, batches: Any, *, by_sample: bool) -> Tensor:
    analysis = AnalyzeCapacity(
        batches,
        model_facts(qmodel).inputs,
        joint=False,
        widths=range(1, 9),
        advice=False,
        by_sample=by_sample,
    )
    analysis(qmodel)
    found = predicted_divergences(qmodel)
    assert found is not None
    return torch.tensor([list(at.values()) for at in found.values()])


def test_predictions_do_not_depend_on_how_samples_are_cut_into_batches() -> None:
    qmodel, every = _prepared(), _samples()
    parts = [every[start::2] for start in range(2)]  # in another order, too
    whole = _analysis(qmodel, [every], by_sample=True)
    cut = torch.stack([_analysis(qmodel, [p], by_sample=True) for p in parts]).mean(0)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=0.0)
    # Ten classes and four draws: with signs drawn in order, they do.
    drawn = torch.stack([_analysis(qmodel, [p], by_sample=False) for p in parts])
    in_order = _analysis(qmodel, [every], by_sample=False)
    assert ((drawn.mean(0) / in_order - 1.0).abs() > 1e-2).any()
    # Both are estimates of the same.
    torch.testing.assert_close(in_order.log(), whole.log(), rtol=0.0, atol=0.5)


# --- where nothing can be predicted ---


def test_batches_that_are_not_finite_are_left_out() -> None:
    batches = list(_samples().split(SIZE))
    spoiled = [torch.full_like(batches[0], torch.nan), *batches[1:]]
    found = _predicted(_prepared(), spoiled).predicted
    assert found == _predicted(_prepared(), batches[1:8]).predicted is not None


def test_a_warning_says_why_the_plan_is_uniform() -> None:
    batches = [torch.full((SIZE, FEATURES), torch.inf)]
    with pytest.warns(CalibrationWarning, match="uniform .* NaN or infinite values"):
        assert _predicted(_prepared(), batches).predicted is None


def test_a_lack_of_memory_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(AnalyzeCapacity, "rewrite", exhausted)
    with pytest.warns(CalibrationWarning, match="1 TiB; call gdnsq_fx.analyze"):
        assert _predicted(_prepared(), _samples().split(SIZE)).predicted is None


# --- what outputs are compared by ---


@pytest.mark.parametrize("loss", [distillation_loss, squared_distillation_loss])
def test_an_output_without_classes_is_compared_by_its_square(loss: Any) -> None:
    """Jeffreys, the default, is not taken where only the loss of the task counts."""
    qmodel, batches = _prepared(Branches(outputs=1)), _samples().split(SIZE)
    predicted = _predicted(qmodel, batches, distillation_loss=loss).predicted
    assert predicted is not None
    assert predicted["strong.weight"][3] > 100.0 * predicted["weak.weight"][3] > 0.0


class TwoOutputs(Branches):
    """The same branches; which of them is weak depends on the output."""

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm(x))
        one, other = self.strong(x), self.weak(torch.tanh(x))
        return {"this": one + 1e-3 * other, "that": other + 1e-3 * one, "alone": one}


def test_the_part_of_the_output_that_is_distilled_counts() -> None:
    qmodel, batches = _prepared(TwoOutputs()), _samples().split(SIZE)
    this = _predicted(qmodel, batches, output="this").predicted
    that = _predicted(qmodel, batches, output=lambda out: out["that"]).predicted
    assert this is not None and that is not None
    assert this["strong.weight"][2] > 100.0 * this["weak.weight"][2]
    assert that["weak.weight"][2] > 100.0 * that["strong.weight"][2]


def test_an_edge_of_which_nothing_is_known_is_not_starved() -> None:
    """It may matter to the loss of the task."""
    qmodel, batches = _prepared(TwoOutputs()), _samples().split(SIZE)
    with pytest.warns(CalibrationWarning, match=r"weak.weight.* do not reach"):
        assert _predicted(qmodel, batches, output="alone").predicted is None


def test_an_edge_of_a_report_is_put_back_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qmodel, batches = _prepared(), _samples().split(SIZE)
    gdnsq_fx.analyze(qmodel, batches)
    before = [facts(site.node).edge for site in sites(qmodel)]

    def failing(self: object, graph_module: GraphModule) -> bool:
        for site in sites(graph_module):
            site.node.meta.pop(KEY)
        raise Interrupted

    monkeypatch.setattr(AnalyzeCapacity, "rewrite", failing)
    with pytest.raises(Interrupted):
        _predicted(qmodel, batches)
    assert all(isinstance(edge, EdgeFacts) for edge in before)
    assert [facts(site.node).edge for site in sites(qmodel)] == before
