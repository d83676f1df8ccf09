"""What a graph keeps as it was on the example input, and whose code looked at it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from gdnsq_fx.capture.data_readers import Function, reader_above
from gdnsq_fx.capture.location import calling_line, in_torch


@dataclass(frozen=True)
class Specialization:
    """A value that the graph keeps as it was on the example input.

    Attributes:
        kind: ``branch`` (a comparison of sizes), ``number`` (a size made a plain
            number), ``data`` (a value read from a tensor) or ``argument``.
        value: what it was, as text.
        source: ``file.py:line`` of the model.
    """

    kind: str
    value: str
    source: str


class Specializations:
    """Notes that a recording takes on the way.

    Attributes:
        found: the values that were fixed.
        modules: paths of modules whose own code reads data.
        functions: functions that read the data among what was fixed.
    """

    def __init__(self) -> None:
        self.found: list[Specialization] = []
        self.modules: set[str] = set()
        self.functions: list[Function] = []
        self._from_data: set[Node] = set()

    def mark_from_data(self, node: Node) -> None:
        """Note that the number of a node hangs on what tensors hold."""
        self._from_data.add(node)

    def is_from_data(self, value: object) -> bool:
        """Whether a traced number hangs on what tensors hold."""
        return getattr(value, "node", None) in self._from_data

    def add(self, kind: str, value: object, source: object = None) -> None:
        """Note that the model's own code looked at a value; torch's does not count.

        Args:
            kind: as in `Specialization`.
            value: what it was.
            source: the traced number that it was made of, if any.
        """
        if in_torch():
            return
        if self.is_from_data(source):
            kind = "data"
        text = " ".join(str(value).split())
        short = text if len(text) <= 40 else text[:37] + "..."
        self.found.append(Specialization(kind, short, calling_line().short))
        function = reader_above() if kind == "data" else None
        if function is not None:
            self.functions.append(function)
