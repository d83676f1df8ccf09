"""What a run under a budget predicts for itself, for its plan, before its first step.

Bits that start at a plan (`PlannedBits`) are as good as the predictions that it is made
from. Where `analyze` has made none, they are made on the batches that training begins
with, which it still sees: up to `BATCHES` of them, as many as hold `SAMPLES` samples,
at the costs and the memory that `AnalyzeCapacity` states for its widths (the time of
some tens of steps on them). The model, the facts on its nodes and the random
state are as before.

Of several processes, each predicts on its share. Predictions are means over samples,
each of which is predicted by itself, so that they do not depend on how many processes
there are, but for rounding. Levels are those that `PlannedBits` opens with. A run that
goes on has its predictions from its checkpoint.

Where nothing can be predicted, training may work all the same, so a warning says why,
and the plan starts uniform.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from gdnsq_fx.analysis.allocation import Divergences, check_feasible
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.analysis.divergence import Curvature
from gdnsq_fx.annotations import KEY, facts, model_facts
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import CalibrationError, CalibrationWarning, ConfigError
from gdnsq_fx.inputs import Batch, batch_size
from gdnsq_fx.passes import AnalyzeCapacity
from gdnsq_fx.sites import sites
from gdnsq_fx.training.batches import BatchStream
from gdnsq_fx.training.budgeted_bits import (
    WIDTHS,
    divergences_of,
    divergences_tensor,
    left_by_training,
    predicted_divergences,
)
from gdnsq_fx.training.checkpointing import Checkpointing
from gdnsq_fx.training.constraint_choice import Limits, starts_at_plan
from gdnsq_fx.training.losses import TaskLoss, squared_distillation_loss
from gdnsq_fx.training.outputs import Selector, select
from gdnsq_fx.training.planned_bits import PREDICTED
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.progress import prediction_bar
from gdnsq_fx.training.schedule import Schedule

BATCHES = 8
SAMPLES = 512


@dataclass(frozen=True)
class FirstPrediction:
    """Predictions for the plan of one run.

    Attributes:
        qmodel: a prepared model, the same in every process; left as it is.
        budget, schedule: of the run.
        group: its processes.
        distillation_loss, output: what outputs are compared by, as in `finetune`.
        progress: show a progress bar.
    """

    qmodel: GraphModule
    budget: Budget | None
    schedule: Schedule
    group: ProcessGroup
    distillation_loss: TaskLoss
    output: Selector | None
    progress: bool

    def limits_of_new(self, stream: BatchStream) -> Limits:
        """What a run that begins must obey; predicted where that is needed.

        Args:
            stream: its batches, none taken, and none afterwards.

        Raises:
            BudgetError: no bits meet the budget. BatchStructureError: as of the stream.
        """
        if not self._is_needed():
            return Limits(self.budget)
        first = stream.peek()
        size = self.group.count * batch_size(first.args, first.kwargs)
        count = max(min(SAMPLES // max(size, 1), BATCHES), 1)
        batches = stream.look_ahead(self.group.from_main(count), self.group)
        return Limits(self.budget, self._predicted(batches))

    def limits_of_old(self, saving: Checkpointing) -> Limits:
        """What a run that goes on must obey, by what it predicted when it began."""
        stored = saving.found(f"run.constraint.{PREDICTED}")
        if stored is None:
            return Limits(self.budget)
        return Limits(self.budget, divergences_of(stored, self._edges))

    @property
    def _edges(self) -> tuple[str, ...]:
        return CostModel.of(self.qmodel).edges

    def _is_needed(self) -> bool:
        """Ceilings alone leave no choice."""
        budget = self.budget
        if not isinstance(budget, Budget) or not starts_at_plan(self.schedule):
            return False
        # Before minutes are spent on it.
        cost = CostModel.of(self.qmodel)
        check_feasible(
            dict.fromkeys(cost.edges, dict.fromkeys(WIDTHS, 0.0)), cost, budget
        )
        known = predicted_divergences(self.qmodel) is not None
        return bool(budget.totals) and not self.group.any(known)

    def _predicted(self, batches: list[Batch]) -> Divergences | None:
        """The mean over all samples of all processes."""
        usable = [batch for batch in batches if _is_finite(batch)]
        samples, cause = 0, "their inputs hold NaN or infinite values"
        sums = torch.zeros(len(self._edges), len(WIDTHS), dtype=torch.float64)
        try:
            if usable:
                found = self._analyzed(usable)
                samples = sum(batch_size(one.args, one.kwargs) for one in usable)
                sums = divergences_tensor(found, self._edges) * samples
        except (CalibrationError, ConfigError, torch.OutOfMemoryError) as error:
            cause = str(error)
        return self._averaged(sums, samples, cause)

    def _averaged(self, sums: Tensor, samples: int, cause: str) -> Divergences | None:
        parts = torch.cat([sums.new_tensor([samples]), sums.flatten()])
        if self.group.count > 1:
            parts = self.group.mean(parts.to(self.group.device)).cpu()
        mean = (parts[1:] / parts[0]).view_as(sums)  # 0 / 0 where there are no samples
        if bool(torch.isfinite(mean).all()):
            found = divergences_of(mean, self._edges)
            return left_by_training(self.qmodel, found)
        if self.group.is_main:
            warnings.warn(
                "nothing could be predicted from the first training batches, so the "
                f"bits start as uniform as the budget allows: {cause}; call "
                "gdnsq_fx.analyze(qmodel, batches, widths=range(1, 9)) before, on "
                "batches that it can use",
                CalibrationWarning,
                stacklevel=5,
            )
        return None

    def _analyzed(self, batches: list[Batch]) -> Divergences:
        """As predicted, before training leaves less of it."""
        curvature: Curvature = "softmax"
        if self.distillation_loss is squared_distillation_loss:
            curvature = "identity"
        with _kept_facts(self.qmodel):
            try:
                self._analysis(batches, curvature)(self.qmodel)
            except ConfigError:  # no classes: trained by the loss of its task alone
                if curvature == "identity":
                    raise
                self._analysis(batches, "identity")(self.qmodel)
            return _written(self.qmodel)

    def _analysis(self, batches: list[Batch], curvature: Curvature) -> AnalyzeCapacity:
        part = None if self.output is None else partial(select, selector=self.output)
        return AnalyzeCapacity(
            prediction_bar(batches, shown=self.progress and self.group.is_main),
            model_facts(self.qmodel).inputs,
            curvature=curvature,
            joint=False,
            widths=WIDTHS,
            advice=False,
            part=part,
            by_sample=True,
        )


def _written(qmodel: GraphModule) -> Divergences:
    """What an analysis wrote on the nodes.

    Raises:
        CalibrationError: edges of which it tells nothing; they may matter to the loss
            of the task, and would get a single bit.
    """
    found: dict[str, Mapping[int, float]] = {}
    for site in sites(qmodel):
        edge = facts(site.node).edge
        found[site.edge] = {} if edge is None else edge.divergence_at
    silent = [name for name, at in found.items() if not at]
    if silent:
        raise CalibrationError(
            f"{', '.join(silent)} do not reach the output that is compared"
        )
    return found


@contextmanager
def _kept_facts(qmodel: GraphModule) -> Generator[None]:
    """What an analysis leaves on nodes is gone afterwards, what was there is back: half
    a report of weights that training changes would help nobody."""
    nodes = [node for site in sites(qmodel) for node in site.nodes]
    before = [(node, node.meta.get(KEY)) for node in nodes]
    try:
        yield
    finally:
        for node, its_facts in before:
            node.meta.pop(KEY, None)
            if its_facts is not None:
                node.meta[KEY] = its_facts


def _is_finite(batch: Batch) -> bool:
    leaves = tree_leaves((batch.args, batch.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return all(bool(torch.isfinite(one).all()) for one in tensors)
