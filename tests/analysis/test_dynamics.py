"""`CapacityTracker`: what fine-tuning feeds it, bounded memory, what it finds."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.analysis.dynamics import CapacityTracker, capacities
from gdnsq_fx.errors import ConfigError, TrainingDivergedError
from gdnsq_fx.sites import hard_bits


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 1, 4, 4, generator=generator) for _ in range(3)]


def _prepared() -> GraphModule:
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(2, 3, first_last=None)
    return gdnsq_fx.prepare(_Net(), _batches()[0], config, _batches())


def _tracked(steps: int, tracker: CapacityTracker | None = None) -> CapacityTracker:
    tracker = tracker or CapacityTracker()
    gdnsq_fx.finetune(
        _prepared(), _batches(), steps=steps, progress=False, tracker=tracker,
        validate=lambda _: 0.5, validate_every=7, schedule=gdnsq_fx.Schedule(steps),
    )  # fmt: skip
    return tracker


def test_records_follow_the_descent() -> None:
    tracker = _tracked(40)
    assert [r.step for r in tracker.records] == list(range(40))
    assert set(tracker.records[0].capacity) == set(tracker.targets)
    assert tracker.targets["conv.weight"] == 2 and tracker.targets["fc.input"] == 3
    first, last = tracker.records[0].capacity, tracker.records[-1].capacity
    for edge, target in tracker.targets.items():
        assert first[edge] > 6.0 > target >= last[edge] - 1e-3
    assert tracker.metrics == dict.fromkeys((6, 13, 20, 27, 34), 0.5)


def test_capacities_are_those_of_the_quantizers() -> None:
    qmodel = _prepared()
    found = capacities(qmodel)
    assert set(found) == set(hard_bits(qmodel))
    quantizer = qmodel.quantizers["fc_input"]
    assert found["fc.input"] == pytest.approx(float(quantizer.capacity().detach()))
    weight = qmodel.quantizers["conv_weight"].capacity(qmodel.conv.weight)
    assert found["conv.weight"] == pytest.approx(float(weight.detach().mean()))


def test_first_met_is_the_first_step_at_the_target() -> None:
    """Hard bit-widths, seen after every step of the same run without the tracker."""
    seen: list[dict[str, int]] = []
    qmodel = _prepared()

    def look(model: nn.Module) -> float:
        assert isinstance(model, GraphModule)
        seen.append(hard_bits(model))
        return 0.0

    tracker = CapacityTracker()
    gdnsq_fx.finetune(
        qmodel, _batches(), steps=30, progress=False, tracker=tracker, validate=look,
        validate_every=1, schedule=gdnsq_fx.Schedule(30),
    )  # fmt: skip
    for edge, step in tracker.first_met.items():
        target = tracker.targets[edge]
        assert step == next(n for n, bits in enumerate(seen) if bits[edge] <= target)
    steps = [s for s in tracker.first_met.values() if s is not None]
    assert steps == sorted(steps, reverse=True) and len(steps) == 4


def test_tracking_changes_nothing() -> None:
    left, right = _prepared(), _prepared()
    torch.manual_seed(1)
    gdnsq_fx.finetune(left, _batches(), steps=15, progress=False)
    torch.manual_seed(1)
    tracker = CapacityTracker()
    gdnsq_fx.finetune(right, _batches(), steps=15, progress=False, tracker=tracker)
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name]), name


@pytest.mark.parametrize("steps", [9, 10, 11, 64, 333])
def test_memory_is_bounded(steps: int) -> None:
    tracker, qmodel = CapacityTracker(max_records=10), _prepared()
    tracker.start(hard_bits(qmodel))
    for step in range(steps):
        if tracker.is_due(step) or step + 1 == steps:
            tracker.observe(qmodel, step, float(step))
        tracker.note_metric(step, float(step))
        assert len(tracker.records) <= 10 and len(tracker.metrics) <= 10
    found = [r.step for r in tracker.records]
    assert found[0] == 0 and found[-1] == steps - 1 and found == sorted(set(found))
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert not gaps or max(gaps) <= 2 * math.ceil(steps / 5)
    assert [r.loss for r in tracker.records] == found


def test_a_tracker_forgets_the_run_before() -> None:
    tracker = _tracked(12)
    _tracked(5, tracker)
    assert [r.step for r in tracker.records] == list(range(5))
    assert tracker.metrics == {}


def _with_losses(losses: list[float]) -> CapacityTracker:
    """Records of a model whose ``fc.input`` loses bits at the tenth step."""
    tracker, qmodel = CapacityTracker(), _prepared()
    tracker.start({"fc.input": 3})
    qmodel.quantizers["fc_input"].open_to(8.0)
    for step, loss in enumerate(losses):
        if step == 10:
            qmodel.quantizers["fc_input"].project(3.0)
        tracker.observe(qmodel, step, loss)
    return tracker


def test_loss_rises_name_the_edges_that_lost_bits() -> None:
    ramp = [0.1 * n for n in range(10)]
    losses = [0.0] * 8 + ramp + [1.0] * 6 + [0.2] * 6 + [0.5] * 6
    rises = _with_losses(losses).loss_rises
    assert len(rises) == 2
    first, second = rises
    assert first.first_step <= 9 and 16 <= first.last_step <= 20
    assert (first.before, first.after) == (0.0, 1.0)
    assert first.lost[0][0] == "fc.input"
    assert first.lost[0][1] == pytest.approx(5.0, abs=0.1)
    assert (second.before, second.after, second.lost) == (0.2, 0.5, ())


def test_no_rise_where_the_loss_falls_or_is_level() -> None:
    assert _with_losses([1.0 / (1 + n) for n in range(30)]).loss_rises == ()
    assert _with_losses([0.5] * 30).loss_rises == ()
    assert CapacityTracker().loss_rises == ()
    # One outlier is no rise.
    assert _with_losses([0.1] * 9 + [9.0] + [0.1] * 9).loss_rises == ()


def test_dict_is_json() -> None:
    found = _tracked(20).to_dict()
    assert set(json.loads(json.dumps(found, allow_nan=False))) == {
        "records", "metrics", "target_bits", "first_met", "loss_rises",
    }  # fmt: skip


def test_plot(tmp_path: Path) -> None:
    tracker = _tracked(20)
    figure = tracker.plot()
    loss, heat, *_ = figure.axes
    assert list(loss.lines[0].get_ydata()) == [r.loss for r in tracker.records]
    labels = [label.get_text() for label in heat.get_yticklabels()]
    assert labels == list(tracker.first_met)
    figure.savefig(tmp_path / "dynamics.png")
    assert (tmp_path / "dynamics.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="nothing was recorded"):
        CapacityTracker().plot()


def test_plot_where_no_edge_met_its_target() -> None:
    tracker, qmodel = CapacityTracker(), _prepared()
    tracker.start(dict.fromkeys(hard_bits(qmodel), 1))
    tracker.observe(qmodel, 0, 1.0)
    assert set(tracker.first_met.values()) == {None}
    tracker.plot()
    report = gdnsq_fx.analyze(qmodel, _batches())
    assert "Training dynamics" in report.to_html(history=tracker)
    assert "Training dynamics" not in report.to_html(history=CapacityTracker())


def test_too_few_records_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 10"):
        CapacityTracker(max_records=9)


def test_divergence_stays_a_typed_error_with_a_tracker() -> None:
    qmodel, tracker = _prepared(), CapacityTracker()

    def broken(*_: Tensor) -> Tensor:
        return qmodel.fc.weight.sum() * math.nan

    with pytest.raises(TrainingDivergedError):
        gdnsq_fx.finetune(
            qmodel, _batches(), steps=9, progress=False, tracker=tracker,
            distillation_loss=broken,
        )  # fmt: skip
    assert tracker.records == ()
