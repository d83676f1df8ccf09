"""Int8 weights of an ONNX model stored in their bits, unpacked by plain operations.

    codes [int8]
      ->
    packed [uint4, or uint8 fields of 2 and 1 bits] -> levels [uint8]
    codes = Cast(factor * levels + least, int8)

Every operation has stored operands alone, so a runtime that folds constants does it
once, at load, and runs the very kernels that int8 weights run. Three bits are a plane
of two and one of one; four are ONNX's own uint4. Its two-bit types need opset 25, which
few runtimes read. Fields of one byte lie apart from each other: of N bytes, byte n
holds elements ``n, n + N, n + 2 * N, ..``, lowest bits first, for long contiguous rows
unpack faster than interleaved ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.deploy.affine_codes import AffineCodes, affine_codes
from gdnsq_fx.deploy.packing import pack_bits
from gdnsq_fx.extras import required

EXTRA = "gdnsq-fx[onnx]"
# What the operations that unpack a weight take in a file, in bytes.
_OVERHEAD = 2048


def onnx_ir() -> Any:
    """The library that models are changed and written with.

    Raises:
        MissingExtraError: it is not installed.
    """
    return required("onnx_ir", "writing ONNX", EXTRA)


def pack_weights(model: Any) -> None:
    """Replace int8 initializers of an ``onnx_ir.Model`` by packed ones, in place."""
    graph = model.graph
    prefix = _free_prefix(graph)
    for index, value in enumerate(list(graph.initializers.values())):
        tensor = value.const_value
        if tensor.dtype.name != "INT8" or tensor.size < _OVERHEAD:
            continue
        codes = torch.tensor(tensor.numpy())
        found = affine_codes(codes, _channel_axis(value))
        if found.size + _OVERHEAD < codes.numel():
            _replace(value, found, _Writer(graph, f"{prefix}{index}"))


def shrink(model: Any, *, shapes: bool = False) -> None:
    """Take out of an ``onnx_ir.Model`` what no runtime reads, and what is there twice.

    Notes of the exporter, equal initializers, and shapes of inner values unless they
    are asked for.
    """
    ir = onnx_ir()
    for value in model.graph.initializers.values():
        stored = value.const_value.numpy()
        if not stored.flags.c_contiguous:  # a permuted buffer, which cannot be hashed
            value.const_value = ir.tensor(stored.copy(order="C"), name=value.name)
    ir.passes.common.DeduplicateHashedInitializersPass()(model)
    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    outputs = {id(value) for value in model.graph.outputs}
    inner = [value for node in model.graph for value in node.outputs]
    for value in (*inner, *model.graph.initializers.values()):
        value.metadata_props.clear()
        if not shapes and id(value) not in outputs:
            value.type = value.shape = None


def _channel_axis(value: Any) -> int | None:
    """The axis of the scales that a weight is read with; None where there is none."""
    for node, position in value.uses():
        if node.op_type == "DequantizeLinear" and position == 0:
            scale = node.inputs[1].const_value
            if scale is not None and len(scale.shape) == 1:
                axis = node.attributes.get("axis")
                return 1 if axis is None else axis.as_int()
    return None


def _free_prefix(graph: Any) -> str:
    """What no name starts with; short, for names are most of what a node takes."""
    values = [value for node in graph for value in node.outputs]
    names = {v.name for v in (*values, *graph.inputs, *graph.initializers.values())}
    prefix = "p"
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    return prefix


def _replace(value: Any, found: AffineCodes, writer: _Writer) -> None:
    codes = writer.affine(writer.levels(found), found)
    value.replace_all_uses_with(codes)
    writer.graph.initializers.pop(value.name)
    codes.name = value.name


class _Writer:
    """Emits nodes before all others of a graph; ``name`` starts names of values."""

    def __init__(self, graph: Any, name: str) -> None:
        self.ir = onnx_ir()
        self.graph, self.name = graph, name
        self.first = graph[0]
        self.count = 0

    def constant(self, tensor: Any) -> Any:
        """A new initializer."""
        name = self._next_name()
        if isinstance(tensor, Tensor):
            tensor = self.ir.tensor(tensor.numpy(), name=name)
        value = self.ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def call(self, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        """The value of a new node."""
        node = self.ir.node(op_type, inputs, attributes)
        node.outputs[0].name = self._next_name()
        self.graph.insert_before(self.first, node)
        node.name = None  # the graph has given it one, which is only more to store
        return node.outputs[0]

    def _next_name(self) -> str:
        self.count += 1
        return f"{self.name}.{self.count}"

    def levels(self, found: AffineCodes) -> Any:
        """Unpacked levels, uint8, in their shape: planes of 4, 2 and 1 bits in sum."""
        total, shift = None, 0
        for width in (1, 2, 4):
            if not found.bits & width:
                continue
            levels = (found.levels >> shift) & (2**width - 1)
            plane = self._nibbles(levels) if width == 4 else self._fields(levels, width)
            if shift:
                places = self.constant(torch.tensor(shift, dtype=torch.uint8))
                plane = self.call("BitShift", plane, places, direction="LEFT")
            total = plane if total is None else self.call("BitwiseOr", total, plane)
            shift += width
        return total

    def affine(self, levels: Any, found: AffineCodes) -> Any:
        """Int8 codes of levels."""
        shape = [1] * found.levels.ndim
        if found.axis is not None:
            shape[found.axis] = -1
        # ONNX multiplies int8, runtimes do not.
        value = self._as("INT32", levels)
        for op_type, factor in (("Mul", found.factor), ("Add", found.least)):
            one = bool((factor == factor[0]).all())
            stored = self.constant(factor[0] if one else factor.reshape(shape))
            value = self.call(op_type, value, self._as("INT32", stored))
        value = self._as("INT8", value)
        if not found.whole.numel():
            return value
        where = self.constant(found.whole[:, None])
        rows = self.constant(found.rows)
        return self.call("ScatterND", value, where, rows)

    def _as(self, kind: str, value: Any) -> Any:
        return self.call("Cast", value, to=int(self.ir.DataType[kind]))

    def _nibbles(self, levels: Tensor) -> Any:
        kind = self.ir.DataType.UINT4
        packed = pack_bits(levels, 4).numpy()
        stored = self.ir.PackedTensor(packed, kind, shape=levels.shape)
        return self._as("UINT8", self.constant(stored))

    def _fields(self, levels: Tensor, width: int) -> Any:
        count, size = 8 // width, levels.numel()
        length = -(-size // count)
        rows = levels.new_zeros(count, length)
        rows.view(-1)[:size] = levels.flatten()
        places = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
        # Fields do not overlap: the sum is their union.
        packed = (rows << places).sum(0, keepdim=True).to(torch.uint8)
        stored = self.constant(packed)
        # First the mask: OpenVINO 2026.4 rounds where other bits are shifted out.
        masks = (torch.tensor(2**width - 1, dtype=torch.int32) << places).byte()
        value = self.call("BitwiseAnd", stored, self.constant(masks))
        shifts = self.constant(places)
        value = self.call("BitShift", value, shifts, direction="RIGHT")
        if length * count > size:
            flat = self.call("Reshape", value, self._numbers(-1))
            value = self.call("Slice", flat, self._numbers(0), self._numbers(size))
        return self.call("Reshape", value, self._numbers(*levels.shape))

    def _numbers(self, *numbers: int) -> Any:
        return self.constant(torch.tensor(numbers, dtype=torch.int64))
