"""Take any output of a model apart, compare two, and make a loss of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# A bias before a normalization has a gradient that is zero up to rounding. Ranges count
# as at least this share of the largest range in the same comparison of gradients.
GRADIENT_FLOOR = 1e-3


@dataclass(frozen=True)
class Comparison:
    """How far two outputs are apart.

    Attributes:
        worst: largest difference in one tensor, as a share of that tensor's range.
        where: path of that tensor.
        mismatch: difference in structure, type, shape or plain values; empty if none.
    """

    worst: float = 0.0
    where: str = ""
    mismatch: str = ""

    def cause(self, tolerance: float) -> str:
        """Why the two differ, empty where they agree."""
        if self.mismatch:
            return self.mismatch
        far = self.worst > tolerance
        return f"{self.where} differs by {self.worst:.1e} of its range" if far else ""


def leaves(value: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of everything in a value; of a container also its type.

    Objects such as key-value caches are taken apart by their attributes.
    """
    if isinstance(value, Mapping):
        items = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    elif hasattr(value, "__dict__") and not _is_leaf(value):
        items = [(f"{path}.{name}", item) for name, item in vars(value).items()]
    else:
        yield path, value
        return
    yield path, type(value)
    for where, item in items:
        yield from leaves(item, where)


def tensors(value: Any) -> dict[str, Tensor]:
    """All tensors in a value by their path."""
    return {path: leaf for path, leaf in leaves(value) if isinstance(leaf, Tensor)}


def loss_of(output: Any) -> Tensor:
    """The sum of a dict of losses; else of the mean squares of all tensors."""
    if isinstance(output, Mapping) and output:
        parts = list(output.values())
        if all(isinstance(part, Tensor) and part.ndim == 0 for part in parts):
            return torch.stack(parts).sum()
    found = [t for t in tensors(output).values() if t.is_floating_point()]
    return torch.stack([t.square().mean() for t in found if t.requires_grad]).sum()


def compare(wanted: Any, got: Any, floor: float = 0.0) -> Comparison:
    """Compare two outputs.

    Args:
        wanted: what eager says; its tensors give the ranges.
        got: what the graph says.
        floor: smallest range of a tensor, as a share of the largest range in
            ``wanted``.
    """
    ours, theirs = dict(leaves(wanted)), dict(leaves(got))
    if ours.keys() != theirs.keys():
        missing, extra = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
        text = f"missing {sorted(missing)[:3]}, extra {sorted(extra)[:3]}"
        return Comparison(mismatch=f"{_types(ours, theirs)}{text}")
    ranges = [_range(leaf) for leaf in ours.values() if isinstance(leaf, Tensor)]
    least = floor * max(ranges, default=0.0)
    worst, where = 0.0, ""
    for path, leaf in ours.items():
        mismatch = _mismatch(leaf, theirs[path])
        if mismatch:
            return Comparison(mismatch=f"{path}: {mismatch}")
        if isinstance(leaf, Tensor):
            distance = _distance(leaf, theirs[path], least)
            if distance > worst:
                worst, where = distance, path
    return Comparison(worst, where)


def gradients(module: nn.Module, names: list[str]) -> dict[str, Tensor | None]:
    """Gradients of the parameters named."""
    return {name: module.get_parameter(name).grad for name in names}


def _is_leaf(value: Any) -> bool:
    kinds = (Tensor, nn.Module, type, torch.device, torch.dtype)
    return isinstance(value, kinds) or callable(value)


def _types(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first container whose type changed: it explains the paths that did."""
    for path, leaf in ours.items():
        other = theirs.get(path)
        if isinstance(leaf, type) and other is not leaf:
            return f"{path}: {_mismatch(leaf, other)}; "
    return ""


def _mismatch(wanted: Any, got: Any) -> str:
    if isinstance(wanted, type):
        shown = got.__name__ if isinstance(got, type) else type(got).__name__
        return "" if wanted is got else f"{shown} instead of {wanted.__name__}"
    if not isinstance(wanted, Tensor):
        same = type(wanted) is type(got) and (_is_leaf(wanted) or wanted == got)
        return "" if same else f"{got!r:.60} instead of {wanted!r:.60}"
    if not isinstance(got, Tensor):
        return f"{type(got).__name__} instead of a tensor"
    if wanted.dtype != got.dtype or wanted.shape != got.shape:
        return f"{_brief(got)} instead of {_brief(wanted)}"
    return ""


def _brief(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _range(tensor: Tensor) -> float:
    """Largest minus smallest finite value, zero included."""
    values = _reals(tensor)
    values = values[values.isfinite()]
    if values.numel() == 0:
        return 0.0
    return float(values.max().clamp(min=0.0) - values.min().clamp(max=0.0))


def _distance(wanted: Tensor, got: Tensor, least: float) -> float:
    """Largest difference as a share of the range.

    Infinite values, values that are no numbers, and whole numbers must be the same.
    """
    mine, other = _reals(wanted), _reals(got)
    same = (mine == other) | (mine.isnan() & other.isnan())
    if bool(same.all()):
        return 0.0
    worst = float((mine - other)[~same].abs().max())
    rounds = wanted.is_floating_point() or wanted.is_complex()
    scale = max(_range(wanted), least)
    return worst / scale if rounds and scale and math.isfinite(worst) else math.inf


def _reals(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().double()
