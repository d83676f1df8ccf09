"""What happens to every edge while bits come down: `CapacityTracker`.

The order in which edges give up their bits is itself a sign of where information is
needed (GDNSQ, arXiv 2508.14004): those that reach their target last resist longest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.sites import activation_sites, hard_bits, weight_sites

LEAST_RECORDS = 10
SMOOTHED = 5  # records of one running median
RISE = 0.1  # of the range of the loss: less is noise
MOST_RISES = 5


@dataclass(frozen=True)
class CapacityRecord:
    """One recorded step.

    Attributes:
        step: optimizer step, from 0.
        loss: loss without the penalty.
        capacity: of every edge, bits per element (mean over scale groups).
    """

    step: int
    loss: float
    capacity: dict[str, float]


@dataclass(frozen=True)
class LossRise:
    """A stretch of training in which the smoothed loss rose.

    Attributes:
        first_step, last_step: its ends.
        before, after: smoothed loss there.
        lost: bits per element that edges gave up meanwhile, most first.
    """

    first_step: int
    last_step: int
    before: float
    after: float
    lost: tuple[tuple[str, float], ...]


class CapacityTracker:
    """Capacity of every edge and loss through a fine-tuning run, in bounded memory.

        tracker = CapacityTracker()
        gdnsq_fx.finetune(qmodel, batches, steps=2000, tracker=tracker)
        tracker.plot()

    Every step is recorded at first; whenever there are too many records, every second
    one is dropped and steps are recorded half as often.

    Args:
        max_records: at least 10.

    Raises:
        ConfigError: fewer than that.
    """

    def __init__(self, max_records: int = 200) -> None:
        if max_records < LEAST_RECORDS:
            raise ConfigError(
                f"max_records must be at least {LEAST_RECORDS}, got {max_records}"
            )
        self._max_records = max_records
        self._stride = 1
        self._records: list[CapacityRecord] = []
        self._targets: dict[str, int] = {}
        self._met: dict[str, int] = {}
        self._metrics: dict[int, float] = {}

    @property
    def records(self) -> tuple[CapacityRecord, ...]:
        """What was recorded, in order of steps."""
        return tuple(self._records)

    @property
    def metrics(self) -> dict[int, float]:
        """What ``validate`` returned, by step."""
        return dict(self._metrics)

    @property
    def targets(self) -> dict[str, int]:
        """Target bit-width of every edge."""
        return dict(self._targets)

    def start(self, targets: dict[str, int]) -> None:
        """Forget an earlier run."""
        self._stride = 1
        self._records = []
        self._targets = dict(targets)
        self._met = {}
        self._metrics = {}

    def retarget(self, targets: dict[str, int]) -> None:
        """Targets were learned meanwhile: edges may meet them only from now on."""
        changed = {e for e, bits in targets.items() if self._targets.get(e) != bits}
        self._targets = dict(targets)
        self._met = {e: step for e, step in self._met.items() if e not in changed}

    def is_due(self, step: int) -> bool:
        """Whether this step is to be recorded."""
        return step % self._stride == 0

    def note_metric(self, step: int, metric: float) -> None:
        """Record what ``validate`` returned after a step."""
        self._metrics[step] = metric
        if len(self._metrics) > self._max_records:
            self._metrics = dict(list(self._metrics.items())[::2])

    def observe(self, graph_module: GraphModule, step: int, loss: float) -> None:
        """Record a step; the model is only read."""
        for edge, bits in hard_bits(graph_module).items():
            if bits <= self._targets.get(edge, 0):
                self._met.setdefault(edge, step)
        capacity = capacities(graph_module)
        self._records.append(CapacityRecord(step, loss, capacity))
        if len(self._records) > self._max_records:
            newest = self._records.pop()
            self._records = [*self._records[::2], newest]
            self._stride *= 2

    def state(self) -> dict[str, Tensor]:
        """Everything recorded, as tensors; edges in the order of `targets`."""
        records = self._records
        capacity = [[r.capacity[edge] for edge in self._targets] for r in records]
        shape = (len(records), len(self._targets))
        return {
            "stride": torch.tensor(self._stride),
            "met": torch.tensor([self._met.get(edge, -1) for edge in self._targets]),
            "step": torch.tensor([r.step for r in records], dtype=torch.int64),
            "loss": torch.tensor([r.loss for r in records], dtype=torch.float64),
            "capacity": torch.tensor(capacity, dtype=torch.float64).reshape(shape),
            "metric_step": torch.tensor(list(self._metrics), dtype=torch.int64),
            "metric": torch.tensor(list(self._metrics.values()), dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned; call `start` with the same targets before."""
        stored: dict[str, Any] = {name: t.tolist() for name, t in state.items()}
        edges = list(self._targets)
        self._stride = stored["stride"]
        met = zip(edges, stored["met"], strict=True)
        self._met = {edge: step for edge, step in met if step >= 0}
        rows = zip(stored["step"], stored["loss"], stored["capacity"], strict=True)
        self._records = [
            CapacityRecord(step, loss, dict(zip(edges, capacity, strict=True)))
            for step, loss, capacity in rows
        ]
        self._metrics = dict(zip(stored["metric_step"], stored["metric"], strict=True))

    @property
    def first_met(self) -> dict[str, int | None]:
        """Step at which each edge was first seen at or under its target bit-width,
        None where it never was; those that resisted longest first, of level ones those
        that kept more bits above their target until then."""
        kept = dict.fromkeys(self._targets, 0.0)
        for record in self._records:
            for edge, target in self._targets.items():
                kept[edge] += max(record.capacity.get(edge, 0.0) - target, 0.0)
        late = sorted(
            self._targets,
            key=lambda e: (self._met.get(e, math.inf), kept[e]),
            reverse=True,
        )
        return {edge: self._met.get(edge) for edge in late}

    @property
    def loss_rises(self) -> tuple[LossRise, ...]:
        """Where the loss rose most, and which edges gave up bits there; at most 5."""
        smooth = _running_median([r.loss for r in self._records])
        ends = _climbs(smooth)
        ends.sort(key=lambda pair: smooth[pair[0]] - smooth[pair[1]])
        return tuple(self._rise(a, b, smooth) for a, b in ends[:MOST_RISES])

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "records": [asdict(r) for r in self._records],
            "metrics": self.metrics,
            "target_bits": self.targets,
            "first_met": self.first_met,
            "loss_rises": [asdict(rise) for rise in self.loss_rises],
        }

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: loss and metric above, capacities below.

        Raises:
            MissingExtraError: matplotlib is not installed.
            ConfigError: nothing was recorded.
        """
        from gdnsq_fx.analysis.plots import dynamics_plot

        return dynamics_plot(self)

    def _rise(self, first: int, last: int, smooth: Sequence[float]) -> LossRise:
        before, after = self._records[first], self._records[last]
        lost = {e: bits - after.capacity[e] for e, bits in before.capacity.items()}
        most = sorted(lost.items(), key=lambda pair: pair[1], reverse=True)
        return LossRise(
            before.step,
            after.step,
            smooth[first],
            smooth[last],
            tuple((e, bits) for e, bits in most[:3] if bits > 0.0),
        )


@torch.no_grad()
def capacities(graph_module: GraphModule) -> dict[str, float]:
    """Capacity of every edge now, bits per element, mean over scale groups."""
    found = {
        s.edge: s.quantizer.capacity(s.weight()).float().mean()
        for s in weight_sites(graph_module)
    }
    for site in activation_sites(graph_module):
        found[site.edge] = site.quantizer.capacity().float().mean()
    if not found:
        return {}
    values = torch.stack(list(found.values())).tolist()  # one transfer from a device
    return dict(zip(found, values, strict=True))


def _running_median(values: Sequence[float]) -> list[float]:
    half = SMOOTHED // 2
    return [median(values[max(n - half, 0) : n + half + 1]) for n in range(len(values))]


def _climbs(values: Sequence[float]) -> list[tuple[int, int]]:
    """Ends of the stretches from a low to the next high, without small ripples."""
    if not values:
        return []
    least = RISE * (max(values) - min(values))
    found: list[tuple[int, int]] = []
    low = high = 0
    for place, value in enumerate(values):
        if value > values[high]:
            high = place
        falls = values[high] - value > least or value < values[low]
        if not falls:
            continue
        if values[high] - values[low] > least:
            found.append((low, high))
        low = high = place
    if values[high] - values[low] > least:
        found.append((low, high))
    return found
