"""The wheel holds the whole library, and `passes/` has one name: `gdnsq_fx.passes`."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "gdnsq_fx", "passes")
NOT_SHIPPED = {"gdnsq_fx/passes.pyi"}

BUILD = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
IMPORT_BOTH = """
import importlib
import gdnsq_fx
import gdnsq_fx.passes as passes

print(gdnsq_fx.__file__)
print(passes.__file__)
for name in passes.__all__:
    exported = getattr(passes, name)
    home = importlib.import_module(exported.__module__)
    assert home.__name__.startswith("gdnsq_fx.passes."), home
    assert getattr(home, name) is exported, name
"""


def run_python(
    *arguments: str, cwd: Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in ``cwd`` with ``path`` first in its ``sys.path``."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def shipped_files() -> set[str]:
    """Where the wheel must hold each file of the library, as POSIX paths."""
    places = set[str]()
    for folder, target in (("gdnsq_fx", "gdnsq_fx"), ("passes", "gdnsq_fx/passes")):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                inside = file.relative_to(ROOT / folder).as_posix()
                places.add(f"{target}/{inside}")
    return places - NOT_SHIPPED


def exported_names(file: Path) -> set[str]:
    """The names that the import statements of a file bind."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name for node in imports for alias in node.names}


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of a wheel built from a copy of the checkout."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    built = tmp_path_factory.mktemp("built")
    done = run_python("-c", BUILD, str(built), cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = built.glob("*.whl")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_wheel_holds_every_file_of_the_library_and_no_other(unpacked_wheel: Path):
    files = (file for file in unpacked_wheel.rglob("*") if file.is_file())
    inside = {file.relative_to(unpacked_wheel).as_posix() for file in files}
    library = {name for name in inside if ".dist-info/" not in name}

    missing = sorted(shipped_files() - library)
    assert not missing, (
        f"not in the wheel: {missing}. In pyproject.toml, list a new subpackage under "
        "[tool.setuptools] packages and a data file under package-data; keep passes/ "
        "flat"
    )
    assert library - shipped_files() == set()
    assert "gdnsq_fx/py.typed" in library


def test_wheel_imports_outside_the_checkout(unpacked_wheel: Path, tmp_path: Path):
    done = run_python("-c", IMPORT_BOTH, cwd=tmp_path, path=unpacked_wheel)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        str(unpacked_wheel / "gdnsq_fx" / "__init__.py"),
        str(unpacked_wheel / "gdnsq_fx" / "passes" / "__init__.py"),
    ]


def test_bare_passes_cannot_be_imported(tmp_path: Path):
    done = run_python("-c", "import passes", cwd=tmp_path, path=ROOT)

    assert done.returncode != 0
    assert "ImportError: this package was imported as 'passes'" in done.stderr


def test_every_pass_is_exported_at_run_time_and_to_type_checkers():
    exported = exported_names(ROOT / "passes" / "__init__.py")
    files = (ROOT / "passes").glob("[!_]*.py")
    classes = {file.stem.title().replace("_", "") for file in files}

    assert classes <= exported
    assert exported_names(ROOT / "gdnsq_fx" / "passes.pyi") == exported
