"""Which line of the model's own code is running."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import NamedTuple

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
# What stands between a model's ``len(x)`` and the recorder.
_BETWEEN = (_OURS, f"{_TORCH}_tensor.py", f"{_TORCH}overrides.py")


class Line(NamedTuple):
    """A line of source code."""

    file: str
    number: int
    function: str

    @property
    def trace(self) -> str:
        """As in a traceback, which is what `torch.fx.Node.stack_trace` holds."""
        return f'  File "{self.file}", line {self.number}, in {self.function}'

    @property
    def short(self) -> str:
        """``file.py:line``."""
        return f"{os.path.basename(self.file)}:{self.number}" if self.file else ""


def calling_line() -> Line:
    """The innermost line that lies neither in torch nor in the tracer."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _OURS, "<")):
            return Line(file, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return Line("", 0, "")


def in_torch() -> bool:
    """Whether code of torch itself asks, such as the checks of ``nn.LSTM``."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_TORCH)


def is_ours(frame: FrameType) -> bool:
    """Whether a frame runs code of the recorder."""
    return frame.f_code.co_filename.startswith(_OURS)


def is_torch(frame: FrameType) -> bool:
    """Whether a frame runs code of torch."""
    return frame.f_code.co_filename.startswith(_TORCH)
