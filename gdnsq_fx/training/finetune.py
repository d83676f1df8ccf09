"""`finetune`: the loop that brings every edge to its bits and keeps the accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from tqdm.auto import tqdm

from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.annotations import model_facts
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import (
    BatchStructureError,
    BudgetError,
    ConfigError,
)
from gdnsq_fx.inputs import Batch, InputStructure, check_device
from gdnsq_fx.sites import hard_bits, require_quantizers
from gdnsq_fx.state import in_evaluation
from gdnsq_fx.training.learned_bits import costs_within
from gdnsq_fx.training.losses import TaskLoss, distillation_loss
from gdnsq_fx.training.objective import Objective, teacher_for
from gdnsq_fx.training.result import FinetuneResult
from gdnsq_fx.training.run import Run
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
    tracker: CapacityTracker | None = None,
    budget: Budget | None = None,
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
        tracker: notes the capacity of every edge through the run.
        budget: learn the bits of every edge, 1 to 8, within these bounds on the whole
            model, instead of the targets that ``qmodel`` has (see `LearnedBits`).

    Returns:
        A `FinetuneResult`.

    Raises:
        ConfigError: nothing to minimize, or a schedule for other steps.
        BatchStructureError: a batch has another structure, or too few batches.
        TrainingDivergedError: loss or gradients became NaN or infinite; the model holds
            the last good state.
        BudgetError: no bits meet the budget, which is found before training; or an
            edge stayed above its target.
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
    check_device(frozen, first.args, first.kwargs)
    with in_evaluation(frozen), bar:
        objective = Objective(frozen, task_loss, distillation, distillation_loss)
        run = Run(qmodel, objective, schedule, lr, max_grad_norm, tracker, budget)
        try:
            for step in bar:
                loss = run.step(step, next(batches))
                due = validate_every is not None and (step + 1) % validate_every == 0
                metric = _validated(qmodel, validate) if due else None
                run.track(step, loss, metric)
                if due or run.records_at(step):
                    bar.set_postfix(**run.record(step, loss, metric))
            run.check_finite(steps)
        except BaseException:
            run.undo_if_untrained()
            raise
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
        budget=budget,
        costs=None if budget is None else costs_within(qmodel, budget),
    )


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
