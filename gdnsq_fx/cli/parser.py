"""Commands and options."""

from __future__ import annotations

import argparse
from pathlib import Path

from gdnsq_fx import __version__
from gdnsq_fx.cli.arguments import bits, model_name, not_negative, positive
from gdnsq_fx.cli.commands import Commands, add_input
from gdnsq_fx.cli.deployment_parser import add_deployment

_REPORT = (
    "Prepare a model for a few bits without training it, and show where that costs "
    "information. Prints the report; --html and --json write it as well."
)
_DATA = (
    "a folder of images (one subfolder for each class, or flat), resized to the "
    "height and width of --input; three channels are normalized as for ImageNet "
    "(mean 0.485 0.456 0.406, deviation 0.229 0.224 0.225), one channel stays grey "
    "in 0..1. Or an .npz file: its array x, or else its first, used as it is. "
    "Without it: random numbers, which say little about real data"
)


def command_parser() -> argparse.ArgumentParser:
    """The parser; each command sets ``run``, a function of what it parsed."""
    parser = argparse.ArgumentParser(
        prog="gdnsq-fx", description="Quantize PyTorch models to a bit budget."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    _add_demo(commands)
    _add_report(commands)
    add_deployment(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole way on scikit-learn's handwritten digits",
        description="Train a small network on scikit-learn's handwritten digits, show "
        "its bottlenecks, fine-tune it to a few bits, convert, check and save it.",
    )
    demo.set_defaults(run=_demo)
    add = demo.add_argument
    add(
        "--bits",
        type=bits,
        default=2,
        help="of weights and activations (default %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("gdnsq-demo"),
        help="folder for the files (default %(default)s)",
    )
    add(
        "--steps",
        type=positive,
        default=1500,
        help="of fine-tuning (default %(default)s)",
    )
    add("--seed", type=int, default=0, help="default %(default)s")


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="where a model loses information at a few bits",
        description=_REPORT,
    )
    report.set_defaults(run=_report)
    add = report.add_argument
    add(
        "model",
        type=model_name,
        help="torchvision:NAME, timm:NAME, or MODULE:CALLABLE, which is called without "
        "arguments and returns the model; the current folder is searched first",
    )
    add_input(report)
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="safetensors file whose keys are exactly those of the model; without it "
        "models of torchvision and timm have random weights",
    )
    add("--bits", type=bits, default=4, help="default %(default)s")
    add("--weight-bits", type=bits, help="of weights, instead of --bits")
    add("--act-bits", type=bits, help="of activations, instead of --bits")
    add("--data", type=Path, metavar="PATH", help=_DATA)
    add("--samples", type=positive, default=64, help="to read (default %(default)s)")
    add("--batch", type=positive, default=16, help="samples at once (%(default)s)")
    add(
        "--confirm",
        type=not_negative,
        default=0,
        metavar="K",
        help="measure the divergence of the K worst edges as well",
    )
    add(
        "--curvature",
        choices=("softmax", "identity"),
        default="softmax",
        help="softmax where the outputs are logits, identity for regression",
    )
    add("--html", type=Path, metavar="FILE", help="write a page with drawings")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--seed", type=int, default=0, help="of all that is random (%(default)s)")


def _demo(given: argparse.Namespace) -> None:
    # Imported late: it needs the extra "demo".
    from gdnsq_fx.demo.run import run_demo

    run_demo(given.bits, given.out, given.seed, given.steps)


def _report(given: argparse.Namespace) -> None:
    # Imported late: usage errors and --help need no torch.
    from gdnsq_fx.cli.report import run_report

    run_report(given)
