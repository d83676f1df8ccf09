"""``gdnsq-fx report``: from a model's name to its capacity report."""

from __future__ import annotations

from argparse import Namespace

from gdnsq_fx import api
from gdnsq_fx.cli.data import random_samples, read_samples
from gdnsq_fx.cli.models import LIBRARIES, build_model, load_weights
from gdnsq_fx.cli.surroundings import check_writable, current_folder_first, warn
from gdnsq_fx.demo.seeding import seeded
from gdnsq_fx.spec import QuantConfig


def run_report(given: Namespace) -> None:
    """Print the report of the model that the options describe, and write its files.

    Raises:
        GdnsqError, OSError: as they say.
    """
    for path in (given.html, given.json):
        check_writable(path)
    with current_folder_first(), seeded(given.seed):
        model = build_model(*given.model).eval()
        if given.weights is not None:
            load_weights(model, given.weights)
        elif given.model[0] in LIBRARIES:
            warn("no --weights: the model's weights are random")
        if given.data is not None:
            samples = read_samples(given.data, given.input, given.samples, given.seed)
        else:
            warn("no --data: random numbers, which say little about real data")
            samples = random_samples(given.input, given.samples)
        config = QuantConfig(
            weight_bits=given.weight_bits or given.bits,
            act_bits=given.act_bits or given.bits,
        )
        batches = samples.split(given.batch)
        qmodel = api.prepare(model, samples[: given.input[0]], config, batches)
        report = api.analyze(
            qmodel, batches, confirm=given.confirm, curvature=given.curvature
        )
    print(report)
    if given.json is not None:
        report.to_json(given.json)
    if given.html is not None:
        report.to_html(given.html)
