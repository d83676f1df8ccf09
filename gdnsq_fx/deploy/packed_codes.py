"""Int8 codes of the deployable form in a file: levels in their bits, and their factors.

    a.codes  ->  a.codes (packed levels), a.codes#factor, a.codes#least, and, where some
                 channels stay as they are, a.codes#whole, a.codes#rows

No module has a ``#`` in the name of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.deploy.affine_codes import AffineCodes, affine_codes

_PARTS = ("factor", "least", "whole", "rows")


def split_codes(
    tensors: Mapping[str, Tensor], codes: Mapping[str, int | None]
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int | None]]:
    """Replace int8 codes by their levels.

    Args:
        tensors: name -> tensor.
        codes: names among them that are int8 codes -> dimension of their channels.

    Returns:
        The tensors to store, bits of those that are levels, and the dimension that the
        factors of each run along, None where there is one factor.
    """
    stored = dict(tensors)
    bits: dict[str, int] = {}
    axes: dict[str, int | None] = {}
    for name, axis in codes.items():
        if not tensors[name].numel():
            continue
        found = affine_codes(tensors[name].cpu(), axis)
        stored[name], bits[name], axes[name] = found.levels, found.bits, found.axis
        stored |= {f"{name}#{part}": getattr(found, part) for part in _PARTS}
    return stored, bits, axes


def joined_codes(tensors: Mapping[str, Tensor], axes: Any) -> dict[str, Tensor]:
    """Undo `split_codes`.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError, IndexError: not what it made.
    """
    found = dict(tensors)
    for name, axis in axes.items():
        parts = {part: found.pop(f"{name}#{part}") for part in _PARTS}
        _check(name, found[name], parts, axis)
        found[name] = AffineCodes(found[name], 0, axis=axis, **parts).codes()
    return found


def _check(name: str, levels: Tensor, parts: dict[str, Tensor], axis: Any) -> None:
    """Broadcasting would make larger tensors of sizes that do not fit."""
    channels = 1
    if axis is not None:
        if type(axis) is not int or not 0 <= axis < levels.ndim:
            raise ValueError(f"{name} has no dimension {axis!r}"[:200])
        channels = levels.shape[axis]
    types = (torch.uint8, torch.int8, torch.int64, torch.int8)
    kinds = dict(zip(_PARTS, types, strict=True))
    fits = all(parts[part].dtype == kind for part, kind in kinds.items())
    fits = fits and levels.dtype == torch.uint8 and parts["whole"].ndim == 1
    sizes = all(list(parts[part].shape) == [channels] for part in _PARTS[:2])
    whole = parts["whole"]
    rows = [len(whole), *levels.shape[1:]] if whole.numel() else [0]
    kept = (
        parts["rows"].numel() == 0
        if not whole.numel()
        else (list(parts["rows"].shape) == rows)
    )
    if not (fits and sizes and kept):
        raise ValueError(f"the codes of {name} and their factors do not fit")
