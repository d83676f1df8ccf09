"""What a case of the zoo is: a model with random weights, and inputs for it."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gdnsq_fx.inputs import ExampleInput

Library = Literal["torchvision", "timm", "transformers"]
Mode = Literal["eval", "train", "batch"]
LIBRARIES: tuple[Library, ...] = ("torchvision", "timm", "transformers")
NOISE = 0.05


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: unique, ``library/model``, with ``-eager`` or ``-sdpa`` for attention.
        family: the group that shares its code, mostly the module that defines it.
        library: the package that the model comes from.
        build: makes the model, with random weights; no weights are downloaded.
        example: makes the example input for a batch of so many samples.
        refuses: what eager itself cannot do, and why: evaluation, training, or a batch
            of another size in evaluation.
        note: what else is peculiar.
    """

    name: str
    family: str
    library: Library
    build: Callable[[], nn.Module]
    example: Callable[[int], ExampleInput]
    refuses: Mapping[Mode, str] = field(default_factory=dict[Mode, str])
    note: str = ""

    def model(self) -> nn.Module:
        """The model; the same weights at every call."""
        seed(0)
        model = self.build()
        roughen(model)
        return model.train()

    def inputs(self, batch: int) -> ExampleInput:
        """The example input; the same values at every call."""
        seed(batch)
        return self.example(batch)


def seed(value: int) -> None:
    """Seed every generator that models draw from (BigBird draws from NumPy's)."""
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


@torch.no_grad()
def roughen(model: nn.Module) -> None:
    """Add noise to constant parameters.

    Heads that start at zero and layer scales of 1e-6 would hide the rest of the model:
    its outputs would not reach the loss, and any two graphs would look the same.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if parameter.min() == parameter.max():
            parameter.add_(NOISE * torch.randn_like(parameter))


def call(model: nn.Module, example: ExampleInput) -> Any:
    """Call a model as `gdnsq_fx.prepare` would."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def image(size: int, channels: int = 3) -> Callable[[int], ExampleInput]:
    """Example of square images."""
    return lambda batch: torch.randn(batch, channels, size, size)


def is_installed(library: Library) -> bool:
    """Whether the cases of a library can run here."""
    return importlib.util.find_spec(library) is not None


@cache
def all_cases(library: Library) -> tuple[Case, ...]:
    """The cases of one library, which must be installed."""
    module = importlib.import_module(f"{library}_models")
    return tuple(module.cases())
