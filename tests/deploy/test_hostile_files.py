"""Mutated and forged files: a typed error or the very same model, and no code runs."""

from __future__ import annotations

import base64
import json
import random
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy import header
from gdnsq_fx.deploy.header import plain_text
from gdnsq_fx.errors import FileFormatError

_X = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
_SECONDS = 10.0
_EACH = 30
Head = dict[str, Any]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


@pytest.fixture(scope="module", params=[False, True], ids=["integer", "deployable"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, GraphModule]:
    """The bytes of a file, and its model."""
    torch.manual_seed(0)
    qmodel = gdnsq_fx.prepare(_Net().eval(), _X, calibration=[_X])
    imodel = gdnsq_fx.convert(qmodel, deployable=request.param)
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    gdnsq_fx.save(imodel, path)
    return path.read_bytes(), imodel


def _split(image: bytes) -> tuple[Head, bytes]:
    size = struct.unpack("<Q", image[:8])[0]
    return json.loads(image[8 : 8 + size]), image[8 + size :]


def _join(head: Head, payload: bytes) -> bytes:
    return _with_text(json.dumps(head), payload)


def _with_text(text: str, payload: bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + payload


def _signed(head: Head) -> Head:
    """A header with a right checksum, as an adversary would write it."""
    fields = {k: v for k, v in head["__metadata__"].items() if k != "checksum"}
    layout: Any = {
        name: (entry["dtype"], entry["shape"])
        for name, entry in head.items()
        if name != "__metadata__"
    }
    fields["checksum"] = ""
    checksum = header._checksum(fields, layout)  # pyright: ignore[reportPrivateUsage]
    return {**head, "__metadata__": {**fields, "checksum": checksum}}


def _forged(image: bytes, change: Callable[[Head], None]) -> bytes:
    """The file with another description and a right checksum."""
    head, payload = _split(image)
    description = json.loads(plain_text(head["__metadata__"]["description"]))
    change(description)
    head["__metadata__"]["description"] = json.dumps(description)
    return _join(_signed(head), payload)


def _loaded(path: Path, content: bytes) -> GraphModule | None:
    """The model, or None where the file is refused, in bounded time."""
    path.write_bytes(content)
    start = time.process_time()
    try:
        found = gdnsq_fx.load(path)
    except FileFormatError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        found = None
    assert time.process_time() - start < _SECONDS
    return found


def _assert_identical(found: GraphModule | None, imodel: GraphModule) -> bool:
    """Whether it is there; if so it is the model that was saved."""
    if found is None:
        return False
    wanted = imodel.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert torch.isfinite(found(_X)).all() or not torch.isfinite(imodel(_X)).all()
    return True


# --- damage: no checksum is right any more ----------------------------------------


def _flipped(rng: random.Random, image: bytes) -> bytes:
    size = 8 + struct.unpack("<Q", image[:8])[0]
    damaged = bytearray(image)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(size)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _truncated(rng: random.Random, image: bytes) -> bytes:
    return image[: rng.randrange(len(image))]


def _spliced(rng: random.Random, image: bytes) -> bytes:
    """A piece of the header overwritten by another piece of it."""
    size = struct.unpack("<Q", image[:8])[0]
    start, source = 8 + rng.randrange(size - 16), 8 + rng.randrange(size - 16)
    length = rng.randint(1, 16)
    piece = image[source : source + length]
    return image[:start] + piece + image[start + length :]


def _doubled(rng: random.Random, image: bytes) -> bytes:
    """A name that comes twice in the header, with another entry."""
    head, payload = _split(image)
    name = rng.choice(sorted(head))
    names = [n for n in sorted(head) if n not in ("__metadata__", name)]
    extra = json.dumps({name: head[rng.choice(names)]})
    return _with_text(f"{json.dumps(head)[:-1]}, {extra[1:]}", payload)


def _retyped(rng: random.Random, image: bytes) -> bytes:
    head, payload = _split(image)
    name = rng.choice([n for n in sorted(head) if n != "__metadata__"])
    dtype = rng.choice(["F32", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F16", "X"])
    shape = rng.choice([[2**40, 2**40], [2**63], [-1], [0, 2**62], head[name]["shape"]])
    head[name] = {**head[name], "dtype": dtype, "shape": shape}
    return _join(head, payload)


@pytest.mark.parametrize(
    "mutation", [_flipped, _truncated, _spliced, _doubled, _retyped]
)
def test_damage_is_found(
    mutation: Callable[[random.Random, bytes], bytes],
    saved: tuple[bytes, GraphModule],
    tmp_path: Path,
) -> None:
    image, imodel = saved
    refused = 0
    for number in range(_EACH):
        rng = random.Random(f"{mutation.__name__} {number}")
        content = mutation(rng, image)
        found = _loaded(tmp_path / "m.safetensors", content)
        if not _assert_identical(found, imodel):
            refused += 1
            continue
        assert found is not None
        for name, value in imodel.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
        assert torch.equal(found(_X), imodel(_X))
    assert refused >= _EACH // 2


# --- forgery: the checksum is right -----------------------------------------------

_CANARY = "canary"
_CODE = (
    "__import__('pathlib').Path('canary').touch()",
    "x; __import__('pathlib').Path('canary').touch()",
    "x):\n    __import__('pathlib').Path('canary').touch()\ndef g(y",
    'a", __import__("pathlib").Path("canary").touch(), "b',
    "a'); __import__('pathlib').Path('canary').touch(); ('",
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "torch.load",
    "torch.hub.load",
    "__class__",
    "__globals__",
    "conv.__class__.__init__.__globals__",
    "../../etc/passwd",
    "a..b",
    ".",
    "",
    "\ud800",
    "x" * 100_000,
    "_modules",
    "forward",
    "graph",
    "class",
    "é",
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every part of a JSON value stands."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        place = (*path, key)
        found += _paths(item, place) if isinstance(item, dict | list) else [place]
    return found


def _put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def _names_as_code(rng: random.Random, description: Head) -> None:
    """Code, or a path, in the place of any string of the graph."""
    places = [p for p in _paths(description["graph"]) if isinstance(p[-1], int | str)]
    _put(description["graph"], rng.choice(places), rng.choice(_CODE))


def _keys_as_code(rng: random.Random, description: Head) -> None:
    """Code as the name of a module, an argument, or a tensor."""
    graph, code = description["graph"], rng.choice(_CODE)
    node = rng.choice(graph["nodes"])
    where = rng.randrange(4)
    if where == 0:
        node[4] = {"dict": [[code, 1]]}
    elif where == 1 and graph["modules"]:
        name = rng.choice(sorted(graph["modules"]))
        graph["modules"][code] = graph["modules"].pop(name)
    elif where == 2:
        graph["modules"][code] = {"class": code, "arguments": {code: code}}
    else:
        node[1] = node[2] = code


def _values_of_any_kind(rng: random.Random, description: Head) -> None:
    value = rng.choice(
        [
            *(None, True, -1, 2**31, 2**64, 10**400, 1e308, "", [], {}, [[]]),
            *({"node": -1}, {"node": 10**9}, {"node": True}, {"tuple": 3}),
            *({"dtype": "load"}, {"device": "meta"}, {"slice": [1]}, {"size": ["a"]}),
            *({"dict": [[[], 1]]}, {"float": "1_0"}, {"": 0}, {"a": 1, "b": 2}),
            [2**62, 2**62],
        ]
    )
    _put(description["graph"], rng.choice(_paths(description["graph"])), value)


def _deep(rng: random.Random, description: Head) -> None:
    depth = rng.choice([40, 200, 300])
    value: Any = []
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"tuple": [value]}
    _put(description["graph"], rng.choice(_paths(description["graph"])), value)


def _parts_left_out(rng: random.Random, description: Head) -> None:
    graph = description["graph"]
    rng.choice(
        [
            lambda: graph.pop(rng.choice(sorted(graph))),
            lambda: graph["nodes"].pop(rng.randrange(len(graph["nodes"]))),
            lambda: rng.shuffle(graph["nodes"]),
            lambda: graph["nodes"].append(rng.choice(graph["nodes"])),
            lambda: graph["nodes"].clear(),
            lambda: graph["constants"].append("nothing"),
            lambda: description.update(affine={"conv.bias": 0}),
            lambda: description.update(affine=[1], graph=[1]),
        ]
    )()


@pytest.mark.parametrize(
    "forgery",
    [_names_as_code, _keys_as_code, _values_of_any_kind, _deep, _parts_left_out],
)
def test_forgery_runs_nothing(
    forgery: Callable[[random.Random, Head], None],
    saved: tuple[bytes, GraphModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, _ = saved
    monkeypatch.chdir(tmp_path)
    refused = 0
    for number in range(_EACH):
        rng = random.Random(f"{forgery.__name__} {number}")
        content = _forged(image, lambda found, rng=rng: forgery(rng, found))
        found = _loaded(tmp_path / "m.safetensors", content)
        refused += found is None
        # A forged file may be another model, but one of tensors and numbers alone.
        assert found is None or isinstance(found, GraphModule)
        assert not (tmp_path / _CANARY).exists(), content
    assert refused >= _EACH // 3


@pytest.mark.parametrize("name", ["description", "packed"])
def test_a_name_that_comes_twice_in_the_metadata(
    name: str, saved: tuple[bytes, GraphModule], tmp_path: Path
) -> None:
    head, payload = _split(saved[0])
    text = plain_text(head["__metadata__"][name])
    key = json.dumps(sorted(json.loads(text))[0])
    head["__metadata__"][name] = f"{text[:-1]}, {key}: null}}"
    content = _join(_signed(head), payload)
    assert _loaded(tmp_path / "m.safetensors", content) is None


@pytest.mark.parametrize("text", [b" " * (1 << 27), b"{}", b"", b"\xff\xfe{}"])
def test_a_compressed_description_is_bounded_and_checked(
    text: bytes, saved: tuple[bytes, GraphModule], tmp_path: Path
) -> None:
    head, payload = _split(saved[0])
    packed = base64.b85encode(zlib.compress(text, 9)).decode()
    for stored in (packed, packed[:-3], f"{packed}00000", "c", "naïve"):
        head["__metadata__"]["description"] = stored
        content = _join(_signed(head), payload)
        assert _loaded(tmp_path / "m.safetensors", content) is None
