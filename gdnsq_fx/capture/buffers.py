"""Buffers that a forward replaced by new tensors are written back by the graph."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gdnsq_fx.capture.helpers import ReplacedBuffer, add_helper
from gdnsq_fx.capture.ledger import Ledger
from gdnsq_fx.capture.values import Untraceable


def write_back_buffers(
    root: nn.Module, before: Mapping[str, Tensor], ledger: Ledger
) -> None:
    """Record that each replaced buffer has a new value.

    Args:
        root: the model, after its forward.
        before: its buffers before, by name.
        ledger: what was recorded.

    Raises:
        Untraceable: a buffer of the root itself has another shape now; the captured
            model takes the root's place, so nothing could replace it there.
    """
    for path, module in list(root.named_modules()):
        for name, value in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if value is before.get(full) or not ledger.knows(value):
                continue
            if _same_form(before.get(full), value):
                get = ledger.attribute(full)
                ledger.call_node("call_method", "copy_", (get, value), {})
            elif module is root:
                raise Untraceable(f"replaces the buffer {name} by one of another shape")
            else:
                helper = add_helper(root, f"new_{full}", ReplacedBuffer(module, name))
                ledger.call_node("call_module", helper, (value,), {})


def _same_form(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one.shape == other.shape and one.dtype == other.dtype
