"""What mixed precision buys before any training: divergence at the size of 3 bits.

    python tests/benchmarks/mixed_precision.py [--data ../shared/data] [--work DIR]

Three trained models are quantized within the weight bytes and the bit operations of
uniform 3 bits, by

* uniform: 3 bits everywhere;
* SQNR: from 8 bits down, each step takes a bit from the edge which keeps the largest
  signal-to-noise ratio without it, until the budget is met; then edges get bits back,
  least ratio first, as far as it allows;
* Hessian: HAWQ-V3's integer programme (arXiv 2011.10680) over the sensitivity of
  HAWQ-V2 (arXiv 1911.03852), mean trace of the Hessian times squared error, by the
  same solver as ours;
* allocate: the same programme over predicted divergences.

The table shows the measured Jeffreys divergence from the floating-point model, nats per
sample, on samples that neither calibration nor the choice saw.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from divergence_ranking import DATA, cases
from ranking_models import Case
from ranking_peers import LocalError, local_errors, mean_hessian_traces
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.analysis.allocation import best_allocation
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.analysis.divergence import jeffreys
from gdnsq_fx.demo.seeding import one_thread

RESULTS = Path(__file__).parent / "results" / "mixed_precision.md"
SAMPLES = 256
UNIFORM = 3
WIDTHS = tuple(range(1, 9))
Errors = Mapping[int, Mapping[str, LocalError]]


@dataclass(frozen=True)
class Row:
    """Measured divergences of one model, by method, and what each took."""

    model: str
    divergences: dict[str, float]
    costs: dict[str, Mapping[str, float]]
    seconds: float


def measure(case: Case) -> Row:
    """Assign bits by every method and measure what comes of it."""
    config = gdnsq_fx.QuantConfig(UNIFORM, UNIFORM, first_last=None)
    qmodel = gdnsq_fx.prepare(case.model, case.batches[0], config, case.calibration)
    cost = CostModel.of(qmodel.eval())
    uniform = dict.fromkeys(cost.edges, UNIFORM)
    limits = cost.costs(uniform)
    budget = gdnsq_fx.Budget(weight_bytes=limits["weight_bytes"], bops=limits["bops"])
    # Half of the samples choose, the other half judges.
    half = len(case.batches) // 2
    chosen, held = case.batches[:half], case.batches[half:]
    start = time.perf_counter()
    ours = gdnsq_fx.allocate(qmodel, chosen, budget, widths=WIDTHS)
    seconds = time.perf_counter() - start
    errors = _errors(qmodel, case, chosen)
    traces = mean_hessian_traces(qmodel, chosen, case.targets[:half])
    assigned: dict[str, Mapping[str, int]] = {
        "uniform": uniform,
        "SQNR": by_sqnr(errors, cost, budget),
        "Hessian": best_allocation(_hessian(errors, traces), cost, budget).bits,
        "allocate": ours.bits,
    }
    divergences: dict[str, float] = {}
    for name, bits in assigned.items():
        assert cost.meets(bits, budget)
        twin = gdnsq_fx.assign_bits(copy.deepcopy(qmodel), bits, case.calibration)
        divergences[name] = _divergence(case, twin, held)
    costs = {name: cost.costs(bits) for name, bits in assigned.items()}
    return Row(case.name, divergences, costs, seconds)


def by_sqnr(
    errors: Errors, cost: CostModel, budget: gdnsq_fx.Budget
) -> Mapping[str, int]:
    """Greedy by signal-to-noise ratio: down from the widest, then up again."""
    bits = dict.fromkeys(cost.edges, max(WIDTHS))
    while not cost.meets(bits, budget):
        candidates = [edge for edge in bits if bits[edge] > min(WIDTHS)]
        edge = min(candidates, key=lambda e: errors[bits[e] - 1][e].inverse_sqnr)
        bits[edge] -= 1
    for edge in sorted(bits, key=lambda e: -errors[bits[e]][e].inverse_sqnr):
        while bits[edge] < max(WIDTHS):
            wider = {**bits, edge: bits[edge] + 1}
            if not cost.meets(wider, budget):
                break
            bits = wider
    return bits


def _hessian(
    errors: Errors, traces: Mapping[str, float]
) -> dict[str, dict[int, float]]:
    return {
        edge: {
            width: max(trace, 0.0) * errors[width][edge].squared_error
            for width in WIDTHS
        }
        for edge, trace in traces.items()
    }


def _errors(qmodel: GraphModule, case: Case, batches: Sequence[Tensor]) -> Errors:
    """The error of each edge alone at each width, levels placed by calibration."""
    found: dict[int, Mapping[str, LocalError]] = {}
    for width in tqdm(WIDTHS, desc=f"{case.name}: errors", unit="width"):
        bits = dict.fromkeys(CostModel.of(qmodel).edges, width)
        twin = gdnsq_fx.assign_bits(copy.deepcopy(qmodel), bits, case.calibration)
        found[width] = local_errors(twin, batches)
    return found


@torch.no_grad()
def _divergence(case: Case, qmodel: GraphModule, batches: Sequence[Tensor]) -> float:
    pairs = ((qmodel(batch), case.model(batch)) for batch in batches)
    total = sum(float(jeffreys(got, wanted).sum()) for got, wanted in pairs)
    return total / sum(len(batch) for batch in batches)


def table(rows: Sequence[Row]) -> str:
    """Markdown, one row for each model."""
    methods = list(rows[0].divergences)
    cells = [
        (
            row.model,
            *(f"{row.divergences[name]:.4g}" for name in methods[:-1]),
            f"**{row.divergences['allocate']:.4g}**",
            f"{row.divergences['uniform'] / row.divergences['allocate']:.1f}x",
            f"{row.costs['allocate']['weight_bytes']:,.0f}"
            f" of {row.costs['uniform']['weight_bytes']:,.0f}",
            f"{row.costs['allocate']['bops'] / 1e6:,.1f}"
            f" of {row.costs['uniform']['bops'] / 1e6:,.1f}",
            f"{row.seconds:.0f}",
        )
        for row in rows
    ]
    headers = (
        "model", *methods, "uniform / ours", "weight bytes", "million BOPs", "seconds",
    )  # fmt: skip
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="CIFAR-10 and weights")
    parser.add_argument("--work", type=Path, help="where images are unpacked")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, one_thread():
        models = cases(options.data, options.work or Path(temporary), SAMPLES)
        text = table([measure(case) for case in models])
    print(text)
    RESULTS.write_text(
        "`python tests/benchmarks/mixed_precision.py`: measured divergence at the "
        f"weight bytes and bit operations of uniform {UNIFORM} bits, nats per sample."
        f"\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
