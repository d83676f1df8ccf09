"""What a check says of a case, and the ways in which it ends without a finding."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gdnsq_fx

Status = Literal["ok", "failed", "not applicable", "blocked"]
_PACKAGE = Path(gdnsq_fx.__file__).parent


@dataclass(frozen=True)
class Result:
    """One check of one case.

    Attributes:
        check: its name.
        status: ``blocked`` where an earlier check left nothing to check.
        value: what was measured: the worst difference, or a share of MACs.
        detail: the cause of a failure, the reason of what is not applicable, or facts.
        seconds: how long it took.
    """

    check: str
    status: Status
    value: float | None = None
    detail: str = ""
    seconds: float = 0.0


class CheckFailed(Exception):
    """A check found a difference; its message is the cause."""


class NotApplicable(Exception):
    """Eager itself cannot do what is checked; its message is the reason."""


class Blocked(Exception):
    """An earlier check left nothing to check."""


def brief(error: BaseException) -> str:
    """Type, message, and the last lines of the library and of all code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _PACKAGE in Path(f.filename).parents]
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in (*own[-1:], *frames[-1:])]
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text} [{', '.join(dict.fromkeys(places))}]"
