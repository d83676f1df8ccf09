"""Each process holds a part of weights, gradients and optimizer state: FSDP2.

A prepared graph reads its weights itself instead of calling layers that own them, so
``fully_shard`` takes it as one group: whole weights exist from forward to the end of
backward, and where they are read between steps. What each process saves is its share of
gradients and optimizer state. Quantizers are a few numbers and stay whole everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.errors import TrainingDivergedError
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.training.dtensors import is_sharded, placed_like
from gdnsq_fx.training.global_batch_norm import synchronize_batch_norm
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.working_copy import give_back, working_copy


class Sharded:
    """Data parallel training of one model in parts.

    Args:
        group: the processes.
        device: type of the device that they compute on.
    """

    def __init__(self, group: ProcessGroup, device: str) -> None:
        self.group = group
        self._device = device
        self._root: Any = None

    @contextmanager
    def working(self, qmodel: GraphModule) -> Generator[GraphModule]:
        """A copy, whose weights are given back whole at the end, or at the last good
        state. After any other error the weights are as they were given."""
        copied = working_copy(qmodel)
        synchronize_batch_norm(copied)
        try:
            yield copied
        except TrainingDivergedError:  # in every process at once
            give_back(copied, qmodel)
            raise
        finally:
            self._root = None
        give_back(copied, qmodel)

    def forward(self, module: nn.Module) -> nn.Module:
        """The module, its weights cut in parts."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._root = _Root(module)
        fully_shard(
            self._root,
            mesh=init_device_mesh(self._device, (self.group.count,)),
            reshard_after_forward=False,
            ignored_params=_kept_whole(module),
        )
        return self._root

    @contextmanager
    def partial(self) -> Generator[None]:
        """Nothing is sent."""
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @torch.no_grad()
    def average_rest(self) -> None:
        """Average the gradients of what is whole everywhere, in one message.

        A parameter that no process has used keeps no gradient.
        """
        kept = [p for p in self._root.parameters() if not is_sharded(p)]
        kept = [p for p in kept if p.requires_grad]
        if not kept:
            return
        used = torch.tensor([p.grad is not None for p in kept], device=kept[0].device)
        parts = [used.float(), *(_flat_gradient(p) for p in kept)]
        mean = self.group.mean(torch.cat(parts))
        shares, *means = mean.split([len(part) for part in parts])
        for parameter, share, values in zip(kept, shares, means, strict=True):
            if share > 0.0:
                parameter.grad = values.view_as(parameter).to(parameter.dtype)

    def add_gradients(self, compute: Callable[[], Tensor]) -> None:
        """Of the whole weights; each process keeps its part."""
        with self.weights():
            found = torch.autograd.grad(compute(), self._learning(), allow_unused=True)
        gradients = cast("tuple[Tensor | None, ...]", found)
        for parameter, gradient in zip(self._learning(), gradients, strict=True):
            if gradient is None:
                continue
            part = placed_like(gradient, parameter)
            earlier = parameter.grad
            parameter.grad = part if earlier is None else earlier + part

    @contextmanager
    def weights(self) -> Generator[None]:
        """Gather them for the time of the block."""
        self._root.unshard()
        try:
            yield
        finally:
            self._root.reshard()

    def _learning(self) -> list[nn.Parameter]:
        """Parameters with gradients, whole or in parts as they are now; the order is
        that of the modules and stays."""
        return [p for p in self._root.parameters() if p.requires_grad]


class _Root(nn.Module):
    """Takes the hooks of FSDP2, so that the graph inside can be called without them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _kept_whole(module: nn.Module) -> set[nn.Parameter]:
    """Quantizers, and scalars, which cannot be cut."""
    quantizers = [m for m in module.modules() if isinstance(m, Quantizer)]
    found = {p for q in quantizers for p in q.parameters()}
    return found | {p for p in module.parameters() if p.ndim == 0}


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    found = parameter if parameter.grad is None else parameter.grad
    flat = found.detach().float().reshape(-1)
    return torch.zeros_like(flat) if parameter.grad is None else flat
