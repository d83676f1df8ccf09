"""What learned bits buy: the digits network at the cost of uniform bits, fine-tuned.

    python tests/benchmarks/mixed_training.py [--steps 200]

Every method trains as many steps, from the same trained networks, on the same batches:

* uniform: all edges at the same bits;
* allocate: the bits that `allocate` chose before training, fixed from then on;
* learned: `finetune` with the budget, from nothing but the training batches, on the
  first of which it predicts for its plan;
* planned: the same, after ``analyze(..., widths=range(1, 9))`` on calibration data.

The budgets are the weight bytes of uniform 2 bits with activations of at most 3 bits,
and the bit operations of uniform W3A3. Accuracy and Jeffreys divergence from the
floating-point network are those on the test images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.analysis.divergence import jeffreys
from gdnsq_fx.demo.digits import (
    DigitsData,
    accuracy,
    load_digits_split,
    train_digits,
    train_loader,
)
from gdnsq_fx.demo.network import DigitsNet
from gdnsq_fx.demo.seeding import one_thread, seeded

RESULTS = Path(__file__).parent / "results" / "mixed_training.md"
SEEDS = (0, 1, 2)
BATCH = 64
METHODS = ("uniform", "allocate", "learned", "planned")


@dataclass(frozen=True)
class Case:
    """A budget, as the cost of one uniform assignment.

    Attributes:
        name: as the table shows it.
        weight_bits, act_bits: of the uniform assignment.
        bound: the cost of it that is not to be exceeded.
        act_ceiling: the widest activation that is allowed, None for any.
    """

    name: str
    weight_bits: int
    act_bits: int
    bound: str
    act_ceiling: int | None = None

    def budget(self, cost: CostModel) -> gdnsq_fx.Budget:
        """What the uniform assignment costs."""
        limit = cost.costs(self.uniform(cost))[self.bound]
        return gdnsq_fx.Budget(**{self.bound: limit}, act_bits=self.act_ceiling)

    def uniform(self, cost: CostModel) -> dict[str, int]:
        """The uniform assignment."""
        return dict.fromkeys(cost.weights, self.weight_bits) | dict.fromkeys(
            cost.activations, self.act_bits
        )


CASES = (
    Case("weight bytes of W2A3", 2, 3, "weight_bytes", act_ceiling=3),
    Case("BOPs of W3A3", 3, 3, "bops"),
)


@dataclass(frozen=True)
class Outcome:
    """One method on one seed; accuracy in percent, divergence in nats per sample."""

    accuracy: float
    divergence: float
    share: float
    widths: tuple[int, int]
    seconds: float


def prepared(
    case: Case,
    method: str,
    model: nn.Module,
    calibration: Sequence[Tensor],
    first_last: Literal["exclude"] | None,
) -> tuple[GraphModule, CostModel, gdnsq_fx.Budget]:
    """A model as a method fine-tunes it, what it costs, and what it may cost.

    Args:
        case: the budget, and the bits that it comes from.
        method: one of `METHODS`.
        model: in floating point.
        calibration: inputs, ``[batch, channels, height, width]``.
        first_last: what is done with the first and the last layer, as in
            `gdnsq_fx.QuantConfig`.
    """
    config = gdnsq_fx.QuantConfig(
        case.weight_bits, case.act_bits, first_last=first_last
    )
    qmodel = gdnsq_fx.prepare(model, calibration[0], config, calibration)
    cost = CostModel.of(qmodel)
    budget = case.budget(cost)
    if method == "allocate":
        found = gdnsq_fx.allocate(qmodel, calibration, budget)
        gdnsq_fx.assign_bits(qmodel, found, calibration)
    if method == "planned":
        gdnsq_fx.analyze(qmodel, calibration, widths=range(1, 9))
    return qmodel, cost, budget


def run(
    case: Case, method: str, model: DigitsNet, data: DigitsData, seed: int, steps: int
) -> Outcome:
    """Prepare and fine-tune one trained network, and measure what comes of it."""
    started = time.perf_counter()
    calibration = data.train_images[: 8 * BATCH].split(BATCH)
    qmodel, cost, budget = prepared(case, method, model, calibration, first_last=None)
    result = gdnsq_fx.finetune(
        qmodel,
        train_loader(data, BATCH, seed=seed),
        steps=steps,
        teacher=model,
        budget=budget if method in ("learned", "planned") else None,
        progress=False,
    )
    assert cost.meets(result.bits, budget), (method, cost.costs(result.bits))
    widths = result.target_bits.values()
    return Outcome(
        accuracy(qmodel, data.test_images, data.test_labels),
        _divergence(qmodel, model, data),
        cost.costs(result.bits)[case.bound] / budget.bounds[case.bound],
        (min(widths), max(widths)),
        time.perf_counter() - started,
    )


@torch.no_grad()
def _divergence(qmodel: GraphModule, model: DigitsNet, data: DigitsData) -> float:
    model.eval()
    return float(jeffreys(qmodel(data.test_images), model(data.test_images)).mean())


def measure(steps: int) -> dict[tuple[str, str], list[Outcome]]:
    """Every method on every budget and seed; the networks are trained once."""
    data = load_digits_split()
    models = {seed: DigitsNet(seed=seed) for seed in SEEDS}
    for seed, model in models.items():
        train_digits(model, data, seed=seed, progress=False)
    found: dict[tuple[str, str], list[Outcome]] = {}
    every = [(case, method) for case in CASES for method in METHODS]
    for case, method in tqdm(every, unit="row"):
        for seed, model in models.items():
            with seeded(seed), one_thread():
                outcome = run(case, method, model, data, seed, steps)
            found.setdefault((case.name, method), []).append(outcome)
    return found


def table(found: Mapping[tuple[str, str], Sequence[Outcome]]) -> str:
    """Markdown, one row for each budget and method."""
    rows = [
        (
            budget,
            method,
            f"{mean(o.accuracy for o in outcomes):.2f}",
            " ".join(f"{o.accuracy:.2f}" for o in outcomes),
            f"{mean(o.divergence for o in outcomes):.3f}",
            " ".join(f"{o.divergence:.3f}" for o in outcomes),
            f"{max(o.share for o in outcomes):.1%}",
            f"{min(o.widths[0] for o in outcomes)}"
            f" to {max(o.widths[1] for o in outcomes)}",
            f"{mean(o.seconds for o in outcomes):.0f}",
        )
        for (budget, method), outcomes in found.items()
    ]
    headers = (
        "budget", "method", "accuracy %", "each seed", "divergence", "each seed",
        "budget used, at most", "bits", "seconds",
    )  # fmt: skip
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning")
    steps = parser.parse_args().steps
    text = table(measure(steps))
    print(text)
    RESULTS.write_text(
        "`python tests/benchmarks/mixed_training.py`: digits, mean of three seeds, "
        f"{steps} steps of fine-tuning for every method; test images.\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
