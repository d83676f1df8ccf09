"""The examples of loops of one's own run offline and end within their bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


NEEDS = {
    "hf_trainer.py": "accelerate",
    "lightning_callback.py": "lightning",
    "distributed.py": "accelerate",
}
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    "name", ["own_loop.py", "hf_trainer.py", "lightning_callback.py"]
)
def test_example_meets_its_budget(name: str, tmp_path: Path) -> None:
    _check([name], tmp_path)


@pytest.mark.parametrize("way", [[], ["--shard"]])
def test_example_meets_its_budget_on_two_processes(
    way: list[str], tmp_path: Path
) -> None:
    printed = _check(["distributed.py", "--cpu", *way], tmp_path, LAUNCHER)
    assert "processes: 2" in printed


def _check(example: list[str], folder: Path, launcher: list[str] | None = None) -> str:
    name, *arguments = example
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *(launcher or []), str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "above target: {}" in lines, done.stdout
    (loss,) = [line for line in lines if line.startswith("loss: ")]
    assert 0.0 < float(loss.removeprefix("loss: ")) < 2.0
    assert not list(folder.iterdir())
    return done.stdout
