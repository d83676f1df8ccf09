"""The captured graph against the model it came from, in evaluation and in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from gdnsq_fx.errors import CaptureError
from gdnsq_fx.state import cloned, preserved_state

RELATIVE_TOLERANCE = 1e-4


class _Output(NamedTuple):
    leaves: list[Any]
    structure: TreeSpec


def self_check(
    model: nn.Module,
    captured: GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Compare graph and model on the example input and on a batch twice as large.

    Both modes are compared under one random seed; buffers and the random state are
    left as they were. A larger batch that the model itself refuses is not compared.

    Args:
        model: the model; shares its parameters and buffers with ``captured``.
        captured: the graph of that model.
        args, kwargs: the example input.

    Raises:
        CaptureError: outputs differ by more than 1e-4 of their range, or only the
            graph fails.
    """
    doubled: Any = tree_map(_doubled, (args, kwargs))
    examples: list[Any] = [(args, kwargs), doubled]
    for training in (False, True):
        for example in examples:
            wanted = _outputs(model, model, training, *example)
            if isinstance(wanted, Exception):
                continue  # the model refuses this batch or mode in eager as well
            got = _outputs(captured, model, training, *example)
            _compare(wanted, got, "training" if training else "evaluation")


def _outputs(
    module: nn.Module,
    model: nn.Module,
    training: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> _Output | Exception:
    """The output, or the error that the module raised."""
    args, kwargs = cloned((args, kwargs))
    with preserved_state(module, model), torch.no_grad():
        module.train(training)
        torch.manual_seed(0)
        try:
            return _Output(*tree_flatten(_plain(module(*args, **kwargs))))
        except Exception as error:  # any error of the user's model is data here
            return error


def _plain(output: Any) -> Any:
    """Mappings as plain dicts: a graph returns an OrderedDict as one."""
    if isinstance(output, Mapping):
        entries: Mapping[Any, Any] = output
        return {key: _plain(value) for key, value in entries.items()}
    return output


def _compare(wanted: _Output, got: _Output | Exception, mode: str) -> None:
    remedy = (
        "The model's control flow depends on data or on train()/eval() in a way that "
        "one graph cannot hold; move that part into a module without children, or "
        "capture a sub-module."
    )
    if isinstance(got, Exception):
        raise CaptureError(f"the captured graph fails in {mode}: {got}. {remedy}")
    same = wanted.structure == got.structure
    if not same or not all(map(_close, wanted.leaves, got.leaves)):
        raise CaptureError(
            f"the captured graph differs from the model in {mode}. {remedy}"
        )


def _close(wanted: Any, got: Any) -> bool:
    if is_dataclass(wanted):
        names = [field.name for field in fields(wanted)]
        same = type(wanted) is type(got)
        return same and all(_close(getattr(wanted, n), getattr(got, n)) for n in names)
    if not isinstance(wanted, Tensor):
        return bool(wanted == got)
    if not isinstance(got, Tensor) or wanted.shape != got.shape:
        return False
    if wanted.is_meta or wanted.numel() == 0:
        return True
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    scale = float(wanted.nan_to_num().abs().amax()) or 1.0
    return torch.allclose(wanted, got, 0.0, RELATIVE_TOLERANCE * scale, equal_nan=True)


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return torch.cat([value, value])
    return value
