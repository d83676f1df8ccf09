"""A folder of checkpoints: the last two of one run, each one safetensors file.

    step-000000200.safetensors     tensors; who the run is, and a digest, as JSON
    step-000000250.safetensors

A file appears whole or not at all (written under another name, flushed, renamed). The
digest covers every value, so a damaged file is noticed, and the one before it is used.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from gdnsq_fx.deploy.files import FileContents, read_file, write_file
from gdnsq_fx.errors import CheckpointError, CheckpointWarning, FileFormatError

KEPT = 2
_NAME = re.compile(r"step-(\d{9})\.safetensors")
_TEMPORARY = ".gdnsq_fx-*.tmp"
_KIND = "fine-tuning checkpoint"

Identity = Mapping[str, str]
"""What makes a run the same run: setting -> its value, printed."""


class CheckpointFolder:
    """Where a run keeps its state.

    Args:
        path: folder, created where it is missing. Other files in it are left alone.
        identity: of the run; checkpoints of any other are refused.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Identity) -> None:
        self.path = Path(path)
        self.identity = dict(identity)
        self.path.mkdir(parents=True, exist_ok=True)
        for left_over in self.path.glob(_TEMPORARY):
            left_over.unlink(missing_ok=True)  # of a run killed while it wrote

    def clear(self) -> None:
        """Delete all checkpoints."""
        for file in self._files().values():
            file.unlink(missing_ok=True)

    def write(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Add a checkpoint, then drop all but the last two.

        Args:
            done: optimizer steps taken, at least 0.
            state: what `read` is to return.

        Raises:
            OSError: no space, or no right to write; the earlier checkpoints stand.
            ConfigError: a tensor of a dtype that safetensors does not know.
        """
        description = {
            "kind": _KIND,
            "done": done,
            "identity": self.identity,
            "digest": digest(state),
        }
        file = self.path / f"step-{done:09d}.safetensors"
        write_file(file, state, {}, description)
        _flush(self.path)
        earlier = [n for n in sorted(self._files()) if n < done]
        kept = {done, *earlier[-(KEPT - 1) :]}
        for number, old in self._files().items():
            if number not in kept:
                old.unlink(missing_ok=True)

    def read(self) -> tuple[int, dict[str, Tensor]] | None:
        """The newest whole checkpoint: (steps taken, state); None if there is none.

        A damaged file is passed over with a `CheckpointWarning`.

        Raises:
            CheckpointError: it belongs to another run.
        """
        for _, file in sorted(self._files().items(), reverse=True):
            try:
                contents = _checked(read_file(file), file)
            except FileFormatError as error:
                warnings.warn(
                    f"{error}; the checkpoint before it is used, if there is one",
                    CheckpointWarning,
                    stacklevel=3,
                )
                continue
            self._check_identity(contents.description["identity"], file)
            done = contents.description["done"]
            assert isinstance(done, int)
            return done, contents.tensors
        return None

    def _files(self) -> dict[int, Path]:
        found = ((_NAME.fullmatch(file.name), file) for file in self.path.iterdir())
        return {int(match[1]): file for match, file in found if match is not None}

    def _check_identity(self, stored: object, file: Path) -> None:
        if stored == self.identity:
            return
        before, now = cast(dict[str, str], stored), self.identity
        differing = [
            f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
            for name in dict.fromkeys((*now, *before))
            if before.get(name) != now.get(name)
        ]
        raise CheckpointError(
            f"{file} is of another run: {'; '.join(differing)}. Fine-tune as that run "
            "did (the model prepared anew, with the same weights and calibration), "
            "choose another folder, or pass resume=False to start over and replace it"
        )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and every byte of the values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _checked(contents: FileContents, file: Path) -> FileContents:
    described = contents.description
    if described.get("kind") != _KIND:
        raise FileFormatError(f"{file} is no {_KIND}")
    if described.get("digest") != digest(contents.tensors):
        raise FileFormatError(f"{file} is damaged: its values fail their digest")
    return contents


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _flush(folder: Path) -> None:
    """Make a rename last through a power failure, where folders can be opened."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
