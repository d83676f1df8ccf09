"""Values of command-line options; what is wrong with one is a usage error."""

from __future__ import annotations

from argparse import ArgumentTypeError

from gdnsq_fx.spec import MAX_BITS, MIN_BITS


def bits(text: str) -> int:
    """A bit-width."""
    value = positive(text)
    if not MIN_BITS <= value <= MAX_BITS:
        raise ArgumentTypeError(f"a number from {MIN_BITS} to {MAX_BITS}")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    value = _whole(text)
    if value is None or value < 1:
        raise ArgumentTypeError(f"a whole number above 0, not {text!r}")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    value = _whole(text)
    if value is None or value < 0:
        raise ArgumentTypeError(f"a whole number of at least 0, not {text!r}")
    return value


def shape(text: str) -> tuple[int, ...]:
    """Sizes with commas between them, batch size first: ``1,3,224,224``."""
    sizes = [_whole(part) for part in text.split(",")]
    if len(sizes) < 2 or any(size is None or size < 1 for size in sizes):
        raise ArgumentTypeError(
            f"sizes above 0 with commas between, batch size first, such as "
            f"1,3,224,224; not {text!r}"
        )
    return tuple(size for size in sizes if size is not None)


def dimension(text: str) -> tuple[str, int]:
    """``NAME=SIZE``: a dimension that a file leaves open."""
    name, _, size = text.partition("=")
    value = _whole(size)
    if not name or value is None or value < 1:
        raise ArgumentTypeError(f"NAME=SIZE, such as sequence=128; not {text!r}")
    return name, value


def model_name(text: str) -> tuple[str, str]:
    """``torchvision:NAME``, ``timm:NAME`` or ``MODULE:CALLABLE``, as its two parts."""
    source, colon, name = text.partition(":")
    if not colon or not source or not name:
        raise ArgumentTypeError(
            "torchvision:NAME, timm:NAME or MODULE:CALLABLE, such as "
            f"torchvision:resnet18; not {text!r}"
        )
    return source, name


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
