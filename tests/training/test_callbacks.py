"""What a run tells while it goes on: callbacks, the CSV log, TensorBoard."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gdnsq_fx
from gdnsq_fx.errors import MissingExtraError


class Interrupted(Exception):
    """Ends a run early."""


class Listener:
    """Keeps what it is told, and may end the run."""

    def __init__(self, stop: int | None = None) -> None:
        self.records: list[gdnsq_fx.StepRecord] = []
        self.results: list[gdnsq_fx.FinetuneResult] = []
        self.stop = stop

    def on_step(self, record: gdnsq_fx.StepRecord) -> None:
        self.records.append(record)
        if record.step == self.stop:
            raise Interrupted

    def on_end(self, result: gdnsq_fx.FinetuneResult) -> None:
        self.results.append(result)


def _finetune(**options: Any) -> gdnsq_fx.FinetuneResult:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 4)
    qmodel = gdnsq_fx.prepare(model, x, gdnsq_fx.QuantConfig(2, 2), [x])
    options = {"validate": lambda m: 0.5, "validate_every": 5, **options}
    return gdnsq_fx.finetune(qmodel, [x], steps=20, progress=False, **options)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _assert_logged(path: Path, result: gdnsq_fx.FinetuneResult) -> None:
    """Every figure reads back exactly."""
    found = [
        gdnsq_fx.StepRecord(
            int(row["step"]),
            float(row["loss"]),
            float(row["mean_bits"]),
            float(row["metric"]) if row["metric"] else None,
        )
        for row in _rows(path)
    ]
    assert found == list(result.history)


def test_callbacks_are_told_of_records_and_result() -> None:
    listener = Listener()
    result = _finetune(callbacks=[listener])
    assert listener.records == list(result.history)
    assert [r.step for r in listener.records if r.metric == 0.5] == [4, 9, 14, 19]
    assert listener.results == [result]


def test_no_result_after_an_error() -> None:
    listener = Listener(stop=7)
    with pytest.raises(Interrupted):
        _finetune(callbacks=[listener])
    assert listener.records[-1].step == 7
    assert listener.results == []


def test_log_holds_the_history(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("something else")
    _assert_logged(path, _finetune(log=path))


def test_log_of_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    path, folder = tmp_path / "run.csv", tmp_path / "checkpoints"
    saving = {"log": path, "checkpoint": folder, "checkpoint_every": 6}
    with pytest.raises(Interrupted):
        _finetune(callbacks=[Listener(stop=15)], **saving)
    assert [int(row["step"]) for row in _rows(path)] == list(range(15))
    _assert_logged(path, _finetune(**saving))


def test_tensorboard_scalars(tmp_path: Path) -> None:
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    result = _finetune(callbacks=[gdnsq_fx.TensorBoardCallback(tmp_path)])
    events = module.EventAccumulator(str(tmp_path)).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    wanted = {record.step: record.loss for record in result.history}
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert [event.step for event in events.Scalars("metric")] == [4, 9, 14, 19]
    edge, bits = next(iter(result.bits.items()))
    assert [event.value for event in events.Scalars(f"bits/{edge}")] == [bits]


def test_tensorboard_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"gdnsq-fx\[tensorboard\]"):
        gdnsq_fx.TensorBoardCallback(tmp_path)
