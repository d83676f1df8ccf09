"""`finetune`: the loop that brings every edge to its bits and keeps the accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm.auto import tqdm

from gdnsq_fx.annotations import model_facts
from gdnsq_fx.errors import (
    BatchStructureError,
    BudgetError,
    ConfigError,
    TrainingDivergedError,
)
from gdnsq_fx.inputs import Batch, InputStructure, check_device
from gdnsq_fx.quantize.quantizer import ActivationQuantizer, Quantizer
from gdnsq_fx.sites import hard_bits, require_quantizers
from gdnsq_fx.state import in_evaluation
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.losses import TaskLoss, distillation_loss
from gdnsq_fx.training.objective import Objective, teacher_for
from gdnsq_fx.training.result import FinetuneResult, StepRecord
from gdnsq_fx.training.schedule import Schedule

Validate = Callable[[nn.Module], float]


def finetune(
    qmodel: GraphModule,
    train_batches: Iterable[Any],
    *,
    steps: int,
    teacher: nn.Module | None = None,
    task_loss: TaskLoss | None = None,
    distillation: float = 1.0,
    distillation_loss: TaskLoss = distillation_loss,
    validate: Validate | None = None,
    validate_every: int | None = None,
    schedule: Schedule | None = None,
    lr: float = 1e-3,
    max_grad_norm: float = 10.0,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune in place until every edge is at or under its target bit-width.

    Args:
        qmodel: a prepared model; it is left in evaluation mode.
        train_batches: batches, alone or followed by targets. Iterated again and again;
            a one-shot iterator must last for all steps.
        steps: optimizer steps; the budget is met for any number of them.
        teacher: floating-point model to imitate; by default the weights that ``qmodel``
            has now, at identity precision.
        task_loss: ``(output, targets) -> scalar`` to add to the distillation.
        distillation: weight of the distillation loss; 0 trains on ``task_loss`` alone.
        distillation_loss: ``(output, teacher output) -> scalar``; Jeffreys by default.
        validate: ``(model) -> metric``, called in evaluation mode at the end.
        validate_every: also call it every so many steps.
        schedule: how bits and rates go down; `Schedule(steps)` by default.
        lr: learning rate of weights (Adam); quantizers have their own (see `Schedule`).
        max_grad_norm: gradients are clipped to this norm.
        progress: show a progress bar.

    Returns:
        A `FinetuneResult`.

    Raises:
        ConfigError: nothing to minimize, or a schedule for other steps.
        BatchStructureError: a batch has another structure, or too few batches.
        TrainingDivergedError: loss or gradients became NaN or infinite; the model holds
            the last good state.
        BudgetError: an edge stayed above its target.
    """
    schedule = schedule or Schedule(steps)
    _check_settings(schedule, steps, task_loss, distillation, lr, max_grad_norm)
    if validate_every is not None and validate_every < 1:
        raise ConfigError(f"validate_every must be at least 1, got {validate_every}")
    inputs = model_facts(qmodel).inputs
    require_quantizers(qmodel, "finetune")
    started = time.monotonic()
    batches = _endless(train_batches, inputs, steps)
    first = next(batches)
    check_device(qmodel, first.args, first.kwargs)  # before anything is changed
    batches = chain([first], batches)
    bar = tqdm(range(steps), desc="fine-tune", disable=not progress, unit="step")
    frozen = teacher_for(qmodel, teacher)
    with in_evaluation(frozen), bar:
        objective = Objective(frozen, task_loss, distillation, distillation_loss)
        run = _Run(qmodel, objective, schedule, lr, max_grad_norm)
        try:
            for step in bar:
                loss = run.step(step, next(batches))
                due = validate_every is not None and (step + 1) % validate_every == 0
                if due or run.records_at(step):
                    metric = _validated(qmodel, validate) if due else None
                    bar.set_postfix(**run.record(step, loss, metric))
            run.check_finite(steps)
        finally:
            qmodel.eval()
    violations = run.constraint.violations()
    if violations:
        raise BudgetError(f"edges above their target bits: {violations}")
    return FinetuneResult(
        steps=steps,
        bits=hard_bits(qmodel),
        target_bits=run.constraint.targets,
        budget_met=True,
        metric=_validated(qmodel, validate),
        seconds=time.monotonic() - started,
        history=tuple(run.history),
    )


