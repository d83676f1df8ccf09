"""The file door: exact round trips, atomic writes, and one error for any bad file."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from gdnsq_fx.deploy import files, header
from gdnsq_fx.deploy.files import FileContents, read_file, write_file
from gdnsq_fx.errors import ConfigError, FileFormatError

_TENSORS = {
    "conv.weight": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4) % 8,
    "conv.bias": torch.tensor([0.5, -1.5]),
    "fc.weight": torch.tensor([[1000, 2], [0, 1023]], dtype=torch.int16),
    "mask": torch.tensor([True, False]),
    "step": torch.tensor(3),
    "empty": torch.zeros(0, 4),
}
_PACKED = {"conv.weight": 3, "fc.weight": 10}
_DESCRIPTION = {"model": "résumé", "layers": [{"bits": 3}], "loss": None, "ok": True}
_SHAPES = {name: tensor.shape for name, tensor in _TENSORS.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a real file."""
    path = tmp_path_factory.mktemp("image") / "model.safetensors"
    write_file(path, _TENSORS, _PACKED, _DESCRIPTION)
    return path.read_bytes()


def _split(image: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", image[:8])[0]
    return json.loads(image[8 : 8 + size]), image[8 + size :]


def _join(head: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + payload


def _signed(head: dict[str, Any]) -> dict[str, Any]:
    """Give a tampered header a right checksum, as an adversary would."""
    fields = head["__metadata__"]
    layout: header.Layout = {
        name: (entry["dtype"], entry["shape"])
        for name, entry in head.items()
        if name != "__metadata__"
    }
    checksum = header._checksum(fields, layout)  # pyright: ignore[reportPrivateUsage]
    return {**head, "__metadata__": {**fields, "checksum": checksum}}


def _assert_refused(path: Path, content: bytes, cause: str) -> None:
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=cause) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


def _assert_original(contents: FileContents) -> None:
    assert contents.description == _DESCRIPTION
    assert contents.tensors.keys() == _TENSORS.keys()
    for name, tensor in _TENSORS.items():
        read = contents.tensors[name]
        assert torch.equal(read.to(tensor.dtype), tensor)
        assert name in _PACKED or read.dtype == tensor.dtype


def test_round_trip(path: Path) -> None:
    size = write_file(str(path), _TENSORS, _PACKED, _DESCRIPTION)
    contents = read_file(str(path))
    assert size == path.stat().st_size
    _assert_original(contents)
    assert contents.tensors["conv.weight"].dtype == torch.uint8
    assert contents.tensors["fc.weight"].dtype == torch.int32


def test_codes_take_only_their_bits(path: Path) -> None:
    codes = {"w": torch.zeros(80_000, dtype=torch.uint8)}
    empty = write_file(path, {}, {}, {})
    assert write_file(path, codes, {"w": 3}, {}) < empty + 30_000 + 200
    assert read_file(path).tensors["w"].shape == (80_000,)


def test_shared_strided_and_grad_tensors(path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "whole": base,
        "same": base,
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(base),
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write_file(path, tensors, {}, {})
    read = read_file(path).tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_result_does_not_change_with_the_file(path: Path) -> None:
    write_file(path, {"a": torch.ones(1000)}, {}, {})
    contents = read_file(path)
    path.write_bytes(b"")
    assert contents.tensors["a"].sum() == 1000


def test_write_replaces_through_a_symbolic_link(tmp_path: Path, path: Path) -> None:
    write_file(path, {"a": torch.zeros(1)}, {}, {"version": 1})
    link = tmp_path / "link"
    link.symlink_to(path)
    write_file(link, {"a": torch.zeros(1)}, {}, {"version": 2})
    assert link.is_symlink()
    assert read_file(path).description == {"version": 2}


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_file_mode_follows_the_umask(path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_file(path, {}, {}, {})
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace"])
def test_failed_write_keeps_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    write_file(path, _TENSORS, _PACKED, _DESCRIPTION)
    monkeypatch.setattr(f"{files.__name__}.{step}", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, {"other": torch.zeros(3)}, {}, {})
    monkeypatch.undo()
    _assert_original(read_file(path))
    assert list(path.parent.iterdir()) == [path]


def test_safetensors_failure_is_an_os_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise files.SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match=r"cannot write .*No space left.*free space"):
        write_file(path, {}, {}, {})
    assert list(path.parent.iterdir()) == []


_SPARSE = torch.eye(2).to_sparse()


@pytest.mark.parametrize(
    ("tensors", "packed", "description", "cause"),
    [
        ({}, {"w": 3}, {}, r"packed names \['w'\]"),
        ({"w": torch.tensor([8])}, {"w": 3}, {}, "'w': codes span 8..8"),
        ({"w": torch.tensor([0])}, {"w": 17}, {}, "'w': codes of 17 bits"),
        ({"w": torch.tensor([0.0])}, {"w": 3}, {}, "'w': codes to pack are"),
        ({"w": torch.zeros(1, device="meta")}, {}, {}, "no dense data"),
        ({"w": torch.zeros(1, device="meta").int()}, {"w": 3}, {}, "no dense data"),
        ({"w": _SPARSE}, {}, {}, "to_dense"),
        ({"w": torch.zeros(1, dtype=torch.complex128)}, {}, {}, "complex128; convert"),
        ({"__metadata__": torch.zeros(1)}, {}, {}, "rename"),
        ({"\ud800": torch.zeros(1)}, {}, {}, "rename"),
        ({}, {}, {"a": {1: 2}}, "key 1 is not a string"),
        ({}, {}, {"a": [({1: 2},)]}, "key 1 is not a string"),
        ({}, {}, {"a": float("nan")}, "cannot store the description"),
        ({}, {}, {"a": object()}, "cannot store the description"),
    ],
)
def test_what_cannot_be_stored(
    path: Path,
    tensors: dict[str, Tensor],
    packed: dict[str, int],
    description: dict[str, object],
    cause: str,
) -> None:
    with pytest.raises(ConfigError, match=cause):
        write_file(path, tensors, packed, description)
    assert list(path.parent.iterdir()) == []


def test_circular_and_deep_descriptions(path: Path) -> None:
    circular: list[object] = []
    circular.append(circular)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (circular, deep):
        with pytest.raises(ConfigError, match="cannot store the description"):
            write_file(path, {}, {}, {"a": value})


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "a"
    with pytest.raises(FileNotFoundError, match="check the path") as caught:
        read_file(missing)
    assert str(missing) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="create it first"):
        write_file(missing, {}, {}, {})
    with pytest.raises(IsADirectoryError, match="path of a file"):
        read_file(tmp_path)
    with pytest.raises(IsADirectoryError, match="path of a file"):
        write_file(tmp_path, {}, {}, {})


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in the file system")
def test_pipes_are_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileFormatError, match="device or a pipe"):
        read_file(pipe)
    with pytest.raises(FileFormatError, match="device or a pipe"):
        write_file(pipe, {}, {}, {})
    assert pipe.is_fifo()


