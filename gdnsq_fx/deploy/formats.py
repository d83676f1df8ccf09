"""The formats of `gdnsq_fx.export`: what each is called, and who writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch.fx import GraphModule

from gdnsq_fx.deploy.atomic import written_whole
from gdnsq_fx.deploy.onnx import write_onnx
from gdnsq_fx.deploy.openvino import write_openvino
from gdnsq_fx.deploy.program import Example, write_program
from gdnsq_fx.deploy.qonnx import write_qonnx
from gdnsq_fx.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Format:
    """One format of files.

    Attributes:
        suffix: of the file.
        form: what the model has to be lowered to: ``"qdq"``, the deployable form, or
            ``"qonnx"`` (`LowerToQonnx`).
        write: writes a model in that form to a path in a folder of its own.
    """

    suffix: str
    form: Literal["qdq", "qonnx"]
    write: Callable[[GraphModule, Example, Path], None]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "onnx": Format(".onnx", "qdq", write_onnx),
        "torch": Format(".pt2", "qdq", write_program),
        "openvino": Format(".xml", "qdq", write_openvino),
        "qonnx": Format(".onnx", "qonnx", write_qonnx),
    }
)


def format_of(path: str | os.PathLike[str], name: str | None) -> Format:
    """The format of a name; of None, the first with the suffix of the path.

    Raises:
        ConfigError: there is no such format, or the suffix is that of another.
    """
    suffix = Path(path).suffix
    known = ", ".join(f"{key!r} ({one.suffix})" for key, one in FORMATS.items())
    if name is None:
        found = [one for one in FORMATS.values() if one.suffix == suffix]
        if not found:
            raise ConfigError(
                f"no format goes by the suffix {suffix!r} of {path}; known are {known}"
            )
        return found[0]
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}; known are {known}")
    if FORMATS[name].suffix != suffix:
        raise ConfigError(
            f"{path} is to be of format {name!r}; end it in {FORMATS[name].suffix}"
        )
    return FORMATS[name]


def write_as(
    kind: Format, model: GraphModule, example: Example, path: str | os.PathLike[str]
) -> int:
    """Write a model in the form of its format, whole or not at all.

    Returns:
        Size of all files in bytes.
    """
    with written_whole(path) as written:
        kind.write(model, example, written)
        return sum(file.stat().st_size for file in written.parent.iterdir())
