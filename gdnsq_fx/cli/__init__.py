"""The command line ``gdnsq-fx``: demo, report, export, verify, bench."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gdnsq_fx.cli.parser import command_parser
from gdnsq_fx.errors import GdnsqError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0 done, 1 failed (of ``verify`` also: a runtime parts), 2 wrong usage.
    """
    parser = command_parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 2
    try:
        status = given.run(given)
    except (GdnsqError, OSError) as error:
        print(f"gdnsq-fx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gdnsq-fx: stopped", file=sys.stderr)
        return 130
    return status or 0
