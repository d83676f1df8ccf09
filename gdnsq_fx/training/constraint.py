"""Capacities under their targets: the exterior-point penalty and the projection.

    P = C * t * (m_w * mean_i relu(cap_i - T_i + eps)     over weights i
               + m_a * mean_j relu(cap_j - T_j + eps))    over activations j

with C the running mean of the loss, t growing from 0 to 1 through the descent, and m_w,
m_a the shares of the violated constraints that are on weights and on activations
(GDNSQ, arXiv 2508.14004). The penalty decides which edges give up bits first. The
projection onto a slowly lowered cap decides by when: it makes the budget certain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.sites import activation_sites, hard_bits, weight_sites
from gdnsq_fx.training.clip_weights import clip_outliers
from gdnsq_fx.training.side_by_side import (
    Activations,
    Excess,
    Weights,
    group_key,
    side_by_side,
)
from gdnsq_fx.training.widen_activations import widen_binary

SMOOTHING = 1e-3
LOSS_MEMORY = 0.99
# A well-trained model distils at a loss near 0; the penalty must still bite.
LOSS_FLOOR = 1e-2

Cap = Callable[[float], float]


class Constraint:
    """The bit budget of a prepared model: each tensor at most its target.

    Args:
        graph_module: a prepared model; its quantizers are read and projected in place.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph_module = graph_module
        self._weights = weight_sites(graph_module)
        self._activations = activation_sites(graph_module)
        self._loss_scale: Tensor | None = None
        self._groups: tuple[list[Weights], list[Activations]] = ([], [])
        self._grouped_by: list[object] = []

    @property
    def targets(self) -> dict[str, int]:
        """Target bit-width of every edge."""
        every = [*self._weights, *self._activations]
        return {site.edge: site.quantizer.spec.bits for site in every}

    @property
    def loss_scale(self) -> Tensor:
        """C, the running mean of the loss, or its floor."""
        scale = LOSS_FLOOR if self._loss_scale is None else self._loss_scale
        return torch.as_tensor(scale).clamp(min=LOSS_FLOOR)

    def observe_loss(self, loss: Tensor) -> None:
        """Update C, the running mean of the loss; call once a step before `penalty`."""
        loss = loss.detach()
        if self._loss_scale is None:
            self._loss_scale = loss.clone()
            return
        self._loss_scale.lerp_(loss, 1.0 - LOSS_MEMORY)

    def penalty(self, growth: float) -> Tensor:
        """The penalty, a differentiable scalar in units of the loss.

        Args:
            growth: t, how strong it is by now.
        """
        weights, activations = self._grouped()
        excess_w = [group.excess() for group in weights]
        excess_a = [group.excess() for group in activations]
        violated_w, violated_a = _violated(excess_w), _violated(excess_a)
        total = violated_w + violated_a + 2.0 * SMOOTHING
        mean_w = _mean(excess_w, len(self._weights))
        mean_a = _mean(excess_a, len(self._activations))
        penalty = (violated_w + SMOOTHING) / total * mean_w
        penalty = penalty + (violated_a + SMOOTHING) / total * mean_a
        return penalty * self.loss_scale * growth

    def observe_gradients(self) -> None:
        """Fixed targets have nothing to learn from gradients."""

    def state(self) -> dict[str, Tensor]:
        """What the steps to come depend on beside model and loss: nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""

    def undo(self) -> None:
        """Fixed targets are as they were."""

    @torch.no_grad()
    def align_gradients(self, cap: Cap) -> None:
        """Let activations at their cap learn one scale; after the last backward.

        Args:
            cap: target -> bits that an edge with this target may have by now.
        """
        _, activations = self._grouped()
        for group in activations:
            group.align_gradients(cap(group.bits))

    @torch.no_grad()
    def project(self, cap: Cap) -> None:
        """Raise steps until every capacity is at most ``cap(target)``."""
        weights, activations = self._grouped()
        for group in (*weights, *activations):
            group.project(cap(group.bits))

    @torch.no_grad()
    def open_to(self, bits: float) -> None:
        """Start over at ``bits`` where the target is lower; outliers are clipped, and
        activations that start at one bit widened."""
        for site in self._weights:
            if site.quantizer.spec.bits < bits:
                site.quantizer.open_to(site.weight(), bits)
        for activation in self._activations:
            if activation.quantizer.spec.bits < bits:
                activation.quantizer.open_to(bits)
        clip_outliers(self._weights, bits)
        if bits <= 1.0:
            widen_binary(self._activations)

    @torch.no_grad()
    def mean_capacity(self) -> float:
        """Mean capacity over all edges, bits per element."""
        found = [s.quantizer.capacity(s.weight()).mean() for s in self._weights]
        found += [s.quantizer.capacity() for s in self._activations]
        return float(torch.stack([f.float() for f in found]).mean())

    def _grouped(self) -> tuple[list[Weights], list[Activations]]:
        """Quantizers side by side, anew where a target or the device has changed."""
        keys = [group_key(site) for site in (*self._weights, *self._activations)]
        if keys != self._grouped_by:
            self._groups = side_by_side(self._weights, self._activations)
            self._grouped_by = keys
        return self._groups

    def violations(self) -> dict[str, tuple[int, int]]:
        """Edges above target: name -> (hard bit-width, target)."""
        targets = self.targets
        return {
            edge: (bits, targets[edge])
            for edge, bits in hard_bits(self._graph_module).items()
            if bits > targets[edge]
        }


def _violated(excesses: list[Excess]) -> Tensor:
    """How many tensors have a channel above its target."""
    if not excesses:
        return torch.tensor(0.0)
    return torch.stack([excess.violated for excess in excesses]).sum()


def _mean(excesses: list[Excess], tensors: int) -> Tensor:
    """Mean over tensors, of the sums over groups of them."""
    if not excesses:
        return torch.tensor(0.0)
    return torch.stack([excess.total for excess in excesses]).sum() / tensors
