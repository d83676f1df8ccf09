"""Images in class folders, read by torchvision: ``train/<class>/*``, ``val/<class>/*``.

Small images (CIFAR) are cropped out of a border of zeros, large ones (ImageNet) out of
themselves; both are flipped. ``test`` may stand in place of ``val``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar_images import MEAN, PADDING, STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

# ImageNet's evaluation: the short side at 256, of which the middle 224 are looked at.
MARGIN = 256 / 224


class Loaded:
    """Batches (images, labels) of a `DataLoader`, on a device."""

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self._loader = loader
        self._device = device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._loader:
            yield (
                images.to(self._device, non_blocking=True),
                labels.to(self._device, non_blocking=True),
            )


@dataclass(frozen=True)
class Folders:
    """Training and validation images, and how many classes there are.

    Attributes:
        train: shuffled and augmented; what does not fill a batch sits a pass out.
        calibration: training images as they are, evenly over the classes.
        validation: all of it, in order.
    """

    train: Loaded
    calibration: list[Tensor]
    validation: Loaded
    classes: int

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of the validation images that a model in evaluation gets right."""
        right = torch.zeros((), dtype=torch.int64)
        seen = 0
        for images, labels in self.validation:
            right = right.to(images.device)
            right += (model(images).argmax(1) == labels).sum()
            seen += len(labels)
        return 100.0 * int(right) / seen


def load_folders(
    data: Path,
    *,
    pixels: int,
    small: bool,
    batch: int,
    calibration: int,
    workers: int,
    device: torch.device,
) -> Folders:
    """Open the folders.

    Args:
        data: holds ``train`` and ``val`` or ``test``.
        pixels: height and width of what a network is given.
        small: crop from a border, as for CIFAR, instead of from a larger image.
        batch: images of each batch; all of them where there are fewer.
        calibration: images to calibrate on.
        workers: processes that read and augment.
        device: where batches go.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: the two do not have the same classes.
    """
    augmented, plain = (_transform(pixels, small, augment=a) for a in (True, False))
    train = ImageFolder(_part(data, "train"), augmented)
    unchanged = ImageFolder(_part(data, "train"), plain)
    validation = ImageFolder(_part(data, "val", "test"), plain)
    if train.classes != validation.classes:
        differing = sorted(set(train.classes) ^ set(validation.classes))
        raise ValueError(
            f"training and validation images in {data} are of different classes, which "
            f"differ in {differing[:5]}; give both the same class folders"
        )
    options = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    # Files stand class by class, so that a stride takes evenly from all of them.
    chosen = range(0, len(unchanged), max(len(unchanged) // calibration, 1))
    some: DataLoader[Any] = DataLoader(
        Subset(unchanged, list(chosen)[:calibration]), batch, **options
    )
    shuffled: DataLoader[Any] = DataLoader(
        train, min(batch, len(train)), shuffle=True, drop_last=True, **options
    )
    # A generator of its own: validating must not move that of the training images.
    ordered: DataLoader[Any] = DataLoader(
        validation, batch, generator=torch.Generator(), **options
    )
    return Folders(
        Loaded(shuffled, device),
        [images for images, _ in Loaded(some, device)],
        Loaded(ordered, device),
        len(train.classes),
    )


def _part(data: Path, *names: str) -> Path:
    for name in names:
        if (data / name).is_dir():
            return data / name
    raise FileNotFoundError(
        f"{data} has no folder {' or '.join(names)}; it needs train/<class>/* and "
        "val/<class>/* (or test/<class>/*)"
    )


def _transform(pixels: int, small: bool, *, augment: bool) -> Any:
    whole = transforms.Resize((pixels, pixels))
    if not augment:
        cut = [transforms.Resize(round(pixels * MARGIN)), transforms.CenterCrop(pixels)]
        before = [whole] if small else cut
    else:
        crop = transforms.RandomCrop(pixels, padding=PADDING)
        moved = [whole, crop] if small else [transforms.RandomResizedCrop(pixels)]
        before = [*moved, transforms.RandomHorizontalFlip()]
    after = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([*before, *after])
