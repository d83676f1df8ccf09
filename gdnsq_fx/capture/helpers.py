"""Small modules without parameters that a captured graph calls."""

# Modules that a helper refers to without owning them stand in its __dict__ alone.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

CONTAINER = "captured_calls"


class _ModeReader(nn.Module):
    """Reads the mode of a module of the model; its own one where none is given.

    Args:
        scope: the module whose ``forward`` asked ``self.training``.
    """

    def __init__(self, scope: nn.Module | None) -> None:
        super().__init__()
        self.__dict__["scope"] = scope

    @property
    def in_training(self) -> bool:
        """Whether that module is in training."""
        scope: nn.Module | None = self.__dict__["scope"]
        return self.training if scope is None else scope.training


class ByMode(_ModeReader):
    """Hands on its first argument in evaluation, its second one in training."""

    def forward(self, evaluation: Any, training: Any) -> Any:
        """Choose by the mode."""
        return training if self.in_training else evaluation


class InMode(_ModeReader):
    """Nodes that run in one mode only; in the other one their values are None.

    Args:
        scope: as for `ByMode`.
        body: the nodes, as a module over the model's own sub-modules. It is not
            registered: what it calls has its name in the model already.
        training: the mode that runs it.
        outputs: number of values that it returns.
    """

    def __init__(
        self, scope: nn.Module | None, body: GraphModule, training: bool, outputs: int
    ) -> None:
        super().__init__(scope)
        self.__dict__["body"] = body
        self.mode = training
        self.outputs = outputs

    def extra_repr(self) -> str:
        """Mode and size."""
        count = len(self.__dict__["body"].graph.nodes)
        return f"{'training' if self.mode else 'evaluation'} only, {count} nodes"

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Run the nodes, or not."""
        if self.in_training != self.mode:
            return (None,) * self.outputs
        # Not called as a module: other tracers look for its name in the tree.
        return self.__dict__["body"].forward(*values)


class AppliedFunction(nn.Module):
    """A call of a `torch.autograd.Function`, with the backward that it defines."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def extra_repr(self) -> str:
        """Name of the function."""
        return self.function.__name__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply it."""
        return self.function.apply(*args, **kwargs)


class ReplacedBuffer(nn.Module):
    """Puts a new tensor in the place of a buffer, whatever its shape.

    Args:
        owner: the module of the model that holds the buffer.
        name: of the buffer.
    """

    _is_impure = True  # nothing reads its result, and yet it must run

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner
        self.name = name

    def extra_repr(self) -> str:
        """Name of the buffer."""
        return self.name

    def forward(self, value: Tensor) -> None:
        """Replace it."""
        setattr(self.__dict__["owner"], self.name, value)


def add_helper(owner: nn.Module, name: str, helper: nn.Module) -> str:
    """Register a helper module under a name, unless it is there; returns its path."""
    if not hasattr(owner, CONTAINER):
        owner.add_module(CONTAINER, nn.ModuleDict())
    container = owner.get_submodule(CONTAINER)
    assert isinstance(container, nn.ModuleDict)
    key = name.replace(".", "_")
    if key not in container:
        container[key] = helper.train(owner.training)
    return f"{CONTAINER}.{key}"
