"""Structure of nested values: what a value is made of, without its data.

A structure describes tensors (shape, dtype), tuples and lists (interchangeable),
mappings (exact keys) and other values (their type). It holds no tensor and compares,
copies and pickles cheaply.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

_MAX_SHOWN = 8


def describe(value: Any) -> Structure:
    """Return the structure of ``value``."""
    if isinstance(value, Tensor):
        return TensorStructure(tuple(value.shape), value.dtype)
    if is_sequence(value):
        items = tuple(describe(item) for item in value)
        return SequenceStructure(items, isinstance(value, list))
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value).items()
        return MappingStructure(tuple((key, describe(item)) for key, item in entries))
    return LeafStructure(_type_name(value))


def is_sequence(value: Any) -> TypeGuard[tuple[Any, ...] | list[Any]]:
    """Tell a tuple or list, the sequences of collation, from everything else."""
    return isinstance(value, (tuple, list))


class Structure(ABC):
    """Structure of one value."""

    @abstractmethod
    def mismatch(self, value: Any, where: str) -> str | None:
        """Say in words how ``value``, found at ``where``, differs; None if it fits."""

    @abstractmethod
    def show(self, any_batch: bool = False) -> str:
        """Return readable text; with ``any_batch`` the first dimensions are ``*``."""

    def conform(self, value: Any) -> Any:
        """Return a fitting ``value`` with its plain sequences of the described kind."""
        return value

    def _differs(self, value: Any, where: str) -> str:
        return f"{where} is {describe(value).show()}, not {self.show(any_batch=True)}"


@dataclass(frozen=True)
class TensorStructure(Structure):
    """A tensor; a value fits that has as many dimensions and the same kind of dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def mismatch(self, value: Any, where: str) -> str | None:
        fits = (
            isinstance(value, Tensor)
            and value.dim() == len(self.shape)
            and _kind(value.dtype) == _kind(self.dtype)
        )
        return None if fits else self._differs(value, where)

    def show(self, any_batch: bool = False) -> str:
        sizes = [str(size) for size in self.shape]
        if any_batch:
            sizes[:1] = ["*"] * len(sizes[:1])
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Tensor[{', '.join(sizes)}] {dtype}"


@dataclass(frozen=True)
class SequenceStructure(Structure):
    """A tuple or list."""

    items: tuple[Structure, ...]
    is_list: bool

    def mismatch(self, value: Any, where: str) -> str | None:
        if not is_sequence(value):
            return self._differs(value, where)
        if len(value) != len(self.items):
            return f"{where} has {len(value)} items, not {len(self.items)}"
        causes = (
            item.mismatch(part, f"{where}[{index}]")
            for index, (item, part) in enumerate(zip(self.items, value, strict=True))
        )
        return next((cause for cause in causes if cause is not None), None)

    def show(self, any_batch: bool = False) -> str:
        parts = [item.show(any_batch) for item in self.items[:_MAX_SHOWN]]
        if len(self.items) > _MAX_SHOWN:
            parts.append(f"... {len(self.items)} items")
        text = ", ".join(parts)
        if self.is_list:
            return f"[{text}]"
        return f"({text},)" if len(parts) == 1 else f"({text})"

    def conform(self, value: Any) -> Any:
        if type(value) not in (tuple, list):
            return value  # a named tuple: its type is part of what the model reads
        parts = [
            item.conform(part) for item, part in zip(self.items, value, strict=True)
        ]
        return parts if self.is_list else tuple(parts)


@dataclass(frozen=True)
class MappingStructure(Structure):
    """A dict or other mapping, with exactly these keys in any order."""

    entries: tuple[tuple[Any, Structure], ...]

    def mismatch(self, value: Any, where: str) -> str | None:
        if not isinstance(value, Mapping):
            return self._differs(value, where)
        mapping = cast(Mapping[Any, Any], value)
        keys = [key for key, _ in self.entries]
        missing = [key for key in keys if key not in mapping]
        extra = [key for key in mapping if key not in keys]
        if missing or extra:
            parts = [f"missing keys {missing}"] * bool(missing)
            parts += [f"extra keys {extra}"] * bool(extra)
            return f"{where} has {' and '.join(parts)}"
        causes = (
            structure.mismatch(mapping[key], f"{where}[{key!r}]")
            for key, structure in self.entries
        )
        return next((cause for cause in causes if cause is not None), None)

    def show(self, any_batch: bool = False) -> str:
        parts = [
            f"{key!r}: {structure.show(any_batch)}"
            for key, structure in self.entries[:_MAX_SHOWN]
        ]
        if len(self.entries) > _MAX_SHOWN:
            parts.append(f"... {len(self.entries)} keys")
        return f"{{{', '.join(parts)}}}"

    def conform(self, value: Any) -> Any:
        if type(value) is not dict:
            return value
        mapping = cast(dict[Any, Any], value)
        return {key: item.conform(mapping[key]) for key, item in self.entries}


@dataclass(frozen=True)
class LeafStructure(Structure):
    """Neither tensor nor container; a value fits that has the very same type."""

    type_name: str

    def mismatch(self, value: Any, where: str) -> str | None:
        return None if describe(value) == self else self._differs(value, where)

    def show(self, any_batch: bool = False) -> str:
        return self.type_name


def _type_name(value: object) -> str:
    """Name the type; a name, unlike the type itself, can always be pickled."""
    if value is None:
        return "None"
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype == torch.bool else "integer"
