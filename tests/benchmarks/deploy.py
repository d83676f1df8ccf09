"""What deployment gains: latency in three runtimes, and sizes of files.

    python tests/benchmarks/deploy.py [--quick] [--threads 1] [--rounds 20]

Latency at W8A8 against floating point in the same runtime, beside onnxruntime's and
torchao's own quantization; within a round every way to run a network takes its turn,
and a ratio is the median over rounds. "full integer": `convert` was given calibration
batches; "inputs": it was not. Sizes of ONNX files against the float32 `state_dict()`
and against codes in their bits, scales and biases alone. Weights are random: neither
depends on them. Writes its tables beside this file, in ``results/``; the README quotes
them. Needs the extra "test", torchao, a C++ compiler, and 12 GB of memory
(``--quick``: small networks, 2 minutes, nothing is written).
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from deploy_routes import (
    Route,
    compiled_float,
    compiled_ours,
    compiled_torchao,
    in_onnxruntime,
    in_openvino,
    write_float,
    write_static,
)
from deploy_sizes import SIZE_TARGETS, size_row
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models import VisionTransformer, resnet18, vit_b_16
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.demo.seeding import seeded
from gdnsq_fx.errors import MissingExtraError
from gdnsq_fx.extras import required

RESULTS = Path(__file__).parent / "results" / "deploy.md"
RUNTIMES = ("onnxruntime", "inductor", "openvino")
FLOAT, OURS, INPUTS = "fp32", "full integer", "inputs"
WARM_UP = 2
# What is to be reached on two cores with VNNI: network, runtime -> times fp32.
TARGETS = {
    ("resnet18", "onnxruntime"): 3.2,
    ("vit_b_16", "onnxruntime"): 2.6,
    ("resnet18", "inductor"): 3.0,
}


@dataclass(frozen=True)
class Case:
    """A network and the images it is timed on."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    batches: tuple[int, ...]


CASES = (
    Case("resnet18", resnet18, 224, (1, 8)),
    Case("vit_b_16", vit_b_16, 224, (1, 8)),
)


def _small_transformer() -> nn.Module:
    return VisionTransformer(64, 16, 2, 4, 128, 256)


QUICK = (
    Case("resnet18 at 64", resnet18, 64, (1, 8)),
    Case("small transformer", _small_transformer, 64, (1, 8)),
)


@dataclass(frozen=True, eq=False)
class Network:
    """One network in all its forms, and its files."""

    model: nn.Module
    full: GraphModule
    inputs: GraphModule
    calibration: list[Tensor]
    folder: Path

    @property
    def files(self) -> dict[str, Path]:
        """Name of the form -> ONNX file."""
        names = (FLOAT, OURS, INPUTS, "its own static int8")
        return {n: self.folder / f"{i}.onnx" for i, n in enumerate(names)}


def network(case: Case, folder: Path) -> Network:
    """Build, quantize and write one network."""
    model = case.build().eval()
    batches = list(torch.randn(16, 3, case.size, case.size).split(8))
    config = gdnsq_fx.QuantConfig(weight_bits=8, act_bits=8)
    qmodel = gdnsq_fx.prepare(model, batches[0], config, batches)
    full = gdnsq_fx.convert(qmodel, calibration=batches)
    made = Network(model, full, gdnsq_fx.convert(qmodel), batches, folder)
    source, ours, inputs, static = made.files.values()
    write_float(model, batches[0], source)
    gdnsq_fx.export(made.full, ours, batches[0])
    gdnsq_fx.export(made.inputs, inputs, batches[0])
    write_static(source, batches, static)
    return made


def routes(
    one: Network, runtime: str, images: Tensor, threads: int
) -> dict[str, Route]:
    """Every way to run a network in one runtime."""
    if runtime == "inductor":
        torch._dynamo.reset()
        made = {
            FLOAT: compiled_float(one.model, images),
            OURS: compiled_ours(one.full, images),
            INPUTS: compiled_ours(one.inputs, images),
        }
        try:
            made["torchao"] = compiled_torchao(one.model, one.calibration, images)
        except Exception as error:  # of its own quantizer, or of torch.export
            print(f"torchao refuses a network: {error}", flush=True)
        return made
    start = in_onnxruntime if runtime == "onnxruntime" else in_openvino
    files = one.files if runtime == "onnxruntime" else list(one.files.items())[:3]
    return {name: start(path, images, threads) for name, path in dict(files).items()}


def in_turns(calls: Mapping[str, Route], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= WARM_UP:
                taken[name].append(time.perf_counter() - start)
    return taken


def latency_rows(
    case: Case, one: Network, args: argparse.Namespace
) -> list[tuple[str, ...]]:
    """One row for each batch size, runtime and form."""
    rows: list[tuple[str, ...]] = []
    for batch in case.batches:
        images = torch.randn(batch, 3, case.size, case.size)
        for runtime in args.runtimes:
            taken = in_turns(routes(one, runtime, images, args.threads), args.rounds)
            for name, seconds in taken.items():
                print(case.name, batch, runtime, name, *_ratio(taken[FLOAT], seconds))
                target = TARGETS.get((case.name, runtime)) if name == OURS else None
                rows.append(
                    (
                        case.name,
                        str(batch),
                        runtime,
                        name,
                        f"{1e3 * median(seconds):.1f}",
                        *_ratio(taken[FLOAT], seconds),
                        f">= {target}" if target else "",
                    )
                )
    return rows


def _ratio(base: list[float], seconds: list[float]) -> tuple[str, str]:
    """Median of the ratios of each round, and their tenth and ninetieth percentile."""
    ratios = [b / s for b, s in zip(base, seconds, strict=True)]
    tenths = quantiles(ratios, n=10) if len(ratios) > 1 else ratios
    return f"{median(ratios):.2f}x", f"{tenths[0]:.2f} to {tenths[-1]:.2f}"


def installed(runtimes: list[str]) -> list[str]:
    """Those of them that can be imported; says which cannot."""
    found: list[str] = []
    for name in runtimes:
        try:
            required("torchao" if name == "inductor" else name, name)
            found.append(name)
        except MissingExtraError as error:
            print(f"left out: {error}")
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--quick", action="store_true", help="small networks, to try")
    args = parser.parse_args()
    args.runtimes = installed(list(args.runtimes))
    torch.set_num_threads(args.threads)
    # Its fused kernel is neither compiled nor exported.
    torch.backends.mha.set_fastpath_enabled(False)
    warnings.simplefilter("ignore")
    rows: list[tuple[str, ...]] = []
    with seeded(0), tempfile.TemporaryDirectory() as name:
        for case in tqdm(QUICK if args.quick else CASES, unit="network"):
            rows += latency_rows(case, network(case, Path(name)), args)
        sizes = [size_row(bits, Path(name)) for bits in SIZE_TARGETS]
    text = _text(rows, sizes, args)
    print(text)
    if not args.quick:
        RESULTS.write_text(text)


def _text(
    rows: list[tuple[str, ...]], sizes: list[tuple[str, ...]], args: argparse.Namespace
) -> str:
    headers = (
        "network", "batch", "runtime", "form", "ms", "against fp32", "range", "target",
    )  # fmt: skip
    first = _table(rows, headers)
    headers = ("weights", "file, MB", "smaller", "target", "ideal", "over ideal")
    second = _table(sizes, headers)
    note = f"W8A8, {args.rounds} rounds, {args.threads} thread(s)"
    return f"{note}\n\n{first}\n\nResNet-18, ONNX files\n\n{second}\n"


def _table(rows: list[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
