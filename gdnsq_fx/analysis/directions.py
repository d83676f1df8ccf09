"""Directions sent back from the outputs, and the divergence that their products tell.

Let d be the change of the logits that the error of one edge makes, to first order, p
the softmax output, and ``s = S' d = sqrt(p) * (d - p'd)``. Then |s|^2 is the Jeffreys
divergence to second order, and for signs v, ``(S v)' d = v' s``: one backward pass from
``S v`` tells the product of every edge.

*Balanced signs.* Independent signs leave the cross terms ``s_i s_j`` as noise, and most
of |s|^2 lies on the few likeliest classes. Therefore the n signs of a class are a
column of a Hadamard matrix of order n, times one random sign: the n likeliest classes
have different columns, which are orthogonal, so that no cross term between them is
left. The others share columns; their random signs keep the mean right. From position
to position columns are shifted by one, lest the likeliest classes of all positions
share theirs.

*Saturation.* Orthogonal columns also tell each s_c itself, hence the change of its
logit ``d_c - p'd = s_c / sqrt(p_c)``, and with ``q_c`` proportional to
``p_c exp(d_c)`` the divergence without the second-order approximation of softmax,

    sum_c (q_c - p_c) d_c + m^2,    m = sum_c p_c d_c

over the n likeliest classes (the rest keeps its logits). Over all classes m is 0; over
some, the first term lacks its square to second order, as if it were common to all. It
is taken where a sample has one prediction; positions of one sample (tokens, pixels)
share their products and stay at second order. So do classes whose p_c is too small for
the division.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gdnsq_fx.analysis.divergence import Curvature, class_dim, curvature_root
from gdnsq_fx.analysis.random_signs import random_signs

LEAST_P = 1e-5  # s_c has the rounding error of all the others: 1e-7 / sqrt(p_c)
LEAST_RECOVERED = 4  # with fewer columns, too many classes share one


class Directions:
    """The vectors S v of one batch, ``draws`` of them.

    Args:
        logits: output ``[B, ..., C]`` or ``[B, C, H, W]`` at which S is taken.
        draws: how many; a power of two.
        curvature: ``softmax`` for logits; ``identity`` for a mean squared error.
        generator: of the random signs, on the CPU.
        seeds: of each sample, for signs that depend on nothing else (`random_signs`).
    """

    def __init__(
        self,
        logits: Tensor,
        draws: int,
        curvature: Curvature,
        generator: torch.Generator,
        seeds: Sequence[int] = (),
    ) -> None:
        self.logits = logits = logits.detach()
        self.draws = draws
        self.curvature: Curvature = curvature
        flips = random_signs(logits.shape, generator, seeds)
        self._flips = flips.to(logits.device)
        self._matrix = hadamard(draws, logits.device)
        self._columns = self._assigned()

    def __iter__(self) -> Iterator[Tensor]:
        """Each S v, of the shape and dtype of the logits."""
        for row in self._matrix:
            signs = (row[self._columns] * self._flips).to(self.logits.dtype)
            yield curvature_root(self.logits, signs, self.curvature)

    def divergences(self, products: Tensor) -> Tensor:
        """Predicted divergence of each sample, nats (squared error for ``identity``).

        Args:
            products: ``[..., draws, B]``, or ``[..., draws, 1]`` where samples cannot
                be told apart: inner products of the gradient of each draw with an
                error, of any number of edges.

        Returns:
            ``[..., B]`` or ``[..., 1]``, not below 0.
        """
        products = products.double()
        if self.curvature == "identity" or self.draws < LEAST_RECOVERED:
            return products.square().mean(-2)
        classes = self.logits.shape[class_dim(self.logits)]
        if self.logits.numel() != products.shape[-1] * classes:
            return products.square().mean(-2)
        return self._saturating(products)

    def _assigned(self) -> Tensor:
        """The column of each output: by rank for the likeliest, else by number."""
        logits = self.logits
        if self.curvature == "identity":
            numbers = _numbers(logits.numel(), logits)
            return numbers.view(logits.shape) % self.draws
        dim = class_dim(logits)
        shape = [1] * logits.ndim
        shape[dim] = -1
        numbers = _numbers(logits.shape[dim], logits)
        columns = (numbers % self.draws).view(shape).expand(logits.shape)
        likeliest = logits.topk(min(self.draws, len(numbers)), dim).indices
        ranks = numbers[: likeliest.shape[dim]].view(shape).expand_as(likeliest)
        columns = columns.scatter(dim, likeliest, ranks)
        one = logits.select(dim, 0)
        shifts = _numbers(one.numel(), logits).view(one.shape)
        return (columns + shifts.unsqueeze(dim)) % self.draws

    def _saturating(self, products: Tensor) -> Tensor:
        """The divergence of the likeliest classes; s_c^2 of those too unlikely."""
        rows = products.shape[-1]
        logits = self.logits.reshape(rows, -1).double()
        chosen = logits.topk(min(self.draws, logits.shape[1]), 1).indices
        columns = self._columns.reshape(rows, -1).gather(1, chosen).long()
        flips = self._flips.reshape(rows, -1).gather(1, chosen)
        p = torch.softmax(logits, 1).gather(1, chosen)
        s = products.mT @ self._matrix.double() / self.draws
        s = s.gather(-1, columns.expand(*s.shape[:-1], -1)) * flips
        known = p >= LEAST_P
        d = torch.where(known, s / p.clamp(min=LEAST_P).sqrt(), 0.0)
        rest = (1.0 - p.sum(1, keepdim=True)).clamp(min=0.0)
        moved = p.log() + d
        rest = rest.log().expand(*moved.shape[:-1], -1)
        q = torch.softmax(torch.cat([moved, rest], -1), -1)[..., :-1]
        second = torch.where(known, 0.0, s.square()).sum(-1)
        missing = (p * d).sum(-1).square()
        return ((q - p) * d).sum(-1).clamp(min=0.0) + missing + second


def _numbers(count: int, logits: Tensor) -> Tensor:
    return torch.arange(count, device=logits.device, dtype=torch.int32)


def hadamard(order: int, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix ``[order, order]`` of +-1; order a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < order:
        top = torch.cat([matrix, matrix], 1)
        matrix = torch.cat([top, torch.cat([matrix, -matrix], 1)])
    return matrix
