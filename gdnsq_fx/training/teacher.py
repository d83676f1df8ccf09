"""Teachers: asked once for each batch, or once for fixed data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.state import cloned, in_evaluation
from gdnsq_fx.training.amp import Autocast, MixedPrecision


class Teacher(nn.Module):
    """A floating-point model as a fast teacher: ``finetune(..., teacher=Teacher(m))``.

    It runs under `torch.inference_mode`; what it returns are ordinary tensors.

    Args:
        model: shared, not copied. What it stores on itself in forward (tables that grow
            with the input) are inference tensors afterwards, which cannot be trained
            through: give a copy of such a model if it is to be trained later.
        compile: run it through `torch.compile`.
        autocast: run it in ``bfloat16`` or ``float16``; outputs are float32 again.

    Raises:
        ConfigError: another type, or weights that are not float32.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compile: bool = False,
        autocast: Autocast | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._is_narrow = autocast is not None
        self._precision = MixedPrecision(model, autocast)
        self._call = torch.compile(self._plain) if compile else self._plain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        with torch.inference_mode(), self._precision.autocast():
            output = self._call(args, kwargs)
        return tree_map(_widened, output) if self._is_narrow else cloned(output)

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model(*args, **kwargs)


def with_teacher_outputs(
    teacher: nn.Module, batches: Iterable[Any]
) -> list[tuple[Any, Any]]:
    """Fixed data with what the teacher answers, so that it is asked but once.

        pairs = gdnsq_fx.with_teacher_outputs(model, batches)
        gdnsq_fx.finetune(
            qmodel, pairs, steps=2000,
            task_loss=gdnsq_fx.distillation_loss, distillation=0.0,
        )

    Args:
        teacher: a floating-point model; it answers in evaluation mode.
        batches: inputs without targets, a tensor, a tuple of arguments or a dict of
            keyword arguments each.

    Returns:
        Pairs of inputs and outputs, in the order of the batches.

    Raises:
        BatchStructureError: a batch is none of these. ConfigError: there is no batch.
    """
    pairs: list[tuple[Any, Any]] = []
    with in_evaluation(teacher), torch.no_grad():
        for batch in batches:
            args, kwargs = InputStructure.of(batch).args_kwargs(batch)
            args, kwargs = cloned((args, kwargs))  # it may write into its input
            pairs.append((batch, teacher(*args, **kwargs)))
    if not pairs:
        raise ConfigError("with_teacher_outputs needs at least one batch")
    return pairs


def _widened(leaf: Any) -> Any:
    """An ordinary tensor, in float32 where it was narrower."""
    if not isinstance(leaf, Tensor):
        return leaf
    narrow = leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if narrow else leaf.clone()
