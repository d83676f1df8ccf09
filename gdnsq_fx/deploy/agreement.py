"""How far one runtime, or one file, agrees with the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OUTPUTS = "output"


@dataclass(frozen=True)
class EdgeAgreement:
    """One quantized activation in one runtime, over all inputs.

    Attributes:
        name: of the edge.
        codes: how many were compared.
        differing: from those of the reference on its own.
        largest: of these differences, in codes.
        departing: from what the reference makes of this runtime's own codes before;
            the rest follows from edges further up.
        rounding: of those departing, by one step where the value before lies within
            float rounding of a half step.
    """

    name: str
    codes: int
    differing: int
    largest: int
    departing: int
    rounding: int

    @property
    def wrong(self) -> int:
        """Codes that no rounding explains."""
        return self.departing - self.rounding


@dataclass(frozen=True)
class RuntimeAgreement:
    """One runtime against the reference executor.

    Attributes:
        name, note: of the runtime.
        max_difference, mean_difference: of outputs, in their units.
        relative_difference: the largest as a share of the range of the output.
        positions: in outputs that have a likeliest class.
        other_argmax: those of them with another likeliest class.
        differing_inputs: inputs whose outputs differ by more than float rounding.
        unexplained_inputs: those of them where no value on the way lies within float
            rounding of a half step (or all, where together they lie further off than
            twice what such roundings can move), and those whose outputs do not follow
            from the codes that the runtime shows.
        edges: in the order of the graph; empty where codes cannot be seen.
    """

    name: str
    note: str
    max_difference: float
    mean_difference: float
    relative_difference: float
    positions: int
    other_argmax: int
    differing_inputs: int
    unexplained_inputs: int
    edges: tuple[EdgeAgreement, ...] = ()

    @property
    def codes(self) -> int:
        """Codes compared."""
        return sum(edge.codes for edge in self.edges)

    @property
    def differing(self) -> int:
        """Codes that differ from those of the reference."""
        return sum(edge.differing for edge in self.edges)

    @property
    def rounding(self) -> int:
        """Departures by float rounding."""
        return sum(edge.rounding for edge in self.edges)

    @property
    def wrong(self) -> int:
        """Departures that no rounding explains."""
        return sum(edge.wrong for edge in self.edges)

    @property
    def largest(self) -> int:
        """Largest difference in codes."""
        return max((edge.largest for edge in self.edges), default=0)

    @property
    def first_edge(self) -> str | None:
        """The first edge where a code differs, or ``output``; None where none does."""
        found = (edge.name for edge in self.edges if edge.differing)
        return next(found, OUTPUTS if self.differing_inputs else None)

    @property
    def first_wrong(self) -> str | None:
        """The first edge where rounding does not explain it, or ``output``, or None."""
        found = (edge.name for edge in self.edges if edge.wrong)
        return next(found, OUTPUTS if self.unexplained_inputs else None)

    @property
    def ok(self) -> bool:
        """Whether all that differs is float rounding."""
        return self.first_wrong is None

    def to_dict(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        derived = ("codes", "differing", "rounding", "wrong", "largest", "ok")
        names = (*derived, "first_edge", "first_wrong")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class WeightAgreement:
    """Codes of weights in a file against those of the model.

    Attributes:
        codes: how many were compared.
        differing: edge -> how many of its codes differ, in the order of the graph.
        unseen: edges whose codes the file holds in another form, or not.
    """

    codes: int
    differing: Mapping[str, int] = field(default_factory=dict[str, int])
    unseen: tuple[str, ...] = ()
