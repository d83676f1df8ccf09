"""What commands do before and around their work."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gdnsq_fx.errors import ConfigError


def check_writable(path: Path | None) -> None:
    """Before minutes of work, not after.

    Raises:
        ConfigError: a folder stands there, or there is none to write to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} to write {path.name} to")


def warn(message: str) -> None:
    """Print a warning."""
    print(f"gdnsq-fx: warning: {message}", file=sys.stderr)


@contextmanager
def current_folder_first() -> Generator[None, None, None]:
    """As with ``python -m``; the console script alone would not find it."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
