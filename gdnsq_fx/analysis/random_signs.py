"""Random signs of a batch, drawn in its order or from what each sample holds.

In order, the signs of a sample depend on its place, and a prediction on how samples are
cut into batches. Drawn from the content of the sample they do not, so that processes
that share a batch find, all together, what one process would.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

SEED_BYTES = 8


def random_signs(
    shape: Sequence[int], generator: torch.Generator, seeds: Sequence[int] = ()
) -> Tensor:
    """Signs +-1, int8 on the CPU: vocabularies are large.

    Args:
        shape: of the signs, samples first.
        generator: on the CPU; with seeds its state means nothing afterwards.
        seeds: of each sample; without them, and where dimension 0 holds no whole number
            of rows for each, signs are drawn in order.
    """
    rows = shape[0] if shape else 0
    if not seeds or rows % len(seeds):
        drawn = _bits(prod(shape), generator)
    else:
        each = prod(shape) // len(seeds)
        parts = [_bits(each, generator.manual_seed(seed)) for seed in seeds]
        drawn = torch.cat(parts)
    return drawn.reshape(tuple(shape)) * 2 - 1


def content_seeds(inputs: Any, samples: int) -> list[int]:
    """A seed for each sample, by the bytes of it in all input tensors.

    Args:
        inputs: tensors, however nested; those with another dimension 0 do not count.
        samples: size of the batch.
    """
    digests = [blake2b(digest_size=SEED_BYTES) for _ in range(samples)]
    for leaf in tree_leaves(inputs):
        if not _is_batched(leaf, samples):
            continue
        rows = leaf.detach().cpu().contiguous().reshape(samples, -1).view(torch.uint8)
        for digest, row in zip(digests, rows.numpy(), strict=True):
            digest.update(row)
    return [int.from_bytes(one.digest(), "little", signed=True) for one in digests]


def _bits(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8)


def _is_batched(leaf: object, samples: int) -> bool:
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        return False
    return leaf.ndim > 0 and leaf.shape[0] == samples and leaf.numel() > 0
