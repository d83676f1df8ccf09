"""SIGTERM waits until a step is done and saved, then acts as it would have."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Termination:
    """Holds SIGTERM back inside a ``with`` block.

        with Termination() as termination:
            ...
            if termination.requested:
                save()
                termination.act()

    Outside the main thread, where Python allows no handlers, and where the handler is
    not Python's to put back, nothing is held back.
    """

    def __init__(self) -> None:
        self.requested = False
        self._installed = False

    def __enter__(self) -> Termination:
        self._previous = signal.getsignal(signal.SIGTERM)
        main = threading.current_thread() is threading.main_thread()
        if main and self._previous is not None:
            signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
            self._installed = False
        if self.requested:
            self.requested = False
            signal.raise_signal(signal.SIGTERM)

    def act(self) -> None:
        """Let the signal do what the previous handler does; returns if that does."""
        self.requested = False
        signal.signal(signal.SIGTERM, self._previous)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            if self._installed:
                signal.signal(signal.SIGTERM, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
