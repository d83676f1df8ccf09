"""CIFAR images from an archive of JPEG files, and augmented batches of them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCHIVE = "cifar10-jpeg.tar.xz"
PADDING = 4


@dataclass(frozen=True)
class Images:
    """Images [N, 3, H, W] as bytes, and their classes [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Images:
        """Those of the lowest numbers, which lie evenly over the classes."""
        return Images(self.pixels[:count], self.labels[:count])

    def batches(self, size: int) -> list[Tensor]:
        """Normalized images in order, without augmentation or labels."""
        return [channels_last(normalized(chunk)) for chunk in self.pixels.split(size)]

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module, size: int = 500) -> float:
        """Percent that the model, left in its mode, classifies as labelled."""
        right = 0
        for pixels, labels in zip(
            self.pixels.split(size), self.labels.split(size), strict=True
        ):
            output = model(channels_last(normalized(pixels)))
            right += int((output.argmax(1) == labels).sum())
        return 100.0 * right / len(self)


class Augmented:
    """Batches (images, labels): shuffled, cropped by `PADDING` pixels, and flipped.

    Each pass draws anew from one generator; images that do not fill a last batch sit
    the pass out.
    """

    def __init__(self, images: Images, size: int, seed: int) -> None:
        self._images = images
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._images) // self._size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._images), generator=self._generator)
        for chosen in order[: len(self) * self._size].split(self._size):
            images = normalized(self._images.pixels[chosen])
            yield self._moved(images), self._images.labels[chosen]

    def _moved(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        top, left = torch.randint(
            2 * PADDING + 1, (2, count, 1), generator=self._generator
        )
        flip = torch.rand(count, 1, generator=self._generator) < 0.5
        columns = torch.arange(width).expand(count, width)
        columns = torch.where(flip, columns.flip(1), columns) + left
        rows = torch.arange(height) + top
        padded = F.pad(images, (PADDING,) * 4)
        which = torch.arange(count).view(-1, 1, 1)
        moved = padded[which, :, rows.unsqueeze(2), columns.unsqueeze(1)]
        return channels_last(moved.permute(0, 3, 1, 2))


def normalized(pixels: Tensor) -> Tensor:
    """Bytes [N, 3, H, W] as the networks were trained to see them."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255.0 - mean) / std


def channels_last(images: Tensor) -> Tensor:
    """The same in the layout in which a CPU took four fifths of the time or less."""
    return images.contiguous(memory_format=torch.channels_last)


def load_cifar(data: Path, work: Path) -> tuple[Images, Images]:
    """Training and test images; decoded once and kept in ``work``.

    The images are dealt so that any first N of them lie evenly over the classes.

    Raises:
        FileNotFoundError: the archive is not in ``data``.
    """
    kept = work / "cifar10.safetensors"
    if not kept.exists():
        folder = unpacked(data / ARCHIVE, work / "cifar10")
        tensors: dict[str, Tensor] = {}
        for part in ("train", "test"):
            images = _decoded(folder / part)
            tensors |= {part: images.pixels, f"{part}_labels": images.labels}
        save_file(tensors, kept)
    found = load_file(kept)
    train, test = (Images(found[p], found[f"{p}_labels"]) for p in ("train", "test"))
    return train, test


def unpacked(archive: Path, folder: Path) -> Path:
    """The folder of ``train`` and ``test``, unpacked where that was not done before."""
    done = folder / "done"
    if not done.exists():
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        done.touch()
    return next(p.parent for p in folder.rglob("train") if p.is_dir())


def _decoded(folder: Path) -> Images:
    """All JPEG files of class folders, the classes taking turns."""
    from torchvision.io import read_image

    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [sorted((folder / name).glob("*.jpg")) for name in classes]
    turns = [
        (file, label)
        for together in zip(*files, strict=True)
        for label, file in enumerate(together)
    ]
    decoded = [read_image(str(file)) for file, _ in tqdm(turns, desc=folder.name)]
    return Images(torch.stack(decoded), torch.tensor([label for _, label in turns]))
