"""What keeps a run that diverges from leaving a broken model behind."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from gdnsq_fx.errors import TrainingDivergedError
from gdnsq_fx.training.amp import MixedPrecision
from gdnsq_fx.training.dtensors import total_norm
from gdnsq_fx.training.stored_state import load_model_state, model_snapshot


class DivergenceGuard:
    """Judges every step by its loss and gradients, and holds the last good state.

    Args:
        model: is put back to its last good state on divergence.
        steps: of the whole run.
        precision: says whether gradients may overflow for their scaling alone.

    Attributes:
        trained: whether any step was usable yet.
    """

    SNAPSHOTS = 20
    MAX_SKIPPED = 10

    def __init__(self, model: nn.Module, steps: int, precision: MixedPrecision) -> None:
        self.trained = False
        self._model = model
        self._every = max(steps // self.SNAPSHOTS, 1)
        self._precision = precision
        self._skipped = 0
        self._good_state = model_snapshot(model)

    def is_usable(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """A finite step proves the parameters it started from; else skip or go back.

        A gradient alone may overflow now and then, where a BatchNorm meets a constant
        channel at one bit. Its update is left out; a run of them is a divergence.

        Args:
            step: its number.
            loss: scalar.
            norm: of the gradients, before the update.

        Raises:
            TrainingDivergedError: the loss is not finite, or too many gradients in a
                row are not.
        """
        finite = bool(torch.isfinite(norm))
        if finite:
            self._skipped = 0
        elif not self._precision.may_overflow:
            self._skipped += 1
        if not bool(torch.isfinite(loss)) or self._skipped > self.MAX_SKIPPED:
            found = f"loss {float(loss.detach())}, gradient norm {float(norm)}"
            self._diverged(step, found)
        if finite and step % self._every == 0:
            self._good_state = model_snapshot(self._model)
        self.trained |= finite
        return finite

    def check_finite(self, step: int) -> None:
        """Restore and raise where the update before this step broke a parameter."""
        norm = total_norm(p.detach() for p in self._model.parameters())
        if not bool(torch.isfinite(norm)):
            self._diverged(step, f"norm of the parameters {float(norm)}")

    def put_back(self) -> None:
        """The last good state becomes the model's again."""
        load_model_state(self._model, self._good_state)

    def counts(self) -> tuple[int, bool]:
        """Steps skipped in a row, and whether any was usable: what a resume needs."""
        return self._skipped, self.trained

    def start_over(self, skipped: int, *, trained: bool) -> None:
        """Go on from such counts; the model as it is is the last good state."""
        self._skipped, self.trained = skipped, trained
        self._good_state = model_snapshot(self._model)

    def _diverged(self, step: int, found: str) -> NoReturn:
        self.put_back()
        remedy = "Lower lr, check the batch for NaN, or take more steps"
        if any(p.dtype is torch.float16 for p in self._model.parameters()):
            remedy += "; the weights are float16, where Adam underflows: use float32"
        raise TrainingDivergedError(
            f"loss or gradients became NaN or infinite at step {step} ({found}); the "
            "model holds its last good state, whose bits may be above target. "
            f"{remedy}",
            step,
        )
