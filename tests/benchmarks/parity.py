"""The same network in every runtime, on full test sets.

    python tests/benchmarks/parity.py --data DIR [--samples 2000] [--only NAME]

``DIR`` holds ``cifar10-jpeg.tar.xz`` and the weights of ResNet-20; without it the
networks on digits alone run. Each network is fine-tuned for few steps at each
precision, converted, exported, and compared on all images. Writes a table beside this
file, in ``results/``, from what it keeps as JSON in ``--json``: rows that are there
already are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from parity_measure import PRECISIONS, Parity, measure
from parity_networks import (
    Network,
    digits_network,
    digits_transformer,
    resnet20_network,
)
from tabulate import tabulate

RESULTS = Path(__file__).parent / "results" / "parity.md"
STEPS = 100
RUNTIMES = ("torch", "inductor", "onnxruntime", "openvino")
_LEGEND = """
Accuracies in percent: *fake* is the fine-tuned model, *converted* the model that
`convert` returns; *moved* counts images with another likeliest class in the deployable
form. Of each runtime, against exact integer arithmetic: its accuracy; images with
another likeliest class; codes that differ (by how many at most), and in how many
roundings that began; codes, and images, that no rounding explains, if there are any.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_line(__doc__, RESULTS)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = read_rows(options.json)
    for name, build in networks(options.data, options.samples).items():
        waiting = [p for p in PRECISIONS if f"{name}: {p.name}" not in kept]
        if not waiting or (options.only is not None and options.only not in name):
            continue
        network = build()
        for precision in waiting:
            found = measure(network, precision, STEPS, options.runtimes)
            kept[f"{name}: {precision.name}"] = as_row(network, precision.name, found)
            print(json.dumps(kept[f"{name}: {precision.name}"]), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(kept, indent=1), "utf-8")
            options.out.write_text(markdown(list(kept.values()), _LEGEND), "utf-8")


def as_row(network: Network, precision: str, found: Parity) -> dict[str, Any]:
    """What the table shows of one network at one precision."""
    trained = found.certificate.trained
    row: dict[str, Any] = {
        "network": network.name,
        "bits": precision,
        "images": f"{found.images:,}",
        "fake": f"{found.fake:.2f}",
        "converted": f"{found.converted:.2f}",
        "moved": "" if trained is None else trained.other_argmax,
    }
    for one in found.certificate.runtimes:
        apart = f"{one.differing:,}"
        if one.differing:
            apart += f" (by {one.largest}, {one.rounding} roundings)"
        if one.wrong:
            apart += f", {one.wrong:,} wrong"
        if one.unexplained_inputs:
            apart += f"; PARTS on {one.unexplained_inputs:,} images"
        accuracy = found.accuracies[one.name]
        row[one.name] = f"{accuracy:.2f}; {one.other_argmax}; {apart}"
    return row


def markdown(rows: list[dict[str, Any]], legend: str) -> str:
    """The table and what its columns mean."""
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return f"{table}\n{legend}"


def networks(data: Path | None, samples: int) -> dict[str, Callable[[], Network]]:
    """What there is to compare, made when asked for.

    Args:
        data: folder of CIFAR-10 and weights; without it digits alone.
        samples: images of CIFAR-10.
    """
    found: dict[str, Callable[[], Network]] = {
        "digits CNN": digits_network,
        "digits transformer": digits_transformer,
    }
    if data is not None:
        found["ResNet-20"] = lambda: resnet20_network(data, samples)
    return found


def read_rows(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows that an earlier run kept."""
    return json.loads(path.read_text("utf-8")) if path and path.exists() else {}


def command_line(described: str | None, results: Path) -> argparse.ArgumentParser:
    """Options of a comparison on these networks; ``results``: where its table goes."""
    parser = argparse.ArgumentParser(description=(described or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 and weights")
    parser.add_argument("--samples", type=int, default=10_000, help="of CIFAR-10")
    parser.add_argument("--only", help="part of a network's name")
    parser.add_argument("--json", type=Path, help="keep rows here, and go on")
    parser.add_argument("--out", type=Path, default=results)
    return parser


if __name__ == "__main__":
    main()
