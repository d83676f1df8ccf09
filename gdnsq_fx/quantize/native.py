"""Kernels in C (``native.c``), compiled when the first quantizer on a CPU wants them.

Each reads and writes a tensor once, where eager operations pass over it several times,
and costs a call where those cost a dozen. They serve dense float32 tensors on the CPU,
and the estimator ``lsq`` in backward; whatever else comes, and every machine without a
C compiler, is left to the eager kernels. Levels are the same to the bit, sums for
gradients to rounding.

The library is compiled for each process in a folder of its own, in less than a second:
nothing stays behind, and nobody else can put a file in its place.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.quantize import levels as eager
from gdnsq_fx.quantize.blocks import is_dense, is_plain, memory_rows

logger = logging.getLogger(__name__)

# Each operation rounds by itself, as in torch; nothing is assumed of NaN and infinity.
_FLAGS = (
    "-O3", "-std=c11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip
_PARALLEL = "-fopenmp"
# `PIECE` of native.c.
_PIECE = 4096
_POINTER, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "levels": (*[_POINTER] * 2, *[_COUNT] * 2, *[_POINTER] * 3, _THREADS),
    "activation_levels": (*[_POINTER] * 2, _COUNT, *[_POINTER] * 3, _THREADS),
    "activation_gradients": (*[_POINTER] * 3, _COUNT, *[_POINTER] * 5, _THREADS),
    "weight_gradients": (*[_POINTER] * 2, *[_COUNT] * 2, *[_POINTER] * 5, _THREADS),
    "extremes": (_POINTER, *[_COUNT] * 2, *[_POINTER] * 2, _THREADS),
}


@dataclass(frozen=True)
class _Library:
    """The functions of ``native.c``, and whether they use several threads."""

    levels: Callable[..., None]
    activation_levels: Callable[..., None]
    activation_gradients: Callable[..., None]
    weight_gradients: Callable[..., None]
    extremes: Callable[..., None]
    is_parallel: bool

    def threads(self) -> int:
        """As many as torch uses."""
        return torch.get_num_threads() if self.is_parallel else 1


def serves(value: Tensor, *scalars: Tensor | None) -> bool:
    """Whether the kernels can read such a tensor, and there are any."""
    if not _is_readable(value) or not is_dense(value):
        return False
    if not all(s is None or (_is_readable(s) and s.is_contiguous()) for s in scalars):
        return False
    if _is_watched():
        return False
    found = library()
    return found is not None and (found.is_parallel or torch.get_num_threads() == 1)


def serves_rows(weight: Tensor, *scales: Tensor | None) -> bool:
    """Whether they can read a weight with a grid for each row of memory."""
    step = scales[0]
    assert step is not None, "there is no grid without a step"
    return memory_rows(weight, step) > 0 and serves(weight, *scales)


def activation_levels(
    x: Tensor, step: Tensor, range_: Tensor, lower: Tensor | None
) -> Tensor:
    """As `gdnsq_fx.quantize.levels.activation_levels`, of what `serves` allows."""
    made = torch.empty_like(x)
    _library().activation_levels(
        x.data_ptr(), made.data_ptr(), x.numel(), *_pointers(step, range_, lower),
        _library().threads(),
    )  # fmt: skip
    return made


def weight_levels(
    weight: Tensor, step: Tensor, lower: Tensor, top: Tensor | None
) -> Tensor:
    """As `gdnsq_fx.quantize.levels.weight_levels`, of what `serves_rows` allows."""
    made = torch.empty_like(weight)
    _library().levels(
        weight.data_ptr(), made.data_ptr(), *_rows_and_length(weight, step),
        *_pointers(step, lower, top), _library().threads(),
    )  # fmt: skip
    return made


def activation_gradients(
    x: Tensor,
    gradient: Tensor,
    step: Tensor,
    range_: Tensor,
    lower: Tensor | None,
    into: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Gradients of `quantize_activation` by ``lsq`` for x, step, range, lower bound.

    Args:
        x, step, range_, lower: what `activation_levels` took.
        gradient: the one that arrives, of the shape of x.
        into: a tensor like x that the gradient of x may be written over, or None.

    Returns:
        None where the gradient is not a tensor that the kernels can read.
    """
    gradient = _like(gradient, x)
    if not _is_readable(gradient):
        return None
    into = torch.empty_like(x) if into is None else into
    sums = torch.empty(3 * _pieces(x.numel()), dtype=torch.float64)
    found = torch.empty(3)
    _library().activation_gradients(
        x.data_ptr(), gradient.data_ptr(), into.data_ptr(), x.numel(),
        *_pointers(step, range_, lower), sums.data_ptr(), found.data_ptr(),
        _library().threads(),
    )  # fmt: skip
    by_step, by_range, by_lower = found.unbind()
    return into, by_step, by_range, by_lower


