"""The full study on small folders of generated images; how studies keep their runs."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tabulate")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    return importlib.import_module("study_full")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 8 images, dark and bright noise."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for label in range(2):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(8):
                noise = torch.randint(128, (36 * 40 * 3,), generator=generator)
                pixels = bytes((noise + 127 * label).tolist())
                image = Image.frombytes("RGB", (40, 36), pixels)
                image.save(folder / f"{number}.png")
    return root


def _arguments(folders: Path, work: Path, *more: str) -> list[str]:
    return [
        *("--data", str(folders), "--work", str(work), "--epochs", "1"),
        *("--seeds", "1", "--workers", "0", "--results", str(work / "table.md")),
        *more,
    ]


def test_every_row_of_the_full_study(
    study: ModuleType, folders: Path, tmp_path: Path
) -> None:
    arguments = _arguments(folders, tmp_path, "--batch", "8")
    study.main(arguments)
    text = (tmp_path / "table.md").read_text()
    for name, reference in (
        *(("W4A4", "-0.04"), ("W3A3", "-0.3"), ("W2A2", "-1.4"), ("W1A1", "-6.3")),
        ("W1A16", "-0.7 (W1A32)"),
    ):
        (line,) = [row for row in text.splitlines() if row.startswith(f"| {name} ")]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert 0.0 <= float(cells[1]) <= 100.0
        assert cells[3] == reference and cells[4] == "1"
    logs = sorted(tmp_path.glob("*/log.csv"))
    assert len(logs) == 5
    assert all(len(log.read_text().splitlines()) == 3 for log in logs)  # 2 steps
    lines = (tmp_path / "study_full.jsonl").read_text()
    study.main(arguments)  # all is done: nothing runs again
    assert (tmp_path / "study_full.jsonl").read_text() == lines
    assert (tmp_path / "table.md").read_text() == text


def test_the_full_study_takes_resnet18(
    study: ModuleType, folders: Path, tmp_path: Path
) -> None:
    more = ("--network", "resnet18", "--pixels", "32", "--bits", "2")
    study.main(_arguments(folders, tmp_path, *more))
    assert "| W2A2 " in (tmp_path / "table.md").read_text()


def test_weights_of_other_classes_are_refused(
    study: ModuleType, folders: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file(study.NETWORKS["resnet20"].make(10).state_dict(), tmp_path / "ten.st")
    arguments = _arguments(folders, tmp_path, "--weights", str(tmp_path / "ten.st"))
    with pytest.raises(ValueError, match=r"ten\.st does not fit resnet20 with the 2"):
        study.main(arguments)


def test_folders_of_other_classes_are_refused(
    study: ModuleType, folders: Path, tmp_path: Path
) -> None:
    for part, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            target = tmp_path / part / name
            target.mkdir(parents=True)
            image = folders / "train" / "class0" / "0.png"
            (target / "0.png").write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match=r"different classes.*\['b', 'c'\]"):
        study.main(_arguments(tmp_path, tmp_path))


def test_a_missing_folder_is_named(study: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder train"):
        study.main(_arguments(tmp_path, tmp_path))


def test_a_study_makes_only_what_is_missing(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs on one thread here, and without the images of CIFAR-10."""
    command = importlib.import_module("study_command")
    short = importlib.import_module("study_short")
    runs = importlib.import_module("study_runs")
    made: list[tuple[Any, ...]] = []

    def run(name: str, setting: Any, data: Path, work: Path) -> Any:
        made.append((name, setting, data, work))
        return outcome(name, setting)

    def outcome(name: str, setting: Any) -> Any:
        return short.Outcome(name, **vars(setting), **figures)

    def in_turn(kept: Path, run: Any, todo: Any, workers: int) -> list[Any]:
        assert workers == 2
        return [run(*arguments) for arguments in todo]

    figures = {"accuracy": 90.0, "mean_bits": 2.0, "met": True, "seconds": 1.0}
    monkeypatch.setattr(command, "new_outcomes", in_turn)
    monkeypatch.setattr(command, "load_cifar", lambda data, work: None)
    kept = tmp_path / "kept.jsonl"
    one, two, longer = (
        short.Setting(bits, 0, steps, 64)
        for bits, steps in ((2, 200), (3, 200), (2, 300))
    )
    runs.add_outcome(kept, outcome("ours", one))
    runs.add_outcome(kept, outcome("ours", longer))
    planned = {
        (name, *vars(setting).values()): (name, setting)
        for name in ("ours", "LSQ")
        for setting in (one, two)
    }
    given = argparse.Namespace(data=tmp_path, work=tmp_path, steps=200, batch=64)
    for workers, missing in ((0, []), (2, [("ours", two), ("LSQ", one), ("LSQ", two)])):
        given.workers = workers
        found = command.measure(
            kept, short.Outcome, run, planned, short.IDENTITY, given
        )
        assert made == [(*pair, tmp_path, tmp_path) for pair in missing]
        wanted = [("ours", one), *missing]
        assert found == [outcome(*pair) for pair in wanted]


@pytest.mark.parametrize("name", ["study_short", "study_mixed"])
def test_planned_runs_are_told_apart(study: ModuleType, name: str) -> None:
    """Fields of an outcome; the results that are kept beside the tables have them."""
    module = importlib.import_module(name)
    fields = list(module.Outcome.__dataclass_fields__)
    assert fields[: len(module.IDENTITY)] == list(module.IDENTITY)
    kept = module.RESULTS.with_suffix(".jsonl")
    found = importlib.import_module("study_runs").kept_outcomes(kept, module.Outcome)
    assert found or name == "study_mixed"
