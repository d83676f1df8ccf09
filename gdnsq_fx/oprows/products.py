"""Products of tensors: matrix products, einsum, attention."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from gdnsq_fx.channels import PER_TENSOR, ChannelLayout
from gdnsq_fx.operands import Operand, Shape
from gdnsq_fx.opinfo import OpInfo

# --- matrix products --------------------------------------------------------------


def _matmul_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    return math.prod(output) * arguments["input"][-1]


def _added_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """The product alone; a sum over the batch (addbmm) takes as many."""
    del output
    left, right = arguments["left"], arguments["right"]
    return math.prod(left) * (right[-1] if len(right) > 1 else 1)


def _tensordot_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """Inputs of a*c and c*b elements make an output of a*b: c is their common size."""
    size = math.prod(output)
    elements = math.prod(arguments["input"]) * math.prod(arguments["other"])
    return size * math.isqrt(elements // max(size, 1))


def _matmul_layout(bound: Mapping[str, Any], operand: Operand) -> ChannelLayout:
    """Columns of the right factor, rows of the left one, are output channels."""
    del bound
    return ChannelLayout(-1 if operand.argument in ("other", "right") else -2)


def _matmul_order(target: object, args: Sequence[Any]) -> Sequence[str] | None:
    del args
    return ("other", "input") if target == "__rmatmul__" else None


# --- einsum -----------------------------------------------------------------------


def _terms(equation: str) -> tuple[list[str], str]:
    """Labels of each operand and of the output, ``...`` as one dot."""
    left, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    if not arrow:
        found = sorted(set(left) - {",", "."})
        output = "." * ("." in left) + "".join(c for c in found if left.count(c) == 1)
    return left.split(","), output


def _einsum_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """Product of the sizes of all labels; those of an ellipsis broadcast."""
    del output
    terms, _ = _terms(arguments["equation"])
    sizes: dict[str, int] = {}
    for labels, shape in zip(terms, arguments["operands"], strict=True):
        hidden = len(shape) - len(labels) + ("." in labels)
        before, _, after = labels.partition(".")
        # Dimensions of an ellipsis align at their ends.
        middle = [f".{i}" for i in range(hidden, 0, -1)] if "." in labels else []
        for label, size in zip([*before, *middle, *after], shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return math.prod(sizes.values())


def _einsum_layout(bound: Mapping[str, Any], operand: Operand) -> ChannelLayout:
    """The last label that this operand alone hands on to the output."""
    terms, output = _terms(bound["equation"])
    mine = terms[operand.index or 0]
    others = "".join(t for i, t in enumerate(terms) if i != operand.index)
    free = [c for c in mine if c != "." and c in output and c not in others]
    if not free or mine.count(free[-1]) > 1:
        return PER_TENSOR
    place = mine.index(free[-1])
    # Behind an ellipsis only the distance from the end is known.
    return ChannelLayout(place - len(mine) if "." in mine[:place] else place)


def _einsum_refusal(bound: Mapping[str, Any]) -> str | None:
    equation = bound.get("equation")
    if not isinstance(equation, str):
        return "einsum with lists of indices is not read; write its equation as text"
    if len(cast(Sequence[Any], bound.get("operands", ()))) < 2:
        return "einsum of one tensor multiplies nothing"
    return None


# --- attention --------------------------------------------------------------------


def _attention_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """Both products, query * key and attention weights * value."""
    query, key = arguments["query"], arguments["key"]
    positions = math.prod(output[:-1]) * key[-2]
    return positions * (query[-1] + output[-1])


def _second_product(arguments: Mapping[str, Any], output: Shape) -> int:
    return math.prod(output) * arguments["key"][-2]


PRODUCTS = (
    OpInfo(
        "matmul",
        ("input", "other"),
        roles={"input": "activation", "other": "activation"},
        functions=(
            *(torch.matmul, operator.matmul, operator.imatmul, torch.linalg.matmul),
            *(torch.bmm, torch.mm, torch.mv, torch.dot),
        ),
        methods=("matmul", "bmm", "mm", "mv", "dot", "__matmul__", "__rmatmul__"),
        aliases={
            **{"mat2": "other", "vec": "other", "tensor": "other"},
            **{"tensor1": "input", "tensor2": "other"},
        },
        order=_matmul_order,
        macs=_matmul_macs,
        layout=_matmul_layout,
    ),
    OpInfo(
        "inner",
        ("input", "other"),
        roles={"input": "activation", "other": "activation"},
        functions=(torch.inner,),
        methods=("inner",),
        macs=_matmul_macs,
        layout=ChannelLayout(axis=0),
    ),
    OpInfo(
        "addmm",
        ("input", "left", "right", "beta", "alpha"),
        roles={"input": "bias", "left": "activation", "right": "activation"},
        functions=(torch.addmm, torch.baddbmm, torch.addbmm, torch.addmv),
        methods=(
            *("addmm", "baddbmm", "addbmm", "addmv"),
            *("addmm_", "baddbmm_", "addbmm_", "addmv_"),
        ),
        aliases={
            **{"mat1": "left", "mat2": "right", "mat": "left", "vec": "right"},
            **{"batch1": "left", "batch2": "right"},
        },
        macs=_added_macs,
        layout=_matmul_layout,
        linear=False,
    ),
    OpInfo(
        "tensordot",
        ("input", "other", "dims"),
        roles={"input": "activation", "other": "activation"},
        functions=(torch.tensordot,),
        aliases={"a": "input", "b": "other"},
        macs=_tensordot_macs,
    ),
    OpInfo(
        "einsum",
        ("equation", "*operands"),
        roles={"operands": "activation"},
        functions=(torch.einsum,),
        macs=_einsum_macs,
        layout=_einsum_layout,
        refusal=_einsum_refusal,
    ),
    OpInfo(
        "attention",
        (
            *("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
            *("scale", "enable_gqa"),
        ),
        roles={"query": "activation", "key": "activation", "value": "activation"},
        functions=(F.scaled_dot_product_attention,),
        macs=_attention_macs,
        inner_macs=_second_product,
        inner="the attention weights",
        linear=False,
    ),
)
