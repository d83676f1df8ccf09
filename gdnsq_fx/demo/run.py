"""The whole way once on real digits: train, prepare, analyze, fine-tune, convert."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from gdnsq_fx import api, deployment, loading
from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.demo.digits import (
    DigitsData,
    accuracy,
    load_digits_split,
    train_digits,
    train_loader,
)
from gdnsq_fx.demo.network import DigitsNet
from gdnsq_fx.demo.seeding import one_thread, seeded
from gdnsq_fx.errors import GdnsqError
from gdnsq_fx.spec import QuantConfig
from gdnsq_fx.training.finetune import finetune

BATCH = 64
CALIBRATION_BATCHES = 8
PARITY = 1e-4


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured. Accuracies in percent of the test images.

    Attributes:
        worst_difference: largest difference between the converted and the fine-tuned
            model over all test batches, as a share of the output range.
        size_ratio: bytes of the floating-point file over those of the packed file.
    """

    bits: int
    float_accuracy: float
    quantized_accuracy: float
    float_bytes: int
    packed_bytes: int
    size_ratio: float
    worst_difference: float
    seconds_of_finetuning: float


def run_demo(bits: int, out: Path, seed: int = 0, steps: int = 1500) -> DemoResult:
    """Run everything, print as it goes, and leave the files in ``out``.

    Args:
        bits: of weights and activations (first convolution and last layer: 8).
        out: folder for the files; made if need be.
        seed: of initial weights, shuffling and augmentation.
        steps: of fine-tuning.

    Raises:
        GdnsqError: the converted model does not compute what the fine-tuned one does.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = load_digits_split()
    _heading(f"1. Train a small residual network on {len(data.train_labels)} digits")
    model = DigitsNet(seed=seed)
    float_accuracy = train_digits(model, data, seed=seed)
    print(f"test accuracy {float_accuracy:.2f} %")

    _heading(f"2. Prepare it for W{bits}A{bits}, and see what that costs where")
    qmodel = api.prepare(
        model,
        data.train_images[:BATCH],
        QuantConfig(weight_bits=bits, act_bits=bits),
        calibration=_calibration(data),
    )
    with one_thread():
        report = api.analyze(qmodel, data.test_images.split(BATCH))
    print(report)

    _heading(f"3. Fine-tune {steps} steps down to {bits} bits")
    tracker = CapacityTracker()
    with seeded(seed), one_thread():
        result = finetune(
            qmodel,
            train_loader(data, BATCH, seed=seed),
            steps=steps,
            teacher=model,
            validate=lambda m: accuracy(m, data.test_images, data.test_labels),
            tracker=tracker,
        )
    print(result)
    report.to_html(out / "report.html", history=tracker)

    _heading("4. Convert to integers, save, load, and compare")
    imodel = deployment.convert(qmodel)
    packed = out / f"digits-w{bits}a{bits}.safetensors"
    packed_bytes = deployment.save(imodel, packed)
    loaded = loading.load(packed, DigitsNet(), data.train_images[:BATCH])
    worst = max(_worst_difference(qmodel, m, data) for m in (imodel, loaded))
    floats = out / "digits-float.safetensors"
    save_file(model.state_dict(), floats)
    measured = DemoResult(
        bits=bits,
        float_accuracy=float_accuracy,
        quantized_accuracy=accuracy(imodel, data.test_images, data.test_labels),
        float_bytes=floats.stat().st_size,
        packed_bytes=packed_bytes,
        size_ratio=floats.stat().st_size / packed_bytes,
        worst_difference=worst,
        seconds_of_finetuning=result.seconds,
    )
    summary = out / "summary.json"
    summary.write_text(json.dumps(asdict(measured), indent=2) + "\n")
    _print_summary(measured, [packed, floats, out / "report.html", summary])
    return measured


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _calibration(data: DigitsData) -> tuple[torch.Tensor, ...]:
    return data.train_images[: BATCH * CALIBRATION_BATCHES].split(BATCH)


@torch.no_grad()
def _worst_difference(
    qmodel: GraphModule, imodel: nn.Module, data: DigitsData
) -> float:
    """Largest difference over all test batches, as a share of the output range.

    Raises:
        GdnsqError: it exceeds 1e-4, or another class wins anywhere.
    """
    qmodel.eval()
    worst = 0.0
    for images in data.test_images.split(BATCH):
        wanted, got = qmodel(images), imodel(images)
        spread = float(wanted.max() - wanted.min())
        worst = max(worst, float((wanted - got).abs().max()) / spread)
        if worst > PARITY or not torch.equal(wanted.argmax(1), got.argmax(1)):
            raise GdnsqError(
                "the converted model differs from the fine-tuned one by "
                f"{worst:.1e} of the output range; this is a defect of the library, "
                "please report it with your versions of torch and gdnsq_fx"
            )
    return worst


def _print_summary(measured: DemoResult, files: list[Path]) -> None:
    rows = [
        ("accuracy, floating point", f"{measured.float_accuracy:.2f} %"),
        ("accuracy, quantized", f"{measured.quantized_accuracy:.2f} %"),
        ("bits of weights / activations", f"{measured.bits} / {measured.bits}"),
        ("file, floating point", f"{measured.float_bytes:,} bytes"),
        ("file, packed", f"{measured.packed_bytes:,} bytes"),
        ("size ratio", f"{measured.size_ratio:.1f}x smaller"),
        ("converted against fine-tuned", f"{measured.worst_difference:.1e} of range"),
    ]
    print("\n" + tabulate(rows, tablefmt="simple", disable_numparse=True))
    print("\nfiles:")
    for file in files:
        print(f"  {file}")
