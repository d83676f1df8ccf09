"""Which runtimes can be asked here, and on what they run."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.fx import GraphModule

from gdnsq_fx.deploy.agreement import WeightAgreement
from gdnsq_fx.deploy.edges import CodedEdge
from gdnsq_fx.deploy.file_runtimes import OnnxRuntime, OpenVino
from gdnsq_fx.deploy.file_weights import compare_weights
from gdnsq_fx.deploy.runtimes import InductorRuntime, Runtime, TorchRuntime
from gdnsq_fx.errors import CompilerError, ConfigError, MissingExtraError

GRAPH_RUNTIMES: dict[str, Callable[[GraphModule, Sequence[CodedEdge]], Runtime]] = {
    "torch": TorchRuntime,
    "inductor": InductorRuntime,
}
FILE_RUNTIMES: dict[str, dict[str, Callable[[Path, Sequence[CodedEdge]], Runtime]]] = {
    ".onnx": {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
}
_PACKAGES = (
    "gdnsq-fx", "torch", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino",
    "numpy",
)  # fmt: skip


def open_runtimes(
    model: GraphModule,
    edges: Sequence[CodedEdge],
    path: Path | None,
    wanted: Sequence[str] | None,
) -> tuple[list[Runtime], dict[str, str]]:
    """The runtimes for a model and its file.

    Args:
        model: in deployable form.
        edges: its quantized activations.
        path: of a file that it was exported to, or None.
        wanted: names; None: all that are installed.

    Returns:
        Runtimes, and name -> reason of those that are not installed.

    Raises:
        ConfigError: an unknown name or suffix, or a runtime of files without a file.
        MissingExtraError, CompilerError: a runtime that was named is not installed.
        FileNotFoundError: there is no file.
        FileFormatError: a runtime cannot load the file.
    """
    makers: dict[str, Callable[[], Runtime]] = {
        name: _bound(make, model, edges) for name, make in GRAPH_RUNTIMES.items()
    }
    if path is not None:
        for name, make in _of_file(path).items():
            makers[name] = _bound(make, path, edges)
    _check_names(wanted, makers)
    opened: list[Runtime] = []
    absent: dict[str, str] = {}
    for name, make in makers.items():
        if wanted is not None and name not in wanted:
            continue
        try:
            opened.append(make())
        except (MissingExtraError, CompilerError) as error:
            if wanted is not None:
                raise
            absent[name] = str(error).rpartition("; ")[2]
    return opened, absent


def package_versions() -> dict[str, str]:
    """Of every package that takes part and is installed."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def platform_facts() -> dict[str, str]:
    """The machine, as far as results can depend on it."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
    }


def file_facts(path: Path) -> dict[str, str | int]:
    """Name, bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {
        "name": path.name,
        "bytes": os.path.getsize(path),
        "sha256": digest.hexdigest(),
    }


def file_weights(model: GraphModule, path: Path) -> WeightAgreement | None:
    """Weights in a file against a model's; None where the file cannot be read here."""
    try:
        return compare_weights(model, path)
    except MissingExtraError:
        return None


def _of_file(path: Path) -> dict[str, Callable[[Path, Sequence[CodedEdge]], Runtime]]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    found = FILE_RUNTIMES.get(path.suffix.lower())
    if found is None:
        raise ConfigError(
            f"no runtime here reads {path.name}; give a file with the suffix "
            f"{' or '.join(FILE_RUNTIMES)}, as gdnsq_fx.export writes it"
        )
    return found


def _check_names(
    wanted: Sequence[str] | None, makers: dict[str, Callable[[], Runtime]]
) -> None:
    if wanted is not None and not wanted:
        raise ConfigError(f"no runtime is named; choose from {', '.join(makers)}")
    for name in wanted or ():
        if name not in makers:
            readers = {n for kinds in FILE_RUNTIMES.values() for n in kinds}
            cause = "needs a file" if name in readers else "is not known"
            raise ConfigError(
                f"the runtime {name!r} {cause}; choose from {', '.join(makers)}"
            )


def _bound(make: Callable[..., Runtime], *given: object) -> Callable[[], Runtime]:
    return lambda: make(*given)
