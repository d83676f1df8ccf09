"""Study A: ResNet-20 on CIFAR-10 in a few hundred steps, against three alternatives.

    python tests/benchmarks/study_short.py --work DIR [--data ../shared/data]

Every method starts from the same trained network, takes the same steps on the same
batches, distils from the same teacher and measures the statistics of BatchNorm again at
the end; the first and the last layer stay in floating point. Rows:

* ours: `finetune` with its defaults for the precision;
* paper: the schedule of the paper (`Schedule.paper`), its estimator (``ste``) and free
  offsets, in `finetune`;
* LSQ: its published quantizers at fixed bits (``study_lsq.py``);
* Brevitas: its quantizers with learned scales at fixed bits (``study_brevitas.py``).

The other rows change one part of ours: bits that come down from 8 over half of the
steps, as in the paper, instead of a start at the target; the task's loss instead of
distillation; a constant learning rate; levels placed on noise.

Accuracy is that on all 10,000 test images; ``bits before`` is the mean over all edges
before the last step, whose projection brings them to target. Finished runs are kept
beside the table, so that the study goes on where it was interrupted (delete them to
begin anew); decoded images in ``DIR``. About an hour on two cores.
Needs ``pip install brevitas``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from cifar_images import load_cifar
from resnet20 import trained_resnet20
from study_command import measure, parsed
from study_methods import Method, Setting, ours, peer
from study_runs import mean_and_spread
from tabulate import tabulate

from gdnsq_fx import Schedule

RESULTS = Path(__file__).parent / "results" / "study_short.md"
BITS = (4, 3, 2, 1)
ABLATION_BITS = (2, 1)
SEEDS = (0, 1, 2)
# The rates of our recipe. LSQ is better at 1e-3 than at 3e-4 (W4A4, one seed: 86.7 and
# 86.2 %), Brevitas at 3e-4 (86.3 and 87.4 %; at 1e-4, three seeds, 87.25).
LSQ_LR = {4: 1e-3, 3: 1e-3, 2: 1e-3, 1: 3e-3}
BREVITAS_LR = {4: 3e-4, 3: 3e-4, 2: 1e-3, 1: 3e-3}
IDENTITY = ("method", "bits", "seed", "steps", "batch")
MAIN = ("ours", "paper", "LSQ", "Brevitas")


class WithoutAnnealing(Schedule):
    """The learning rate stays what it is after warming up."""

    def learning_rate_factor(self, step: int, met_at: int | None = None) -> float:
        """Linear warm-up, then 1."""
        return min((step + 1) / max(self.steps * self.warm_up, 1.0), 1.0)


@dataclass(frozen=True)
class Outcome:
    """One run: accuracy in percent, mean bits before the end, whether it met them."""

    method: str
    bits: int
    seed: int
    steps: int
    batch: int
    accuracy: float
    mean_bits: float
    met: bool
    seconds: float


def method_of(name: str, bits: int) -> Method:
    """The method of a row."""
    made: dict[str, Callable[[], Method]] = {
        "ours": ours,
        "paper": lambda: ours(
            schedule=Schedule.paper, config={"estimator": "ste", "offset": "free"}
        ),
        "LSQ": lambda: _lsq(bits),
        "Brevitas": lambda: _brevitas(bits),
        "gradual descent": lambda: ours(
            schedule=functools.partial(Schedule, start_bits=8.0, descent=0.5)
        ),
        "no distillation": lambda: ours(distillation=0.0, task_loss=F.cross_entropy),
        "no annealing": lambda: ours(
            schedule=functools.partial(WithoutAnnealing, start_bits=1.0)
        ),
        "no calibrated start": lambda: ours(calibrated=False),
    }
    return made[name]()


def _lsq(bits: int) -> Method:
    from study_lsq import lsq_model

    return peer(lsq_model, LSQ_LR[bits])


def _brevitas(bits: int) -> Method:
    from study_brevitas import brevitas_model

    return peer(brevitas_model, BREVITAS_LR[bits])


ABLATIONS = (
    "gradual descent",
    "no distillation",
    "no annealing",
    "no calibrated start",
)


def run(name: str, setting: Setting, data: Path, work: Path) -> Outcome:
    """One method on one precision and seed, on one thread."""
    torch.set_num_threads(1)
    train, test = load_cifar(data, work)
    teacher = trained_resnet20(data)
    started = time.perf_counter()
    trained = method_of(name, setting.bits)(teacher, train, setting)
    seconds = time.perf_counter() - started
    accuracy = test.accuracy(trained.model)
    return Outcome(
        name,
        **asdict(setting),
        accuracy=accuracy,
        mean_bits=trained.mean_bits,
        met=trained.met,
        seconds=seconds,
    )


def planned(steps: int, batch: int) -> Iterator[tuple[str, Setting]]:
    """Every run; those that the tables need most come first."""
    for seed in SEEDS:
        for bits in reversed(BITS):
            for name in MAIN:
                yield name, Setting(bits, seed, steps, batch)
    for seed in SEEDS:
        for bits in ABLATION_BITS:
            for name in ABLATIONS:
                yield name, Setting(bits, seed, steps, batch)


def table(found: Sequence[Outcome], names: Sequence[str], every: Sequence[int]) -> str:
    """Markdown: a row for each method, mean and spread of the seeds in each column."""
    rows = []
    for name in names:
        row = [name]
        for bits in every:
            runs = [o for o in found if (o.method, o.bits) == (name, bits)]
            row.append(mean_and_spread([o.accuracy for o in runs], len(SEEDS)))
        mine = [o for o in found if o.method == name]
        row.append(f"{sum(o.met for o in mine)} of {len(mine)}")
        before = {b: [o.mean_bits for o in mine if o.bits == b] for b in every}
        row.append(" ".join(f"{mean(v):.1f}" for v in before.values() if v))
        row.append(f"{mean(o.seconds for o in mine):.0f}" if mine else "")
        rows.append(row)
    columns = [f"W{bits}A{bits}" for bits in every]
    headers = ["accuracy %", *columns, "met", "bits before", "seconds"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Run what is missing, print and write the tables."""
    given = parsed(__doc__)
    kept = RESULTS.with_suffix(".jsonl")
    every = {
        (name, *asdict(setting).values()): (name, setting)
        for name, setting in planned(given.steps, given.batch)
    }
    found = measure(kept, Outcome, run, every, IDENTITY, given)
    _, test = load_cifar(given.data, given.work)
    reference = test.accuracy(trained_resnet20(given.data))
    text = (
        f"ResNet-20, {given.steps} steps of {given.batch} images, mean ± standard "
        f"deviation of {len(SEEDS)} seeds, (n) of n where fewer have run; floating "
        f"point {reference:.2f} %\n\n"
        f"{table(found, MAIN, BITS)}\n\nOurs with one part changed\n\n"
        f"{table(found, ('ours', *ABLATIONS), ABLATION_BITS)}\n"
    )
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
