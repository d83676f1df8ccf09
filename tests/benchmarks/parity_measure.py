"""One quantized network in every runtime: accuracy, likeliest classes, codes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from parity_networks import BATCH, Network
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.annotations import model_facts
from gdnsq_fx.demo.digits import accuracy
from gdnsq_fx.deploy.certificate import Certificate
from gdnsq_fx.deploy.edges import coded_edges
from gdnsq_fx.deploy.installed import open_runtimes
from gdnsq_fx.deploy.runtimes import Observation, Runtime, Values
from gdnsq_fx.deploy.verification import Verification
from gdnsq_fx.passes import Calibrate, QuantizeBetweenLayers, run_passes


@dataclass(frozen=True)
class Precision:
    """How a network is quantized.

    Attributes:
        name: as the table shows it.
        bits: of weights and inputs of the layers in turn; of all where it is one.
        between: grids of 8 bits between the layers as well, before fine-tuning.
    """

    name: str
    bits: tuple[int, ...]
    between: bool = False


PRECISIONS = (
    *(Precision(f"W{bits}A{bits}", (bits,)) for bits in (8, 4, 3, 2, 1)),
    Precision("mixed 4, 2, 8, 3", (4, 2, 8, 3)),
    Precision("W4A4, all integer", (4,), between=True),
)


@dataclass(frozen=True)
class Parity:
    """What one network at one precision gives.

    Attributes:
        images: how many were compared.
        fake: accuracy of the fine-tuned model, percent.
        converted: of the converted model that computes the same, percent.
        differing: its logits that are not those of the fine-tuned model to the bit.
        accuracies: of the deployable form by runtime, percent.
        certificate: of the deployable form, against exact integer arithmetic.
    """

    images: int
    fake: float
    converted: float
    differing: int
    accuracies: dict[str, float]
    certificate: Certificate


def measure(
    network: Network,
    precision: Precision,
    steps: int,
    runtimes: Sequence[str] | None = None,
) -> Parity:
    """Quantize, fine-tune, convert, export, and compare on all images.

    Args:
        network: trained.
        precision: how to quantize it.
        steps: of fine-tuning.
        runtimes: names, as `gdnsq_fx.verify` takes them; None: all that are installed.
    """
    qmodel = quantized(network, precision, steps)
    imodel = gdnsq_fx.convert(qmodel)
    model = gdnsq_fx.convert(qmodel, deployable=True)
    batches = network.images.split(4 * BATCH)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        gdnsq_fx.export(imodel, path, batches[0])
        opened, _ = open_runtimes(model, coded_edges(model), path, runtimes)
        scored = [_Scored(one) for one in opened]
        verification = Verification(model, coded_edges(model), scored, imodel)
        verification.add([images] for images in batches)
        differing = sum(int((qmodel(x) != imodel(x)).sum()) for x in batches)
    return Parity(
        len(network.images),
        accuracy(qmodel, network.images, network.labels),
        accuracy(imodel, network.images, network.labels),
        differing,
        {one.name: one.accuracy(network.labels) for one in scored},
        verification.certificate(),
    )


def quantized(network: Network, precision: Precision, steps: int) -> GraphModule:
    """A model fine-tuned for few steps, in evaluation."""
    layers = [
        name
        for name, module in network.model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    turns = precision.bits
    each = {name: turns[n % len(turns)] for n, name in enumerate(layers)}
    overrides = {name: {"weight_bits": b, "act_bits": b} for name, b in each.items()}
    config = gdnsq_fx.QuantConfig(
        turns[0], turns[0], overrides=overrides if len(turns) > 1 else {}
    )
    example, calibration = network.calibration[0], network.calibration
    qmodel = gdnsq_fx.prepare(network.model, example, config, calibration)
    if precision.between:
        place = Calibrate(calibration, model_facts(qmodel).inputs, added=True)
        qmodel = run_passes(qmodel, (QuantizeBetweenLayers(), place))
    gdnsq_fx.finetune(
        qmodel, network.training(), steps=steps, teacher=network.model, progress=False
    )
    return qmodel.eval()


@dataclass
class _Scored(Runtime):
    """A runtime whose classes are kept."""

    runtime: Runtime
    classes: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.runtime.name

    @property
    def note(self) -> str:  # type: ignore[override]
        return self.runtime.note

    def outputs(self, values: Values) -> list[Tensor]:
        found = self.runtime.outputs(values)
        self.classes.append(found[0].argmax(1))
        return found

    def observe(self, values: Values) -> Observation:
        return self.runtime.observe(values)

    def accuracy(self, labels: Tensor) -> float:
        """Percent of all images so far."""
        return 100.0 * float((torch.cat(self.classes) == labels).double().mean())
