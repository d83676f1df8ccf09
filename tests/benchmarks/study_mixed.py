"""Study C: does learned mixed precision beat uniform bits at equal cost?

    python tests/benchmarks/study_mixed.py --work DIR [--data ../shared/data]

ResNet-20 on CIFAR-10, the loop of Study A (``study_short.py``): same trained network,
batches, teacher, steps. With the first and the last layer in floating point, as there,
at the weight bytes of uniform W2A2 (activations at most 2 bits) and at the bit
operations of uniform W3A3; with every layer quantized, as uniform bits and a budget on
the whole network mean it, at the weight bytes of uniform W2A4 (activations at most 4
bits) and at the bit operations of uniform W3A3:

* uniform: all edges at the same bits;
* allocate: the bits that `allocate` chose before training, fixed from then on;
* learned: `finetune` with the budget, from nothing but the training batches, on the
  first of which it predicts for its plan;
* planned: the same, after ``analyze(..., widths=range(1, 9))`` on calibration data.

Accuracy is that on all 10,000 test images. Every method must meet the budget exactly,
or the run fails. Finished runs are kept in ``DIR``, so that the study goes on where it
was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from cifar_images import Augmented, load_cifar
from mixed_training import METHODS, Case, prepared
from resnet20 import trained_resnet20
from study_command import measure, parsed
from study_methods import CALIBRATION, REESTIMATED, Remembering
from study_runs import mean_and_spread
from tabulate import tabulate

import gdnsq_fx
from gdnsq_fx.demo.seeding import seeded

RESULTS = Path(__file__).parent / "results" / "study_mixed.md"
IDENTITY = ("budget", "method", "seed", "steps", "batch")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class StudyCase(Case):
    """A budget, and what becomes of the first and the last layer (`QuantConfig`)."""

    first_last: Literal["exclude"] | None = "exclude"


CASES = (
    StudyCase("weight bytes of W2A2", 2, 2, "weight_bytes", act_ceiling=2),
    StudyCase("BOPs of W3A3", 3, 3, "bops"),
    StudyCase(
        "weight bytes of W2A4, every layer", 2, 4, "weight_bytes", 4, first_last=None
    ),
    StudyCase("BOPs of W3A3, every layer", 3, 3, "bops", first_last=None),
)


@dataclass(frozen=True)
class Outcome:
    """One run: accuracy in percent, share of the budget used, least and most bits."""

    budget: str
    method: str
    seed: int
    steps: int
    batch: int
    accuracy: float
    share: float
    least: int
    most: int
    seconds: float


def run(
    case: StudyCase,
    method: str,
    seed: int,
    steps: int,
    batch: int,
    data: Path,
    work: Path,
) -> Outcome:
    """One method on one budget and seed, on one thread."""
    torch.set_num_threads(1)
    train, test = load_cifar(data, work)
    teacher = trained_resnet20(data)
    started = time.perf_counter()
    calibration = train.first(CALIBRATION).batches(batch)
    qmodel, cost, budget = prepared(case, method, teacher, calibration, case.first_last)
    with seeded(seed):
        result = gdnsq_fx.finetune(
            qmodel,
            Augmented(train, batch, seed),
            steps=steps,
            teacher=Remembering(teacher),
            budget=budget if method in ("learned", "planned") else None,
            batch_norm_batches=REESTIMATED,
            progress=False,
        )
    seconds = time.perf_counter() - started
    if not cost.meets(result.bits, budget):
        raise RuntimeError(f"{method} missed {budget}: {cost.costs(result.bits)}")
    return Outcome(
        case.name,
        method,
        seed,
        steps,
        batch,
        accuracy=test.accuracy(qmodel),
        share=cost.costs(result.bits)[case.bound] / budget.bounds[case.bound],
        least=min(result.target_bits.values()),
        most=max(result.target_bits.values()),
        seconds=seconds,
    )


def planned() -> Iterator[tuple[StudyCase, str, int]]:
    """Every run; those that answer the question come first, one seed of each."""
    for methods in (("uniform", "learned"), ("planned", "allocate")):
        for seed in SEEDS:
            for case in CASES:
                for method in methods:
                    yield case, method, seed


def table(found: Sequence[Outcome]) -> str:
    """Markdown, one row for each budget and method that has run."""
    rows, absent = [], []
    for case in CASES:
        for method in METHODS:
            runs = [o for o in found if (o.budget, o.method) == (case.name, method)]
            runs.sort(key=lambda outcome: outcome.seed)
            if runs:
                rows.append((case.name, method, *_cells(runs)))
            else:
                absent.append(f"{method} at the {case.name}")
    headers = (
        "budget", "method", "accuracy %", "each seed", "budget used, at most", "bits",
        "seconds",
    )  # fmt: skip
    shown = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"{shown}\n\nNot run: {', '.join(absent)}." if absent else shown


def _cells(runs: Sequence[Outcome]) -> tuple[str, ...]:
    return (
        mean_and_spread([o.accuracy for o in runs], len(SEEDS)),
        " ".join(f"{o.accuracy:.2f}" for o in runs),
        f"{max(o.share for o in runs):.1%}",
        f"{min(o.least for o in runs)} to {max(o.most for o in runs)}",
        f"{mean(o.seconds for o in runs):.0f}",
    )


def main() -> None:
    """Run what is missing, print and write the table."""
    given = parsed(__doc__)
    kept = given.work / "study_mixed.jsonl"
    asked = given.steps, given.batch
    every = {
        (case.name, method, seed, *asked): (case, method, seed, *asked)
        for case, method, seed in planned()
    }
    found = measure(kept, Outcome, run, every, IDENTITY, given)
    _, test = load_cifar(given.data, given.work)
    reference = test.accuracy(trained_resnet20(given.data))
    text = (
        f"ResNet-20, {given.steps} steps of {given.batch} images, {len(SEEDS)} seeds, "
        f"mean ± standard deviation; floating point {reference:.2f} %\n\n"
        f"{table(found)}\n"
    )
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