def test_foreign_files(path: Path, image: bytes) -> None:
    _assert_refused(path, b"", "it is empty")
    _assert_refused(path, b"some text, not tensors", "no safetensors file")
    _assert_refused(path, image[:4], "truncated")
    _assert_refused(path, image[:-1], "truncated")
    _assert_refused(path, image + b"x", "damaged")
    for modern in (True, False):
        torch.save(_TENSORS, path, _use_new_zipfile_serialization=modern)
        _assert_refused(path, path.read_bytes(), "never unpickled")
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.zeros(3)}, path, metadata)
        _assert_refused(path, path.read_bytes(), "did not write it; load a checkpoint")


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("schema_version", "3", "schema version is '3'.*install a newer"),
        ("schema_version", "1", "checksum"),
        ("schema_version", "9" * 5000, "install a newer"),
        ("schema_version", "0", "schema version is '0'.*copy"),
        ("schema_version", "one", "schema version is 'one'.*copy"),
        ("description", "{", "description is no JSON"),
        ("description", "[1]", "description is no JSON object"),
        ("description", "[" * 200_000, "description is no JSON"),
        ("description", "9" * 5000, "description is no JSON"),
        ("packed", "null", "packed is no JSON object"),
        ("packed", '{"other": {"bits": 3, "shape": [1]}}', "packed .*are missing"),
        ("description", '{"model": "other"}', "checksum"),
        ("checksum", "0", "checksum"),
        ("packed", None, r"lack \['packed'\]"),
        ("checksum", None, r"lack \['checksum'\]"),
    ],
)
def test_bad_metadata(
    path: Path, image: bytes, field: str, value: str | None, cause: str
) -> None:
    head, payload = _split(image)
    if value is None:
        del head["__metadata__"][field]
    else:
        head["__metadata__"][field] = value
    _assert_refused(path, _join(head, payload), cause)


