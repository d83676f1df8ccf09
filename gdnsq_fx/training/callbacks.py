"""Who is told how a run goes: a protocol, a CSV file, TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from gdnsq_fx.extras import required
from gdnsq_fx.training.result import FinetuneResult, StepRecord

_COLUMNS = ("step", "loss", "mean_bits", "metric")


class Callback(Protocol):
    """What `finetune` calls; an exception ends the run."""

    def on_step(self, record: StepRecord) -> None:
        """After each step that goes into the history: about a hundred of a run, spread
        evenly, and those that were validated. A resumed run repeats none before its
        checkpoint."""
        ...

    def on_end(self, result: FinetuneResult) -> None:
        """Once, when the run has ended within its budget."""
        ...


class CsvLog:
    """The history as a CSV file, one line for each record, written as they come.

    Args:
        path: replaced if it exists.
        history: records to begin with, those of the run that is resumed.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], history: Sequence[StepRecord] = ()
    ) -> None:
        self._path = Path(path)
        rows = [_COLUMNS, *(_row(record) for record in history)]
        with self._path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)

    def on_step(self, record: StepRecord) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(_row(record))

    def on_end(self, result: FinetuneResult) -> None:
        """Nothing is left to write."""


class TensorBoardCallback:
    """Loss, mean bits and metric as TensorBoard scalars, then the bits of every edge.

    Args:
        folder: where the event file goes.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        install = "gdnsq-fx[tensorboard]"
        required("tensorboard", "TensorBoardCallback", install)
        module = required("torch.utils.tensorboard", "TensorBoardCallback", install)
        self._writer: Any = module.SummaryWriter(os.fspath(folder))

    def on_step(self, record: StepRecord) -> None:
        """Add the scalars of a step."""
        self._writer.add_scalar("loss", record.loss, record.step)
        self._writer.add_scalar("mean_bits", record.mean_bits, record.step)
        if record.metric is not None:
            self._writer.add_scalar("metric", record.metric, record.step)
        self._writer.flush()

    def on_end(self, result: FinetuneResult) -> None:
        """Add the final bits and close the file."""
        for edge, bits in result.bits.items():
            self._writer.add_scalar(f"bits/{edge}", bits, result.steps)
        if result.metric is not None:
            self._writer.add_scalar("final_metric", result.metric, result.steps)
        self._writer.close()


def _row(record: StepRecord) -> tuple[Any, ...]:
    metric = "" if record.metric is None else record.metric
    return record.step, record.loss, record.mean_bits, metric
