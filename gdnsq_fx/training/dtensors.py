"""Parameters of which each process holds a part: ``DTensor``, as FSDP2 leaves them.

All functions pass plain tensors through. They are told apart by what a ``DTensor``
alone can do, because its module takes half a second to import.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process; called by all of them."""
    held: Any = tensor
    return held.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, sharing its memory."""
    held: Any = tensor
    return held.to_local() if is_sharded(tensor) else tensor


def placed_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every process, cut as another one is."""
    if not is_sharded(other) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    held: Any = other
    mesh, placements = held.device_mesh, held.placements
    # Every process cuts its own: nothing is sent.
    value = value.to(local(other).device)
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def whole_of_parts(part: Tensor, other: Tensor) -> Tensor:
    """All of a tensor of which each process gives the part that it has of another."""
    if not is_sharded(other):
        return part
    from torch.distributed.tensor import DTensor

    held: Any = other
    mesh, placements = held.device_mesh, held.placements
    joined = DTensor.from_local(
        part, mesh, placements, shape=other.shape, stride=other.stride()
    )
    return whole(joined)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all of them, plain and sharded together; a plain scalar."""
    every = list(tensors)
    plain = [t for t in every if not is_sharded(t)]
    norm = nn.utils.get_total_norm(plain)
    if len(plain) == len(every):
        return norm
    sharded = nn.utils.get_total_norm([t for t in every if is_sharded(t)])
    return torch.stack([norm.to(sharded.device), whole(sharded)]).norm()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """``clip_grad_norm_`` for plain and sharded parameters; returns the norm before."""
    every = list(parameters)
    gradients = [p.grad for p in every if p.grad is not None]
    if not any(map(is_sharded, gradients)):
        return nn.utils.clip_grad_norm_(every, max_norm)
    norm = total_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)
    return norm
