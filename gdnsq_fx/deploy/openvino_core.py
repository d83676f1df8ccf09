"""The one OpenVINO core of a process."""

from __future__ import annotations

from functools import cache
from typing import Any

from gdnsq_fx.extras import required

OPENVINO_EXTRA = "gdnsq-fx[openvino]"


def openvino_core() -> Any:
    """An ``openvino.Core`` that stays until the process ends.

    Where the CPU has AMX, the plugin of a core (2026.4) gives the thread that loads it
    a stack for signals, and takes it away from whichever thread drops the last
    reference: if that is another one, the next signal (SIGTERM, Ctrl-C) ends the
    process with a segmentation fault. A core that stays never does.

    Raises:
        MissingExtraError: openvino is not installed.
    """
    return _core(required("openvino", "running OpenVINO", OPENVINO_EXTRA))


@cache
def _core(openvino: Any) -> Any:
    return openvino.Core()
