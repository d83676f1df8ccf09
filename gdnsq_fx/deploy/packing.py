"""Dense bit packing: integer codes of 1 to 16 bits stored without gaps between them.

Bit order is little-endian throughout. Code ``n`` (flat, row-major index) occupies bits
``n * bits .. (n + 1) * bits - 1`` of the stream, its least significant bit first, and
bit ``m`` of the stream is bit ``m % 8`` (value ``2 ** (m % 8)``) of byte ``m // 8``.
The unused high bits of the last byte are zero. Example, 3 bits, codes 5, 1, 2::

    stream  101 100 010 (each code low bit first) -> byte 0 = 0b10001101, byte 1 = 0

Eight codes fill exactly ``bits`` bytes, whatever ``bits`` is. Both directions therefore
work on groups of eight codes, and on bounded chunks of groups, so that the temporaries
do not grow with the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gdnsq_fx.errors import ConfigError, FileFormatError

MAX_BITS = 16
MAX_DIMS = 64
"""Most dimensions that a stored shape may have (torch's iterators know no more)."""

_GROUP = 8
# 2048 groups keep each operation below the size at which torch starts its thread pool:
# ten times faster on a loaded machine, and never slower on an idle one.
_CHUNK_GROUPS = 1 << 11
_MAX_NUMEL = 2**63 - 1
_INTEGER_DTYPES = frozenset(
    {
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    }
)


def packed_size(numel: int, bits: int) -> int:
    """Return ``ceil(numel * bits / 8)``, the bytes that ``numel`` codes occupy."""
    return (numel * bits + 7) // 8


def checked_numel(shape: Sequence[int]) -> int:
    """Return the number of elements of ``shape``, allocating nothing.

    Raises:
        ConfigError: ``shape`` has more than 64 dimensions, a dimension that is not a
            non-negative int, or more elements than a signed 64-bit index can count.
    """
    if len(shape) > MAX_DIMS:
        raise ConfigError(
            f"a shape of {len(shape)} dimensions; flatten it to at most {MAX_DIMS}"
        )
    # Zeros count as one: torch computes strides of an empty tensor in the same way.
    span = math.prod(max(size, 1) for size in shape)
    if any(size < 0 for size in shape) or span > _MAX_NUMEL:
        raise ConfigError(
            f"shape {list(shape)} is impossible; give non-negative sizes with a product"
            " below 2**63"
        )
    return math.prod(shape)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes densely, in the bit order that the module docstring gives.

    Args:
        codes: integer tensor of any shape, values in ``0 .. 2**bits - 1``.
        bits: bits of one code, 1 to 16.

    Returns:
        uint8 tensor of shape ``[ceil(codes.numel() * bits / 8)]``, on the same device.

    Raises:
        ConfigError: ``bits`` is out of range, ``codes`` is not an integer tensor, or a
            code needs more than ``bits`` bits.
    """
    _check_bits(bits)
    if codes.dtype not in _INTEGER_DTYPES:
        raise ConfigError(
            f"codes to pack are {codes.dtype}; convert them to an integer dtype such as"
            " torch.uint8 first"
        )
    flat = codes.detach().reshape(-1)
    numel = flat.numel()
    packed = torch.empty(
        packed_size(numel, bits), dtype=torch.uint8, device=codes.device
    )
    for group in range(0, -(-numel // _GROUP), _CHUNK_GROUPS):
        chunk = flat[group * _GROUP : (group + _CHUNK_GROUPS) * _GROUP]
        if chunk.dtype != torch.uint8:  # not all integers can be compared
            chunk = chunk.to(torch.int64)
        _check_range(chunk, bits)
        start = group * bits
        packed[start : start + _CHUNK_GROUPS * bits] = _pack_chunk(chunk, bits)
    return packed


def unpack_bits(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Undo ``pack_bits``.

    Args:
        packed: uint8 tensor of shape ``[ceil(prod(shape) * bits / 8)]``.
        bits: bits of one code, 1 to 16.
        shape: shape of the result.

    Returns:
        Tensor of shape ``shape`` with values in ``0 .. 2**bits - 1``, on the same
        device: uint8 for ``bits <= 8``, else int32.

    Raises:
        ConfigError: ``bits`` or ``shape`` is out of range.
        FileFormatError: ``packed`` is not a flat uint8 tensor of the size that
            ``shape`` and ``bits`` ask for. Nothing is allocated before this is known.
    """
    _check_bits(bits)
    numel = checked_numel(shape)
    size = packed_size(numel, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != size:
        raise FileFormatError(
            f"packed codes are {packed.dtype} of shape {list(packed.shape)}, but shape"
            f" {list(shape)} at {bits} bits takes torch.uint8 of shape [{size}]; the"
            " packed data and their description do not belong together"
        )
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.empty(numel, dtype=dtype, device=packed.device)
    for group in range(0, -(-numel // _GROUP), _CHUNK_GROUPS):
        chunk = packed[group * bits : (group + _CHUNK_GROUPS) * bits]
        target = codes[group * _GROUP : (group + _CHUNK_GROUPS) * _GROUP]
        target.copy_(_unpack_chunk(chunk, bits)[: target.numel()])
    return codes.reshape(tuple(shape))


def _pack_chunk(codes: Tensor, bits: int) -> Tensor:
    """Pack ``[n]`` codes into ``[ceil(n * bits / 8)]`` uint8."""
    if 8 % bits == 0:
        return _pack_whole_bytes(codes.to(torch.uint8), bits)
    columns = _columns(codes.to(torch.int32), _GROUP)
    packed = columns.new_zeros(bits, columns.shape[1])
    for index in range(_GROUP):
        first, shift = divmod(index * bits, 8)
        last = (index * bits + bits - 1) // 8
        window = columns[index] << shift
        for byte in range(first, last + 1):
            packed[byte] |= (window >> 8 * (byte - first)) & 0xFF
    size = packed_size(codes.numel(), bits)
    return packed.to(torch.uint8).t().reshape(-1)[:size]


def _pack_whole_bytes(codes: Tensor, bits: int) -> Tensor:
    """The same of uint8 codes that cross no boundary of bytes."""
    columns = _columns(codes, 8 // bits)
    packed = columns[0]
    for index in range(1, len(columns)):
        packed |= columns[index] << index * bits
    return packed


def _unpack_chunk(packed: Tensor, bits: int) -> Tensor:
    """Unpack ``[m]`` uint8 into int32 codes, those of the padding included."""
    columns = _columns(packed.to(torch.int32), bits)
    codes = columns.new_empty(_GROUP, columns.shape[1])
    for index in range(_GROUP):
        first, shift = divmod(index * bits, 8)
        last = (index * bits + bits - 1) // 8
        window = columns[first]
        for byte in range(first + 1, last + 1):
            window = window | (columns[byte] << 8 * (byte - first))
        codes[index] = (window >> shift) & (2**bits - 1)
    return codes.t().reshape(-1)


def _columns(flat: Tensor, width: int) -> Tensor:
    """Pad ``[n]`` with zeros to rows of ``width``; return ``[width, rows]``.

    Contiguous columns keep each shift and mask one pass over adjacent memory.
    """
    rows = -(-flat.numel() // width)
    padded = flat.new_zeros(rows * width)
    padded[: flat.numel()] = flat
    return padded.reshape(rows, width).t().contiguous()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"codes of {bits} bits cannot be packed; use 1 to {MAX_BITS}")


def _check_range(chunk: Tensor, bits: int) -> None:
    low, high = (int(bound) for bound in chunk.aminmax())
    if low < 0 or high >= 2**bits:
        raise ConfigError(
            f"codes span {low}..{high}, but {bits} bits hold 0..{2**bits - 1}; subtract"
            " the lowest code first, or pack with more bits"
        )
