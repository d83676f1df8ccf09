"""The loop that trains what other tools quantized: the one of `finetune`, bare.

Adam, distillation from the same teacher by the same loss, gradients clipped alike, and
the learning rate of the same schedule: what differs from ours is the quantizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gdnsq_fx import Schedule
from gdnsq_fx.training.losses import distillation_loss

MAX_GRAD_NORM = 10.0


def train(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    schedule: Schedule,
    lr: float,
) -> nn.Module:
    """Distil for all steps of the schedule; returns the model in evaluation."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    stream = _endless(batches)
    model.train()
    for step in range(schedule.steps):
        images, _ = next(stream)
        optimizer.param_groups[0]["lr"] = lr * schedule.learning_rate_factor(step)
        with torch.no_grad():
            wanted = teacher(images)
        loss = distillation_loss(model(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    return model.eval()


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches
