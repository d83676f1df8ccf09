"""``gdnsq-fx export``: a saved model as an ONNX file."""

from __future__ import annotations

import json
from argparse import Namespace

from gdnsq_fx import deployment
from gdnsq_fx.cli.saved import read_saved
from gdnsq_fx.cli.surroundings import check_writable, current_folder_first
from gdnsq_fx.demo.seeding import seeded
from gdnsq_fx.errors import ConfigError


def run_export(given: Namespace) -> None:
    """Write the file, and print its size.

    Raises:
        GdnsqError, OSError: as they say.
    """
    for path in (given.file, given.json):
        check_writable(path)
    if given.file.suffix.lower() != ".onnx":
        raise ConfigError(f"{given.file} must end in .onnx, the format that is written")
    with current_folder_first(), seeded(given.seed):
        imodel, samples = read_saved(given, given.input[0])
        size = deployment.export(imodel, given.file, samples)
    saved = given.checkpoint.stat().st_size
    print(f"{given.file}: {size:,} bytes ({given.checkpoint}: {saved:,} bytes)")
    if given.json is not None:
        facts = {"file": str(given.file), "bytes": size, "checkpoint_bytes": saved}
        given.json.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
