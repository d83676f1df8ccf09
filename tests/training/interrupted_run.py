"""Fine-tune in child processes that are killed at random moments, and compare.

    python interrupted_run.py FOLDER KILLS

Prints one line for each run that was resumed to its end after two kills: how many steps
the kills let pass, and whether the end equals that of the uninterrupted run bit for
bit. A child is a fork, so that the libraries are loaded once; the parent must not run
autograd, which does not survive a fork.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # `prepare` imports it late; here once, before the forks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import gdnsq_fx

STEPS = 40


class Noisy(Dataset[Tensor]):
    """Samples with an augmentation that draws from every global generator."""

    def __init__(self) -> None:
        own = torch.Generator().manual_seed(0)
        self.samples = torch.randn(44, 1, 4, 4, generator=own)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        drawn = random.gauss(0.0, 0.1) + np.random.standard_normal() * 0.1
        return self.samples[index] + drawn + 0.1 * torch.randn(1, 4, 4)


def finetuned(folder: Path | None, begun: Path) -> str:
    """Digest of everything that a run ends with; the script always starts the same.

    The file ``begun`` appears when the model is prepared.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    batches = torch.randn(4, 6, 1, 4, 4)
    config = gdnsq_fx.QuantConfig(2, 2, first_last=None, estimator="ste")
    qmodel = gdnsq_fx.prepare(model, batches[0], config, list(batches))
    qmodel.train()
    loader = DataLoader(Noisy(), batch_size=6, shuffle=True)  # 8 batches a pass
    tracker = gdnsq_fx.CapacityTracker(10)
    begun.touch()
    result = gdnsq_fx.finetune(
        qmodel,
        loader,
        steps=STEPS,
        progress=False,
        tracker=tracker,
        validate=lambda m: float(m(batches[0]).detach().sum()),
        validate_every=7,
        checkpoint=folder,
        checkpoint_every=3,
    )
    found = hashlib.sha256()
    for name, tensor in qmodel.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    rest = (result.history, result.metric, result.bits, tracker.to_dict())
    drawn = torch.rand(1), random.random(), np.random.rand()
    found.update(repr((rest, drawn)).encode())
    return found.hexdigest()


def child(folder: Path | None, output: Path) -> int:
    """Fork one that resumes the run in ``folder`` and writes its digest."""
    pid = os.fork()
    if pid:
        return pid
    try:
        output.write_text(finetuned(folder, _begun(output)))
    except BaseException as error:
        print("child failed:", repr(error), flush=True)
        os._exit(1)
    os._exit(0)


def _begun(output: Path) -> Path:
    return output.with_suffix(".begun")


def wait_for(file: Path) -> None:
    """Until it appears."""
    while not file.exists():
        time.sleep(0.001)


def newest(folder: Path) -> int:
    """Steps that the newest checkpoint holds."""
    files = folder.glob("step-*.safetensors")
    return max((int(file.stem.removeprefix("step-")) for file in files), default=0)


def main() -> None:
    """Compare runs that were killed twice with one that was not."""
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    moments = random.Random(1)
    reference = root / "uninterrupted.txt"
    pid = child(None, reference)
    wait_for(_begun(reference))
    started = time.monotonic()
    os.waitpid(pid, 0)
    duration = time.monotonic() - started
    wanted = reference.read_text()
    for number in range(kills // 2):
        folder, output = root / str(number), root / f"{number}.txt"
        reached: list[int] = []
        for _ in range(2):
            pid = child(folder, output)
            wait_for(_begun(output))
            time.sleep(moments.uniform(0.0, 0.8 * duration))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            reached.append(newest(folder))
            _begun(output).unlink()
        output.unlink(missing_ok=True)
        os.waitpid(child(folder, output), 0)
        equal = output.exists() and output.read_text() == wanted
        print(number, *reached, "equal" if equal else "DIFFERENT", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
