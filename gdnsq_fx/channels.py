"""Where the output channels of a weight lie: which of its elements share one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ChannelLayout:
    """Where the output channels of a weight lie.

    Attributes:
        axis: dimension that counts output channels (of one group), from the end where
            negative; None: one scale for the whole tensor.
        groups: number of groups along dimension 0. Only a grouped transposed
            convolution needs it: its weight is ``[in, out / groups, *kernel]``, so
            channel ``g * out / groups + c`` is ``weight[in of g, c]``.
    """

    axis: int | None
    groups: int = 1

    def resolved(self, ndim: int) -> ChannelLayout:
        """With its axis counted from the start; one scale where it has no such axis."""
        if self.axis is None or not -ndim <= self.axis < ndim or ndim < 2:
            return PER_TENSOR
        return ChannelLayout(self.axis % ndim, self.groups)

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight viewed as ``[groups, dim0 / groups, ...]`` where groups > 1."""
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def reduced_dims(self, ndim: int) -> tuple[int, ...]:
        """Dimensions of ``grouped(weight)`` that share one scale."""
        if self.axis is None:
            return tuple(range(ndim + (self.groups > 1)))
        kept = {self.axis} if self.groups == 1 else {0, self.axis + 1}
        return tuple(d for d in range(ndim + (self.groups > 1)) if d not in kept)

    def expanded(self, scale: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """A scale shaped for ``grouped`` made broadcastable to the plain weight."""
        if self.groups == 1 or self.axis is None:
            return (
                scale.reshape([1] * len(weight_shape)) if self.axis is None else scale
            )
        per_group = weight_shape[0] // self.groups
        return scale.squeeze(1).repeat_interleave(per_group, dim=0)


PER_TENSOR = ChannelLayout(axis=None)
