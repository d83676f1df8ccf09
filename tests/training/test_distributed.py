"""Two and four processes take the steps that one takes, whole or in parts.

Rounding decides by the last bit of a float, so that another order of summation may,
some steps later, give one value another code: so does one process whose batches hold
the same samples in another order. The loss is therefore compared closely over the first
steps, and the bits at the end; processes of one run agree to the bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
from accelerate import Accelerator

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.training.distributed import engine_for
from gdnsq_fx.training.engine import SingleProcess

SCRIPT = Path(__file__).with_name("distributed_run.py")
COMPARED = ("plain", "fixed", "budget", "planned", "features", "loader")
CLOSE_STEPS = 8

Cases = dict[str, dict[str, Any]]


def _run(folder: Path, processes: int, cases: list[str]) -> Cases:
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else [])]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """What a process on its own finds."""
    return _run(tmp_path_factory.mktemp("one"), 1, [*COMPARED, "predicted"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """What two find, with DDP and with FSDP2."""
    both = [*COMPARED, "bfloat16", "aewgs", "resumed", "poisoned"]
    cases = [*both, *(f"{name}-shard" for name in both), "seeds_differ", "differing"]
    cases.append("predicted")
    return _run(tmp_path_factory.mktemp("two"), 2, cases)


def _check_same_run(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    close = slice(CLOSE_STEPS)
    assert found["loss"][close] == pytest.approx(wanted["loss"][close], rel=1e-4)
    assert found["mean_bits"][close] == pytest.approx(
        wanted["mean_bits"][close], rel=1e-5
    )
    for mine, other in zip(
        found["metrics"][close], wanted["metrics"][close], strict=True
    ):
        assert (mine is None) == (other is None)  # where none was due
        assert mine is None or mine == pytest.approx(other, rel=1e-3)
    assert found["bits"] == wanted["bits"]
    assert found["equal"]


@pytest.mark.parametrize("way", ["", "-shard"])
@pytest.mark.parametrize("case", COMPARED)
def test_two_processes_take_the_steps_of_one(
    one: Cases, two: Cases, case: str, way: str
) -> None:
    _check_same_run(two[case + way], one[case])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["", "-shard"])
def test_four_processes_take_the_steps_of_one(
    one: Cases, tmp_path: Path, way: str
) -> None:
    four = _run(tmp_path, 4, [f"plain{way}", f"budget{way}", "predicted"])
    for case in ("plain", "budget"):
        _check_same_run(four[case + way], one[case])
    _check_same_prediction(four["predicted"], one["predicted"])


def test_two_processes_predict_what_one_does(one: Cases, two: Cases) -> None:
    _check_same_prediction(two["predicted"], one["predicted"])


def _check_same_prediction(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["values"] == pytest.approx(wanted["values"], rel=1e-3)
    assert found["targets"] == wanted["targets"]
    assert len(set(found["targets"].values())) > 1
    assert found["equal"]


@pytest.mark.parametrize("way", ["", "-shard"])
def test_the_model_is_given_back_as_it_was_but_trained(
    one: Cases, two: Cases, way: str
) -> None:
    for case in COMPARED:
        assert two[case + way]["types"] == one[case]["types"]
        assert two[case + way]["plain"]


@pytest.mark.parametrize("way", ["", "-shard"])
@pytest.mark.parametrize("case", ["aewgs", "bfloat16"])
def test_processes_stay_equal_where_runs_differ(
    two: Cases, case: str, way: str
) -> None:
    """Signs drawn in each process, and bfloat16, where every sum rounds visibly."""
    found = two[case + way]
    assert found["equal"]
    assert max(found["bits"].values()) <= 4


@pytest.mark.parametrize("way", ["", "-shard"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    two: Cases, way: str
) -> None:
    found = two["resumed" + way]
    assert found["stopped"]
    assert found["files"] == [
        "step-000000008.safetensors",
        "step-000000009.safetensors",
    ]
    assert found["same"]


@pytest.mark.parametrize("way", ["", "-shard"])
def test_nan_in_one_process_stops_all_at_the_last_good_state(
    two: Cases, way: str
) -> None:
    found = two["poisoned" + way]
    assert found["step"] == 3
    assert found["finite"] and found["plain"] and found["equal"]


def test_all_start_from_the_model_of_the_first(one: Cases, two: Cases) -> None:
    _check_same_run(two["seeds_differ"], one["plain"])


def test_models_of_different_bits_are_refused(two: Cases) -> None:
    assert "prepared different models" in two["differing"]["error"]


def test_one_process_needs_no_engine() -> None:
    assert isinstance(engine_for(None, shard=False), SingleProcess)
    assert isinstance(engine_for(Accelerator(cpu=True), shard=True), SingleProcess)


def test_shard_without_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs accelerator="):
        engine_for(None, shard=True)


def test_what_is_no_accelerator_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be an accelerate"):
        engine_for("ddp", shard=False)  # type: ignore[arg-type]


def test_accumulation_is_left_to_finetune() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="accumulate=4"):
        engine_for(accelerator, shard=False)


def test_nothing_is_imported_for_one_process() -> None:
    code = (
        "import sys, torch, gdnsq_fx; m = torch.nn.Linear(4, 2); x = torch.randn(8, 4);"
        "q = gdnsq_fx.prepare(m, x);"
        "gdnsq_fx.finetune(q, [x], steps=1, progress=False);"
        "print('accelerate' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
