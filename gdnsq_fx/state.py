"""Leave a model as it was: modes, buffers and the random state."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def preserved_modes(model: nn.Module) -> Generator[None]:
    """Every sub-module has its own training mode back afterwards.

    ``model.train(was_training)`` would not do: it also wakes sub-modules that the user
    holds in evaluation.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_evaluation(model: nn.Module) -> Generator[None]:
    """Run a model in evaluation for the time of the block."""
    with preserved_modes(model):
        model.eval()
        yield


@contextmanager
def preserved_state(*modules: nn.Module) -> Generator[None]:
    """Restore buffers, training flags and the random state on the way out."""
    buffers = {id(b): b for m in modules for b in m.buffers()}
    saved = [(b, b.detach().clone()) for b in buffers.values()]
    devices = {b.device for b in buffers.values() if b.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(
            torch.random.fork_rng(devices=[d.index or 0 for d in devices])
        )
        for module in modules:
            stack.enter_context(preserved_modes(module))
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)