def weight_gradients(
    weight: Tensor, gradient: Tensor, step: Tensor, lower: Tensor, top: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Gradients of `quantize_weight` by ``lsq`` for weight and step; None as above."""
    gradient = _like(gradient, weight)
    if not _is_readable(gradient):
        return None
    rows, length = _rows_and_length(weight, step)
    sums = torch.empty(rows * _pieces(length), dtype=torch.float64)
    by_step = torch.empty_like(step)
    _library().weight_gradients(
        weight.data_ptr(), gradient.data_ptr(), rows, length,
        *_pointers(step, lower, top), sums.data_ptr(), by_step.data_ptr(),
        _library().threads(),
    )  # fmt: skip
    return gradient, by_step


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of each row of a contiguous matrix, ``[rows]`` each."""
    low, high = torch.empty(2, len(rows)).unbind()
    _library().extremes(
        rows.data_ptr(), *rows.shape, low.data_ptr(), high.data_ptr(),
        _library().threads(),
    )  # fmt: skip
    return low, high


@cache
def library() -> _Library | None:
    """The compiled library; None, and one line in the log, where there is none."""
    try:
        found = _compiled()
        if not _agrees(found):
            raise RuntimeError("what it compiled computes other levels")
    # A compiler can be missing, refuse or hang, and what it wrote may not load.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().partition("\n")[0]
        logger.info("quantizers run eager kernels on CPUs: no C compiler (%s)", reason)
        return None
    return found


def _library() -> _Library:
    found = library()
    assert found is not None, "whoever calls has asked `serves`"
    return found


def _compiled() -> _Library:
    source = resources.files(__package__ or "").joinpath("native.c").read_bytes()
    command = _compiler()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "native.so"
        for extra in (("-march=native", _PARALLEL), ("-march=native",), ()):
            done = subprocess.run(
                [*command, *_FLAGS, *extra, "-x", "c", "-", "-o", str(path), "-lm"],
                input=source,
                capture_output=True,
                timeout=60.0,
            )
            if done.returncode == 0:
                return _loaded(path, parallel=_PARALLEL in extra)
    raise RuntimeError(f"{command[0]}: {done.stderr.decode(errors='replace')}")


def _compiler() -> list[str]:
    """The command, ``CC`` of the environment or what is usual."""
    asked = os.environ.get("CC")
    if asked:
        return shlex.split(asked)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("neither cc, gcc nor clang is there, and CC is not set")


def _loaded(path: Path, *, parallel: bool) -> _Library:
    found = ctypes.CDLL(str(path))
    functions: dict[str, Any] = {}
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, f"gdnsq_{name}")
        function.argtypes, function.restype = arguments, None
        functions[name] = function
    return _Library(**functions, is_parallel=parallel)


def _agrees(found: _Library) -> bool:
    """Whether a grid has the levels that torch gives it, halves and NaN included."""
    x = torch.arange(-40.0, 40.0).div_(8.0)
    x[0] = torch.nan
    step, range_, lower = torch.tensor([0.25, 2.0, -0.75]).unbind()
    made = torch.empty_like(x)
    found.activation_levels(
        x.data_ptr(), made.data_ptr(), x.numel(), *_pointers(step, range_, lower), 1
    )
    wanted = eager.activation_levels(x, step, range_, lower)
    return torch.allclose(made, wanted, rtol=0.0, atol=0.0, equal_nan=True)


def _is_readable(value: Tensor) -> bool:
    """Whether its memory holds its values, as float32; it has some."""
    plain = is_plain(value) and value.layout is torch.strided and not value.is_neg()
    on_cpu = plain and value.device.type == "cpu"
    return on_cpu and value.dtype == torch.float32 and value.data_ptr() != 0


def _is_watched() -> bool:
    """Whether tracers or counters see every operation, and would miss these."""
    inner: Any = getattr(torch, "_C")  # noqa: B009
    return bool(inner._len_torch_dispatch_stack() or inner._is_tracing())


def _like(gradient: Tensor, value: Tensor) -> Tensor:
    """The gradient in the strides of the value, as one of a sum has none of its own."""
    if gradient.stride() == value.stride():
        return gradient
    return torch.empty_like(value).copy_(gradient)


def _rows_and_length(weight: Tensor, step: Tensor) -> tuple[int, int]:
    rows = memory_rows(weight, step)
    return rows, weight.numel() // rows


def _pieces(length: int) -> int:
    return -(-length // _PIECE)


def _pointers(*tensors: Tensor | None) -> Sequence[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]
