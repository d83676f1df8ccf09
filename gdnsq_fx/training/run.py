"""The state of one fine-tuning run, and what one step does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.inputs import Batch, model_device
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.training.amp import MixedPrecision
from gdnsq_fx.training.constraint import LOSS_MEMORY, Cap
from gdnsq_fx.training.constraint_choice import Limits
from gdnsq_fx.training.divergence import DivergenceGuard
from gdnsq_fx.training.dtensors import clip_gradients
from gdnsq_fx.training.ema import Average
from gdnsq_fx.training.engine import Engine, SingleProcess
from gdnsq_fx.training.learned_bits import LearnedBits
from gdnsq_fx.training.parameter_groups import parameter_groups
from gdnsq_fx.training.recipe import default_rate
from gdnsq_fx.training.result import StepRecord
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.settings import Settings
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

Loss = Callable[[nn.Module, Batch], Tensor]
"""What a run minimizes on a batch besides the penalty: a scalar."""


class Run:
    """One fine-tuning run: optimizer, constraint, history.

    Args:
        qmodel: is trained; read and projected in place.
        objective: what is minimized.
        schedule, settings: as in `finetune`.
        tracker: shown some steps.
        limits: what bits must obey; by default the targets of the model.
        engine: how processes share the work; the model is its working one.
        module: what the objective is given, the model by default.
    """

    RECORDS = 100

    def __init__(
        self,
        qmodel: GraphModule,
        objective: Loss,
        schedule: Schedule,
        settings: Settings,
        tracker: CapacityTracker | None = None,
        limits: Limits | None = None,
        engine: Engine | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self.engine = engine or SingleProcess()
        # First of all: a budget that cannot be met must leave the model as it was.
        group = self.engine.group
        self.constraint = (limits or Limits()).constraint(qmodel, schedule, group)
        self.qmodel = qmodel
        self.objective = objective
        self.schedule = schedule
        self.max_grad_norm = settings.max_grad_norm
        self.precision = MixedPrecision(qmodel, settings.autocast)
        self.guard = DivergenceGuard(qmodel, schedule.steps, self.precision)
        self.taken = 0
        self.met_at: int | None = None
        # What the user holds in evaluation inside a model in training stays there.
        modules = qmodel.modules() if qmodel.training else ()
        self.held = [one for one in modules if not one.training]
        for quantizer in qmodel.modules():
            if isinstance(quantizer, Quantizer):
                quantizer.enabled = True  # without them it would be no fine-tuning
        self.constraint.open_to(schedule.start_bits)
        self.module = self.engine.forward(qmodel if module is None else module)
        come_down = isinstance(self.constraint, LearnedBits)
        lr = settings.lr or default_rate(qmodel, come_down=come_down)
        self.optimizer = torch.optim.Adam(parameter_groups(qmodel, schedule, lr))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average: Average | None = None
        if settings.ema is not None:
            begins = schedule.descent_steps
            self.average = Average(qmodel, settings.ema, begins, self.to_targets)
        self.loss_mean: Tensor | None = None
        self.history: list[StepRecord] = []
        self.tracker = tracker
        if tracker is not None:
            tracker.start(self.constraint.targets)

    def step(self, step: int, batches: Sequence[Batch]) -> Tensor:
        """Forward, backward, update, projection; returns the loss without penalty.

        Of several batches the gradients add up to that of their mean loss.
        """
        self.qmodel.train()
        for module in self.held:
            module.training = False
        factor = self.schedule.learning_rate_factor(step, self.met_at)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        loss = self._backward(batches)
        self.engine.average_rest()
        self.precision.unscale(self.optimizer)
        self._add_penalty(self.schedule.growth(step))
        self.constraint.align_gradients(lambda target: self.schedule.cap(step, target))
        norm = clip_gradients(self.qmodel.parameters(), self.max_grad_norm)
        usable = self.guard.is_usable(step, loss, norm)
        self.precision.update(self.optimizer, usable=usable)
        self._project(lambda target: self.schedule.cap(step, target))
        self.taken = step + 1
        if self.schedule.anneals_once_met and self.met_at is None:
            self.met_at = None if self.violations() else self.taken
        if self.average is not None:
            self.average.update(self.taken)
        return loss

    def _backward(self, batches: Sequence[Batch]) -> Tensor:
        """Gradients of the mean loss of the batches; returns it, of all processes."""
        if not batches:
            raise ConfigError("a step needs at least one batch")
        *earlier, last = batches
        shares: list[Tensor] = []
        for batch in earlier:
            with self.engine.partial():
                share = self._loss(batch) / len(batches)
                self.precision.backward(share)
            shares.append(share.detach())
        share = self._loss(last) / len(batches)
        self.precision.backward(share)
        shares.append(share.detach())
        mean = self.engine.group.mean(torch.stack(shares).sum())
        self._observe(mean)
        return mean

    def _add_penalty(self, growth: float) -> None:
        """Its gradients, where it counts by now; those of the loss are seen before."""
        if growth > 0.0:
            self.engine.add_gradients(lambda: self._penalty(growth))
        else:
            with self.engine.weights():
                self.constraint.observe_gradients()

    def _penalty(self, growth: float) -> Tensor:
        self.constraint.observe_gradients()
        return self.constraint.penalty(growth)

    def _loss(self, batch: Batch) -> Tensor:
        with self.precision.autocast():
            return self.objective(self.module, batch)

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.taken == self.schedule.steps

    def to_targets(self) -> None:
        """Bring every capacity to its target now."""
        self._project(float)

    def violations(self) -> dict[str, tuple[int, int]]:
        """Edges above target: name -> (hard bit-width, target)."""
        with self.engine.weights():
            return self.constraint.violations()

    def averaged(self) -> AbstractContextManager[object]:
        """The model with averaged weights inside the block, where there are any."""
        return nullcontext() if self.average is None else self.average.applied()

    def settle(self) -> None:
        """The averaged weights, where there are any, become the model's own."""
        if self.average is not None:
            self.average.settle()
            self.average = None

    def records_at(self, step: int) -> bool:
        """Whether this step goes into the history."""
        every = max(self.schedule.steps // self.RECORDS, 1)
        return step % every == 0 or step + 1 == self.schedule.steps

    def record(self, step: int, loss: Tensor, metric: float | None) -> dict[str, Any]:
        """Add to the history; returns what the progress bar shows."""
        self.guard.check_finite(step + 1)
        with self.engine.weights():
            mean_bits = self.constraint.mean_capacity()
            above = len(self.constraint.violations())
        self.history.append(StepRecord(step, float(loss), mean_bits, metric))
        shown: dict[str, Any] = {
            "loss": f"{float(loss):.4f}",
            "bits": f"{mean_bits:.2f}",
            "above": above,
        }
        return shown if metric is None else {**shown, "metric": f"{metric:.4g}"}

    def track(self, step: int, loss: Tensor, metric: float | None) -> None:
        """Show a step that is due, or the last one, and any metric to the tracker."""
        if self.tracker is None:
            return
        if metric is not None:
            self.tracker.note_metric(step, metric)
        if self.tracker.is_due(step) or step + 1 == self.schedule.steps:
            self.guard.check_finite(step + 1)  # NaN has no bit-width
            self.tracker.retarget(self.constraint.targets)
            with self.engine.weights():
                self.tracker.observe(self.qmodel, step, float(loss))

    def state(self) -> dict[str, Tensor]:
        """What the steps to come depend on, as copies; the model is checked first.

        Raises:
            TrainingDivergedError: the last update broke a parameter.
        """
        self.guard.check_finite(self.taken)
        met_at = -1 if self.met_at is None else self.met_at
        counts = torch.tensor([self.taken, *self.guard.counts(), met_at])
        mean = {} if self.loss_mean is None else {"loss_mean": self.loss_mean}
        parts = {
            "model": model_state(self.qmodel),
            "optimizer": optimizer_state(self.optimizer),
            "history": history_state(self.history),
            "precision": self.precision.state(),
            "average": {} if self.average is None else self.average.state(),
            "constraint": self.constraint.state(),
        }
        return {**joined(parts), **mean, "counts": counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken; the model then is the last good state."""
        # First the targets: what the model holds was placed for them.
        self.constraint.load_state(under(state, "constraint"))
        load_model_state(self.qmodel, under(state, "model"))
        for quantizer in self.qmodel.modules():
            if isinstance(quantizer, WeightQuantizer):
                quantizer.forget()  # parts of a sharded weight keep its version
        load_optimizer_state(self.optimizer, under(state, "optimizer"))
        self.history = history_of(under(state, "history"))
        self.precision.load_state(under(state, "precision"))
        if self.average is not None:
            self.average.load_state(under(state, "average"))
        self.taken, skipped, trained, met_at = state["counts"].tolist()
        self.met_at = None if met_at < 0 else met_at
        if "loss_mean" in state:
            device = model_device(self.qmodel)
            self.loss_mean = state["loss_mean"].to(device, copy=True)
            self.constraint.observe_loss(self.loss_mean)
        self.guard.start_over(skipped, trained=bool(trained))

    def _project(self, cap: Cap) -> None:
        with self.engine.weights():
            self.constraint.project(cap)

    def _observe(self, loss: Tensor) -> None:
        """Show the loss to the constraint, and keep the mean that it takes of it."""
        self.constraint.observe_loss(loss)
        if self.loss_mean is None:
            self.loss_mean = loss.clone()
        else:
            self.loss_mean.lerp_(loss, 1.0 - LOSS_MEMORY)

    def undo_if_untrained(self) -> None:
        """Where not one step was taken, put back the quantizers that were opened."""
        if not self.guard.trained:
            self.guard.put_back()
            self.constraint.undo()
