"""The examples of loops of one's own run offline and end within their bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", ["own_loop.py", "hf_trainer.py"])
def test_example_meets_its_budget(name: str, tmp_path: Path) -> None:
    if name == "hf_trainer.py":
        pytest.importorskip("accelerate")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
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
    assert not list(tmp_path.iterdir())
