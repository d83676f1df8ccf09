"""The state of one fine-tuning run, and what one step does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.errors import TrainingDivergedError
from gdnsq_fx.inputs import Batch, model_device
from gdnsq_fx.quantize.quantizer import ActivationQuantizer, Quantizer
from gdnsq_fx.training.constraint import LOSS_MEMORY, Constraint
from gdnsq_fx.training.objective import Objective
from gdnsq_fx.training.result import StepRecord
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.stored_state import (
    history_of,
    history_state,
    joined,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    under,
)

MAX_RANGE_RATE = 5e-2


class Run:
    """One fine-tuning run: optimizer, constraint, history, and the last good state."""

    RECORDS = 100
    SNAPSHOTS = 20
    MAX_SKIPPED = 10

    def __init__(
        self,
        qmodel: GraphModule,
        objective: Objective,
        schedule: Schedule,
        lr: float,
        max_grad_norm: float,
        tracker: CapacityTracker | None = None,
    ) -> None:
        self.qmodel = qmodel
        self.objective = objective
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.good_state = _copied_state(qmodel)
        self.trained = False
        self.taken = 0
        self.skipped = 0
        # What the user holds in evaluation inside a model in training stays there.
        modules = qmodel.modules() if qmodel.training else ()
        self.held = [module for module in modules if not module.training]
        for module in qmodel.modules():
            if isinstance(module, Quantizer):
                module.enabled = True  # to train without them would be no fine-tuning
        self.constraint = Constraint(qmodel)
        self.constraint.open_to(schedule.start_bits)
        self.optimizer = torch.optim.Adam(_parameter_groups(qmodel, schedule, lr))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.loss_mean: Tensor | None = None
        self.history: list[StepRecord] = []
        self.tracker = tracker
        if tracker is not None:
            tracker.start(self.constraint.targets)

    def step(self, step: int, batch: Batch) -> Tensor:
        """Forward, backward, update, projection; returns the loss without penalty."""
        self.qmodel.train()
        for module in self.held:
            module.training = False
        factor = self.schedule.learning_rate_factor(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.objective(self.qmodel, batch)
        self._observe(loss.detach())
        penalty = self.constraint.penalty(self.schedule.progress(step))
        self.optimizer.zero_grad()
        (loss + penalty).backward()
        norm = nn.utils.clip_grad_norm_(self.qmodel.parameters(), self.max_grad_norm)
        if self._is_usable(step, loss, norm):
            self.optimizer.step()
            self.trained = True
        self.constraint.project(lambda target: self.schedule.cap(step, target))
        self.taken = step + 1
        return loss.detach()

    def records_at(self, step: int) -> bool:
        """Whether this step goes into the history."""
        every = max(self.schedule.steps // self.RECORDS, 1)
        return step % every == 0 or step + 1 == self.schedule.steps

    def record(self, step: int, loss: Tensor, metric: float | None) -> dict[str, Any]:
        """Add to the history; returns what the progress bar shows."""
        self.check_finite(step + 1)
        mean_bits = self.constraint.mean_capacity()
        self.history.append(StepRecord(step, float(loss), mean_bits, metric))
        shown: dict[str, Any] = {
            "loss": f"{float(loss):.4f}",
            "bits": f"{mean_bits:.2f}",
            "above": len(self.constraint.violations()),
        }
        return shown if metric is None else {**shown, "metric": f"{metric:.4g}"}

    def track(self, step: int, loss: Tensor, metric: float | None) -> None:
        """Show a step that is due, or the last one, and any metric to the tracker."""
        if self.tracker is None:
            return
        if metric is not None:
            self.tracker.note_metric(step, metric)
        if self.tracker.is_due(step) or step + 1 == self.schedule.steps:
            self.check_finite(step + 1)  # NaN has no bit-width
            self.tracker.observe(self.qmodel, step, float(loss))

    def state(self) -> dict[str, Tensor]:
        """What the steps to come depend on, as copies; the model is checked first.

        Raises:
            TrainingDivergedError: the last update broke a parameter.
        """
        self.check_finite(self.taken)
        counts = torch.tensor([self.taken, self.skipped, self.trained])
        mean = {} if self.loss_mean is None else {"loss_mean": self.loss_mean}
        parts = {
            "model": model_state(self.qmodel),
            "optimizer": optimizer_state(self.optimizer),
            "history": history_state(self.history),
        }
        return {**joined(parts), **mean, "counts": counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken; the model then is the last good state."""
        load_model_state(self.qmodel, under(state, "model"))
        load_optimizer_state(self.optimizer, under(state, "optimizer"))
        self.history = history_of(under(state, "history"))
        self.taken, self.skipped, trained = state["counts"].tolist()
        self.trained = bool(trained)
        if "loss_mean" in state:
            device = model_device(self.qmodel)
            self.loss_mean = state["loss_mean"].to(device, copy=True)
            self.constraint.observe_loss(self.loss_mean)
        self.good_state = _copied_state(self.qmodel)

    def _observe(self, loss: Tensor) -> None:
        """Show the loss to the constraint, and keep the mean that it takes of it."""
        self.constraint.observe_loss(loss)
        if self.loss_mean is None:
            self.loss_mean = loss.clone()
        else:
            self.loss_mean.lerp_(loss, 1.0 - LOSS_MEMORY)

    def undo_if_untrained(self) -> None:
        """Where not one step was taken, put back the quantizers that were opened."""
        if not self.trained:
            self.qmodel.load_state_dict(self.good_state)

    def check_finite(self, step: int) -> None:
        """Restore and raise where the update before this step broke a parameter."""
        norm = nn.utils.get_total_norm([p.detach() for p in self.qmodel.parameters()])
        if not bool(torch.isfinite(norm)):
            self._restore(step, f"norm of the parameters {float(norm)}")

    def _is_usable(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """A finite step proves the parameters it started from; else skip or go back.

        A gradient alone may overflow now and then, where a BatchNorm meets a constant
        channel at one bit. Its update is left out; a run of them is a divergence.
        """
        finite = bool(torch.isfinite(norm))
        self.skipped = 0 if finite else self.skipped + 1
        if not bool(torch.isfinite(loss)) or self.skipped > self.MAX_SKIPPED:
            self._restore(
                step, f"loss {float(loss.detach())}, gradient norm {float(norm)}"
            )
        if not finite:
            return False
        if step % max(self.schedule.steps // self.SNAPSHOTS, 1) == 0:
            self.good_state = _copied_state(self.qmodel)
        return True

    def _restore(self, step: int, found: str) -> NoReturn:
        self.qmodel.load_state_dict(self.good_state)
        remedy = "Lower lr, check the batch for NaN, or take more steps"
        if any(p.dtype is torch.float16 for p in self.qmodel.parameters()):
            remedy += "; the weights are float16, where Adam underflows: use float32"
        raise TrainingDivergedError(
            f"loss or gradients became NaN or infinite at step {step} ({found}); the "
            "model holds its last good state, whose bits may be above target. "
            f"{remedy}",
            step,
        )


def _copied_state(qmodel: GraphModule) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in qmodel.state_dict().items()}


def _parameter_groups(
    qmodel: GraphModule, schedule: Schedule, lr: float
) -> list[dict[str, Any]]:
    """Weights at ``lr``; each quantizer at the rate that its descent needs.

    Only the step has bits to lose: the range follows the data, so in short runs its
    rate is limited, or it strays by powers of two. ``lower`` is in units of its
    activation, not a logarithm: its rate is a share of the range.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    ours: set[int] = set()
    for module in qmodel.modules():
        if not isinstance(module, Quantizer):
            continue
        ours |= {id(p) for p in module.parameters()}
        rate = schedule.quantizer_rate(module.spec.bits)
        for name, parameter in module.named_parameters():
            own = rate if name == "log2_step" else min(rate, MAX_RANGE_RATE)
            if name == "lower" and isinstance(module, ActivationQuantizer):
                own *= float(module.range.detach())
            groups.setdefault(own, []).append(parameter)
    weights = [p for p in qmodel.parameters() if p.requires_grad and id(p) not in ours]
    return [
        {"params": weights, "lr": lr},
        *({"params": params, "lr": rate} for rate, params in groups.items()),
    ]
