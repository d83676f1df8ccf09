"""Copies of a model: deep ones, and shells that share what they hold."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from gdnsq_fx.errors import CaptureError


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        CaptureError: the model refuses.
    """
    # Tensors computed from others (a pruned weight) refuse to be copied as they are.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    memo |= {
        id(p): cast(Any, type(p))(device=p.device, dtype=p.dtype)
        for p in (*model.parameters(), *model.buffers())
        if is_lazy(p)
    }
    try:
        twin = copy.deepcopy(model, memo)
        for module, other in zip(twin.modules(), model.modules(), strict=False):
            module.training = other.training  # torchvision's extractors forget it
        return twin
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}. Pass inplace=True, "
            "which copies nothing"
        ) from error


def shell_of(model: nn.Module) -> nn.Module:
    """The same parameters and sub-modules under a new root, which may be added to."""
    if isinstance(model, GraphModule):
        return model  # its own copies do not keep what a subclass adds
    # Not copy.copy: a parametrized module refuses it.
    shell = object.__new__(type(model))
    vars(shell).update(vars(model))
    for kind in ("_modules", "_parameters", "_buffers"):
        vars(shell)[kind] = dict(vars(model)[kind])
    return shell


def own_path(shell: nn.Module, path: str) -> nn.Module:
    """A shell of the module at a path, put into shells of all that lie above it.

    Args:
        shell: a module that may be changed.
        path: of a module in it.
    """
    for name in path.split("."):
        below = shell_of(shell._modules[name])  # type: ignore[arg-type]
        shell._modules[name] = below
        shell = below
    return shell
