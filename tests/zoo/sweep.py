"""Check the library on every model of the zoo.

    python tests/zoo/sweep.py                                 # everything
    python tests/zoo/sweep.py --library timm --only '*vit*'   # some of it
    python tests/zoo/sweep.py --json results.json --out results.md
    python tests/zoo/sweep.py --export --json export.json     # as ONNX files instead
    python tests/zoo/sweep.py --export --families             # one model of each family

Prints a line for each model. Each runs in a process of its own, so that a crash or a
model without end costs one case. With ``--json`` results are kept as they come, and
models whose results are there already are not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from cases import LIBRARIES, Case, Library, all_cases, is_installed
from checks import CHECKS, Check, Subject, run_case
from export_checks import EXPORT_CHECKS, ExportSubject
from result import Result
from table import markdown

SECONDS = 180.0
GIBIBYTES = 12.0
Results = dict[str, list[Result]]
Plan = tuple[dict[str, Check], type[Subject]]
_ALL: Plan = (CHECKS, Subject)
_EXPORT: Plan = (EXPORT_CHECKS, ExportSubject)


def main() -> None:
    """The command line."""
    options = _options()
    results = _read(options.json)
    plan = _EXPORT if options.export else _ALL
    found = list(_chosen(options.library or LIBRARIES, options.only))
    if options.families:
        found = list({(c.library, c.family): c for c in reversed(found)}.values())[::-1]
    waiting = [case for case in found if case.name not in results]
    for number, case in enumerate(waiting, 1):
        results[case.name] = run_isolated(case, options.seconds, options.gib, plan)
        print(
            f"[{number:3}/{len(waiting)}] {_line(case, results[case.name])}", flush=True
        )
        _write(options.json, results)
    text = markdown(found, {c.name: results[c.name] for c in found}, list(plan[0]))
    print(text) if options.out is None else options.out.write_text(text, "utf-8")


def run_isolated(
    case: Case, seconds: float, gib: float, plan: Plan = _ALL
) -> list[Result]:
    """All checks of a case in a process of its own.

    Checks that the process did not live to see are failed, with the cause.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(case, sender, gib, plan), daemon=True)
    started = time.monotonic()
    process.start()
    sender.close()
    results, cause = [], f"no result within {seconds:.0f} s"
    try:
        while receiver.poll(max(started + seconds - time.monotonic(), 0.0)):
            results.append(receiver.recv())
    except EOFError:
        process.join(1.0)
        cause = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return [*results, *_missing(results, cause, plan)]


def _work(case: Case, sender: Connection, gib: float, plan: Plan) -> None:
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for result in run_case(case, *plan):
        sender.send(result)
    sender.close()


def _missing(results: list[Result], cause: str, plan: Plan) -> Iterator[Result]:
    for place, name in enumerate(list(plan[0])[len(results) :]):
        yield Result(name, "blocked" if place else "failed", detail=cause)


def _chosen(libraries: Iterable[Library], pattern: str) -> Iterator[Case]:
    for library in libraries:
        if not is_installed(library):
            print(f"{library} is not installed: its models are left out")
            continue
        names = (pattern, f"{library}/{pattern}")
        for case in all_cases(library):
            if any(fnmatch.fnmatch(case.name, name) for name in names):
                yield case


def _line(case: Case, results: list[Result]) -> str:
    marks = {"ok": "ok", "failed": "FAILED", "not applicable": "n/a", "blocked": "-"}
    shown = " ".join(f"{r.check} {marks[r.status]}" for r in results)
    return f"{case.name:44} {shown} {sum(r.seconds for r in results):6.1f} s"


def _read(path: Path | None) -> Results:
    if path is None or not path.exists():
        return {}
    stored = json.loads(path.read_text("utf-8"))
    return {name: [Result(**r) for r in found] for name, found in stored.items()}


def _write(path: Path | None, results: Results) -> None:
    if path is None:
        return
    stored = {name: [asdict(r) for r in found] for name, found in results.items()}
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(stored, indent=1), "utf-8")
    beside.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", action="append", choices=LIBRARIES)
    parser.add_argument("--only", default="*", help="pattern on names of cases")
    parser.add_argument("--families", action="store_true", help="first of each family")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--export", action="store_true", help="check ONNX files")
    parser.add_argument("--json", type=Path, help="keep results here, and go on")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each case")
    parser.add_argument("--gib", type=float, default=GIBIBYTES, help="memory limit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
