"""The results of a sweep as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import median

from cases import Case
from checks import CHECKS
from result import Result
from tabulate import tabulate

Results = dict[str, list[Result]]


def markdown(
    cases: Sequence[Case], results: Results, checks: Sequence[str] = tuple(CHECKS)
) -> str:
    """A table by library, then every miss with its cause, then what is left out."""
    grouped = [list(group) for _, group in groupby(cases, lambda case: case.library)]
    counted = [name for name in checks if name != "macs"]
    rows = [_row(group, results, counted) for group in grouped]
    headers = ("library", "cases", "families", *counted, "median MACs", "seconds")
    parts = [
        tabulate(rows, headers, tablefmt="github"),
        "Passed / applicable. MACs: share of multiply-accumulates that are quantized.",
        _listed("Misses", _with_status(results, "failed")),
        _listed("Not applicable", _with_status(results, "not applicable")),
        _listed("Quantized in part", _partly(results)),
    ]
    return "\n\n".join(parts) + "\n"


def _row(cases: Sequence[Case], results: Results, counted: Sequence[str]) -> list[str]:
    found = [result for case in cases for result in results[case.name]]
    shares = [r.value for r in found if r.check == "macs" and r.value is not None]
    return [
        cases[0].library,
        str(len(cases)),
        str(len({case.family for case in cases})),
        *(_share(found, name) for name in counted),
        f"{median(shares):.1%}" if shares else "-",
        f"{sum(r.seconds for r in found):.0f}",
    ]


def _share(results: Sequence[Result], check: str) -> str:
    counts = Counter(r.status for r in results if r.check == check)
    return f"{counts['ok']}/{counts.total() - counts['not applicable']}"


def _with_status(results: Results, status: str) -> Iterator[str]:
    for name, found in results.items():
        for result in found:
            if result.status == status:
                yield f"`{name}` {result.check}: {result.detail}"


def _partly(results: Results) -> Iterator[str]:
    for name, found in results.items():
        for result in found:
            if result.check == "macs" and result.value is not None and result.value < 1:
                yield f"`{name}` {result.value:.1%}: {result.detail}"


def _listed(title: str, lines: Iterator[str]) -> str:
    every = [f"* {line}" for line in lines]
    return "\n".join([f"## {title} ({len(every)})", "", *(every or ["None."])])
