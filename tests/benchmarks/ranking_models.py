"""Three trained models with real data, for the benchmark of the ranking of edges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_images import ARCHIVE, normalized, unpacked
from ranking_decoder import CONTEXT, Decoder, doc_strings, train_decoder
from resnet20 import trained_resnet20
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gdnsq_fx.demo.digits import load_digits_split, train_digits
from gdnsq_fx.demo.network import DigitsNet
from gdnsq_fx.demo.seeding import seeded


@dataclass(frozen=True)
class Case:
    """A trained model and what it is measured on.

    Attributes:
        name: as the table shows it.
        model: in evaluation.
        calibration: batches that place the levels.
        batches: batches that the analysis sees, apart from those.
        targets: their classes, for the Hessian of the task's loss.
        quality: accuracy or loss of the model, in words.
    """

    name: str
    model: nn.Module
    calibration: list[Tensor]
    batches: list[Tensor]
    targets: list[Tensor]
    quality: str


def digits_case(samples: int) -> Case:
    """The network of the demo on scikit-learn's digits."""
    data = load_digits_split()
    model = DigitsNet()
    accuracy = train_digits(model, data)
    return Case(
        "digits CNN",
        model.eval(),
        list(data.train_images[:512].split(64)),
        list(data.test_images[:samples].split(64)),
        list(data.test_labels[:samples].split(64)),
        f"{accuracy:.2f} % of the test images",
    )


def resnet20_case(data: Path, work: Path, samples: int) -> Case:
    """ResNet-20 trained on CIFAR-10; images spread evenly over the ten classes.

    Args:
        data: folder with ``cifar10-jpeg.tar.xz`` and the weights.
        work: where the images are unpacked once.

    Raises:
        FileNotFoundError: a file is missing.
    """
    model = trained_resnet20(data)
    folder = unpacked(data / ARCHIVE, work / "cifar10")
    calibration, _ = _images(folder / "train", 512)
    images, labels = _images(folder / "test", samples)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()
    return Case(
        "ResNet-20",
        model,
        list(calibration.split(64)),
        list(images.split(64)),
        list(labels.split(64)),
        f"{100 * float(right):.1f} % of these images",
    )


def _images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Normalized images [count, 3, 32, 32], evenly spread, and their labels."""
    from torchvision.io import read_image

    files = sorted(folder.glob("*/*.jpg"))
    classes = sorted({f.parent.name for f in files})
    chosen = [files[i * len(files) // count] for i in range(count)]
    images = torch.stack([read_image(str(f)) for f in chosen])
    labels = torch.tensor([classes.index(f.parent.name) for f in chosen])
    return normalized(images), labels


def decoder_case(work: Path, samples: int, steps: int = 900) -> Case:
    """A small decoder trained on the documentation of Python's standard library.

    Args:
        work: where the trained weights are kept, and looked for.
        samples: rows of 64 characters.
        steps: of 32 rows each.
    """
    text = "\n".join(doc_strings())
    alphabet = sorted(set(text))
    codes = {c: i for i, c in enumerate(alphabet)}
    ids = torch.tensor([codes[c] for c in text])
    cut = len(ids) * 9 // 10 // CONTEXT * CONTEXT
    with seeded(0):
        model = Decoder(len(alphabet))
        kept = work / f"decoder-{len(alphabet)}-{len(ids)}-{steps}.safetensors"
        if kept.exists():
            model.load_state_dict(load_file(kept))
        else:
            train_decoder(model, ids[:cut], steps)
            save_file(model.state_dict(), kept)
        torch.manual_seed(0)
        held = ids[cut:]
        held = held[: len(held) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        held = held[torch.randperm(len(held))[:samples]]
        seen = ids[:cut].view(-1, CONTEXT)
        calibration = seen[torch.randperm(len(seen))[:256]]
    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(model(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten())
    return Case(
        "decoder",
        model,
        list(calibration.split(64)),
        list(held[:, :-1].contiguous().split(64)),
        list(held[:, 1:].contiguous().split(64)),
        f"{float(loss):.2f} nats a character of held-out text",
    )
