"""The header of a file: five metadata strings that say what its tensors mean.

``format``, ``schema_version``, ``packed`` (JSON, ``{name: {"bits": int, "shape":
[int, ...]}}``), ``description`` (JSON object of the caller) and ``checksum``: SHA-256
over the former four and the name, dtype and shape of every stored tensor. The checksum
covers everything but the tensors' values, so that damage to a header is an error and
never a tensor of another name. A description is compressed where that is shorter.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, cast

import torch

from gdnsq_fx.deploy.packing import checked_numel
from gdnsq_fx.errors import ConfigError, FileFormatError

FORMAT = "gdnsq_fx"
SCHEMA_VERSION = 2
_READABLE = ("1", "2")  # 2: descriptions may hold the graph

_FIELDS = ("format", "schema_version", "packed", "description", "checksum")
REMEDY = "copy the file again, or write it anew"
# Of one field, in characters: a small file must not fill the memory.
MOST_TEXT = 1 << 26
DTYPE_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
Layout = dict[str, tuple[str, list[int]]]
"""Stored name -> (safetensors dtype code, shape)."""


def encode_header(
    packed: Mapping[str, Mapping[str, object]],
    description: Mapping[str, object],
    layout: Layout,
) -> dict[str, str]:
    """Return the metadata of a file.

    Args:
        packed: name -> ``{"bits": bits, "shape": shape before packing}``.
        description: object of JSON values with string keys.
        layout: name -> dtype code and shape, as stored.

    Raises:
        ConfigError: ``description`` holds what JSON cannot represent.
    """
    fields = {
        "format": FORMAT,
        "schema_version": str(SCHEMA_VERSION),
        "packed": json.dumps(packed),
        "description": _shorter(_description_json(description)),
    }
    return {**fields, "checksum": _checksum(fields, layout)}


def decode_header(
    fields: Mapping[str, str], layout: Layout
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the packed table and the description, and vouch for ``layout``.

    The entries of the table are JSON values of any kind: the caller checks them.

    Raises:
        ConfigError: ``layout`` has a shape that no tensor can have.
        FileFormatError: the metadata are foreign, of another schema, or damaged.
    """
    _check_fields(fields)
    description = _json_object(fields, "description")
    packed = _json_object(fields, "packed")
    if unknown := sorted(packed.keys() - layout.keys()):
        raise FileFormatError(f"packed tensors {unknown} are missing; {REMEDY}")
    for name, (code, shape) in layout.items():
        if code not in DTYPE_CODES.values():
            raise FileFormatError(f"tensor {name!r} has type {code}; {REMEDY}")
        checked_numel(shape)
    if _checksum(fields, layout) != fields["checksum"]:
        raise FileFormatError(f"its header fails its checksum; {REMEDY}")
    return packed, description


def plain_text(stored: str) -> str:
    """The JSON of a field, which may be compressed: zlib in base 85, begins with c.

    Raises:
        ValueError: neither, or more text than any file of ours has.
    """
    if not stored.startswith("c"):
        return stored
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(base64.b85decode(stored), MOST_TEXT)
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("cut off, or too long")
    return text.decode()


def _shorter(text: str) -> str:
    """The text, compressed where that takes less room."""
    packed = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    return packed if len(packed) < len(text) else text


def _description_json(description: Mapping[str, object]) -> str:
    try:
        text = json.dumps(dict(description), allow_nan=False)
        _check_keys(description)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot store the description: {error}; use dicts with string keys, lists,"
            " strings, finite numbers, booleans and None only"
        ) from error
    return text


def _check_keys(value: Any) -> None:
    """Refuse what ``json.dumps`` silently renames: the key of ``{1: 2}`` to ``"1"``."""
    if isinstance(value, Mapping):
        for key, item in cast(Mapping[Any, Any], value).items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is not a string")
            _check_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in cast("list[Any] | tuple[Any, ...]", value):
            _check_keys(item)


def _checksum(fields: Mapping[str, str], layout: Layout) -> str:
    covered = [[fields[key] for key in _FIELDS if key != "checksum"], layout]
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _check_fields(fields: Mapping[str, str]) -> None:
    if fields.get("format") != FORMAT:
        raise FileFormatError(
            f"a safetensors file, but {FORMAT} did not write it; load a checkpoint into"
            " the model with safetensors.torch.load_file instead"
        )
    version = fields.get("schema_version", "")
    if version not in _READABLE:
        newer = version.isdecimal() and int(version[:9]) > SCHEMA_VERSION
        remedy = f"install a newer {FORMAT}" if newer else REMEDY
        raise FileFormatError(
            f"its schema version is {version[:20]!r}, but this {FORMAT} reads"
            f" {' and '.join(_READABLE)}; {remedy}"
        )
    if missing := [key for key in _FIELDS if key not in fields]:
        raise FileFormatError(f"its metadata lack {missing}; {REMEDY}")


def _json_object(fields: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        text = plain_text(fields[key])
        value: object = json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"its {key} is no JSON: {error}; {REMEDY}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"its {key} is no JSON object; {REMEDY}")
    return cast(dict[str, Any], value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two entries of one name readers would take different ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
