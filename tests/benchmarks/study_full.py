"""Study B, the full protocol: all images, 200 epochs, against published drops.

    python tests/benchmarks/study_full.py --data DIR --work DIR \\
        --weights resnet20-cifar10.safetensors --device cuda --autocast bfloat16

``DIR`` of ``--data`` holds ``train/<class>/*`` and ``val/<class>/*`` (or ``test``):
CIFAR-10, CIFAR-100, ImageNet (``--network resnet18``, which is torchvision's). Weights
are a ``state_dict`` in safetensors; without them the network is random, for a dry run.

The first and the last layer stay in floating point, all else is `finetune` by default:
distillation from the floating-point network alone. Each epoch ends with a validation;
the best state counts, as in the published figures. Checkpoints and finished runs are
kept in ``--work``: the same command goes on where it was interrupted.

The row W1A32 of the reference quantizes weights alone. Here every quantized layer has a
quantizer on its input as well, so that row is run, and labelled, with 16 bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from image_folders import Folders, load_folders
from resnet20 import ResNet20
from safetensors.torch import load_file
from study_runs import add_outcome, kept_outcomes, mean_and_spread
from tabulate import tabulate
from torch import nn

import gdnsq_fx
from gdnsq_fx.demo.seeding import seeded

RESULTS = Path(__file__).parent / "results" / "study_full.md"
CALIBRATION = 512
CHECKPOINTS = 10  # of each epoch


@dataclass(frozen=True)
class Precision:
    """One row: bits, and the drop in points of the reference, ResNet-20 on CIFAR-10.

    Source of the drops: the table of MHAQ (github.com/aifoundry-org/MHAQ).
    """

    name: str
    weight_bits: int
    act_bits: int
    reference: str


PRECISIONS = {
    "4": Precision("W4A4", 4, 4, "-0.04"),
    "3": Precision("W3A3", 3, 3, "-0.3"),
    "2": Precision("W2A2", 2, 2, "-1.4"),
    "1": Precision("W1A1", 1, 1, "-6.3"),
    "w1a32": Precision("W1A16", 1, 16, "-0.7 (W1A32)"),
}


@dataclass(frozen=True)
class Network:
    """How a network is made, and which images it takes."""

    make: Callable[[int], nn.Module]
    pixels: int
    small: bool


def _resnet18(classes: int) -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=classes)


NETWORKS = {
    "resnet20": Network(ResNet20, 32, True),
    "resnet18": Network(_resnet18, 224, False),
}


@dataclass(frozen=True)
class Outcome:
    """One run: percent of the validation images, and all that it depends on."""

    run: str
    precision: str
    seed: int
    accuracy: float
    best_epoch: int
    seconds: float


def trained_network(network: str, classes: int, weights: Path | None) -> nn.Module:
    """The floating-point network, in evaluation.

    Raises:
        ValueError: the weights are those of another network or number of classes.
    """
    torch.manual_seed(0)
    model = NETWORKS[network].make(classes)
    if weights is not None:
        try:
            model.load_state_dict(load_file(weights))
        except RuntimeError as error:
            raise ValueError(
                f"{weights} does not fit {network} with the {classes} classes that "
                f"--data has: {error}. Name the network that they are of, or give "
                "images of the classes that it was trained on"
            ) from error
    return model.eval()


def run(
    teacher: nn.Module,
    folders: Folders,
    precision: Precision,
    seed: int,
    given: argparse.Namespace,
) -> Outcome:
    """Fine-tune at one precision from one seed, or go on where that was left."""
    started = time.perf_counter()
    config = gdnsq_fx.QuantConfig(
        precision.weight_bits, precision.act_bits, first_last="exclude"
    )
    images = folders.calibration
    qmodel = gdnsq_fx.prepare(teacher, images[0], config, images)
    epoch = len(folders.train)
    steps = given.epochs * epoch
    folder = given.work / f"{name_of(given)}-{precision.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with seeded(seed):
        result = gdnsq_fx.finetune(
            qmodel,
            folders.train,
            steps=steps,
            teacher=teacher,
            validate=folders.accuracy,
            validate_every=epoch,
            best="max",
            schedule=gdnsq_fx.Schedule(steps, start_bits=given.start_bits),
            autocast=given.autocast,
            checkpoint=folder / "checkpoint",
            checkpoint_every=max(epoch // CHECKPOINTS, 1),
            log=folder / "log.csv",
        )
    assert result.metric is not None and result.best_step is not None
    seconds, best = time.perf_counter() - started, (result.best_step + 1) // epoch
    return Outcome(name_of(given), precision.name, seed, result.metric, best, seconds)


def name_of(given: argparse.Namespace) -> str:
    """What outcomes of one protocol have in common."""
    kind = given.autocast or "float32"
    return (
        f"{given.network}-{given.data.name}-{given.epochs}x{given.batch}"
        f"-from{given.start_bits:g}-{kind}"
    )


def table(found: Sequence[Outcome], rows: Sequence[Precision], reference: float) -> str:
    """Markdown: drops from floating point in points, beside the published ones."""
    cells = []
    for precision in rows:
        runs = [o for o in found if o.precision == precision.name]
        drop = f"{mean(o.accuracy for o in runs) - reference:+.2f}" if runs else ""
        cells.append(
            (
                precision.name,
                mean_and_spread([o.accuracy for o in runs]),
                drop,
                precision.reference,
                " ".join(str(o.best_epoch) for o in runs),
                f"{mean(o.seconds for o in runs):.0f}" if runs else "",
            )
        )
    headers = ("bits", "accuracy %", "drop", "reference", "best epoch", "seconds")
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="class folders")
    parser.add_argument("--work", type=Path, required=True, help="keeps runs")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet20")
    parser.add_argument("--weights", type=Path, help="safetensors; else random")
    parser.add_argument("--pixels", type=int, help="by default 32, resnet18 224")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bits", default=",".join(PRECISIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--start-bits", type=float, default=1.0, help="8: descend")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"))
    parser.add_argument("--workers", type=int, default=4, help="that read images")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    given.bits = given.bits.split(",")
    if unknown := [one for one in given.bits if one not in PRECISIONS]:
        parser.error(f"--bits {unknown}: choose from {', '.join(PRECISIONS)}")
    if given.epochs < 1 or given.seeds < 1:
        parser.error("--epochs and --seeds must be at least 1")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing; print and write the table after every run."""
    given = parsed(arguments)
    network, device = NETWORKS[given.network], torch.device(given.device)
    folders = load_folders(
        given.data,
        pixels=given.pixels or network.pixels,
        small=network.small,
        batch=given.batch,
        calibration=CALIBRATION,
        workers=given.workers,
        device=device,
    )
    teacher = trained_network(given.network, folders.classes, given.weights).to(device)
    reference = folders.accuracy(teacher)
    rows = [PRECISIONS[bits] for bits in given.bits]
    given.work.mkdir(parents=True, exist_ok=True)
    kept = given.work / "study_full.jsonl"
    found = [o for o in kept_outcomes(kept, Outcome) if o.run == name_of(given)]
    done = {(o.precision, o.seed) for o in found}
    weights = "random weights" if given.weights is None else given.weights.name
    title = f"{name_of(given)}, {weights}, floating point {reference:.2f} %"
    for seed in range(given.seeds):
        for precision in rows:
            if (precision.name, seed) not in done:
                found.append(run(teacher, folders, precision, seed, given))
                add_outcome(kept, found[-1])
            text = f"{title}\n\n{table(found, rows, reference)}\n"
            given.results.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
