"""Runs of a study, several at a time; finished ones are kept, a line of JSON each."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from tqdm import tqdm

O = TypeVar("O")  # noqa: E741 - a dataclass, the outcome of one run


def kept_outcomes(kept: Path, kind: type[O]) -> list[O]:
    """Outcomes of runs that were made before; none where there is no file.

    Raises:
        TypeError: a line has other fields than ``kind``.
    """
    if not kept.exists():
        return []
    return [kind(**json.loads(line)) for line in kept.read_text().splitlines()]


def new_outcomes(
    kept: Path, run: Callable[..., O], todo: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[O]:
    """Make runs in processes of their own; each is kept as soon as it ends.

    Args:
        kept: file that a line is added to for each run.
        run: a function of a module; returns a dataclass of plain values.
        todo: its arguments for each run.
        workers: processes.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        jobs = [pool.submit(run, *arguments) for arguments in todo]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run"):
            add_outcome(kept, job.result())
            yield job.result()


def add_outcome(kept: Path, outcome: Any) -> None:
    """Add a line for one run, a dataclass of plain values."""
    with kept.open("a") as lines:
        lines.write(json.dumps(asdict(outcome)) + "\n")


def mean_and_spread(values: Sequence[float], wanted: int | None = None) -> str:
    """Mean ± standard deviation over seeds, as a cell of a table.

    Args:
        values: of each seed that has run.
        wanted: how many seeds there are to be; the cell says where fewer have run.
    """
    if not values:
        return "not run"
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    few = f" ({len(values)})" if wanted and len(values) < wanted else ""
    return f"{mean(values):.2f}{spread}{few}"
