"""The runtimes of ONNX files, as `Runtime`s: onnxruntime and OpenVINO."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from gdnsq_fx.deploy.edges import CodedEdge
from gdnsq_fx.deploy.onnx_edges import edge_values
from gdnsq_fx.deploy.openvino_core import openvino_core
from gdnsq_fx.deploy.runtimes import Observation, Runtime, Values, tensors
from gdnsq_fx.errors import BatchStructureError, FileFormatError, GdnsqError
from gdnsq_fx.extras import required

ONNX_EXTRA = "gdnsq-fx[onnx]"


@final
class OnnxRuntime(Runtime):
    """onnxruntime on the CPU, with its default options.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        FileFormatError: the file cannot be read or loaded.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, edges: Sequence[CodedEdge]) -> None:
        self._path = path
        runtime = required("onnxruntime", "running an ONNX file", ONNX_EXTRA)
        model, self._places = read_onnx(path, edges)
        onnx = required("onnx", "reading an ONNX file", ONNX_EXTRA)
        outputs = {output.name for output in model.graph.output}
        self._count = len(model.graph.output)
        for name in dict.fromkeys(self._places.values()):
            if name not in outputs:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        with loading(path, self.name):
            providers = ["CPUExecutionProvider"]
            self._session = runtime.InferenceSession(path, providers=providers)
            self._seen = runtime.InferenceSession(
                model.SerializeToString(), providers=providers
            )

    def outputs(self, values: Values) -> list[Tensor]:
        """As `Runtime.outputs`."""
        with loading(self._path, self.name, "run"):
            found = self._session.run(None, self._fed(values))
        return [torch.from_numpy(array) for array in found]

    def observe(self, values: Values) -> Observation:
        """As `Runtime.observe`."""
        names = [output.name for output in self._seen.get_outputs()]
        with loading(self._path, self.name, "run"):
            found = self._seen.run(None, self._fed(values))
        arrays = [torch.from_numpy(array) for array in found]
        by_name = dict(zip(names, arrays, strict=True))
        codes = {edge: by_name[name] for edge, name in self._places.items()}
        return Observation(arrays[: self._count], codes)

    def _fed(self, values: Values) -> dict[str, Any]:
        names = [given.name for given in self._session.get_inputs()]
        return dict(zip(names, _arrays(names, values, self._path), strict=True))


@final
class OpenVino(Runtime):
    """OpenVINO on the CPU, in float32 between int8 layers; raises as `OnnxRuntime`."""

    name = "openvino"
    # Its default is bfloat16 where the CPU has that: another arithmetic, not a defect.
    note = "float32 hint"

    def __init__(self, path: Path, edges: Sequence[CodedEdge]) -> None:
        self._path = path
        core = openvino_core()
        _, self._places = read_onnx(path, edges)
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        with loading(path, self.name):
            self._model = core.compile_model(core.read_model(path), "CPU", hint)
            seen = core.read_model(path)
            outputs = {n for output in seen.outputs for n in output.names}
            seen.add_outputs([n for n in self._places.values() if n not in outputs])
            self._seen = core.compile_model(seen, "CPU", hint)

    def outputs(self, values: Values) -> list[Tensor]:
        """As `Runtime.outputs`."""
        with loading(self._path, self.name, "run"):
            found = self._model(self._fed(values))
        return [torch.tensor(found[output]) for output in self._model.outputs]

    def observe(self, values: Values) -> Observation:
        """As `Runtime.observe`."""
        with loading(self._path, self.name, "run"):
            found = self._seen(self._fed(values))
        count = len(self._model.outputs)
        outputs = [torch.tensor(found[o]) for o in self._seen.outputs[:count]]
        codes = {e: torch.tensor(found[name]) for e, name in self._places.items()}
        return Observation(outputs, codes)

    def _fed(self, values: Values) -> list[Any]:
        names = [given.any_name for given in self._model.inputs]
        return _arrays(names, values, self._path)


def read_onnx(path: Path, edges: Sequence[CodedEdge]) -> tuple[Any, dict[str, str]]:
    """A file, and which of its values hold the codes of which edges.

    Raises:
        MissingExtraError: onnx is not installed. FileFormatError: not an ONNX file.
    """
    onnx = required("onnx", "reading an ONNX file", ONNX_EXTRA)
    with loading(path, "onnx"):
        model = onnx.load(path)
    places = edge_values(model)
    held = {name for node in model.graph.node for name in node.output}
    known = [edge.name for edge in edges if places.get(edge.name) in held]
    return model, {edge: places[edge] for edge in known}


def _arrays(names: Sequence[str], values: Values, path: Path) -> list[Any]:
    """Tensors as arrays, one for each input of a file, in its order."""
    found = [tensor.detach().cpu().numpy() for tensor in tensors(values)]
    if len(found) != len(names):
        raise BatchStructureError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), a batch has "
            f"{len(found)}; give batches such as the example it was exported with"
        )
    return found


@contextmanager
def loading(
    path: Path, runtime: str, what: str = "load"
) -> Generator[None, None, None]:
    """Name the file and the runtime where one refuses the other.

    Raises:
        FileFormatError: for any error of the runtime.
    """
    try:
        yield
    except (OSError, GdnsqError):
        raise
    except Exception as error:  # each has error classes of its own
        raise FileFormatError(
            f"{runtime} cannot {what} {path}: {error}; give the file that was exported "
            "from this model"
        ) from error
