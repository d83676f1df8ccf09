"""What a training step of a prepared model costs, against floating point and peers.

    python tests/benchmarks/qat_overhead.py [--quick] [--threads 2] [--no-compile]

A step is forward, loss, backward and Adam. Ours aligns gradients at the cap and
projects to the targets besides, as `finetune` does with its defaults; in a row of its
own it adds the penalty, as where bits come down. All variants of one network take
turns, step by step, in one run: what is printed are medians, and medians of the ratios
to the floating-point step of the same round (compiled against compiled). Saved
activations are the bytes of distinct storages that autograd keeps for backward, those
of parameters and buffers left out. Each network is measured in a process of its own,
which gives its memory back. Writes its tables beside this file, in ``results/``, and
what there is of them after every network.
Needs the extra "test"; Brevitas and torchao are measured where they are installed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from qat_networks import NETWORKS, Network, decoder, tokens
from qat_variants import Variant, against_floating_point, measure, variants
from tabulate import tabulate
from torch import Tensor
from torchvision.models import resnet50
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.demo.seeding import seeded

RESULTS = Path(__file__).parent / "results" / "qat_overhead.md"
MIB = 2.0**20
HEADERS = ("network", "training", "step, ms", "ratio", "saved, MiB", "ratio")
GROWTH_HEADERS = ("size", "floating point, ms", "ours, ms", *HEADERS[3:])

Row = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """How everything is measured.

    Attributes:
        threads: of torch.
        rounds: steps of each variant that count.
        compile: measure compiled models too.
        cpu_time: time of this process alone, where others share the machine.
    """

    threads: int
    rounds: int
    compile: bool
    cpu_time: bool

    def begin(self) -> Callable[[], float]:
        """Make a new process ready; returns the clock."""
        torch.set_num_threads(self.threads)
        warnings.simplefilter("ignore")
        return time.process_time if self.cpu_time else time.perf_counter


def alone(function: Callable[..., T], *arguments: object) -> T:
    """Call a function of this module in a process that ends afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def network_rows(network: Network, setting: Setting) -> tuple[list[Row], list[str]]:
    """All variants of one network, and a line for each that does not run."""
    clock = setting.begin()
    with seeded(0):
        x = network.batch(network.samples)
        made, absent = variants(network, x, compiled=setting.compile)
        measure(made, x, targets_of(made[0], x), setting.rounds, clock)
    return rows_of(network, made), absent


def growth_row(label: str, network: Network, setting: Setting) -> Row:
    """Ours against floating point at one size."""
    clock = setting.begin()
    with seeded(0):
        x = network.batch(network.samples)
        made = against_floating_point(network, x)
        measure(made, x, targets_of(made[0], x), setting.rounds, clock)
    base, ours = rows_of(network, made)
    return (label, base[2], *ours[2:])


def deployment_row(setting: Setting) -> str:
    """Seconds for prepare, convert and save of ResNet-50."""
    setting.begin()
    model, x = resnet50().eval(), torch.randn(1, 3, 224, 224)
    start = time.perf_counter()
    qmodel = gdnsq_fx.prepare(model, x, gdnsq_fx.QuantConfig(4, 4), [x])
    with tempfile.TemporaryDirectory() as folder:
        gdnsq_fx.save(gdnsq_fx.convert(qmodel), Path(folder) / "model.safetensors")
    took = time.perf_counter() - start
    return f"ResNet-50, 224 x 224: prepare, convert and save together {took:.1f} s"


def rows_of(network: Network, made: list[Variant]) -> list[Row]:
    """Rows of the table of one network."""
    by_name = {variant.name: variant for variant in made}
    rows: list[Row] = []
    for variant in made:
        base = by_name[variant.base]
        ratios = [a / b for a, b in zip(variant.seconds, base.seconds, strict=True)]
        rows.append(
            (
                network.name,
                variant.name,
                f"{1e3 * median(variant.seconds):.0f}",
                f"{median(ratios):.2f}",
                f"{variant.saved / MIB:.1f}",
                f"{variant.saved / base.saved:.2f}",
            )
        )
    return rows


def targets_of(variant: Variant, x: Tensor) -> Tensor:
    """A random class for each row of logits."""
    with torch.no_grad():
        shape = variant.model(x).shape
    return torch.randint(shape[1], shape[:1])


def growth_cases(*, quick: bool) -> list[tuple[str, Network]]:
    """ResNet-18 at four batch sizes, decoders of four depths."""
    cases = [
        (f"ResNet-18, batch {samples}", replace(NETWORKS[0], samples=samples))
        for samples in (4, 8, 16, 32)
    ]
    for layers in () if quick else (2, 4, 8, 16):
        name = f"decoder, {layers} layers"
        cases.append((name, Network(name, partial(decoder, layers), tokens, 4)))
    return cases


def _markdown(rows: list[Row], headers: Row) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--cpu-time", action="store_true", help="for a shared machine")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    options = _options()
    setting = Setting(
        options.threads, options.rounds, options.compile, options.cpu_time
    )
    rows: list[Row] = []
    absent: list[str] = []
    growth: list[Row] = []
    deployment = ""

    def written() -> str:
        notes = "".join(f"\nabsent: {note}" for note in absent)
        parts = [
            f"{setting.threads} thread(s), {setting.rounds} rounds",
            f"{_markdown(rows, HEADERS)}\n{notes}",
            _markdown(growth, GROWTH_HEADERS),
            deployment,
        ]
        text = "\n\n".join(parts) + "\n"
        if not options.quick:
            RESULTS.write_text(text)
        return text

    for network in tqdm(NETWORKS[:1] if options.quick else NETWORKS, unit="network"):
        more, notes = alone(network_rows, network, setting)
        rows += more
        absent += notes
        written()
    for label, network in tqdm(growth_cases(quick=options.quick), unit="size"):
        growth.append(alone(growth_row, label, network, setting))
        written()
    deployment = alone(deployment_row, setting)
    print(written())


if __name__ == "__main__":
    main()