def test_header_text_that_is_no_utf8(path: Path, image: bytes) -> None:
    _assert_refused(path, image.replace(b"format", b"f\xffrmat"), "damaged")


@pytest.mark.parametrize(
    "entry",
    [
        {"bits": 3, "shape": [2, 3, 5]},
        {"bits": 4, "shape": [2, 3, 4]},
        {"bits": 3, "shape": [-2, -3, 4]},
        {"bits": 3, "shape": [2**60]},
        {"bits": 3, "shape": [2**40, 2**40]},
        {"bits": 3, "shape": [0, 2**62, 2**62]},
        {"bits": 3, "shape": [24.0]},
        {"bits": 3, "shape": [True]},
        {"bits": 3, "shape": 24},
        {"bits": 3, "shape": "24"},
        {"bits": 0, "shape": [24]},
        {"bits": 10**9, "shape": [24]},
        {"bits": "3", "shape": [24]},
        {"bits": 3},
        [3, [24]],
        None,
    ],
)
def test_bad_packed_entries(path: Path, image: bytes, entry: object) -> None:
    head, payload = _split(image)
    table = {**json.loads(head["__metadata__"]["packed"]), "conv.weight": entry}
    head["__metadata__"]["packed"] = json.dumps(table)
    content = _join(_signed(head), payload)
    _assert_refused(path, content, "'conv.weight' is packed wrongly")


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F32", [0, 2**63]),
        ("F32", [0, 2**62, 2**62]),
        ("F32", [-1]),
        ("F6_E2M3", [0]),
        ("F8_E8M0", [0]),
    ],
)
def test_bad_tensor_entries(
    path: Path, image: bytes, dtype: str, shape: list[int]
) -> None:
    head, payload = _split(image)
    head["empty"] = {**head["empty"], "dtype": dtype, "shape": shape}
    _assert_refused(path, _join(_signed(head), payload), "cannot read")


def test_every_truncation_is_refused(path: Path, image: bytes) -> None:
    for size in range(len(image)):
        _assert_refused(path, image[:size], "cannot read")


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
    st.booleans(),
)
@settings(
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
def test_flipped_bytes(
    path: Path, image: bytes, flips: list[tuple[float, int]], in_header: bool
) -> None:
    damaged = bytearray(image)
    payload = 8 + struct.unpack("<Q", image[:8])[0]
    span = payload if in_header else len(image)
    for position, mask in flips:
        damaged[min(int(position * span), span - 1)] ^= mask
    path.write_bytes(damaged)
    try:
        contents = read_file(path)
    except FileFormatError as error:
        assert str(path) in str(error)
        return
    assert {name: t.shape for name, t in contents.tensors.items()} == _SHAPES
    assert contents.description == _DESCRIPTION
