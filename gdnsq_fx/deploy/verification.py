"""Runtimes against the reference executor, batch after batch.

Each batch runs in the reference, then in every runtime twice: as users run it, and with
the codes of its quantized activations shown. Where codes differ the reference runs once
more on that runtime's codes, which tells the edge where it parted from what followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.deploy.agreement import EdgeAgreement, RuntimeAgreement
from gdnsq_fx.deploy.certificate import Certificate
from gdnsq_fx.deploy.edges import CodedEdge
from gdnsq_fx.deploy.following import FollowingReference, batch_size
from gdnsq_fx.deploy.output_tally import OutputTally, input_distances, same_inputs
from gdnsq_fx.deploy.runtimes import Observation, Runtime, TorchRuntime, Values
from gdnsq_fx.errors import BatchStructureError, FileFormatError

# Of what all roundings together can move, counting the ways that they add up.
_MOST = 2.0


@dataclass(frozen=True, eq=False)
class _Expected:
    """What the reference makes of one batch, and which inputs hang on a rounding."""

    reference: FollowingReference
    values: Values
    seen: Observation
    near: Tensor
    count: int

    @cached_property
    def movable(self) -> Tensor:
        """How far roundings to the other side move each input's outputs, ``[B]``."""
        turned = self.reference.turned(self.values)
        return input_distances(turned, self.seen.outputs, self.count)


@final
class Verification:
    """Compares runtimes over batches; what it keeps does not grow with them.

    Args:
        model: in deployable form and in evaluation.
        edges: its quantized activations.
        runtimes: to compare.
        trained: the converted model before its levels moved, or None.
    """

    def __init__(
        self,
        model: GraphModule,
        edges: Sequence[CodedEdge],
        runtimes: Sequence[Runtime],
        trained: GraphModule | None = None,
    ) -> None:
        self._reference = FollowingReference(model, edges)
        self._tallies = [_Tally(one, self._reference, edges) for one in runtimes]
        self._trained = None if trained is None else TorchRuntime(trained, ())
        self._trained_outputs = OutputTally()
        self._trained_differ = 0
        self._inputs = 0

    @torch.no_grad()
    def add(self, batches: Iterable[Values]) -> None:
        """Compare batches, each one value for each placeholder of the graph.

        Raises:
            BatchStructureError: there was no batch.
            FileFormatError: a file has outputs of other shapes than the model.
        """
        for values in batches:
            seen, near = self._reference.observe(values)
            count = batch_size(values)
            expected = _Expected(self._reference, values, seen, near, count)
            self._inputs += expected.count
            for tally in self._tallies:
                tally.add(values, expected)
            if self._trained is not None:
                got = self._trained.outputs(values)
                self._trained_outputs.add(got, seen.outputs)
                same = same_inputs(got, seen.outputs, expected.count)
                self._trained_differ += int((~same).sum())
        if not self._inputs:
            raise BatchStructureError("there are no batches to verify with; give some")

    def certificate(self) -> Certificate:
        """What was found, without file, versions and platform."""
        trained = None
        if self._trained is not None:
            found = _agreement("as trained", "", self._trained_outputs)
            trained = replace(found, differing_inputs=self._trained_differ)
        return Certificate(
            self._inputs,
            tuple(tally.agreement() for tally in self._tallies),
            trained=trained,
            integer=tuple(sorted(self._reference.integer)),
            floating=tuple(sorted(self._reference.floating)),
        )


@dataclass
class _Tally:
    """One runtime over all batches."""

    runtime: Runtime
    reference: FollowingReference
    edges: Sequence[CodedEdge]
    outputs: OutputTally = field(default_factory=OutputTally)
    differing: int = 0
    unexplained: int = 0
    excused: int = 0
    strayed: float = 0.0
    movable: float = 0.0
    found: dict[str, EdgeAgreement] = field(default_factory=dict[str, EdgeAgreement])

    def add(self, values: Values, expected: _Expected) -> None:
        got = self.runtime.outputs(values)
        shown = self.runtime.observe(values)
        wanted = expected.seen.outputs
        for outputs in (got, shown.outputs):
            self._check_shapes(outputs, wanted)
        self.outputs.add(got, wanted)
        implied = self._compare_codes(values, shown.codes, expected.seen)
        count = expected.count
        same = same_inputs(got, wanted, count)
        followed = same_inputs(shown.outputs, implied, count)
        seen = same_inputs(got, shown.outputs, count)
        explained = same | expected.near | seen
        self._excuse(followed & explained & ~same & ~seen, got, expected)
        self.differing += int((~same).sum())
        self.unexplained += int((~(followed & explained)).sum())

    def _excuse(
        self, excused: Tensor, got: Sequence[Tensor], expected: _Expected
    ) -> None:
        """Note inputs that other kernels than those that show codes may have rounded.

        Nearly every input has a value near a half step somewhere. So what they strayed
        by, all together, is held against what roundings can move.
        """
        if not bool(excused.any()):
            return
        apart = input_distances(got, expected.seen.outputs, expected.count)
        self.excused += int(excused.sum())
        self.strayed += float(apart[excused].sum())
        self.movable += float(expected.movable[excused].sum())

    def agreement(self) -> RuntimeAgreement:
        strays = self.strayed > _MOST * self.movable
        unexplained = self.unexplained + (self.excused if strays else 0)
        found = _agreement(self.runtime.name, self.runtime.note, self.outputs)
        named = [self.found[e.name] for e in self.edges if e.name in self.found]
        return replace(
            found,
            differing_inputs=self.differing,
            unexplained_inputs=unexplained,
            edges=tuple(named),
        )

    def _compare_codes(
        self, values: Values, codes: Mapping[str, Tensor], own: Observation
    ) -> list[Tensor]:
        """Note how codes differ.

        Returns:
            The outputs that the runtime's codes imply.
        """
        apart = {name: _apart(codes[name], own.codes[name]) for name in codes}
        implied, departures = own.outputs, {}
        if any(worst for _, worst in apart.values()):
            implied, departures = self.reference.follow(values, codes)
        for name, (differing, worst) in apart.items():
            before = self.found.get(name, EdgeAgreement(name, 0, 0, 0, 0, 0))
            departing, rounding = departures.get(name, (0, 0))
            self.found[name] = EdgeAgreement(
                name,
                before.codes + own.codes[name].numel(),
                before.differing + differing,
                max(before.largest, worst),
                before.departing + departing,
                before.rounding + rounding,
            )
        return implied

    def _check_shapes(self, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        shapes, wished = ([tuple(t.shape) for t in ts] for ts in (got, wanted))
        if shapes != wished:
            raise FileFormatError(
                f"{self.runtime.name} returns tensors of shapes {shapes}, the model "
                f"{wished}: this is the file of another model, or of another export"
            )


def _apart(got: Tensor, own: Tensor) -> tuple[int, int]:
    """How many codes differ, and by how much at most."""
    if got.shape != own.shape:
        return own.numel(), 255
    distance = (got.long() - own.long()).abs()
    worst = int(distance.max()) if distance.numel() else 0
    return int((distance > 0).sum()), worst


def _agreement(name: str, note: str, outputs: OutputTally) -> RuntimeAgreement:
    return RuntimeAgreement(
        name,
        note,
        outputs.largest,
        outputs.mean,
        outputs.relative,
        outputs.positions,
        outputs.other_argmax,
        differing_inputs=0,
        unexplained_inputs=0,
    )
