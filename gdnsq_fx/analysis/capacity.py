"""Formulas of one noisy channel: capacity, entropy, signal to noise. Bits are log2.

Source: GDNSQ (arXiv 2508.14004): an edge quantized to L levels is a channel that
carries at most log2(L) bits per element; the entropy of its codes is what it does
carry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_SQNR_DB = 200.0
FLOAT_BITS = 32
MAX_BINS = 1 << 24
PAIRED_LEVELS = 64  # their pairs have counts that stay in the cache
PAIRED_CODES = 1 << 14
NORM_ROW = 1 << 12  # short enough for a sum in float32 to be accurate to its last bits


def capacity_bits(elements: Tensor, levels: Tensor) -> float:
    """sum_c N_c * log2(L_c), bits.

    Args:
        elements: elements of each scale group, or one number.
        levels: levels of each scale group, of a broadcastable shape.
    """
    return float((elements * torch.log2(levels.double())).sum())


def code_counts(codes: Tensor, levels: int) -> Tensor:
    """Occurrences of each whole code 0 .. levels - 1, int64 ``[levels]``.

    Many codes of few levels are counted in pairs: most of the time goes into
    increments, of which pairs need half as many.

    Args:
        codes: any shape, whole numbers as floats, below ``levels``.
        levels: at most 2^16.
    """
    flat = codes.reshape(-1)
    # Converting to a small type takes less time, and so does reading it.
    kind = torch.int16 if levels <= 1 << 15 else torch.int32
    half = flat.numel() // 2
    if levels > PAIRED_LEVELS or half < PAIRED_CODES:
        return torch.bincount(flat.to(kind), minlength=levels)
    pairs = torch.add(flat[half : 2 * half], flat[:half], alpha=levels)
    joint = torch.bincount(pairs.to(kind), minlength=levels**2).view(levels, levels)
    rest = torch.bincount(flat[2 * half :].to(kind), minlength=levels)
    return joint.sum(0) + joint.sum(1) + rest


def entropy_bits(counts: Tensor) -> float:
    """sum_c N_c * H(counts_c / N_c), bits, of histograms along the last dimension.

    Args:
        counts: occurrences of each code, ``[..., codes]``; N_c is the sum of a row.
    """
    counts = counts.double()
    totals = counts.sum(-1, keepdim=True).clamp(min=1.0)
    shares = counts / totals
    return max(float(-(counts * shares.clamp(min=1e-300).log2()).sum()), 0.0)


def grouped_entropy_bits(codes: Tensor, groups: int) -> float:
    """Entropy of whole codes where each scale group has an alphabet of its own, bits.

    Args:
        codes: ``[groups, elements]`` codes as floats.
        groups: number of scale groups.
    """
    rows = codes.reshape(groups, -1)
    alphabet = int(rows.max()) + 1
    few = groups * alphabet <= MAX_BINS  # whole numbers so small are exact as floats
    kind = torch.float32 if few else torch.float64
    first = torch.arange(groups, device=codes.device, dtype=kind).mul_(alphabet)
    shifted = rows.to(kind).add(first.unsqueeze(1)).reshape(-1)
    if few:
        counts = torch.bincount(shifted.to(torch.int32)).double()
        counts = counts[counts > 0]
    else:  # many codes, most of them absent: sorting takes less memory
        counts = torch.unique(shifted, return_counts=True)[1].double()
    return max(float(-(counts * (counts / rows.shape[1]).log2()).sum()), 0.0)


def sum_of_squares(value: Tensor) -> Tensor:
    """Float64 scalar, from float32 norms of short rows: no wide copy is made.

    Args:
        value: any shape, floating point; squares must be numbers of float32.
    """
    flat = value.reshape(-1)
    whole = flat.numel() // NORM_ROW * NORM_ROW
    kind = torch.promote_types(value.dtype, torch.float32)
    norms = [
        torch.linalg.vector_norm(rows, dim=1, dtype=kind).double()
        for rows in (flat[:whole].view(-1, NORM_ROW), flat[whole:].view(1, -1))
    ]
    return torch.cat(norms).square().sum()


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), dB; at most 200 where the edge is exact.

    Args:
        signal: sum of squares of the value.
        noise: sum of squares of the quantization error.
    """
    if noise <= signal * 10.0 ** (-MAX_SQNR_DB / 10.0):
        return MAX_SQNR_DB
    return 10.0 * math.log10(max(signal, 1e-300) / noise)
