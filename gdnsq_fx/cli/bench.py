"""``gdnsq-fx bench``: latency and size of ONNX files."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict

from tabulate import tabulate

from gdnsq_fx.cli.surroundings import check_writable
from gdnsq_fx.deploy.installed import package_versions, platform_facts
from gdnsq_fx.deploy.latency import Latency, measure_latency


def run_bench(given: Namespace) -> None:
    """Print the table, and write its figures.

    Raises:
        GdnsqError, OSError: as they say.
    """
    check_writable(given.json)
    found, absent = measure_latency(
        given.files,
        batch=given.batch,
        sizes=dict(given.dim),
        rounds=given.rounds,
        threads=given.threads,
        seed=given.seed,
    )
    print(_table(found))
    print(
        f"\nmedian of {given.rounds} rounds in turns, tenth to ninetieth percentile; "
        f"batch {given.batch},\nthreads {given.threads}; OpenVINO in float32 between "
        "int8 layers. speed: against the first file there."
    )
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    if given.json is not None:
        facts = {
            "latencies": [asdict(one) for one in found],
            "options": {k: getattr(given, k) for k in ("batch", "rounds", "threads")},
            "absent": absent,
            "versions": package_versions(),
            "platform": platform_facts(),
        }
        given.json.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def _table(found: list[Latency]) -> str:
    first: dict[str, float] = {}
    rows: list[list[str]] = []
    for one in found:
        base = first.setdefault(one.runtime, one.median_ms)
        rows.append(
            [
                one.file,
                f"{one.bytes:,}",
                one.runtime,
                f"{one.median_ms:.3f}",
                f"{one.low_ms:.3f} to {one.high_ms:.3f}",
                f"{base / one.median_ms:.2f}x",
            ]
        )
    headers = ("file", "bytes", "runtime", "ms", "range", "speed")
    align = ("left", "right", "left", "right", "right", "right")
    return tabulate(
        rows, headers, tablefmt="simple", colalign=align, disable_numparse=True
    )
