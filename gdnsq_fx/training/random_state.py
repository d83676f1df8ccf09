"""The state of every global random generator, as tensors.

Covered are Python's ``random``, NumPy's global generator (where NumPy is loaded), and
torch's on the CPU and, once CUDA is in use, on every CUDA device.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.errors import CheckpointError

_MERSENNE_TWISTER = "MT19937"


def random_state() -> dict[str, Tensor]:
    """The state of all of them now, by name; nothing is drawn.

    Raises:
        CheckpointError: NumPy's global generator is not the one it comes with.
    """
    _, words, gauss = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": _optional(gauss),
        **_numpy_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            found[f"cuda{device}"] = state
    return found


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put back what `random_state` returned, except for CUDA devices that are gone."""
    torch.set_rng_state(state["torch"])
    gauss: list[float] = state["python_gauss"].tolist()
    words = tuple(state["python"].tolist())
    random.setstate((3, words, gauss[0] if gauss else None))
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        *key, position = state["numpy"].tolist()
        cached: list[float] = state["numpy_gauss"].tolist()
        numpy.random.set_state(
            (_MERSENNE_TWISTER, key, position, len(cached), cached[0] if cached else 0)
        )
    for device in range(torch.cuda.device_count()):
        if f"cuda{device}" in state:
            torch.cuda.set_rng_state(state[f"cuda{device}"], device)


def _numpy_state() -> dict[str, Tensor]:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return {}
    state: dict[str, Any] = numpy.random.get_state(legacy=False)
    if state["bit_generator"] != _MERSENNE_TWISTER:
        raise CheckpointError(
            f"NumPy's global generator is {state['bit_generator']}, whose state cannot "
            f"be stored; leave it at {_MERSENNE_TWISTER}, or fine-tune without "
            "checkpoint"
        )
    inner = state["state"]
    return {
        "numpy": torch.tensor([*inner["key"].tolist(), int(inner["pos"])]),
        "numpy_gauss": _optional(state["gauss"] if state["has_gauss"] else None),
    }


def _optional(value: float | None) -> Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)
