"""The command line: ``gdnsq-fx demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gdnsq_fx import __version__
from gdnsq_fx.errors import GdnsqError
from gdnsq_fx.spec import MAX_BITS, MIN_BITS


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 2
    try:
        _demo(given)
    except (GdnsqError, OSError) as error:
        print(f"gdnsq-fx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gdnsq-fx: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gdnsq-fx", description="Quantize PyTorch models to a bit budget."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="the whole way on scikit-learn's handwritten digits",
        description="Train a small network on scikit-learn's handwritten digits, show "
        "its bottlenecks, fine-tune it to a few bits, convert, check and save it.",
    )
    demo.add_argument(
        "--bits",
        type=_bits,
        default=2,
        help="of weights and activations (default %(default)s)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("gdnsq-demo"),
        help="folder for the files (default %(default)s)",
    )
    demo.add_argument(
        "--steps",
        type=_positive,
        default=1500,
        help="of fine-tuning (default %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser


def _demo(given: argparse.Namespace) -> None:
    # Imported late: it needs the extra "demo".
    from gdnsq_fx.demo.run import run_demo

    run_demo(given.bits, given.out, given.seed, given.steps)


def _bits(text: str) -> int:
    value = _positive(text)
    if not MIN_BITS <= value <= MAX_BITS:
        raise argparse.ArgumentTypeError(f"a number from {MIN_BITS} to {MAX_BITS}")
    return value


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {text!r}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
