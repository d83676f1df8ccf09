"""The user's metric through a run: when it is taken, and the best state it found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.state import in_evaluation
from gdnsq_fx.training.run import Run
from gdnsq_fx.training.settings import Goal
from gdnsq_fx.training.stored_state import (
    joined,
    load_model_state,
    model_state,
    under,
)

Validate = Callable[[nn.Module], float]


class Validation:
    """Calls ``validate`` and remembers the best state that meets the budget.

    Args:
        run: whose model is validated, in evaluation and with averaged weights.
        validate: ``(model) -> metric``; without one nothing happens.
        every: optimizer steps between two calls; None for none but the last.
        goal: which metric is best; None keeps no state.
        patience: validations within the budget without a better one that end the run.
    """

    def __init__(
        self,
        run: Run,
        validate: Validate | None,
        every: int | None,
        goal: Goal | None = None,
        patience: int | None = None,
    ) -> None:
        self._run = run
        self._validate = validate
        self._every = every
        self._goal = goal
        self._patience = patience
        self._waited = 0
        self._best: tuple[int, float] | None = None
        self._best_state: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self._waited >= self._patience

    @property
    def best_step(self) -> int | None:
        """Optimizer step, from 0, after which the best state was found."""
        return None if self._best is None else self._best[0]

    def after(self, step: int) -> float | None:
        """The metric after a step, from 0, if it is due then."""
        return self._measured(step) if self.is_due(step) else None

    def is_due(self, step: int) -> bool:
        """Whether `after` measures after this step."""
        return self._every is not None and (step + 1) % self._every == 0

    @torch.no_grad()
    def final(self, qmodel: GraphModule) -> float | None:
        """The metric of what the run leaves, whole in every process."""
        if self._validate is None:
            return None
        found = float(self._validate(qmodel))
        return self._run.engine.group.mean_number(found)

    def settle(self) -> None:
        """Give the model its best state, the last one included."""
        if self._goal is None:
            return
        self._measured(self._run.taken - 1)
        if self._best is not None:
            load_model_state(self._run.qmodel, self._best_state)

    def state(self) -> dict[str, Tensor]:
        """The best so far."""
        waited = {"waited": torch.tensor(self._waited)}
        if self._best is None:
            return waited
        best = {"best": torch.tensor(self._best, dtype=torch.float64)}
        return {**waited, **best, **joined({"model": self._best_state})}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        self._waited = int(state["waited"])
        if "best" in state:
            step, metric = state["best"].tolist()
            self._best = int(step), metric
            self._best_state = under(state, "model")

    def _measured(self, step: int) -> float | None:
        if self._validate is None:
            return None
        qmodel = self._run.qmodel
        engine = self._run.engine
        with self._run.averaged(), in_evaluation(qmodel), torch.no_grad():
            with engine.weights():
                found = float(self._validate(qmodel))
            metric = engine.group.mean_number(found)
            if self._goal is not None:
                self._compare(step, metric)
        return metric

    def _compare(self, step: int, metric: float) -> None:
        if self._run.violations():
            return  # bits still come down: no state to keep, and no reason to stop
        if not self._is_better(metric):
            self._waited += 1
            return
        self._waited = 0
        self._best = step, metric
        self._best_state = model_state(self._run.qmodel)

    def _is_better(self, metric: float) -> bool:
        if self._best is None or math.isnan(self._best[1]):
            return True
        best = self._best[1]
        return metric > best if self._goal == "max" else metric < best
