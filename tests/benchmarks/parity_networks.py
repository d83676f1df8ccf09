"""Trained networks with real labelled images, on which runtimes are compared."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cifar_images import ARCHIVE, Images, normalized
from resnet20 import trained_resnet20
from torch import Tensor, nn

from gdnsq_fx.demo.digits import (
    DigitsData,
    load_digits_split,
    train_digits,
    train_loader,
)
from gdnsq_fx.demo.network import DigitsNet
from gdnsq_fx.demo.seeding import seeded

BATCH = 64
_CALIBRATION = 8 * BATCH


@dataclass(frozen=True)
class Network:
    """A trained model, and images.

    Attributes:
        name: as the table shows it.
        model: in evaluation; maps images ``[B, ...]`` to logits ``[B, 10]``.
        training: makes the batches (images, labels) to fine-tune on, each time alike.
        calibration: batches of images that place the levels.
        images: to compare on, ``[N, ...]``.
        labels: their classes ``[N]``.
    """

    name: str
    model: nn.Module
    training: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    calibration: list[Tensor]
    images: Tensor
    labels: Tensor


class DigitsTransformer(nn.Module):
    """Two blocks of attention over 16 patches of 2 x 2 pixels.

    Both products of attention stand in the open, so that they are quantized as well.
    """

    def __init__(self, width: int = 32, heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.patches = nn.Conv2d(1, width, 2, stride=2)
            self.position = nn.Parameter(0.02 * torch.randn(16, width))
            self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(2)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 1, 8, 8] to logits [B, 10]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class _Block(nn.Module):
    """Attention and a layer of GELU, each normalized before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, T, width] to tokens."""
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        mixed = (scores.softmax(3) @ value).transpose(1, 2).flatten(2)
        x = x + self.mix(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def digits_network(width: int = 16, epochs: int = 4) -> Network:
    """The network of the demo on all of scikit-learn's digits, test images first."""
    data, model = load_digits_split(), DigitsNet(width)
    train_digits(model, data, epochs, progress=False)
    return _on_digits("digits CNN", model, data)


def digits_transformer(epochs: int = 60) -> Network:
    """A small transformer on the same images."""
    data, model = load_digits_split(), DigitsTransformer()
    loader = train_loader(data, BATCH)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.01, total_steps=epochs * len(loader)
    )
    for _ in range(epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return _on_digits("digits transformer", model, data)


def _on_digits(name: str, model: nn.Module, data: DigitsData) -> Network:
    return Network(
        name,
        model.eval(),
        partial(train_loader, data, BATCH),
        list(data.train_images[:_CALIBRATION].split(BATCH)),
        torch.cat([data.test_images, data.train_images]),
        torch.cat([data.test_labels, data.train_labels]),
    )


def resnet20_network(data: Path, count: int) -> Network:
    """ResNet-20 on the test images of CIFAR-10, fine-tuned on few training images.

    Args:
        data: folder with ``cifar10-jpeg.tar.xz`` and the weights.
        count: test images, spread evenly over the classes.

    Raises:
        FileNotFoundError: a file is missing.
    """
    model = trained_resnet20(data)
    test, train = _packed_images(data / ARCHIVE, {"test": count, "train": 1280})
    seen = normalized(train.pixels)
    batches = list(zip(seen.split(BATCH), train.labels.split(BATCH), strict=True))
    return Network(
        "ResNet-20",
        model,
        lambda: batches,
        list(seen[:_CALIBRATION].split(BATCH)),
        normalized(test.pixels),
        test.labels,
    )


def _packed_images(archive: Path, counts: dict[str, int]) -> list[Images]:
    """The first images of each class and part, the classes taking turns.

    The archive is read once and not unpacked, for few images are wanted.
    """
    found: dict[str, dict[str, dict[str, bytes]]] = {part: {} for part in counts}
    with tarfile.open(archive) as packed:
        for member in packed:
            part, _, rest = member.name.partition("/")
            kind, _, name = rest.partition("/")
            file = packed.extractfile(member) if part in counts else None
            if file is not None and name.endswith(".jpg"):
                found[part].setdefault(kind, {})[name] = file.read()
    return [_decoded(found[part], count) for part, count in counts.items()]


def _decoded(files: dict[str, dict[str, bytes]], count: int) -> Images:
    """The first ``count`` images, the classes taking turns, each in order of names."""
    from torchvision.io import decode_jpeg

    kinds = [[files[kind][n] for n in sorted(files[kind])] for kind in sorted(files)]
    turns = [
        (data, label)
        for together in zip(*kinds, strict=True)
        for label, data in enumerate(together)
    ][:count]
    pixels = [
        decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        for data, _ in turns
    ]
    return Images(torch.stack(pixels), torch.tensor([label for _, label in turns]))
