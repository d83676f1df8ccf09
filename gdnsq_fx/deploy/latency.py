"""How long ONNX files take in the runtimes that are installed.

All files and runtimes take turns within each round, so that whatever else the machine
does falls on all of them alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdnsq_fx.deploy.file_runtimes import ONNX_EXTRA, loading
from gdnsq_fx.deploy.openvino_core import OPENVINO_EXTRA, openvino_core
from gdnsq_fx.errors import ConfigError, MissingExtraError
from gdnsq_fx.extras import required

Inputs = dict[str, Any]
Call = Callable[[Inputs], object]
_WARM_UP = 3
_TOKENS = 2  # whole numbers below this are tokens of every vocabulary


@dataclass(frozen=True)
class Latency:
    """One file in one runtime.

    Attributes:
        file: its path. bytes: its size.
        median_ms, low_ms, high_ms: of a call; tenth and ninetieth percentile.
    """

    file: str
    bytes: int
    runtime: str
    median_ms: float
    low_ms: float
    high_ms: float


def measure_latency(
    paths: Sequence[Path],
    *,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    rounds: int = 50,
    threads: int = 1,
    seed: int = 0,
) -> tuple[list[Latency], dict[str, str]]:
    """Time files on random inputs.

    Args:
        paths: of ONNX files.
        batch: size of dimension 0 where a file leaves it open.
        sizes: of other open dimensions, by name.
        rounds: calls of each.
        threads: that a runtime may use for one call.
        seed: of the inputs.

    Returns:
        One entry for each file and runtime; name -> reason of absent runtimes.

    Raises:
        FileNotFoundError, FileFormatError: no file, or none of ONNX.
        ConfigError: an open dimension has no size.
        MissingExtraError: onnx, or every runtime, is not installed.
    """
    makers, absent = _installed()
    calls: list[tuple[Path, str, Callable[[], object]]] = []
    for path in paths:
        inputs = _random_inputs(path, batch, sizes or {}, seed)
        for name, make in makers.items():
            with loading(path, name):
                call = make(path, threads)
                for _ in range(_WARM_UP):
                    call(inputs)
            calls.append((path, name, _bound(call, inputs)))
    taken = _in_turns([call for _, _, call in calls], rounds)
    found = [
        _latency(path, name, seconds)
        for (path, name, _), seconds in zip(calls, taken, strict=True)
    ]
    return found, absent


def _in_turns(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return taken


def _latency(path: Path, runtime: str, seconds: list[float]) -> Latency:
    tenths = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else seconds
    median, low, high = statistics.median(seconds), tenths[0], tenths[-1]
    size = os.path.getsize(path)
    return Latency(str(path), size, runtime, 1e3 * median, 1e3 * low, 1e3 * high)


def _installed() -> tuple[dict[str, Callable[[Path, int], Call]], dict[str, str]]:
    makers = {"onnxruntime": (_onnxruntime, ONNX_EXTRA)}
    makers["openvino"] = (_openvino, OPENVINO_EXTRA)
    found: dict[str, Callable[[Path, int], Call]] = {}
    absent: dict[str, str] = {}
    missing: MissingExtraError | None = None
    for name, (make, extra) in makers.items():
        try:
            required(name, f"timing with {name}", extra)
        except MissingExtraError as error:
            missing, absent[name] = error, str(error).rpartition("; ")[2]
        else:
            found[name] = make
    if missing is not None and not found:
        raise missing
    return found, absent


def _onnxruntime(path: Path, threads: int) -> Call:
    runtime = required("onnxruntime", "timing with onnxruntime", ONNX_EXTRA)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    return lambda inputs: session.run(None, inputs)


def _openvino(path: Path, threads: int) -> Call:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino_core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda inputs: request.infer(inputs, share_inputs=True)


def _random_inputs(
    path: Path, batch: int, sizes: Mapping[str, int], seed: int
) -> Inputs:
    onnx = required("onnx", "reading an ONNX file", ONNX_EXTRA)
    numpy = required("numpy", "timing ONNX files", ONNX_EXTRA)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with loading(path, "onnx"):
        graph = onnx.load(path, load_external_data=False).graph
    generator = numpy.random.default_rng(seed)
    stored = {tensor.name for tensor in graph.initializer}
    inputs: Inputs = {}
    for value in graph.input:
        if value.name in stored:
            continue
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        dimensions = value.type.tensor_type.shape.dim
        shape = [_size(path, d, n, batch, sizes) for n, d in enumerate(dimensions)]
        if kind.kind == "f":
            inputs[value.name] = generator.standard_normal(shape).astype(kind)
        else:
            inputs[value.name] = generator.integers(0, _TOKENS, shape).astype(kind)
    return inputs


def _size(
    path: Path, dimension: Any, place: int, batch: int, sizes: Mapping[str, int]
) -> int:
    if dimension.HasField("dim_value"):
        return int(dimension.dim_value)
    name = str(dimension.dim_param)
    if name in sizes:
        return sizes[name]
    if place == 0:
        return batch
    raise ConfigError(
        f"{path} leaves the size of dimension {place} ({name or 'no name'}) open; give "
        f"it with --dim {name or 'NAME'}=SIZE"
    )


def _bound(call: Call, inputs: Inputs) -> Callable[[], object]:
    return lambda: call(inputs)
