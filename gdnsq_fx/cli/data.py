"""Samples for a report: a folder of images, an array in a file, or random numbers."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.errors import ConfigError, FileFormatError
from gdnsq_fx.extras import required

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def random_samples(shape: Sequence[int], count: int) -> Tensor:
    """Normal numbers, ``[count, *shape[1:]]``, from torch's random state."""
    return torch.randn(count, *shape[1:])


def read_samples(path: Path, shape: Sequence[int], count: int, seed: int) -> Tensor:
    """Read samples from a folder of images or an .npz file.

    Args:
        path: of the folder or file.
        shape: of the example input, batch size first.
        count: samples wanted; fewer where there are no more.
        seed: chooses the images.

    Returns:
        ``[count, *shape[1:]]``.

    Raises:
        FileNotFoundError: there is nothing at this path.
        ConfigError: neither a folder nor an .npz file, or it does not fit the shape.
        FileFormatError: a file cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir():
        return _read_images(path, shape, count, seed)
    if path.suffix.lower() == ".npz":
        return _read_array(path, shape, count)
    raise ConfigError(f"--data takes a folder of images or an .npz file, not {path}")


def _read_images(folder: Path, shape: Sequence[int], count: int, seed: int) -> Tensor:
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise ConfigError(
            "images need an --input of batch size, 1 or 3 channels, height and width; "
            f"it is {','.join(str(size) for size in shape)}"
        )
    paths = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file()
    )
    if not paths:
        raise ConfigError(
            f"no images in {folder} (looked for {' '.join(sorted(IMAGES))})"
        )
    chosen = random.Random(seed).sample(paths, min(count, len(paths)))
    pillow = required("PIL.Image", "--data with a folder of images", "gdnsq-fx[demo]")
    return torch.stack([_image(pillow, path, shape) for path in chosen])


def _image(pillow: Any, path: Path, shape: Sequence[int]) -> Tensor:
    """``[channels, height, width]``."""
    channels, height, width = shape[1:]
    try:
        with pillow.open(path) as opened:
            image = opened.convert("RGB" if channels == 3 else "L")
            resized = image.resize((width, height), pillow.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as an image: {error}") from error
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    values = pixels.reshape(height, width, channels).permute(2, 0, 1) / 255.0
    if channels == 1:
        return values
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    return (values - mean[:, None, None]) / deviation[:, None, None]


def _read_array(path: Path, shape: Sequence[int], count: int) -> Tensor:
    numpy = required("numpy", "--data with an .npz file")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            names = list(file.files)
            if not names:
                raise FileFormatError(f"{path} holds no array")
            array = file["x" if "x" in names else names[0]]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FileFormatError(
            f"{path} cannot be read as arrays of numbers ({error}); write it with "
            "numpy.savez(path, x=array)"
        ) from error
    if array.ndim != len(shape) or tuple(array.shape[1:]) != tuple(shape[1:]):
        raise ConfigError(
            f"the array in {path} has shape {tuple(array.shape)}; --input says samples "
            f"of {tuple(shape[1:])}, one after the other"
        )
    if not len(array):
        raise ConfigError(f"the array in {path} holds no samples")
    return _as_input(array[:count], path)


def _as_input(array: Any, path: Path) -> Tensor:
    """Floats as float32; whole numbers (such as tokens) as int64."""
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype("float32"))
    if array.dtype.kind in "iu" and array.dtype.itemsize > 1:
        return torch.from_numpy(array.astype("int64"))
    raise ConfigError(
        f"the array in {path} holds {array.dtype}; save floats, scaled and normalized "
        "as the model expects them, or int64 for tokens"
    )
