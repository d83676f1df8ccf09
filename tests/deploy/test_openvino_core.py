"""A process that ran OpenVINO still takes signals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gdnsq_fx

# The last references go in another thread, as when a collector runs there.
SCRIPT = """
import faulthandler, gc, signal, sys, threading
from gdnsq_fx.deploy.openvino_core import openvino_core

faulthandler.enable()
held = [openvino_core().compile_model(sys.argv[1], "CPU")]
dropping = threading.Thread(target=lambda: (held.clear(), gc.collect()))
dropping.start()
dropping.join()
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
signal.raise_signal(signal.SIGTERM)
assert received == [signal.SIGTERM]
assert openvino_core() is openvino_core()
"""


def test_signals_arrive_after_openvino_models_are_gone(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    x = torch.randn(2, 4)
    qmodel = gdnsq_fx.prepare(nn.Sequential(nn.Linear(4, 3)), x, calibration=[x])
    path = tmp_path / "model.xml"
    gdnsq_fx.export(gdnsq_fx.convert(qmodel), path, x)
    done = subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
