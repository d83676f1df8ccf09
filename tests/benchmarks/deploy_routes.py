"""The ways to run one network that `deploy.py` compares: each a call without arguments.

Peers have their own recommended flow: onnxruntime's static quantization (QDQ, uint8
activations, int8 weights for each channel), and torchao's PT2E flow with its quantizer
for x86. All calibrate on the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy.openvino_core import openvino_core

Route = Callable[[], object]


def write_float(model: nn.Module, images: Tensor, path: Path) -> None:
    """The floating-point network as an ONNX file for batches of any size."""
    example = images if len(images) > 1 else torch.cat([images, images])
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=21,
        dynamic_shapes=batch,
        verbose=False,
    )
    assert program is not None
    program.save(path)


def write_static(source: Path, batches: list[Tensor], path: Path) -> None:
    """onnxruntime's own quantization of a floating-point file."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = _session(source, 1).get_inputs()[0].name
    given = iter([{name: batch.numpy()} for batch in batches])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(given, None)

    prepared = path.with_suffix(".float.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def in_onnxruntime(path: Path, images: Tensor, threads: int) -> Route:
    """A file in onnxruntime."""
    session = _session(path, threads)
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)


def in_openvino(path: Path, images: Tensor, threads: int) -> Route:
    """A file in OpenVINO, in float32 between integer layers."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino_core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request, given = compiled.create_infer_request(), [images.numpy()]
    return lambda: request.infer(given, share_inputs=True)


def compiled_float(model: nn.Module, images: Tensor) -> Route:
    """The floating-point network in inductor, its weights packed as for int8."""
    return _compiled(model, images)


def compiled_ours(imodel: GraphModule, images: Tensor) -> Route:
    """`gdnsq_fx.compile`."""
    compiled = gdnsq_fx.compile(imodel, images)
    return lambda: compiled(images)


def compiled_torchao(model: nn.Module, batches: list[Tensor], images: Tensor) -> Route:
    """torchao's PT2E flow on inductor, exported for the batch that is timed."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    with torch.no_grad():
        for batch in _of_size(torch.cat(batches), len(images)):
            prepared(batch)
    return _compiled(convert_pt2e(prepared), images)


def _of_size(images: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of a size; an exported program takes no other."""
    return (one for one in images.split(size) if len(one) == size)


def _compiled(model: nn.Module, images: Tensor) -> Route:
    from torch._inductor import config

    compiled: Any = torch.compile(model, dynamic=False)

    @torch.no_grad()
    def run() -> object:
        with config.patch(freezing=True):
            return compiled(images)

    run()
    return run


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(path, options, providers=providers)
