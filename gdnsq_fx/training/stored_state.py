"""Model, optimizer and history as flat dictionaries of tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdnsq_fx.training.dtensors import placed_like, whole
from gdnsq_fx.training.result import StepRecord


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole copies of all parameters and buffers, also of those outside
    ``state_dict()``."""
    return {name: whole(t.detach()).clone() for name, t in _tensors(model).items()}


def model_snapshot(model: nn.Module) -> dict[str, Tensor]:
    """As `model_state`, of the parts that this process holds."""
    return {name: t.detach().clone() for name, t in _tensors(model).items()}


@torch.no_grad()
def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write into parameters and buffers what either of the above returned."""
    for name, tensor in _tensors(model).items():
        tensor.copy_(placed_like(state[name], tensor))


def optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Moments and counts of every parameter that has been updated."""
    every: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": whole(value)
        for number, own in every.items()
        for name, value in own.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` returned; learning rates stay as they are."""
    every: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in state.items():
        number, _, name = key.partition(".")
        if value.ndim:  # a moment; the count of steps is a scalar
            value = placed_like(value, parameters[int(number)])
        every.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": every, "param_groups": groups})


def history_state(history: Sequence[StepRecord]) -> dict[str, Tensor]:
    """One row for each record."""
    rows = [(r.loss, r.mean_bits, r.metric or 0.0) for r in history]
    return {
        "step": torch.tensor([r.step for r in history], dtype=torch.int64),
        "measured": torch.tensor([r.metric is not None for r in history]).bool(),
        "values": torch.tensor(rows, dtype=torch.float64).reshape(-1, 3),
    }


def history_of(state: Mapping[str, Tensor]) -> list[StepRecord]:
    """The records that `history_state` took."""
    columns = (state["step"], state["values"], state["measured"])
    return [
        StepRecord(step, loss, bits, metric if measured else None)
        for step, (loss, bits, metric), measured in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


def under(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """What a dictionary holds under ``part.``, without that prefix."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One dictionary of several: the reverse of `under`."""
    return {f"{p}.{key}": t for p, state in parts.items() for key, t in state.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    kept: dict[str, Any] = model.state_dict(keep_vars=True)
    every = {**dict(model.named_buffers(remove_duplicate=False)), **kept}
    return {name: t for name, t in every.items() if isinstance(t, Tensor)}
