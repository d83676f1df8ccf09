"""``gdnsq-fx verify``: a saved model, and the file made of it, in every runtime."""

from __future__ import annotations

import sys
from argparse import Namespace

from gdnsq_fx import deployment
from gdnsq_fx.cli.saved import read_saved
from gdnsq_fx.cli.surroundings import check_writable, current_folder_first, warn
from gdnsq_fx.demo.seeding import seeded


def run_verify(given: Namespace) -> int:
    """Print the certificate; 0 where all runtimes agree, 1 where one parts.

    Raises:
        GdnsqError, OSError: as they say.
    """
    check_writable(given.json)
    with current_folder_first(), seeded(given.seed):
        if given.data is None:
            warn("no --data: random numbers, which reach other codes than real data")
        imodel, samples = read_saved(given, given.samples)
        certificate = deployment.verify(
            imodel,
            given.file,
            samples.split(given.batch),
            runtimes=given.runtime,
            progress=sys.stderr.isatty(),
        )
    print(certificate)
    if given.json is not None:
        certificate.to_json(given.json)
    return 0 if certificate.ok else 1
