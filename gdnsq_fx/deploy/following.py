"""The reference on the codes of another runtime, so that each edge is judged alone.

Where a value lies half-way between two codes, float rounding decides which it becomes,
and all that follows from it differs by whole numbers. So the reference takes over the
codes that the other runtime has at each edge, and compares only what it would have made
itself of that runtime's own codes before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from gdnsq_fx.deploy.edges import CodedEdge
from gdnsq_fx.deploy.reference import Integers, ReferenceExecutor
from gdnsq_fx.deploy.runtimes import Observation, Values, tensors
from gdnsq_fx.state import cloned

# Of the largest magnitude in a tensor: some sixty roundings of float32.
FLOAT_ROUNDING = 2.0**-18


class Departure(NamedTuple):
    """Where a runtime parts from what its own codes before imply.

    Attributes:
        codes: how many differ.
        rounding: how many of them differ by one step, where the value before lies
            within float rounding of a half step.
    """

    codes: int
    rounding: int


@final
class FollowingReference(ReferenceExecutor):
    """The reference executor, with codes to see and to take over.

    Args:
        model: in deployable form.
        edges: its quantized activations.
    """

    def __init__(self, model: GraphModule, edges: Sequence[CodedEdge]) -> None:
        super().__init__(model)
        self._edges = {edge.codes: edge for edge in edges}
        self._rounded = {edge.rounded for edge in edges}
        self._values: dict[Node, Tensor] = {}
        self._given: Mapping[str, Tensor] = {}
        self._codes: dict[str, Tensor] = {}
        self._near: Tensor | None = None
        self._turning = False
        self._departures: dict[str, Departure] = {}

    def observe(self, values: Values) -> tuple[Observation, Tensor]:
        """Run on its own.

        Returns:
            Outputs and codes; and for each input of the batch, bool ``[B]``, whether
            some value of it lies within float rounding of a half step.
        """
        count = batch_size(values)
        self._near = torch.zeros(count, dtype=torch.bool)
        outputs = self._run(values, {})
        return Observation(outputs, dict(self._codes)), self._near

    def follow(
        self, values: Values, codes: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Departure]]:
        """Run on the codes of another runtime.

        Returns:
            Outputs, and the edges where that runtime parts from the reference on its
            own codes before, in order of the graph.
        """
        self._near = None
        self._departures = {}
        outputs = self._run(values, codes)
        return outputs, self._departures

    def turned(self, values: Values) -> list[Tensor]:
        """Outputs if every value near a half step were rounded the other way.

        They show how far float rounding can move the outputs of these inputs.
        """
        self._near = None
        self._turning = True
        try:
            return self._run(values, {})
        finally:
            self._turning = False

    def _run(self, values: Values, codes: Mapping[str, Tensor]) -> list[Tensor]:
        self._given, self._codes = codes, {}
        try:
            return tensors(self.run(*cloned(values)))
        finally:
            self._values.clear()

    def run_node(self, n: Node) -> Any:
        """One node; codes as they are given."""
        if n in self._rounded:
            value: Any = self.fetch_args_kwargs_from_env(n)[0][0]
            self._values[n] = value.real() if isinstance(value, Integers) else value
        found = super().run_node(n)
        edge = self._edges.get(n)
        if edge is None:
            return found
        value = self._values.pop(edge.rounded)
        if self._turning:
            return _turned(edge, value, found)
        self._codes[edge.name] = found
        if self._near is not None:
            self._near |= _by_input(near_half(edge, value), len(self._near))
        given = self._given.get(edge.name)
        if given is None:
            return found
        if given.shape != found.shape:
            self._departures[edge.name] = Departure(found.numel(), 0)
            return found
        self._compare(edge, found, given.to(found.dtype), value)
        return given.to(found.dtype)

    def _compare(
        self, edge: CodedEdge, found: Tensor, given: Tensor, value: Tensor
    ) -> None:
        apart = (given.long() - found.long()).abs()
        differing = int((apart > 0).sum())
        if differing:
            rounding = (apart == edge.factor) & _is_nearest(edge, value, given)
            departure = Departure(differing, int(rounding.sum()))
            self._departures[edge.name] = departure


def near_half(edge: CodedEdge, value: Tensor) -> Tensor:
    """Which values lie within float rounding of the middle between two levels."""
    steps = edge.in_steps(value)
    return (steps - steps.floor() - 0.5).abs() <= _rounding(steps)


def _turned(edge: CodedEdge, value: Tensor, codes: Tensor) -> Tensor:
    """Codes, those of values near a half step on its other side."""
    above = edge.in_steps(value) > (codes.double() - edge.zero) / edge.factor
    other = codes.long() + torch.where(above, edge.factor, -edge.factor)
    other = other.clamp(edge.least, edge.most).to(codes.dtype)
    return torch.where(near_half(edge, value), other, codes)


def _is_nearest(edge: CodedEdge, value: Tensor, codes: Tensor) -> Tensor:
    """Which codes are those of a level nearest to their value, up to float rounding."""
    steps = edge.in_steps(value)
    levels = (codes.double() - edge.zero) / edge.factor
    near = (steps - levels).abs() <= 0.5 + _rounding(steps)
    return near & (codes >= edge.least) & (codes <= edge.most)


def _rounding(steps: Tensor) -> Tensor | float:
    return FLOAT_ROUNDING * (steps.abs().amax() if steps.numel() else 0.0)


def batch_size(values: Values) -> int:
    """Size of dimension 0 of the first tensor that has one, else 1."""
    sizes = [tensor.shape[0] for tensor in tensors(list(values)) if tensor.ndim]
    return sizes[0] if sizes else 1


def _by_input(found: Tensor, count: int) -> Tensor:
    """For each input, whether any of its values counts; all where they are mixed."""
    if found.ndim and count and found.shape[0] % count == 0:
        return found.reshape(count, -1).any(1)
    return found.any().expand(count)
