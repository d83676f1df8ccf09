"""What commands are added to: the type of what ``add_subparsers`` returns."""

from __future__ import annotations

from argparse import (
    ArgumentParser,
    _SubParsersAction,  # pyright: ignore[reportPrivateUsage]
)
from typing import TypeAlias

# As text: only for type checkers does the class take a parameter.
Commands: TypeAlias = "_SubParsersAction[ArgumentParser]"
