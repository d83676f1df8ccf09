"""Make one node of what was recorded of a call: a module or function stays closed."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from gdnsq_fx.capture.ledger import Mark
from gdnsq_fx.capture.recorder import Recorder
from gdnsq_fx.capture.values import Untraceable
from gdnsq_fx.opinfo import OpTable


class Call(NamedTuple):
    """What one node calls."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Start(NamedTuple):
    """The state of the recording when a call began.

    Attributes:
        mark: of the ledger.
        notes: how many specializations there were.
        versions: of the tensors among its arguments.
    """

    mark: Mark
    notes: int
    versions: dict[int, int]


class Closing:
    """Closes calls of one recording.

    Args:
        root: the model.
        recorder: wrote down what the calls did.
        table: which operations must not be hidden in a node.
    """

    def __init__(self, root: nn.Module, recorder: Recorder, table: OpTable) -> None:
        self._root = root
        self._recorder = recorder
        self._table = table

    def start(self, arguments: Any) -> Start:
        """What `close` needs to know; call before anything is recorded."""
        ledger = self._recorder.ledger
        notes = len(self._recorder.specialized.found)
        return Start(ledger.mark(), notes, ledger.versions(arguments))

    def is_possible(self, mark: Mark, output: Any) -> bool:
        """Whether there is nothing to quantize in what was recorded since."""
        if not _is_tensors(output):
            return False
        for node in self._recorder.ledger.nodes_since(mark):
            opened = node.op != "call_module"
            op = self._table.find(node, self._root) if opened else None
            if op is not None and op.is_compute:
                return False
        return True

    def close(self, call: Call, start: Start, output: Any) -> Any:
        """One node for what was recorded and noted since, if a graph can hold it."""
        ledger = self._recorder.ledger
        try:
            ledger.argument((call.args, call.kwargs))
        except Untraceable:
            return output
        ledger.undo(start.mark)
        del self._recorder.specialized.found[start.notes :]
        return ledger.track(output, ledger.call_node(*call), start.versions)


def _is_tensors(output: Any) -> bool:
    if isinstance(output, tuple | list):
        items = cast(tuple[Any, ...], output)
        return type(output) in (tuple, list) and all(map(_is_tensors, items))
    return isinstance(output, Tensor)
