"""What quantization costs on the digits network: mean of three seeds.

    python tests/benchmarks/digits_accuracy.py             # W2A2 and W1A1
    python tests/benchmarks/digits_accuracy.py --recipes   # estimators, offsets

``start``: at the target, or at 8 bits, which come down over half of the steps as
``(1 - progress)^n``. Prints a table and writes it beside this file, in ``results/``;
the README quotes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from tabulate import tabulate
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.demo.digits import (
    DigitsData,
    accuracy,
    load_digits_split,
    train_digits,
    train_loader,
)
from gdnsq_fx.demo.network import DigitsNet
from gdnsq_fx.demo.seeding import one_thread, seeded
from gdnsq_fx.spec import Estimator, Offset

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    bits: int
    steps: int
    estimator: Estimator = "lsq"
    offset: Offset = "half_step"
    slow_down: float | None = None  # None: bits start at their targets

    @property
    def schedule(self) -> gdnsq_fx.Schedule | None:
        """Bits come down from 8 over half of the steps, or the default."""
        if self.slow_down is None:
            return None
        return gdnsq_fx.Schedule(self.steps, slow_down=self.slow_down)


@dataclass(frozen=True)
class Run:
    """One seed of one recipe; accuracies in percent."""

    floating: float
    untrained: float
    tuned: float
    converted: float
    worst_difference: float
    met: bool


DEFAULTS = (Recipe(2, 1500), Recipe(1, 1500))
RECIPES = tuple(
    Recipe(bits, 300, estimator, offset, slow_down)
    for estimator, offset, slow_down in (
        ("lsq", "half_step", None),
        ("ste", "half_step", None),
        ("ewgs", "half_step", None),
        ("aewgs", "half_step", None),
        ("lsq", "free", None),
        ("lsq", "integer", None),
        ("lsq", "half_step", 1.0),
        ("lsq", "half_step", 2.0),
        ("lsq", "half_step", 3.0),
    )
    for bits in (2, 1)
)


def run(recipe: Recipe, model: DigitsNet, data: DigitsData, seed: int) -> Run:
    """Prepare, fine-tune and convert one trained network."""
    config = gdnsq_fx.QuantConfig(
        recipe.bits, recipe.bits, estimator=recipe.estimator, offset=recipe.offset
    )
    calibration = data.train_images[: 8 * BATCH].split(BATCH)
    qmodel = gdnsq_fx.prepare(model, data.train_images[:BATCH], config, calibration)
    untrained = accuracy(qmodel, data.test_images, data.test_labels)
    result = gdnsq_fx.finetune(
        qmodel,
        train_loader(data, BATCH, seed=seed),
        steps=recipe.steps,
        teacher=model,
        schedule=recipe.schedule,
        progress=False,
    )
    imodel = gdnsq_fx.convert(qmodel)
    with torch.no_grad():
        wanted, got = qmodel(data.test_images), imodel(data.test_images)
    return Run(
        accuracy(model, data.test_images, data.test_labels),
        untrained,
        accuracy(qmodel, data.test_images, data.test_labels),
        accuracy(imodel, data.test_images, data.test_labels),
        float((wanted - got).abs().max() / (wanted.max() - wanted.min())),
        result.budget_met,
    )


def measure(recipes: Sequence[Recipe]) -> list[tuple[Recipe, list[Run]]]:
    """Every recipe on every seed; the networks are trained once."""
    data = load_digits_split()
    models = {seed: DigitsNet(seed=seed) for seed in SEEDS}
    for seed, model in models.items():
        train_digits(model, data, seed=seed, progress=False)
    found: list[tuple[Recipe, list[Run]]] = []
    for recipe in tqdm(recipes, unit="recipe"):
        runs: list[Run] = []
        for seed, model in models.items():
            with seeded(seed), one_thread():
                runs.append(run(recipe, model, data, seed))
        found.append((recipe, runs))
    return found


def table(found: Sequence[tuple[Recipe, list[Run]]]) -> str:
    """Markdown, one row for each recipe, means over the seeds."""
    rows = [
        (
            f"W{recipe.bits}A{recipe.bits}",
            recipe.estimator,
            recipe.offset,
            "at target" if recipe.slow_down is None else f"8, ^{recipe.slow_down:g}",
            recipe.steps,
            f"{mean(r.floating for r in runs):.2f}",
            f"{mean(r.untrained for r in runs):.2f}",
            f"{mean(r.tuned for r in runs):.2f}",
            f"{mean(r.floating - r.tuned for r in runs):+.2f}",
            " ".join(f"{r.floating - r.tuned:+.2f}" for r in runs),
            f"{max(r.worst_difference for r in runs):.0e}",
            "yes" if all(r.met for r in runs) else "no",
        )
        for recipe, runs in found
    ]
    headers = (
        "bits", "estimator", "offset", "start", "steps", "float %", "not tuned %",
        "tuned %", "points lost", "each seed", "converted differs by", "budget met",
    )  # fmt: skip
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", action="store_true")
    recipes = parser.parse_args().recipes
    text = table(measure(RECIPES if recipes else DEFAULTS))
    print(text)
    name = "digits_recipes.md" if recipes else "digits_accuracy.md"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text + "\n")


if __name__ == "__main__":
    main()
