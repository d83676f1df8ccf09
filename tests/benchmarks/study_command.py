"""The command line of the studies of a few hundred steps, and their loop over runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from cifar_images import load_cifar
from study_runs import kept_outcomes, new_outcomes

DATA = Path(__file__).parents[2].parent / "shared" / "data"

O = TypeVar("O")  # noqa: E741 - a dataclass, the outcome of one run


def parsed(description: str | None) -> argparse.Namespace:
    """What the command line says: data, work (made if absent), steps, batch, workers.

    Args:
        description: of the study.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="CIFAR-10 and weights")
    parser.add_argument("--work", type=Path, required=True, help="keeps images")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="0: tables only")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    return given


def measure(
    kept: Path,
    kind: type[O],
    run: Callable[..., O],
    planned: Mapping[tuple[Any, ...], tuple[Any, ...]],
    identity: tuple[str, ...],
    given: argparse.Namespace,
) -> list[O]:
    """All runs, as many at a time as there are workers; without any, those kept.

    Args:
        kept: file of finished runs; new ones are added to it.
        kind: a dataclass, the outcome of one run; has the fields ``steps`` and
            ``batch``.
        run: a function of a module, which makes one run; called with the arguments
            that ``planned`` has for it, then the folders ``data`` and ``work``.
        planned: arguments of every run, in order, by the values of ``identity``.
        identity: fields of an outcome, two at least, that tell one run from another.
        given: of the command line, see `parsed`.

    Returns:
        Outcomes with the steps and the batch that were asked for.
    """
    found = kept_outcomes(kept, kind)
    done = set(map(attrgetter(*identity), found))
    todo = [
        (*arguments, given.data, given.work)
        for key, arguments in planned.items()
        if key not in done
    ]
    load_cifar(given.data, given.work)  # decoded once, before several ask for it
    if given.workers:
        found += new_outcomes(kept, run, todo, given.workers)
    asked = given.steps, given.batch
    return [
        outcome for outcome in found if attrgetter("steps", "batch")(outcome) == asked
    ]
