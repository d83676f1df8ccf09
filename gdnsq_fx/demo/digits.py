"""Handwritten digits: 1,797 real 8x8 images, and how to train on them.

The images come with scikit-learn, so nothing is downloaded. Everything here follows
from its seed alone: no function reads the global random state or leaves it changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from gdnsq_fx.demo.seeding import one_thread, seeded
from gdnsq_fx.errors import ConfigError, MissingExtraError
from gdnsq_fx.state import in_evaluation

_PIXEL_MAX = 16.0  # scikit-learn stores the grey levels 0..16
_TEST_SHARE = 0.25
_EVAL_BATCH = 256
_MAX_LEARNING_RATE = 0.1


@final
@dataclass(frozen=True)
class DigitsData:
    """The two halves of a split.

    Images are float32 [N, 1, 8, 8] in 0..1, labels int64 [N] in 0..9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits_split(seed: int = 0) -> DigitsData:
    """Load the digits, split into 1,347 training and 450 test images by class.

    Args:
        seed: which split. It is apart from all training seeds, so that runs with
            different training seeds are judged on the same test images.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    datasets, model_selection = _import_sklearn()
    digits = datasets.load_digits()
    train, test = model_selection.train_test_split(
        range(len(digits.target)),
        test_size=_TEST_SHARE,
        stratify=digits.target,
        random_state=seed,
    )
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / _PIXEL_MAX
    labels = torch.tensor(digits.target, dtype=torch.int64)
    return DigitsData(images[train], labels[train], images[test], labels[test])


def _import_sklearn() -> tuple[Any, Any]:
    """``sklearn.datasets`` and ``sklearn.model_selection``, imported on first use."""
    try:
        return (
            importlib.import_module("sklearn.datasets"),
            importlib.import_module("sklearn.model_selection"),
        )
    except ImportError as error:
        raise MissingExtraError(
            "the digits demo reads its images from scikit-learn, which cannot be "
            f"imported ({error}); install it with: "
            'pip install "gdnsq-fx[demo]"'
        ) from error


@final
class AugmentedLoader:
    """Batches of training images, shuffled and shifted anew on every pass.

    A pass draws all its random numbers when it starts: passes after one that was left
    halfway are the same as after one that ran to its end. The images that do not fill
    a last batch sit this pass out, so that BatchNorm never sees a tiny batch.
    """

    def __init__(self, data: DigitsData, batch_size: int, seed: int) -> None:
        count = len(data.train_labels)
        if not 1 <= batch_size <= count:
            raise ConfigError(
                f"batch_size is {batch_size}, but there are {count} training images; "
                f"choose a batch size from 1 to {count}"
            )
        self._data = data
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self._data.train_labels) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images [batch_size, 1, 8, 8], labels [batch_size]) ``len`` times."""
        count = len(self._data.train_labels)
        order = torch.randperm(count, generator=self._generator)
        offsets = torch.randint(0, 3, (2, count), generator=self._generator)
        for index in range(len(self)):
            start = index * self._batch_size
            chosen = order[start : start + self._batch_size]
            images = _crop_padded(self._data.train_images[chosen], offsets[:, chosen])
            yield images, self._data.train_labels[chosen]


def train_loader(
    data: DigitsData, batch_size: int = 64, seed: int = 0
) -> AugmentedLoader:
    """Return an iterable over augmented training batches that can be iterated again.

    Raises:
        ConfigError: ``batch_size`` is below 1 or above the number of training images.
    """
    return AugmentedLoader(data, batch_size, seed)


def _crop_padded(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift each image [B, C, H, W] by ``offsets`` [2, B] - 1 pixels; 0 flows in."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images)), :, offsets[0], offsets[1]]


def train_digits(
    model: nn.Module,
    data: DigitsData,
    epochs: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Train in place (SGD, one-cycle rate) and return the test accuracy in percent.

    The model is left in eval mode, ready to be prepared or to teach. Meanwhile torch
    computes on one CPU thread, so the result does not depend on their number.

    Args:
        model: maps [B, 1, 8, 8] to logits [B, 10]; trained from its present weights.
        data: the split to train and test on.
        epochs: passes over the training images.
        seed: fixes shuffling, shifts, and what randomness the model has on the CPU.
        progress: whether to draw a progress bar.

    Raises:
        ConfigError: ``epochs`` is below 1.
    """
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}; train for at least 1 epoch")
    loader = train_loader(data, seed=seed)
    device = _device_of(model)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=_MAX_LEARNING_RATE,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_MAX_LEARNING_RATE, total_steps=epochs * len(loader)
    )
    model.train()
    with seeded(seed), one_thread():
        for _ in tqdm(range(epochs), desc="digits", unit="epoch", disable=not progress):
            for images, labels in loader:
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()
    return accuracy(model, data.test_images, data.test_labels)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images whose largest logit is their label, in eval mode.

    Every submodule has its own train/eval mode back afterwards, also after an error.

    Args:
        model: maps [B, ...] to logits [B, classes].
        images: [N, ...], taken in batches of 256 to the device of the model.
        labels: int64 [N].

    Raises:
        ConfigError: there are no images, or not as many labels as images.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ConfigError(
            f"accuracy needs one label for each image, got {len(images)} images and "
            f"{len(labels)} labels; pass the two tensors of one split"
        )
    device = _device_of(model)
    correct = 0
    with in_evaluation(model), torch.no_grad():
        for batch, target in zip(
            images.split(_EVAL_BATCH), labels.split(_EVAL_BATCH), strict=True
        ):
            predicted = model(batch.to(device)).argmax(dim=1)
            correct += int((predicted == target.to(device)).sum())
    return 100.0 * correct / len(images)


def _device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU if there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
