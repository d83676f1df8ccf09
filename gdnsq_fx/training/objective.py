"""What one step minimizes: distillation from a teacher, a task loss, or both."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.errors import BatchStructureError, ConfigError
from gdnsq_fx.inputs import Batch, check_device
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.recompute import recomputed_levels
from gdnsq_fx.state import cloned
from gdnsq_fx.training.losses import TaskLoss


class Objective:
    """Distillation from a teacher, a task loss, or both."""

    def __init__(
        self,
        teacher: nn.Module,
        task_loss: TaskLoss | None,
        distillation: float,
        distillation_loss: TaskLoss,
    ) -> None:
        self.teacher = teacher
        self.task_loss = task_loss
        self.weight = distillation
        self.distillation_loss = distillation_loss

    def __call__(self, qmodel: nn.Module, batch: Batch) -> Tensor:
        check_device(qmodel, batch.args, batch.kwargs)
        # Each model gets tensors of its own: it may write into its input.
        args, kwargs = cloned((batch.args, batch.kwargs))
        with recomputed_levels():
            output = qmodel(*args, **kwargs)
        losses: list[Tensor] = []
        if self.weight:
            args, kwargs = cloned((batch.args, batch.kwargs))
            wanted = self._asked(args, kwargs)
            losses.append(self.weight * self.distillation_loss(output, wanted))
        if self.task_loss is not None:
            if batch.targets is None:
                raise BatchStructureError(
                    "task_loss needs targets, and the batch holds inputs alone; yield "
                    "(inputs, targets)"
                )
            losses.append(self.task_loss(output, batch.targets))
        if any(getattr(loss, "ndim", 1) for loss in losses):
            raise ConfigError(
                "a loss must be a scalar tensor; reduce it over the batch, as .mean() "
                "does"
            )
        return torch.stack(losses).sum()

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the teacher answers, as ordinary tensors."""
        # A graph of ours keeps nothing of a call. What a user's own model keeps would
        # be inference tensors for good, unfit for training it later.
        inference = isinstance(self.teacher, GraphModule)
        with torch.inference_mode() if inference else torch.no_grad():
            wanted = self.teacher(*args, **kwargs)
        return cloned(wanted) if inference else wanted


def teacher_for(qmodel: GraphModule, teacher: nn.Module | None) -> nn.Module:
    """The given teacher, or a copy of the model as it is now at identity precision."""
    if teacher is not None and teacher is not qmodel:
        return teacher
    copied = copy.deepcopy(qmodel)
    for module in copied.modules():
        if isinstance(module, Quantizer):
            module.enabled = False
    return copied
