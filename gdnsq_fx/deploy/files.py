"""The file door: one safetensors file, codes bit-packed, the description as JSON.

``header.py`` says what the metadata hold. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from gdnsq_fx.deploy.header import (
    DTYPE_CODES,
    FORMAT,
    REMEDY,
    SCHEMA_VERSION,
    decode_header,
    encode_header,
)
from gdnsq_fx.deploy.packing import pack_bits, unpack_bits
from gdnsq_fx.errors import ConfigError, FileFormatError

__all__ = ["FORMAT", "SCHEMA_VERSION", "FileContents", "read_file", "write_file"]


@dataclass(frozen=True, eq=False)
class FileContents:
    """What a file holds, on the CPU, independent of the file from here on.

    Attributes:
        tensors: name -> tensor; packed ones are codes again, uint8 up to 8 bits and
            int32 above, in the shape they were written with.
        description: the JSON object that was written (tuples have become lists).
    """

    tensors: dict[str, Tensor]
    description: dict[str, object]


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, int],
    description: Mapping[str, object],
) -> int:
    """Write one file atomically: after a failure the old file stands, and no other.

    Args:
        path: file to write or replace; a symbolic link is followed.
        tensors: name -> dense tensor of any shape on any device.
        packed: name -> bits (1 to 16), for those of ``tensors`` that hold integer codes
            in ``0 .. 2**bits - 1`` and are to be stored bit-packed.
        description: object of JSON values with string keys.

    Returns:
        Size of the file in bytes.

    Raises:
        ConfigError: a tensor, a bit-width, a name or the description cannot be stored.
        FileFormatError: ``path`` is a device or a pipe.
        OSError: ``path`` is a directory, its folder is missing, or writing failed.
    """
    target = Path(os.path.realpath(path))
    _check_regular(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "no such folder; create it first", str(target.parent)
        )
    if unknown := sorted(packed.keys() - tensors.keys()):
        raise ConfigError(f"packed names {unknown} are not in tensors; add their codes")
    table = {
        name: {"bits": bits, "shape": list(tensors[name].shape)}
        for name, bits in packed.items()
    }
    stored = {
        name: _storable(name, tensor, packed.get(name))
        for name, tensor in tensors.items()
    }
    layout = {
        name: (DTYPE_CODES[tensor.dtype], list(tensor.shape))
        for name, tensor in stored.items()
    }
    fields = encode_header(table, description, layout)
    return _write_atomically(target, stored, fields)


def read_file(path: str | os.PathLike[str]) -> FileContents:
    """Read what ``write_file`` wrote; no content of a file leads to another error.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: ``path`` is a directory.
        FileFormatError: the file is foreign, truncated, damaged, or of a newer schema;
            the message names the path, the cause and the remedy.
    """
    source = Path(path)
    _check_regular(source)
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file; check the path", str(path))
    try:
        return _read(source)
    except (SafetensorError, ConfigError, FileFormatError) as error:
        cause = _diagnosis(source) if isinstance(error, SafetensorError) else ""
        raise FileFormatError(f"cannot read {path}: {cause}{error}") from error


def _check_regular(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "give the path of a file", str(path))
    if path.exists() and not path.is_file():
        # Reading a pipe would wait for ever; writing would replace a device node.
        raise FileFormatError(f"{path} is a device or a pipe; give a regular file")


def _storable(name: str, tensor: Tensor, bits: int | None) -> Tensor:
    """Return ``tensor``, packed if it has ``bits``, in CPU memory of its own."""
    cause = None
    if name == "__metadata__" or any("\ud800" <= char <= "\udfff" for char in name):
        cause = "its name is reserved or no valid Unicode; rename it"
    elif tensor.is_meta or tensor.layout != torch.strided:
        cause = "it holds no dense data; materialize it, or call to_dense()"
    elif bits is None and tensor.dtype not in DTYPE_CODES:
        known = ", ".join(str(dtype) for dtype in DTYPE_CODES)
        cause = f"its dtype is {tensor.dtype}; convert it to one of {known}"
    if cause is not None:
        raise ConfigError(f"cannot store tensor {name!r}: {cause}")
    if bits is None:
        # safetensors refuses tensors that share storage, whole or in part.
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        return pack_bits(tensor, bits).cpu()
    except ConfigError as error:
        raise ConfigError(f"cannot store tensor {name!r}: {error}") from error


def _write_atomically(
    target: Path, stored: dict[str, Tensor], fields: dict[str, str]
) -> int:
    temporary = target.parent / f".{FORMAT}-{secrets.token_hex(8)}.tmp"
    try:
        # save_file makes its files private to their owner: restore the umask's mode.
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        save_file(stored, temporary, fields)
        temporary.chmod(mode & 0o777)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        os.replace(temporary, target)
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}; free space there") from error
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _read(source: Path) -> FileContents:
    opener: Any = safe_open  # its stub has no types
    with opener(source, framework="pt") as opened:
        fields: dict[str, str] = opened.metadata() or {}
        names: list[str] = opened.keys()
        views = {name: opened.get_slice(name) for name in names}
        layout = {name: (v.get_dtype(), v.get_shape()) for name, v in views.items()}
        packed, description = decode_header(fields, layout)
        # Plain tensors leave the memory map: the file may change later.
        tensors = {
            name: _unpacked(name, opened.get_tensor(name), packed[name])
            if name in packed
            else opened.get_tensor(name).clone()
            for name in names
        }
    return FileContents(tensors, description)


def _unpacked(name: str, stored: Tensor, entry: Any) -> Tensor:
    try:
        bits, shape = entry["bits"], entry["shape"]
        if any(type(value) is not int for value in (bits, *shape)):
            raise TypeError("bits and sizes must be integers")
        return unpack_bits(stored, bits, shape)
    except (LookupError, TypeError, ConfigError, FileFormatError) as error:
        cause = f"tensor {name!r} is packed wrongly ({error}); {REMEDY}"
        raise FileFormatError(cause) from error


def _diagnosis(source: Path) -> str:
    """Say what a file is that safetensors refused, as the start of a message."""
    with source.open("rb") as file:
        start = file.read(9)
    if not start:
        return f"it is empty; {REMEDY}: "
    # Eight bytes of length come before the JSON header; the first may be any byte.
    ours = len(start) < 9 or start[8:] == b"{"
    if not ours and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        return (
            "it looks like a torch.save file, which is never unpickled here; load it"
            " into the model with torch.load(..., weights_only=True) instead: "
        )
    return f"it is truncated, damaged, or no safetensors file; {REMEDY}: "
