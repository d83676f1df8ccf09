"""Files that appear whole or not at all, one or several that belong together."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Generator[Path]:
    """A path to write to instead, in a folder of its own on the same disk.

    What the block leaves in that folder takes the place of files of the same names
    beside ``path``, the file at ``path`` last: until then a reader finds the old one.
    After an error in the block nothing has changed.

    Args:
        path: file to write or replace; a symbolic link is followed.

    Raises:
        OSError: ``path`` is a directory, or its folder is missing.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "give the path of a file", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "no such folder; create it first", str(target.parent)
        )
    folder = Path(tempfile.mkdtemp(prefix=".gdnsq_fx-", dir=target.parent))
    try:
        yield folder / target.name
        others = sorted(p for p in folder.iterdir() if p.name != target.name)
        for written in [*others, folder / target.name]:
            with written.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(written, target.parent / written.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
