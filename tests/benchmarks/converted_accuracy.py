"""Accuracy of fake-quantized, converted and exported models on full test sets.

    python tests/benchmarks/converted_accuracy.py --data DIR [--only NAME]

As `parity.py`, but without exact integer arithmetic, which takes an hour for the test
images of CIFAR-10: networks are fine-tuned for few steps at each precision, and each
form of them is scored on all images. ``DIR`` holds ``cifar10-jpeg.tar.xz`` and the
weights of ResNet-20; without it the networks on digits alone run. Writes a table beside
this file, in ``results/``; rows that ``--json`` has already are not measured again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parity import STEPS, command_line, markdown, networks, read_rows
from parity_measure import PRECISIONS, Precision, quantized
from parity_networks import BATCH, Network
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.demo.digits import accuracy
from gdnsq_fx.deploy.edges import coded_edges
from gdnsq_fx.deploy.installed import open_runtimes

RESULTS = Path(__file__).parent / "results" / "converted_accuracy.md"
_LEGEND = """
Percent. *Fake-quantized*: as fine-tuned. *Converted*: what `convert` returns;
*deployable*: `convert(deployable=True)`, with the offsets and biases that integer
kernels hold. *Onnxruntime* runs the file that `export` writes. *Apart*: the largest
difference from fake-quantized, in points.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line(__doc__, RESULTS).parse_args(arguments)
    torch.set_num_threads(1)
    kept = read_rows(options.json)
    for name, build in networks(options.data, options.samples).items():
        waiting = [p for p in PRECISIONS if f"{name}: {p.name}" not in kept]
        if not waiting or (options.only is not None and options.only not in name):
            continue
        network = build()
        for precision in waiting:
            kept[f"{name}: {precision.name}"] = row = measure(network, precision)
            print(json.dumps(row), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(kept, indent=1), "utf-8")
            options.out.write_text(markdown(list(kept.values()), _LEGEND), "utf-8")


def measure(network: Network, precision: Precision) -> dict[str, Any]:
    """A row of the table: one network at one precision."""
    qmodel = quantized(network, precision, STEPS)
    imodel = gdnsq_fx.convert(qmodel)
    deployable = gdnsq_fx.convert(qmodel, deployable=True)
    scores = {
        form: accuracy(model, network.images, network.labels)
        for form, model in (
            ("fake-quantized", qmodel),
            ("converted", imodel),
            ("deployable", deployable),
        )
    }
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        batches = network.images.split(4 * BATCH)
        gdnsq_fx.export(imodel, path, batches[0])
        edges = coded_edges(deployable)
        (runtime,), _ = open_runtimes(deployable, edges, path, ["onnxruntime"])
        right = 0
        for images, labels in zip(
            tqdm(batches, desc="onnxruntime", leave=False),
            network.labels.split(4 * BATCH),
            strict=True,
        ):
            classes = runtime.outputs([images])[0].argmax(1)
            right += int((classes == labels).sum())
    scores["onnxruntime"] = 100.0 * right / len(network.labels)
    apart = max(abs(one - scores["fake-quantized"]) for one in scores.values())
    return {
        "network": network.name,
        "bits": precision.name,
        "images": f"{len(network.images):,}",
        **{form: f"{score:.2f}" for form, score in scores.items()},
        "apart": f"{apart:.2f}",
    }


if __name__ == "__main__":
    main()
