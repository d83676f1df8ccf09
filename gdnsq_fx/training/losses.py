"""What fine-tuning minimizes besides the penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.analysis.divergence import (
    LEAST_LOG_P,
    class_dim,
    jeffreys,
    primary_output,
)
from gdnsq_fx.errors import ConfigError

TaskLoss = Callable[[Any, Any], Tensor]


def distillation_loss(output: Any, teacher_output: Any) -> Tensor:
    """Jeffreys divergence to the floating-point teacher, mean over the batch, nats.

    Args:
        output, teacher_output: model outputs of the same structure.

    Source: GDNSQ (arXiv 2508.14004), "metric smoothing".
    """
    return jeffreys(*_alike(output, teacher_output)).mean()


def kl_distillation_loss(output: Any, teacher_output: Any) -> Tensor:
    """KL(teacher || model) of the class probabilities, mean over the batch, nats.

    Args:
        output, teacher_output: model outputs of the same structure, with logits as
            `jeffreys` takes them; several positions of one sample add up.

    Source: Hinton et al. 2015 (arXiv 1503.02531), at temperature 1.
    """
    mine, wanted = _alike(output, teacher_output)
    dim = class_dim(mine)
    # Masked classes have logits of -inf on both sides: 0 * (inf - inf) is no number.
    log_q = torch.log_softmax(mine.float(), dim).clamp(min=LEAST_LOG_P)
    log_p = torch.log_softmax(wanted.float(), dim).clamp(min=LEAST_LOG_P)
    each = log_p.exp() * (log_p - log_q)
    return each.reshape(each.shape[0], -1).sum(1).mean()


def squared_distillation_loss(output: Any, teacher_output: Any) -> Tensor:
    """Mean squared difference to the teacher, for outputs that are not logits."""
    mine, wanted = _alike(output, teacher_output)
    return (mine - wanted).square().mean()


def _alike(output: Any, teacher_output: Any) -> tuple[Tensor, Tensor]:
    """The tensors to compare; shapes that only broadcast are a mistake."""
    mine, wanted = primary_output(output), primary_output(teacher_output)
    if mine.shape != wanted.shape:
        raise ConfigError(
            f"the teacher's output has shape {tuple(wanted.shape)}, the model's "
            f"{tuple(mine.shape)}; give the model that was prepared as teacher"
        )
    return mine, wanted
