"""What commands share: what they are added to, and the option ``--input``."""

from __future__ import annotations

from argparse import (
    ArgumentParser,
    _SubParsersAction,  # pyright: ignore[reportPrivateUsage]
)
from typing import TypeAlias

from gdnsq_fx.cli.arguments import shape

# What ``add_subparsers`` returns. As text: the class takes a parameter for type
# checkers only.
Commands: TypeAlias = "_SubParsersAction[ArgumentParser]"


def add_input(command: ArgumentParser) -> None:
    """Add the shape of the example input, which a model is captured with."""
    command.add_argument(
        "--input",
        type=shape,
        required=True,
        metavar="SHAPE",
        help="shape of the example input, batch size first: 1,3,224,224",
    )
