"""Quantizers of one target side by side: one operation for all instead of one for each.

Parameters of quantizers are many and small: a scalar, or a number for each channel.
Joined into one vector, penalty and projection take as many operations for a hundred
quantizers as for one. Nothing here waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.quantize.capacity import (
    projected_activation,
    projected_weight,
    weight_capacity,
)
from gdnsq_fx.sites import ActivationSite, WeightSite

EPSILON = 1e-3


@dataclass(frozen=True)
class Excess:
    """By how much capacities exceed their targets.

    Attributes:
        total: sum over tensors of ``mean relu(cap - T + eps)``, differentiable scalar.
        violated: number of tensors with a scale group above its target, scalar.
    """

    total: Tensor
    violated: Tensor


class SideBySide(ABC):
    """Quantizers of one kind, target and device.

    Attributes:
        bits: their target.
    """

    bits: int

    @abstractmethod
    def excess(self) -> Excess:
        """What lies above the target."""

    @abstractmethod
    def project(self, cap: float) -> None:
        """Raise steps until every capacity is at most ``cap``; under `no_grad`."""


class Activations(SideBySide):
    """Activation quantizers of one target."""

    def __init__(self, sites: Sequence[ActivationSite]) -> None:
        self.bits = sites[0].quantizer.spec.bits
        self._quantizers = [site.quantizer for site in sites]

    def excess(self) -> Excess:
        """What lies above the target."""
        excess = _excess(self._ranges() - self._steps(), self.bits)
        return Excess(excess.sum(), (excess.detach() > EPSILON).sum())

    def project(self, cap: float) -> None:
        """See `projected_activation`."""
        steps, ranges = projected_activation(self._steps(), self._ranges(), cap)
        quantizers = self._quantizers
        _copy([q.log2_step for q in quantizers], steps.unbind())
        _copy([q.log2_range for q in quantizers], ranges.unbind())

    def align_gradients(self, cap: float) -> None:
        """Where capacity is at ``cap``, let step and range move alike; `no_grad`.

        There the budget leaves one direction to learn in, the scale of all levels. An
        optimizer that gives each parameter a step of its own length, as Adam does,
        loses it: whichever of the two moved against the other, the projection takes
        back, so that scales only grow. The mean of both gradients is their part along
        the cap, and with it log2_step learns as the one step of LSQ does.
        """
        learning = [
            q
            for q in self._quantizers
            if q.log2_step.grad is not None and q.log2_range.grad is not None
        ]
        if not learning:
            return
        steps: list[Tensor] = [q.log2_step for q in learning]
        ranges: list[Tensor] = [q.log2_range for q in learning]
        at_cap = torch.stack(ranges) - torch.stack(steps) >= cap - EPSILON
        gradients = [[_gradient(p) for p in steps], [_gradient(p) for p in ranges]]
        by_step, by_range = (torch.stack(one) for one in gradients)
        along = (by_step + by_range) / 2
        for own, into in zip((by_step, by_range), gradients, strict=True):
            _copy(into, torch.where(at_cap, along, own).unbind())

    def _steps(self) -> Tensor:
        return torch.stack([q.log2_step for q in self._quantizers])

    def _ranges(self) -> Tensor:
        return torch.stack([q.log2_range for q in self._quantizers])


class Weights(SideBySide):
    """Weight quantizers of one target."""

    def __init__(self, sites: Sequence[WeightSite]) -> None:
        self.bits = sites[0].quantizer.spec.bits
        self._sites = sites
        self._sizes = [site.quantizer.log2_step.numel() for site in sites]
        device = sites[0].quantizer.log2_step.device
        sizes = torch.tensor(self._sizes, device=device)
        numbers = torch.arange(len(sites), device=device)
        # Known lengths, so that no device is asked for them.
        total = sum(self._sizes)
        self._tensor_of = numbers.repeat_interleave(sizes, output_size=total)
        self._shares = (1.0 / sizes).repeat_interleave(sizes, output_size=total)

    def excess(self) -> Excess:
        """What lies above the target; extremes are those that forward met."""
        extremes = [s.quantizer.learnable_extremes(s.weight()) for s in self._sites]
        lows, highs = (_flat(one) for one in zip(*extremes, strict=True))
        excess = _excess(weight_capacity(lows, highs, self._steps()), self.bits)
        above = (excess.detach() > EPSILON).float()
        counts = above.new_zeros(len(self._sites)).index_add_(0, self._tensor_of, above)
        return Excess((excess * self._shares).sum(), (counts > 0).sum())

    def project(self, cap: float) -> None:
        """See `projected_weight`; the next forward pass knows the extremes met here."""
        extremes = [s.quantizer.look_ahead(s.weight()) for s in self._sites]
        lows, highs = (_flat(one) for one in zip(*extremes, strict=True))
        inside = self._sites[0].quantizer.within_int8
        projected = projected_weight(
            self._steps(), lows, highs, cap, within_int8=inside
        )
        steps = [s.quantizer.log2_step for s in self._sites]
        parts = zip(projected.split(self._sizes), steps, strict=True)
        _copy(steps, [part.view_as(step) for part, step in parts])

    def _steps(self) -> Tensor:
        return _flat(site.quantizer.log2_step for site in self._sites)


def side_by_side(
    weights: Iterable[WeightSite], activations: Iterable[ActivationSite]
) -> tuple[list[Weights], list[Activations]]:
    """Quantizers grouped by their targets and devices."""
    by_weight: dict[object, list[WeightSite]] = {}
    by_activation: dict[object, list[ActivationSite]] = {}
    for weight in weights:
        by_weight.setdefault(group_key(weight), []).append(weight)
    for activation in activations:
        by_activation.setdefault(group_key(activation), []).append(activation)
    return (
        [Weights(sites) for sites in by_weight.values()],
        [Activations(sites) for sites in by_activation.values()],
    )


def group_key(site: WeightSite | ActivationSite) -> object:
    """What the quantizers of one group have in common: target, offsets and device."""
    quantizer = site.quantizer
    return quantizer.spec.bits, quantizer.spec.offset, quantizer.log2_step.device


def _excess(capacity: Tensor, target: float) -> Tensor:
    """relu(cap - T + eps) of each scale group."""
    return torch.relu(capacity.float() - target + EPSILON)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """One operation for all on a GPU; torch has no public name for it."""
    copy: Any = getattr(torch, "_foreach_copy_")  # noqa: B009
    copy(list(targets), list(sources))
