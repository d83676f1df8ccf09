"""Which part of a model's output a loss compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from torch import Tensor

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.training.losses import TaskLoss

Selector: TypeAlias = str | int | Callable[[Any], Any]
"""A name (key of a dict, attribute of a ``ModelOutput``), an index, or a function."""


def select(output: Any, selector: Selector) -> Any:
    """The part of an output that a selector names.

    Args:
        output: tensor, tuple, list, dict, dataclass or ``ModelOutput``.
        selector: see `Selector`.

    Raises:
        ConfigError: the output has no such part; names those that it has.
    """
    if callable(selector):
        return selector(output)
    try:
        if isinstance(selector, str) and not isinstance(output, Mapping):
            return getattr(output, selector)
        return output[selector]
    except (AttributeError, LookupError, TypeError) as error:
        raise ConfigError(
            f"the model's output has no part {selector!r}: it {_parts(output)}; give "
            "output= a name or an index of those, or a function that takes the output"
        ) from error


def selecting(loss: TaskLoss, selector: Selector | None) -> TaskLoss:
    """The loss between the same part of two outputs of one structure."""
    if selector is None:
        return loss

    def of_parts(output: Any, wanted: Any) -> Tensor:
        return loss(select(output, selector), select(wanted, selector))

    return of_parts


def weighted(loss: TaskLoss, weight: float) -> TaskLoss:
    """The loss times a constant."""
    if weight == 1.0:
        return loss

    def times(output: Any, wanted: Any) -> Tensor:
        return weight * loss(output, wanted)

    return times


def _parts(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"is a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"has the keys {list(cast(Mapping[Any, Any], output))}"
    if isinstance(output, Sequence):
        return f"has {len(cast(Sequence[Any], output))} parts"
    return f"is a {type(output).__name__}"
