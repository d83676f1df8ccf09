"""The captured graph against the model it came from, in evaluation and in training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from gdnsq_fx.errors import CaptureError
from gdnsq_fx.state import preserved_state

RELATIVE_TOLERANCE = 1e-4


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
) -> list[Any] | Exception:
    """Leaves of the output, or the error that the module raised."""
    # A forward pass may write into its input; the example is the user's.
    cloned: Any = tree_map(_cloned, (args, kwargs))
    args, kwargs = cloned
    with preserved_state(module, model), torch.no_grad():
        module.train(training)
        torch.manual_seed(0)
        try:
            return tree_leaves(module(*args, **kwargs))
        except Exception as error:  # any error of the user's model is data here
            return error


def _compare(wanted: Iterable[Any], got: list[Any] | Exception, mode: str) -> None:
    remedy = (
        "The model's control flow depends on data or on train()/eval() in a way that "
        "one graph cannot hold; move that part into a module without children, or "
        "capture a sub-module."
    )
    if isinstance(got, Exception):
        raise CaptureError(f"the captured graph fails in {mode}: {got}. {remedy}")
    pairs = list(zip(wanted, got, strict=False))
    if len(pairs) != len(got) or not all(_close(a, b) for a, b in pairs):
        raise CaptureError(
            f"the captured graph differs from the model in {mode}. {remedy}"
        )


def _close(wanted: Any, got: Any) -> bool:
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


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
