"""How a batch relates to the example input: inputs alone, or inputs then targets.

The example input decides what the model takes. A batch has its structure, or starts
with it and goes on with targets, in the forms that a ``DataLoader`` yields:

    example          inputs alone      with targets
    x                x  or  (x,)       (x, y)
    (a, b)           (a, b)            (a, b, y)  or  ((a, b), y)
    {"k": x}         {"k": x}          ({"k": x}, y)

Tuples and lists are interchangeable, since collation turns one into the other. Where a
batch can be read both ways, it is inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from gdnsq_fx.errors import BatchStructureError, DeviceMismatchError
from gdnsq_fx.structure import (
    LeafStructure,
    MappingStructure,
    SequenceStructure,
    Structure,
    describe,
    is_sequence,
)

ExampleInput: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]
"""A tensor is the one positional argument, a tuple (or list) all positional arguments,
a dict the keyword arguments."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, taken apart.

    Attributes:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        targets: the one item that followed the inputs, the tuple of them if there were
            several, None if there were none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any | None


@dataclass(frozen=True)
class InputStructure:
    """Structure of the example input: shapes and dtypes, no tensors.

    Cheap to copy, to pickle, and to keep in the metadata of a module.
    """

    root: Structure

    @classmethod
    def of(cls, example: Any) -> InputStructure:
        """Describe an ``ExampleInput``.

        Raises:
            BatchStructureError: ``example`` is neither a tensor, nor a tuple or list,
                nor a mapping with string keys.
        """
        root = describe(example)
        if isinstance(root, LeafStructure):
            raise BatchStructureError(
                f"the example input is of type {root.show()}; give a tensor, a tuple of"
                " positional arguments, or a dict of keyword arguments"
            )
        if isinstance(root, MappingStructure):
            wrong = [key for key, _ in root.entries if not isinstance(key, str)]
            if wrong:
                raise BatchStructureError(
                    f"the example input has keys {wrong}; the keys name arguments of"
                    " the model: use strings"
                )
        return cls(root)

    def args_kwargs(self, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that inputs without targets stand for.

        Raises:
            BatchStructureError: ``example`` has another structure, or targets.
        """
        inputs, targets = self._read(example)
        if targets:
            raise self._error(example, "it has targets where only inputs belong")
        return self._arguments(inputs)

    def split(self, batch: Any) -> Batch:
        """Take a batch apart.

        Plain tuples and lists within the inputs come out as the kind that the example
        has, whatever collation made of them.

        Raises:
            BatchStructureError: ``batch`` is neither inputs nor inputs then targets.
        """
        inputs, targets = self._read(batch)
        args, kwargs = self._arguments(inputs)
        if len(targets) > 1:
            return Batch(args, kwargs, targets)
        return Batch(args, kwargs, targets[0] if targets else None)

    def _read(self, batch: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return (inputs, targets) by the first reading that fits the example."""
        readings = list(self._readings(batch))
        causes: list[str] = []
        for inputs, targets, where in readings:
            cause = self.root.mismatch(inputs, where)
            if cause is None:
                return inputs, tuple(targets)
            causes.append(cause)
        # Of several readings nobody knows which was meant: show the structures only.
        raise self._error(batch, causes[0] if len(causes) == 1 else None)

    def _readings(self, batch: Any) -> Iterator[tuple[Any, Iterable[Any], str]]:
        """Yield (inputs, targets, path of the inputs), side by side before nested."""
        if not is_sequence(batch):
            yield batch, (), "batch"
            return
        if isinstance(self.root, SequenceStructure):
            count = len(self.root.items)
            yield batch[:count], batch[count:], "batch"
            if not batch or not is_sequence(batch[0]):
                return
        if batch:
            yield batch[0], batch[1:], "batch[0]"

    def _arguments(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = self.root.conform(inputs)
        if isinstance(self.root, SequenceStructure):
            return tuple(inputs), {}
        if isinstance(self.root, MappingStructure):
            return (), dict(inputs)
        return (inputs,), {}

    def _error(self, batch: Any, cause: str | None) -> BatchStructureError:
        detail = "" if cause is None else f" ({cause})"
        return BatchStructureError(
            f"expected {self.root.show(any_batch=True)}, optionally followed by"
            f" targets; got {describe(batch).show()}{detail}; yield such batches, or"
            " prepare the model with an example input that is like them"
        )


def model_device(module: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer; None if there is neither."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return None if first is None else first.device


def check_device(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Check that every input tensor, however nested, lies where the model lies.

    Raises:
        DeviceMismatchError: one does not. The meta device differs from all others.
    """
    device = model_device(module)
    if device is None:
        return
    for where, tensor in _input_tensors(args, kwargs):
        if tensor.device != device:
            raise DeviceMismatchError(
                f"the model is on {device}, but its input {where} is on"
                f" {tensor.device}; move one to the other: input.to('{device}') or"
                f" model.to('{tensor.device}') (meta tensors have no data to move:"
                " create that side anew)"
            )


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the size of dimension 0 of the first input tensor that has one, else 1."""
    tensors = (tensor for _, tensor in _input_tensors(args, kwargs))
    return next((int(tensor.shape[0]) for tensor in tensors if tensor.dim() > 0), 1)


def _input_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor), positional arguments first."""
    yield from _tensors(args, "args")
    yield from _tensors(kwargs, "kwargs")


def _tensors(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield where, value
    elif is_sequence(value):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{where}[{index}]")
    elif isinstance(value, Mapping):
        for key, item in cast(Mapping[Any, Any], value).items():
            yield from _tensors(item, f"{where}[{key!r}]")
