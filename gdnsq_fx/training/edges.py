"""Weights and activations alike: the capacity of an edge, and how it is moved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gdnsq_fx.sites import ActivationSite, WeightSite

Edge = WeightSite | ActivationSite


def capacity(edge: Edge) -> Tensor:
    """Capacity of each scale group, bits per element, differentiable."""
    if isinstance(edge, WeightSite):
        return edge.quantizer.capacity(edge.weight())
    return edge.quantizer.capacity()


def mean_capacities(edges: Iterable[Edge]) -> Tensor:
    """Mean over the scale groups of each edge, ``[edges]`` float64 on the CPU."""
    return torch.stack([capacity(edge).mean().cpu().double() for edge in edges])


def largest_capacities(edges: Iterable[Edge]) -> Tensor:
    """The largest scale group of each edge, which its bits must hold; as above."""
    return torch.stack([capacity(edge).amax().cpu().double() for edge in edges])


def open_edge(edge: Edge, bits: float) -> None:
    """Start over with ``bits`` over the whole range."""
    if isinstance(edge, WeightSite):
        edge.quantizer.open_to(edge.weight(), bits)
    else:
        edge.quantizer.open_to(bits)


def project_edge(edge: Edge, bits: float) -> None:
    """Raise steps until no scale group has more than ``bits``."""
    if isinstance(edge, WeightSite):
        edge.quantizer.project(edge.weight(), bits)
    else:
        edge.quantizer.project(bits)


def raise_edge(edge: Edge, bits: float) -> None:
    """Give every scale group at most ``bits`` more, by a smaller step."""
    edge.quantizer.log2_step.sub_(bits)


def slope(edge: Edge) -> Tensor:
    """Minus the derivative of what was differentiated last by the bits of an edge.

    All scale groups count together. The range is held, so that the derivative by the
    step alone decides: ``cap = log2(q) - log2(s)`` of an activation falls as log2(s)
    grows, ``cap = log2(span/s + 1)`` of a weight by 1 - 2^-cap.

    Returns:
        A scalar, float64 on the CPU; not a number where there is no gradient.
    """
    gradient = edge.quantizer.log2_step.grad
    if gradient is None:
        return torch.tensor(torch.nan, dtype=torch.float64)
    if isinstance(edge, WeightSite):
        # At least one bit; a constant channel has none, and no gradient either.
        gradient = gradient / (1.0 - torch.exp2(-capacity(edge))).clamp(min=0.5)
    return gradient.sum().cpu().double()