class _Run:
    """One fine-tuning run: optimizer, constraint, history, and the last good state."""

    RECORDS = 100
    SNAPSHOTS = 20

    def __init__(
        self,
        qmodel: GraphModule,
        objective: Objective,
        schedule: Schedule,
        lr: float,
        max_grad_norm: float,
    ) -> None:
        self.qmodel = qmodel
        self.objective = objective
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.good_state = _copied_state(qmodel)
        for module in qmodel.modules():
            if isinstance(module, Quantizer):
                module.enabled = True  # to train without them would be no fine-tuning
        self.constraint = Constraint(qmodel)
        self.constraint.open_to(schedule.start_bits)
        self.optimizer = torch.optim.Adam(_parameter_groups(qmodel, schedule, lr))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history: list[StepRecord] = []

    def step(self, step: int, batch: Batch) -> Tensor:
        """Forward, backward, update, projection; returns the loss without penalty."""
        self.qmodel.train()
        factor = self.schedule.learning_rate_factor(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.objective(self.qmodel, batch)
        self.constraint.observe_loss(loss)
        penalty = self.constraint.penalty(self.schedule.progress(step))
        self.optimizer.zero_grad()
        (loss + penalty).backward()
        norm = nn.utils.clip_grad_norm_(self.qmodel.parameters(), self.max_grad_norm)
        self._keep_or_restore(step, loss, norm)
        self.optimizer.step()
        self.constraint.project(lambda target: self.schedule.cap(step, target))
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

    def check_finite(self, step: int) -> None:
        """Restore and raise where the update before this step broke a parameter."""
        norm = nn.utils.get_total_norm([p.detach() for p in self.qmodel.parameters()])
        if not bool(torch.isfinite(norm)):
            self._restore(step, f"norm of the parameters {float(norm)}")

    def _keep_or_restore(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """A finite step proves the parameters it started from; else go back."""
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self._restore(
                step, f"loss {float(loss.detach())}, gradient norm {float(norm)}"
            )
        if step % max(self.schedule.steps // self.SNAPSHOTS, 1) == 0:
            self.good_state = _copied_state(self.qmodel)

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


def _check_settings(
    schedule: Schedule,
    steps: int,
    task_loss: TaskLoss | None,
    distillation: float,
    lr: float,
    max_grad_norm: float,
) -> None:
    if schedule.steps != steps:
        raise ConfigError(f"the schedule is for {schedule.steps} steps, not {steps}")
    if task_loss is None and distillation == 0.0:
        raise ConfigError("nothing to minimize: give task_loss, or distillation > 0")
    for name, value in (("lr", lr), ("max_grad_norm", max_grad_norm)):
        if not value > 0.0:
            raise ConfigError(f"{name} must be above 0, got {value}")
    if not distillation >= 0.0:
        raise ConfigError(f"distillation must be at least 0, got {distillation}")


def _parameter_groups(
    qmodel: GraphModule, schedule: Schedule, lr: float
) -> list[dict[str, Any]]:
    """Weights at ``lr``; each quantizer at the rate that its descent needs.

    ``lower`` is in units of its activation, not a logarithm: its rate is a share of the
    range.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    ours: set[int] = set()
    for module in qmodel.modules():
        if not isinstance(module, Quantizer):
            continue
        ours |= {id(p) for p in module.parameters()}
        rate = schedule.quantizer_rate(module.spec.bits)
        for name, parameter in module.named_parameters():
            scale = 1.0
            if name == "lower" and isinstance(module, ActivationQuantizer):
                scale = float(module.range.detach())
            groups.setdefault(rate * scale, []).append(parameter)
    weights = [p for p in qmodel.parameters() if p.requires_grad and id(p) not in ours]
    return [
        {"params": weights, "lr": lr},
        *({"params": params, "lr": rate} for rate, params in groups.items()),
    ]


def _endless(
    batches: Iterable[Any], inputs: InputStructure, steps: int
) -> Iterator[Batch]:
    given = 0
    while True:
        before = given
        for batch in batches:
            given += 1
            yield inputs.split(batch)
        if given == before:
            raise BatchStructureError(
                f"train_batches gave {given} of the {steps} batches needed and cannot "
                "be iterated again; pass a DataLoader or a list instead of an iterator"
            )


def _validated(qmodel: GraphModule, validate: Validate | None) -> float | None:
    if validate is None:
        return None
    with in_evaluation(qmodel), torch.no_grad():
        return float(validate(qmodel))
