"""Patterns that select layers: by name, or by operation after ``op:``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from gdnsq_fx.errors import ConfigError, PatternError

OPERATION_PREFIX = "op:"


def matches(pattern: str, layer: str, operation: str) -> bool:
    """Whether a pattern selects a layer by name or, after ``op:``, by operation."""
    if pattern.startswith(OPERATION_PREFIX):
        return fnmatchcase(operation, pattern.removeprefix(OPERATION_PREFIX))
    # A layer that is called again is "name#2"; its plain name stands for every call.
    return fnmatchcase(layer, pattern) or fnmatchcase(layer.partition("#")[0], pattern)


def any_matches(patterns: Iterable[str], layer: str, operation: str) -> bool:
    """Whether one of the patterns selects a layer."""
    return any(matches(pattern, layer, operation) for pattern in patterns)


def patterns_of(name: str, given: object) -> tuple[str, ...]:
    """What a user passed for the option ``name``, as patterns.

    Raises:
        ConfigError: it is not a sequence of strings.
    """
    if isinstance(given, str):
        raise ConfigError(
            f"{name} is a sequence of patterns, got the string {given!r}; "
            f"write {name}=({given!r},)"
        )
    patterns: tuple[object, ...] = tuple(given) if isinstance(given, Iterable) else ()
    if not isinstance(given, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f"{name} is a sequence of strings, got {given!r}")
    return tuple(str(pattern) for pattern in patterns)


def require_match(
    owner: str, patterns: Iterable[str], known: Sequence[tuple[str, str]]
) -> None:
    """Raise if a pattern matches none of the (layer, operation) pairs.

    Raises:
        PatternError: names the pattern, its ``owner`` option and the layers there are.
    """
    for pattern in patterns:
        if pattern != "*" and not any(matches(pattern, *one) for one in known):
            raise PatternError(_no_match(owner, pattern, known))


def _no_match(owner: str, pattern: str, known: Sequence[tuple[str, str]]) -> str:
    names = [layer for layer, _ in known]
    operations = sorted({operation for _, operation in known})
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return (
        f"{owner}: the pattern {pattern!r} matches no layer. "
        f"Layers: {shown or 'none'}. "
        f"Operations (prefix {OPERATION_PREFIX!r}): {', '.join(operations) or 'none'}"
    )
