"""Options of ``export``, ``verify`` and ``bench``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gdnsq_fx.cli.arguments import dimension, model_name, positive
from gdnsq_fx.cli.commands import Commands, add_input

_DATA = (
    "samples as for report: a folder of images or an .npz file; without it random "
    "numbers"
)
_VERIFY = (
    "Compare every runtime that is installed with exact integer arithmetic, on each "
    "sample: outputs, and the integer codes of every quantized activation. Exit status "
    "0 if all that differs is float rounding, 1 if a runtime parts."
)
_BENCH = (
    "Time ONNX files in every runtime that is installed, in turns within one run, on "
    "random inputs of the sizes that the files say."
)


def add_deployment(commands: Commands) -> None:
    """Add the three commands."""
    _add_export(commands)
    _add_verify(commands)
    _add_bench(commands)


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="a saved model as an ONNX file",
        description="Write a model that gdnsq_fx.save wrote as an ONNX file.",
    )
    export.set_defaults(run=_export)
    _add_model(export)
    export.add_argument("file", type=Path, help="to write: out.onnx")
    export.add_argument("--json", type=Path, metavar="FILE", help="write its size")


def _add_verify(commands: Commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="whether runtimes compute what was trained",
        description=_VERIFY,
    )
    verify.set_defaults(run=_verify)
    _add_model(verify)
    add = verify.add_argument
    # Python before 3.12 takes no optional positional argument behind options.
    add("--file", type=Path, metavar="FILE", help="that export wrote of it")
    add("--samples", type=positive, default=64, help="to compare (default %(default)s)")
    add("--batch", type=positive, default=16, help="samples at once (%(default)s)")
    add(
        "--runtime",
        action="append",
        metavar="NAME",
        help="torch, inductor, onnxruntime or openvino; may be given several times "
        "(default: all that are installed)",
    )
    add("--json", type=Path, metavar="FILE", help="write the certificate")


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench", help="latency and size of ONNX files", description=_BENCH
    )
    bench.set_defaults(run=_bench)
    add = bench.add_argument
    add(
        "files", type=Path, nargs="+", metavar="file", help="the first is the yardstick"
    )
    add("--batch", type=positive, default=1, help="samples (default %(default)s)")
    add(
        "--dim",
        type=dimension,
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="size of any other dimension that the files leave open",
    )
    add("--rounds", type=positive, default=50, help="of turns (default %(default)s)")
    add("--threads", type=positive, default=1, help="default %(default)s")
    add("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures")


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "model",
        type=model_name,
        help="torchvision:NAME, timm:NAME, or MODULE:CALLABLE, as for report",
    )
    add_input(command)
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="that gdnsq_fx.save wrote",
    )
    add("--data", type=Path, metavar="PATH", help=_DATA)
    add("--seed", type=int, default=0, help="of all that is random (%(default)s)")


# Imported late: usage errors and --help need no torch.


def _export(given: argparse.Namespace) -> None:
    from gdnsq_fx.cli.export import run_export

    run_export(given)


def _verify(given: argparse.Namespace) -> int:
    from gdnsq_fx.cli.verify import run_verify

    return run_verify(given)


def _bench(given: argparse.Namespace) -> None:
    from gdnsq_fx.cli.bench import run_bench

    run_bench(given)
