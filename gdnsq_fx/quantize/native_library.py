"""Compiles and loads the kernels in C, once for each process that wants them.

It takes less than a second, in a folder of the process's own: nothing stays behind, and
nobody else can put a file in its place.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from gdnsq_fx.quantize.levels import activation_levels

logger = logging.getLogger(__name__)

# Each operation rounds by itself, as in torch; nothing is assumed of NaN and infinity.
_FLAGS = (
    "-O3", "-std=c11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip
_PARALLEL = "-fopenmp"
# From the fastest to what every compiler takes.
_TIERS = (("-march=native", _PARALLEL), ("-march=native", "-fopenmp-simd"), ())
# Torch leaves smaller tensors to one thread, too.
_ELEMENTS_OF_A_THREAD = 32768
_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_INTEGER = ctypes.c_int
_SIGNATURES = {
    "weight_grid": (*[_POINTER] * 3, _COUNT, *[_NUMBER] * 2, *[_POINTER] * 2),
    "weight_levels": (*[_POINTER] * 2, *[_COUNT] * 2, *[_POINTER] * 3, _INTEGER),
    "weight_gradients": (*[_POINTER] * 2, *[_COUNT] * 2, *[_POINTER] * 5, _INTEGER),
    "extremes": (_POINTER, *[_COUNT] * 3, *[_POINTER] * 4, _INTEGER),
    "activation_grid": (*[_POINTER] * 3, _NUMBER, *[_POINTER] * 3),
    "activation_levels": (
        *[_POINTER] * 2, *[_COUNT] * 3, _POINTER, *[_INTEGER] * 2,
    ),
    "activation_gradients": (
        *[_POINTER] * 3, *[_COUNT] * 3, _POINTER, _INTEGER, *[_POINTER] * 4, _INTEGER,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Library:
    """The functions of ``native.c``, and whether they use several threads."""

    weight_grid: Callable[..., None]
    weight_levels: Callable[..., None]
    weight_gradients: Callable[..., None]
    extremes: Callable[..., None]
    activation_grid: Callable[..., None]
    activation_levels: Callable[..., None]
    activation_gradients: Callable[..., None]
    is_parallel: bool

    def threads(self, elements: int) -> int:
        """How many to use for a tensor: a team for few values costs more than it gains,
        and a process forked from one that has a team must not wait for it."""
        useful = -(-elements // _ELEMENTS_OF_A_THREAD)
        return min(torch.get_num_threads(), useful) if self.is_parallel else 1


@cache
def library() -> Library | None:
    """The compiled library; None, and one line in the log, where there is none."""
    try:
        found = _compiled()
        if not _agrees(found):
            raise RuntimeError("it computes other levels than torch")
    # A compiler can be missing, be named wrongly, refuse or hang, and what it wrote may
    # not load.
    except (
        OSError,
        RuntimeError,
        ValueError,
        AttributeError,
        subprocess.SubprocessError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        logger.info(
            "quantizers on CPUs run eager kernels: no kernels in C (%s)", reason
        )
        return None
    if not found.is_parallel:
        logger.info("kernels in C run where torch uses one thread: no OpenMP of GCC")
    return found


def _compiled() -> Library:
    source = resources.files(__package__ or "").joinpath("native.c").read_bytes()
    command, refusal = _compiler(), ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "native.so"
        for extra in _TIERS:
            done = subprocess.run(
                [*command, *_FLAGS, *extra, "-x", "c", "-", "-o", str(path), "-lm"],
                input=source,
                capture_output=True,
                timeout=60.0,
            )
            if done.returncode == 0:
                return _loaded(path, parallel=_PARALLEL in extra)
            refusal = done.stderr.decode(errors="replace")
    raise RuntimeError(f"{command[0]}: {refusal}")


def _compiler() -> list[str]:
    """The command, ``CC`` of the environment or what is usual."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        return asked
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("neither cc, gcc nor clang is there, and CC is not set")


def _loaded(path: Path, *, parallel: bool) -> Library:
    found = ctypes.CDLL(str(path))
    functions: dict[str, Any] = {}
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, f"gdnsq_{name}")
        function.argtypes, function.restype = arguments, None
        functions[name] = function
    return Library(**functions, is_parallel=parallel)


def _agrees(found: Library) -> bool:
    """Whether grids and levels are those of torch, halves and NaN included."""
    as_read: Any = {"dtype": torch.float32, "device": "cpu"}
    x = torch.arange(-40.0, 40.0, **as_read).div_(8.0)
    x[0] = torch.nan
    made, grid = torch.empty_like(x), torch.tensor([0.25, 2.0, -0.75], **as_read)
    found.activation_levels(
        x.data_ptr(), made.data_ptr(), 1, x.numel(), 0, grid.data_ptr(), 1, 1
    )
    wanted = activation_levels(x, *grid.unbind())
    alike = torch.allclose(made, wanted, rtol=0.0, atol=0.0, equal_nan=True)
    return alike and all(_has_step(found, 0.37 * one) for one in range(-40, 10))


def _has_step(found: Library, log2_step: float) -> bool:
    """Whether a step is the float that torch has: the last bit of 2^x is up to whoever
    wrote the function."""
    as_read: Any = {"dtype": torch.float32, "device": "cpu"}
    given = torch.tensor(log2_step, **as_read)
    step, range_ = torch.empty_like(given), torch.empty_like(given)
    found.activation_grid(
        given.data_ptr(), given.data_ptr(), None, 0.0, step.data_ptr(),
        range_.data_ptr(), None,
    )  # fmt: skip
    return bool(torch.equal(step, torch.exp2(given)))
