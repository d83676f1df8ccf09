"""Run a literal tuple of passes in order."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from gdnsq_fx.errors import GdnsqError, PassError

from ._base import Pass


def run_passes(graph_module: GraphModule, passes: Sequence[Pass]) -> GraphModule:
    """Apply each pass to the result of the one before.

    Raises:
        GdnsqError: what a pass raises on purpose goes through as it is.
        PassError: anything else, with the name of the pass (torch's own manager
            raises a bare Exception).
    """
    for one in passes:
        try:
            graph_module = one(graph_module).graph_module
        except GdnsqError:
            raise
        except Exception as error:
            raise PassError(f"{one.name} failed: {error}") from error
    return graph_module
