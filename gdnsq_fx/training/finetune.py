"""`finetune`: the loop that brings every edge to its bits and keeps the accuracy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.annotations import model_facts
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import BudgetError, ConfigError
from gdnsq_fx.inputs import check_device
from gdnsq_fx.passes import AlignBiases
from gdnsq_fx.sites import hard_bits, require_quantizers
from gdnsq_fx.state import in_evaluation
from gdnsq_fx.training.amp import Autocast
from gdnsq_fx.training.batch_norm import reestimate_batch_norm
from gdnsq_fx.training.batches import BatchStream
from gdnsq_fx.training.budgeted_bits import costs_within
from gdnsq_fx.training.callbacks import Callback, CsvLog
from gdnsq_fx.training.checkpointing import Checkpointing, Resumable
from gdnsq_fx.training.compiled import Compile, compiled
from gdnsq_fx.training.distributed import engine_for
from gdnsq_fx.training.features import FeatureObjective, graph_teacher
from gdnsq_fx.training.first_prediction import FirstPrediction
from gdnsq_fx.training.identity import identity_of
from gdnsq_fx.training.losses import TaskLoss, distillation_loss
from gdnsq_fx.training.objective import Objective, teacher_for
from gdnsq_fx.training.outputs import Selector, selecting, weighted
from gdnsq_fx.training.progress import step_bar
from gdnsq_fx.training.recipe import default_rate, default_schedule
from gdnsq_fx.training.result import FinetuneResult
from gdnsq_fx.training.run import Run
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.settings import Goal, Settings
from gdnsq_fx.training.settled_inputs import settled_inputs
from gdnsq_fx.training.validation import Validate, Validation
from gdnsq_fx.training.working_copy import agree_on

if TYPE_CHECKING:
    from accelerate import Accelerator


def finetune(
    qmodel: GraphModule,
    train_batches: Iterable[Any],
    *,
    steps: int,
    teacher: nn.Module | None = None,
    task_loss: TaskLoss | None = None,
    distillation: float = 1.0,
    distillation_loss: TaskLoss = distillation_loss,
    task_weight: float = 1.0,
    output: Selector | None = None,
    features: Mapping[str, float] | None = None,
    validate: Validate | None = None,
    validate_every: int | None = None,
    schedule: Schedule | None = None,
    lr: float | None = None,
    max_grad_norm: float = 10.0,
    progress: bool = True,
    tracker: CapacityTracker | None = None,
    budget: Budget | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    resume: bool = True,
    accumulate: int = 1,
    autocast: Autocast | None = None,
    ema: float | None = None,
    batch_norm_batches: int = 0,
    best: Goal | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    log: str | os.PathLike[str] | None = None,
    compile: Compile = False,
    accelerator: Accelerator | None = None,
    shard: bool = False,
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
        distillation_loss: ``(output, teacher output) -> scalar``; Jeffreys by default,
            `kl_distillation_loss` and `squared_distillation_loss` are others.
        task_weight: weight of ``task_loss``.
        output: part of both outputs that the distillation compares: a name, an index,
            or a function of the output. By default ``logits`` or the first tensor.
            ``task_loss`` always takes the whole output.
        features: name of a node of ``qmodel.graph`` -> weight of the mean squared
            difference of its value to the teacher's, which then needs the same
            parameters as the model; part of the distillation.
        validate: ``(model) -> metric``, called in evaluation mode at the end.
        validate_every: also call it every so many steps.
        schedule: how bits and rates go down; by default bits start at their targets
            (see ``recipe.py``), or with a ``budget`` at a plan of them.
        lr: learning rate of weights (Adam); by default 3e-3, 1e-3, 3e-4 or 1e-4,
            where the median weight has 1, 2, 3 or more bits (with a ``budget`` by the
            plan; 1e-3 where bits come down). Quantizers have their own (`Schedule`).
        max_grad_norm: gradients are clipped to this norm.
        progress: show a progress bar.
        tracker: notes the capacity of every edge through the run.
        budget: learn the bits of every edge, 1 to 8, within these bounds on the whole
            model, instead of the targets that ``qmodel`` has: from a plan (see
            `PlannedBits`), or coming down if the schedule starts above (`LearnedBits`).
            The plan is predicted on the first few batches (512 samples, at least one
            batch), which training then sees as well, unless ``analyze(qmodel, batches,
            widths=range(1, 9))`` was called before; nothing of it stays on ``qmodel``.
        checkpoint: folder that keeps the last two states of the run (see
            ``checkpoint_folder.py``). On SIGTERM the step is finished and saved before
            the signal acts.
        checkpoint_every: optimizer steps between two of them.
        resume: go on from the newest whole checkpoint, to the bit as if the run had
            never been interrupted (``batches.py`` says what that asks of
            ``train_batches``); call it with the model prepared anew, as for the first
            time. False starts over and replaces what the folder holds.
        accumulate: batches of each optimizer step, whose mean loss is minimized.
        autocast: compute outputs and loss in this type, ``bfloat16`` or ``float16``
            (with its loss scaled); parameters and quantizers stay in float32.
        ema: decay of a moving average of the parameters, 0..1, from the end of the
            descent on; it is what is validated and what the model ends with.
        batch_norm_batches: at the end measure the statistics of BatchNorm again, on so
            many of the batches that come next.
        best: ``"max"`` or ``"min"``: end with the state of the best ``validate`` among
            those that meet the budget, the last one included.
        patience: end after so many calls of ``validate`` without a better one, counted
            while the budget is met.
        callbacks: told of every record of the history, and of the result.
        log: CSV file with a line for each record of the history.
        compile: run training forward and backward through ``torch.compile``; a mapping
            gives its options.
        accelerator: ``accelerate.Accelerator`` of a run on several processes, each of
            which calls `finetune` alike, with ``train_batches`` of its own share of
            each global batch, all shares of one size (see ``distributed.py``).
        shard: cut gradients, optimizer state and, between steps, weights among the
            processes (FSDP2) instead of holding all of them in each (DDP).

    Returns:
        A `FinetuneResult`.

    Raises:
        ConfigError: nothing to minimize, or a schedule for other steps.
        BatchStructureError: a batch has another structure, or too few batches.
        TrainingDivergedError: loss or gradients became NaN or infinite; the model holds
            the last good state.
        BudgetError: no bits meet the budget, which is found before training; or an
            edge stayed above its target.
        CheckpointError: the folder holds another run.
        MissingExtraError: ``accelerate`` is not installed.
    """
    engine = engine_for(accelerator, shard=shard)
    group = engine.group
    schedule = schedule or default_schedule(steps)
    if best is not None and validate is None:
        raise ConfigError("best needs validate, the metric that is compared")
    _check_goal(schedule, steps, task_loss, distillation)
    inputs = model_facts(qmodel).inputs
    require_quantizers(qmodel, "finetune")
    if lr is None and budget is None:  # else the rate of the plan, once there is one
        lr = default_rate(qmodel, come_down=False)
    settings = Settings(
        lr=lr,
        max_grad_norm=max_grad_norm,
        distillation=distillation,
        task_weight=task_weight,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        accumulate=accumulate,
        autocast=autocast,
        ema=ema,
        batch_norm_batches=batch_norm_batches,
        best=best,
        patience=patience,
    )
    agree_on(qmodel, group)
    needed = steps * accumulate + batch_norm_batches
    stream = BatchStream(
        train_batches, inputs, needed, resumable=(checkpoint, budget) != (None, None)
    )
    frozen = (graph_teacher if features else teacher_for)(qmodel, teacher)
    choices = {
        "task_loss": task_loss,
        "distillation_loss": distillation_loss,
        "output": output,
        "features": features,
        "budget": budget,
        **({"processes": group.count} if group.count > 1 else {}),
    }
    saving = Checkpointing(
        checkpoint,
        checkpoint_every,
        lambda: identity_of(qmodel, frozen, schedule, settings, choices),
        group,
    )
    begun = saving.find(resume=resume)
    prediction = FirstPrediction(
        qmodel, budget, schedule, group, distillation_loss, output, progress
    )
    if begun:
        limits = prediction.limits_of_old(saving)
    else:
        first = stream.peek()  # before anything is changed
        check_device(qmodel, first.args, first.kwargs)
        check_device(frozen, first.args, first.kwargs)
        limits = prediction.limits_of_new(stream)
    bar = step_bar(begun, steps, shown=progress and group.is_main)
    listeners = list(callbacks) if group.is_main else []
    settled = settled_inputs(qmodel) if budget is None else nullcontext()
    working = engine.working(qmodel)
    with in_evaluation(frozen), settled, saving, bar, working as model:
        module: nn.Module = model
        objective = Objective(
            frozen,
            None if task_loss is None else weighted(task_loss, task_weight),
            distillation,
            selecting(distillation_loss, output),
        )
        if features:
            objective = FeatureObjective(objective, model, features)
            module = objective.module
        module = compiled(module, compile)
        run = Run(model, objective, schedule, settings, tracker, limits, engine, module)
        validation = Validation(run, validate, validate_every, best, patience)
        parts: dict[str, Resumable] = {
            "batches": stream,
            "run": run,
            "validation": validation,
        }
        if tracker is not None:
            parts["tracker"] = tracker
        try:
            saving.restore(parts)
            if log is not None and group.is_main:
                listeners.append(CsvLog(log, run.history))
            for step in bar:
                if validation.is_over:
                    break
                loss = run.step(step, stream.take_several(accumulate))
                metric = validation.after(step)
                run.track(step, loss, metric)
                if validation.is_due(step) or run.records_at(step):
                    bar.set_postfix(**run.record(step, loss, metric))
                    for callback in listeners:
                        callback.on_step(run.history[-1])
                if saving.is_due(step + 1, last=validation.is_over or run.is_done):
                    saving.save(step + 1, parts)
            run.guard.check_finite(run.taken)
            run.settle()
            validation.settle()
            refreshed = (stream.take() for _ in range(batch_norm_batches))
            with engine.weights():
                reestimate_batch_norm(model, refreshed, run.held)
            violations = run.violations()
        except BaseException:
            run.undo_if_untrained()
            raise
        finally:
            model.eval()
    qmodel.eval()
    if violations:
        raise BudgetError(f"edges above their target bits: {violations}")
    AlignBiases()(qmodel)
    metric = validation.final(qmodel)
    result = FinetuneResult(
        steps=run.taken,
        bits=hard_bits(qmodel),
        target_bits=run.constraint.targets,
        budget_met=True,
        metric=metric,
        seconds=saving.seconds,
        history=tuple(run.history),
        budget=budget,
        costs=None if budget is None else costs_within(qmodel, budget),
        best_step=validation.best_step,
    )
    for callback in listeners:
        callback.on_end(result)
    return result


def _check_goal(
    schedule: Schedule, steps: int, task_loss: TaskLoss | None, distillation: float
) -> None:
    if schedule.steps != steps:
        raise ConfigError(f"the schedule is for {schedule.steps} steps, not {steps}")
    if task_loss is None and distillation == 0.0:
        raise ConfigError("nothing to minimize: give task_loss, or distillation > 0")
