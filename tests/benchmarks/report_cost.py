"""What a bottleneck report costs, in forward-backward passes over the same data.

    python tests/benchmarks/report_cost.py [--threads 1]

One forward-backward pass is the floating-point model's, with gradients of every
parameter, over the batches that the report reads; repetitions are interleaved. Writes
its table beside this file, in ``results/``; the README quotes it. Needs the extra
"test" and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models import densenet121, mobilenet_v3_large, resnet18, resnet50
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.demo.seeding import seeded

RESULTS = Path(__file__).parent / "results" / "report_cost.md"
REPEATS = 3
IMAGES, BATCH = 32, 8


@dataclass(frozen=True)
class Case:
    """A network, its images, and what to ask for."""

    build: Callable[[], nn.Module]
    size: int
    joint: bool


CASES = (
    Case(resnet18, 112, False),
    Case(resnet18, 112, True),
    Case(mobilenet_v3_large, 112, True),
    Case(densenet121, 112, True),
    Case(resnet50, 224, True),
)


def measure(case: Case) -> tuple[str, ...]:
    """One row of the table."""
    model = case.build().eval()
    batches = list(torch.randn(IMAGES, 3, case.size, case.size).split(BATCH))
    config = gdnsq_fx.QuantConfig(4, 4)
    qmodel = gdnsq_fx.prepare(model, batches[0], config, batches)
    passes: list[float] = []
    reports: list[float] = []
    for _ in range(REPEATS):
        passes.append(_seconds(lambda: _forward_backward(model, batches)))
        reports.append(
            _seconds(lambda: gdnsq_fx.analyze(qmodel, batches, joint=case.joint))
        )
    edges = len(gdnsq_fx.analyze(qmodel, batches[:1], joint=False).edges)
    ratios = [r / p for r, p in zip(reports, passes, strict=True)]
    return (
        case.build.__name__,
        f"{case.size} x {case.size}",
        str(edges),
        "alone, joint" if case.joint else "alone",
        f"{median(passes):.1f}",
        f"{median(reports):.1f}",
        f"{median(ratios):.1f}",
        f"{min(ratios):.1f} to {max(ratios):.1f}",
    )


def _forward_backward(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model.zero_grad()
        model(batch).logsumexp(1).sum().backward()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    warnings.simplefilter("ignore")
    with seeded(0):
        rows = [measure(case) for case in tqdm(CASES, unit="network")]
    headers = (
        "network", "images", "edges", "predicted", "pass, s", "report, s", "passes",
        "range",
    )  # fmt: skip
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    text = f"{IMAGES} images in batches of {BATCH}, {torch.get_num_threads()} thread(s)"
    print(text := f"{text}\n\n{table}\n")
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
