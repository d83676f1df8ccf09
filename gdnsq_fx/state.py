"""Leave a model as it was: modes, buffers and the random state."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from gdnsq_fx.foreign_random import foreign_state, restore_foreign_state

# Buffers that a forward pass replaced have no public way back.
# pyright: reportPrivateUsage=false

_REGISTRIES = ("_modules", "_parameters", "_buffers")


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
    """Restore buffers, modes, tensors kept as attributes, and all random states.

    A forward pass may write into buffers, replace them, or keep a tensor on ``self``.
    """
    every = {id(m): m for root in modules for m in root.modules()}.values()
    buffers = {id(b): b for root in modules for b in root.buffers() if not is_lazy(b)}
    saved = [(b, b.detach().clone()) for b in buffers.values()]
    attributes = [
        (m, dict(vars(m)), dict(m._buffers), dict(m._parameters)) for m in every
    ]
    kept = [(c, c.copy()) for m in every for c in _containers(m)]
    tensors = [t for root in modules for t in (*root.parameters(), *root.buffers())]
    cuda = {t.device.index or 0 for t in tensors if t.device.type == "cuda"}
    foreign = foreign_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(cuda)))
        for module in modules:
            stack.enter_context(preserved_modes(module))
        try:
            yield
        finally:
            restore_foreign_state(foreign)
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)
            for module, before, its_buffers, its_parameters in attributes:
                _restore(module, before, its_buffers, its_parameters)
            for container, before in kept:
                _refill(container, before)


def is_on_meta(model: nn.Module) -> bool:
    """Whether any parameter or buffer has a shape but no values."""
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def cloned(tree: Any) -> Any:
    """The same structure with every tensor cloned: a model may write into its input."""
    return tree_map(_clone, tree)


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _restore(
    module: nn.Module,
    before: dict[str, Any],
    buffers: dict[str, Tensor | None],
    parameters: dict[str, nn.Parameter | None],
) -> None:
    """Put back replaced buffers and parameters, and attributes that hold a tensor.

    Parameters are replaced by a model that calls ``layer.to(dtype)`` in its forward.
    """
    for name, parameter in parameters.items():
        if name in module._parameters and not is_lazy(cast(Tensor, parameter)):
            module._parameters[name] = parameter
    for name, buffer in buffers.items():
        if name in module._buffers and not is_lazy(cast(Tensor, buffer)):
            module._buffers[name] = buffer
    for name, value in list(vars(module).items()):
        if name in _REGISTRIES or value is before.get(name):
            continue
        if not any(map(_is_traced, tree_leaves(value))):
            continue
        if name in before:
            vars(module)[name] = before[name]
        else:
            del vars(module)[name]


def _containers(module: nn.Module) -> list[Any]:
    """Lists and dicts that the user keeps on a module."""
    own = (v for k, v in vars(module).items() if k not in _REGISTRIES)
    return [value for value in own if type(value) in (list, dict)]


def _refill(container: Any, before: Any) -> None:
    """Take out what a forward pass put into a list or dict, if it holds tensors."""
    if not any(map(_is_traced, tree_leaves(container))):
        return
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)


def _is_traced(leaf: Any) -> bool:
    """A tensor, or a number that a tracer made of a size."""
    return isinstance(leaf, Tensor) or (
        isinstance(leaf, int | float) and hasattr(leaf, "node")
    )


@contextmanager
def without_fast_path() -> Generator[None]:
    """Attention layers compute step by step: the fused kernel drops padded places."""
    mha = torch.backends.mha
    enabled = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(enabled)
