"""The certificate: what ran where, on how many inputs, and how far it agreed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gdnsq_fx.analysis.notation import quantity, shortened
from gdnsq_fx.deploy.agreement import RuntimeAgreement, WeightAgreement

_NAME = 24
_LEGEND = """
Against exact integer arithmetic. argmax: other likeliest classes; outputs: largest
difference, as a share of their range; codes: that differ; most: by how much; rounding:
codes off by one step where the value before lies within float rounding of a half step;
wrong: any other code that does not follow from the codes before it.
"""


@dataclass(frozen=True)
class Certificate:
    """Which runtimes compute what the model says; printed as a table.

    Attributes:
        inputs: how many were compared.
        runtimes: each against the reference executor.
        absent: runtime -> why it did not run.
        trained: the converted model before its levels moved to deployable grids,
            against the reference; None where the deployable form was given. It shows
            what the move costs and does not count for `ok`.
        weights: codes of weights in the file; None without a file, or without onnx.
        integer, floating: layers that the reference computed in integers and in
            floating point.
        file: ``name``, ``bytes`` and ``sha256`` of the file, empty without one.
        versions: of the packages.
        platform: of the machine.
    """

    inputs: int
    runtimes: tuple[RuntimeAgreement, ...]
    absent: Mapping[str, str] = field(default_factory=dict[str, str])
    trained: RuntimeAgreement | None = None
    weights: WeightAgreement | None = None
    integer: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    file: Mapping[str, str | int] = field(default_factory=dict[str, "str | int"])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    platform: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def ok(self) -> bool:
        """Whether all runtimes that ran agree up to float rounding, and all weights."""
        weights = self.weights is None or not self.weights.differing
        return weights and all(runtime.ok for runtime in self.runtimes)

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        return {
            "ok": self.ok,
            **{name: getattr(self, name) for name in ("inputs", "integer", "floating")},
            "runtimes": [runtime.to_dict() for runtime in self.runtimes],
            "absent": dict(self.absent),
            "trained": None if self.trained is None else self.trained.to_dict(),
            "weights": None if self.weights is None else asdict(self.weights),
            "file": dict(self.file),
            "versions": dict(self.versions),
            "platform": dict(self.platform),
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")

    def __str__(self) -> str:
        """At most 100 columns."""
        return "\n".join([_table(self), _LEGEND, *_facts(self), "", _verdict(self)])


def _table(certificate: Certificate) -> str:
    headers = (
        "runtime", "argmax", "outputs", "codes", "most", "rounding", "wrong",
        "first edge",
    )  # fmt: skip
    rows = [_row(runtime) for runtime in certificate.runtimes]
    if certificate.trained is not None:
        # Other levels have no codes to compare, and nowhere to part.
        rows.append([*_row(certificate.trained)[:-1], ""])
    return tabulate(
        rows,
        headers,
        tablefmt="simple",
        colalign=("left", *["right"] * 6, "left"),
        disable_numparse=True,
    )


def _row(runtime: RuntimeAgreement) -> list[str]:
    seen = bool(runtime.edges)
    return [
        runtime.name,
        f"{runtime.other_argmax:,}" if runtime.positions else "",
        f"{runtime.relative_difference:.1e}",
        f"{runtime.differing:,}" if seen else "not seen",
        str(runtime.largest) if seen else "",
        f"{runtime.rounding:,}" if seen else "",
        f"{runtime.wrong:,}" if seen else "",
        shortened(runtime.first_wrong or runtime.first_edge or "", _NAME),
    ]


def _facts(certificate: Certificate) -> list[str]:
    codes = max((runtime.codes for runtime in certificate.runtimes), default=0)
    edges = max((len(runtime.edges) for runtime in certificate.runtimes), default=0)
    rows = [
        ("inputs", f"{certificate.inputs:,}; {quantity(codes)} codes on {edges} edges"),
        (
            "reference",
            f"{len(certificate.integer)} layers in int64, {len(certificate.floating)} "
            "in floating point",
        ),
    ]
    if certificate.file:
        name, size, digest = (
            certificate.file[key] for key in ("name", "bytes", "sha256")
        )
        rows.append(("file", f"{shortened(str(name), 40)}, {size:,} bytes"))
        rows.append(("sha256", str(digest)))
    if certificate.weights is not None:
        rows.append(("weights", _weights(certificate.weights)))
    notes = [f"{r.name}: {r.note}" for r in certificate.runtimes if r.note]
    rows += [("set", note) for note in notes]
    rows += [("absent", f"{n}: {why}") for n, why in certificate.absent.items()]
    rows += [("versions", text) for text in _lines(certificate.versions)]
    rows += [("platform", text) for text in _lines(certificate.platform)]
    return [f"{name:<10} {shortened(text, 88)}" for name, text in rows]


def _lines(entries: Mapping[str, str]) -> list[str]:
    """``name text, ...``, broken before 88 columns."""
    lines: list[str] = []
    for part in (f"{name} {text}" for name, text in entries.items()):
        if lines and len(lines[-1]) + 2 + len(part) <= 88:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return lines


def _weights(weights: WeightAgreement) -> str:
    wrong = sum(weights.differing.values())
    unseen = (
        f", {len(weights.unseen)} weights in another form" if weights.unseen else ""
    )
    return f"{wrong:,} of {weights.codes:,} codes in the file differ{unseen}"


def _verdict(certificate: Certificate) -> str:
    if certificate.ok:
        names = ", ".join(runtime.name for runtime in certificate.runtimes)
        return f"agrees: {names or 'nothing ran'}"
    weights = certificate.weights.differing if certificate.weights is not None else {}
    lines = [
        f"PARTS: the file at {n} ({_counted(c, 'code')})" for n, c in weights.items()
    ]
    for one in certificate.runtimes:
        if one.ok:
            continue
        counted = [_counted(one.wrong, "code")] if one.wrong else []
        if one.unexplained_inputs:
            counted.append(f"outputs of {_counted(one.unexplained_inputs, 'input')}")
        lines.append(f"PARTS: {one.name} at {one.first_wrong} ({', '.join(counted)})")
    return "\n".join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")
