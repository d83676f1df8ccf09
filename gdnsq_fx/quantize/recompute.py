"""Levels are computed again in backward instead of kept.

A convolution keeps its input for backward. In a prepared model that is the output y of
a quantizer, a new tensor as large as the activation x, while x is kept by whatever made
it (a ReLU keeps its output). Likewise for weights. Inside `recomputed_levels` autograd
keeps, instead of y, how to compute y from x:

    forward    x -> y = levels(x) -> conv(y)        kept: x
    backward   y = levels(x), once for all readers and for the quantizer's own gradient

The values are the same to the bit: the same operations run on the same input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Compute = Callable[..., Tensor]


class Kept(Protocol):
    """What is kept of a tensor: a call gives it back."""

    def __call__(self) -> Tensor: ...


@contextmanager
def recomputed_levels() -> Generator[None]:
    """Run the forward pass of a prepared model so that backward keeps no levels.

    Only the forward pass belongs inside; backward may come later. Other hooks on saved
    tensors that are active outside (`torch.utils.checkpoint`, `save_on_cpu`) get what
    is kept instead. Under `torch.compile`, which finds out by itself what to compute
    again, it does nothing.

    An operation that modifies the input of a quantizer in place before backward is an
    error (`RuntimeError`), as it is without this.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    recorder = _Recorder()
    token = _RECORDER.set(recorder)
    try:
        with saved_tensors_hooks(recorder.pack, _Recorder.unpack):
            yield
    finally:
        _RECORDER.reset(token)


def recipe_for(compute: Compute, value: Tensor, *scalars: Any) -> Recipe | None:
    """How to make ``compute(value, *scalars)`` again; None outside of the context."""
    if torch.compiler.is_compiling():
        return None
    recorder = _RECORDER.get()
    if recorder is None or not torch.is_grad_enabled() or not recorder.is_in_force:
        return None
    fixed = [_constant(one) for one in scalars]
    return Recipe(value, lambda given: compute(given, *fixed), recorder)


def hold_recipe(ctx: Any, recipe: Recipe | None) -> None:
    """Note a recipe in the context of its function, which must not keep it alive."""
    ctx.recipe = None if recipe is None else weakref.ref(recipe)


def held_recipe(ctx: Any) -> Recipe | None:
    """The recipe that was noted."""
    found: Recipe | None = None if ctx.recipe is None else ctx.recipe()
    return found


class Recipe:
    """A quantized tensor, and how to compute it again."""

    def __init__(
        self, given: Tensor, compute: Callable[[Tensor], Tensor], recorder: _Recorder
    ) -> None:
        self._given = recorder.pack(given)
        self._compute = compute
        self._recorder: _Recorder | None = recorder
        self._value: Tensor | None = None
        recorder.owned = self

    def made(self, value: Tensor) -> None:
        """This is the tensor; whoever saves it, or a view of it, saves the recipe."""
        recorder, self._recorder = self._recorder, None
        assert recorder is not None, "a recipe is for one tensor"
        recorder.owned = None
        recorder.recipes[_storage(value)] = self
        self._made, self._version = weakref.ref(value), value._version

    def shows(self, tensor: Tensor) -> bool:
        """Whether this is a view of the tensor that was made, still as it was made."""
        made = self._made()
        # An address is given out again once its tensor is gone.
        if made is None or tensor.dtype != made.dtype:
            return False
        return _storage(tensor) == _storage(made) and tensor._version == self._version

    def value(self) -> Tensor:
        """The tensor, made once for all readers."""
        if self._value is None:
            with torch.no_grad():
                self._value = self._compute(self._given())
        return self._value

    def take(self) -> Tensor:
        """The tensor for the last time: all its readers are through."""
        value = self.value()
        self.let_go()
        return value

    def spare(self) -> Tensor | None:
        """The memory of the tensor where it was made again, for whatever comes next."""
        value = self._value
        self.let_go()
        return value

    def let_go(self) -> None:
        """Hold the tensor no longer; whoever asks again has it computed again."""
        self._value = None


class _Recorder:
    """What one forward pass saves."""

    def __init__(self) -> None:
        self.recipes: dict[int, Recipe] = {}
        self.owned: Recipe | None = None
        self._outer = _active_hooks()

    @property
    def is_in_force(self) -> bool:
        """Whether no hooks were put above ours since (`torch.utils.checkpoint`), which
        would see other tensors in the first pass than in the next."""
        top = _active_hooks()
        return top is None or top[0] == self.pack

    def pack(self, tensor: Tensor) -> Kept:
        """What autograd keeps of a tensor.

        The first that the function of a recipe saves is its input, and keeps the recipe
        as long as autograd keeps that: until backward is through. What the function's
        context holds would stay for as long as the loss does.
        """
        owned, self.owned = self.owned, None
        kept = self._packed(tensor)
        return kept if owned is None else partial(_with, owned, kept)

    def _packed(self, tensor: Tensor) -> Kept:
        recipe = self.recipes.get(_storage(tensor))
        if recipe is None or not recipe.shows(tensor):
            return self._whole(tensor)
        size, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        return lambda: recipe.value().as_strided(size, stride, offset)

    @staticmethod
    def unpack(kept: Kept) -> Tensor:
        """The tensor again."""
        return kept()

    def _whole(self, tensor: Tensor) -> Kept:
        # Without its history, or a node that saves its own output would hold itself,
        # where no garbage collector sees it. Values and versions are shared.
        value = tensor if tensor.grad_fn is None else tensor.detach()
        version = tensor._version
        if self._outer is not None:
            pack, unpack = self._outer
            packed = pack(value)
            return lambda: unpack(packed)

        def kept() -> Tensor:
            if value._version != version:
                raise RuntimeError(
                    "a tensor that backward needs was modified in place after the "
                    f"forward pass: shape {tuple(value.shape)}, version "
                    f"{value._version} instead of {version}; use the operation that "
                    "is not in place"
                )
            return value

        return kept


_RECORDER: ContextVar[_Recorder | None] = ContextVar("gdnsq_fx_recorder", default=None)


def _with(recipe: Recipe, kept: Kept) -> Tensor:
    """What is kept; the recipe stands here to live as long."""
    return kept()


def _constant(value: Any) -> Any:
    is_learned = isinstance(value, Tensor) and value.requires_grad
    return value.detach() if is_learned else value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _active_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Hooks on saved tensors that are in force already.

    Of two pairs of hooks torch calls the inner one alone, and has no public way to ask
    for the outer.
    """
    inner: Any = getattr(torch, "_C")  # noqa: B009
    ask = getattr(inner._autograd, "_top_saved_tensors_default_hooks", None)
    return None if ask is None else ask(True)
