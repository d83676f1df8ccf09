"""``gdnsq-fx report``: models, weights, data, files, and what is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import gdnsq_fx
from gdnsq_fx.cli import main
from gdnsq_fx.cli.data import DEVIATION, MEAN, read_samples

_MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, ids):
        return self.fc(self.embed(ids).mean(1))

class Zoo:
    grey = staticmethod(lambda: Net(1))

def regression():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
def number():
    return 3
def fails():
    raise RuntimeError("no such luck")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module of models, and no traces in ``sys.modules``."""
    (tmp_path / "given_models.py").write_text(_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "given_models", raising=False)
    return tmp_path


def _report(model: str = "given_models:Net", *options: str) -> int:
    given = ["--samples", "6", "--batch", "3", *options]
    if "--input" not in given:
        given += ["--input", "2,3,8,8"]
    return main(["report", model, *given])


def _facts(folder: Path, model: str = "given_models:Net", *options: str) -> Any:
    """The JSON report of a run that must succeed."""
    path = folder / "facts.json"
    assert _report(model, "--json", str(path), *options) == 0
    return json.loads(path.read_text())


def _edges(found: Any) -> dict[str, Any]:
    return {edge["name"]: edge for edge in found["edges"]}


def _net() -> nn.Module:
    """The model of ``given_models:Net``."""
    scope: dict[str, Any] = {}
    exec(_MODELS, scope)
    return scope["Net"]()


def _images(folder: Path, count: int = 4, subfolders: bool = True) -> Path:
    """Coloured images of several sizes, in the layout of ImageFolder or flat."""
    for n in range(count):
        place = folder / "images" / ("ab"[n % 2] if subfolders else "")
        place.mkdir(parents=True, exist_ok=True)
        noise = numpy.random.default_rng(n).integers(0, 255, (9 + n, 12, 3), "uint8")
        Image.fromarray(noise).save(place / f"{n}.png")
    (folder / "images" / "notes.txt").write_text("not an image")
    return folder / "images"


# --- what it prints and writes ---


def test_prints_the_report_and_warns_of_random_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _report() == 0
    shown = capsys.readouterr()
    assert "conv.weight" in shown.out and "minimum cut" in shown.out
    assert "warning: no --data" in shown.err
    # The function may have loaded weights itself.
    assert "--weights" not in shown.err


def test_writes_html_and_json(folder: Path) -> None:
    assert _report("given_models:Net", "--html", "a.html", "--json", "a.json") == 0
    assert "conv.weight" in (folder / "a.html").read_text(encoding="utf-8")
    assert {"edges", "minimum_cut"} <= set(json.loads((folder / "a.json").read_text()))


def test_bits(folder: Path) -> None:
    config = gdnsq_fx.QuantConfig()
    assert config.first_last == 8  # which both layers of Net are
    found = _edges(_facts(folder, "given_models:Net", "--bits", "9"))
    assert {edge["target_bits"] for edge in found.values()} == {9}
    given = ("--bits", "9", "--weight-bits", "10", "--act-bits", "11")
    found = _edges(_facts(folder, "given_models:Net", *given))
    assert found["conv.weight"]["target_bits"] == 10
    assert found["fc.input"]["target_bits"] == 11


def test_confirm_measures_the_worst(folder: Path) -> None:
    edges = _facts(folder, "given_models:Net", "--confirm", "2")["edges"]
    assert [e["measured_divergence"] is not None for e in edges] == [
        True, True, False, False,
    ]  # fmt: skip


def test_seed_fixes_everything(folder: Path) -> None:
    torch.manual_seed(5)
    first = _facts(folder)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    assert _facts(folder) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert _facts(folder, "given_models:Net", "--seed", "1") != first


def test_regression(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("given_models:regression", "--input", "2,6")
    assert _report(*model) == 1
    assert "no classes" in capsys.readouterr().err
    assert _facts(folder, *model, "--curvature", "identity")["edges"]


# --- models ---


def test_torchvision_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("torchvision:squeezenet1_1", "--input", "1,3,64,64")
    assert "features.0.weight" in _edges(_facts(folder, *given))
    assert "warning: no --weights" in capsys.readouterr().err


def test_timm_model(folder: Path) -> None:
    pytest.importorskip("timm")
    given = ("timm:mobilenetv3_small_050", "--input", "1,3,64,64")
    assert "conv_stem.weight" in _edges(_facts(folder, *given))


def test_segmentation_downloads_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", refuse)
    given = ("--input", "2,3,32,32", "--samples", "2")
    assert _report("torchvision:lraspp_mobilenet_v3_large", *given) == 0


def test_attribute_of_an_attribute(folder: Path) -> None:
    found = _facts(folder, "given_models:Zoo.grey", "--input", "2,1,8,8")
    assert _edges(found)["conv.weight"]["shape"] == [4, 1, 3, 3]


def test_current_folder_is_found_from_the_console_script(folder: Path) -> None:
    root = str(Path(gdnsq_fx.__file__).parents[1])
    code = f"import sys; sys.path[0] = {root!r}; from gdnsq_fx.cli import main; main()"
    given = ["given_models:Net", "--input", "2,3,8,8", "--samples", "4"]
    done = subprocess.run(
        [sys.executable, "-c", code, "report", *given],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "conv.weight" in done.stdout


def test_search_path_is_left_as_it_was() -> None:
    before = list(sys.path)
    assert _report() == 0
    assert _report("given_models:fails") == 1
    assert sys.path == before


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        ("torchvision:resnet19", "did you mean resnet1"),
        ("timm:resnet19", "timm has no model named resnet19"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("given_models:absent", "has no attribute 'absent'"),
        ("given_models:number", "gave int, not a torch.nn.Module"),
        ("given_models:fails", "RuntimeError: no such luck"),
        ("math:pi", "is float, not a function"),
    ],
)
def test_wrong_models(
    model: str, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report(model) == 1
    assert cause in capsys.readouterr().err


def test_input_that_the_model_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report("given_models:Net", "--input", "2,4,8,8") == 1
    assert "got 4 channels" in capsys.readouterr().err


# --- weights ---


def test_weights_are_read(folder: Path) -> None:
    model = _net()
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.weight[0, 0, 0, 0] = 3.0
    save_file(model.state_dict(), folder / "w.safetensors")
    found = _edges(_facts(folder, "given_models:Net", "--weights", "w.safetensors"))
    # All but one channel are constant, and carry nothing; one sign has half of int8.
    assert found["conv.weight"]["capacity"] == pytest.approx(27 * 7, rel=0.01)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda s: s.pop("fc.bias"), "1 missing (fc.bias)"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unknown (extra)"),
        (
            lambda s: s.update({"fc.bias": torch.zeros(6)}),
            "1 of another shape (fc.bias (6,) for (5,))",
        ),
        (
            lambda s: s.update({f"more{n}": torch.zeros(1) for n in range(9)}),
            "9 unknown (more0, more1, more2, more3, more4, ...)",
        ),
    ],
)
def test_weights_of_another_model(
    change: Callable[[dict[str, Any]], object],
    cause: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = _net().state_dict()
    change(state)
    save_file(state, folder / "w.safetensors")
    assert _report("given_models:Net", "--weights", "w.safetensors") == 1
    assert cause in capsys.readouterr().err


def test_pickled_weights_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(_net().state_dict(), folder / "w.pt")
    assert _report("given_models:Net", "--weights", "w.pt") == 1
    assert "not a safetensors file" in capsys.readouterr().err
    assert _report("given_models:Net", "--weights", "absent.safetensors") == 1
    assert "absent.safetensors" in capsys.readouterr().err


# --- data ---


@pytest.mark.parametrize("subfolders", [True, False])
def test_folder_of_images(
    subfolders: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = _images(folder, subfolders=subfolders)
    assert _report("given_models:Net", "--data", str(images)) == 0
    shown = capsys.readouterr()
    assert "conv.weight" in shown.out and "warning" not in shown.err


def test_images_are_resized_and_normalized(folder: Path) -> None:
    place = folder / "plain"
    place.mkdir()
    Image.new("RGB", (20, 10), (255, 0, 51)).save(place / "x.png")
    (image,) = read_samples(place, (1, 3, 6, 4), 9, 0)
    assert image.shape == (3, 6, 4)
    for channel, value, mean, deviation in zip(
        image, (1.0, 0.0, 0.2), MEAN, DEVIATION, strict=True
    ):
        wanted = torch.full((6, 4), (value - mean) / deviation)
        torch.testing.assert_close(channel, wanted)
    (grey,) = read_samples(place, (1, 1, 2, 2), 9, 0)
    luma = (299 * 255 + 114 * 51) // 1000 / 255
    torch.testing.assert_close(grey, torch.full((1, 2, 2), luma), atol=4e-3, rtol=0.0)


def test_rows_and_columns_of_images_keep_their_places(folder: Path) -> None:
    place = folder / "corner"
    place.mkdir()
    pixels = numpy.zeros((4, 6, 3), "uint8")
    pixels[0, 5] = (255, 0, 0)
    Image.fromarray(pixels).save(place / "x.png")
    (image,) = read_samples(place, (1, 3, 4, 6), 1, 0)
    red = image[0] - image[0].min()
    assert (red > 0).nonzero().tolist() == [[0, 5]]
    assert image[1].unique().numel() == image[2].unique().numel() == 1


def test_seed_and_number_of_images(folder: Path) -> None:
    images = _images(folder, count=8)
    chosen = [read_samples(images, (1, 3, 5, 5), 3, seed) for seed in (0, 0, 1)]
    assert chosen[0].shape == (3, 3, 5, 5)
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert len(read_samples(images, (1, 3, 5, 5), 99, 0)) == 8


def test_array_file(folder: Path) -> None:
    x = numpy.random.default_rng(0).normal(size=(5, 3, 8, 8))
    numpy.savez(folder / "a.npz", other=numpy.zeros(3), x=x)
    found = read_samples(folder / "a.npz", (1, 3, 8, 8), 4, 0)
    torch.testing.assert_close(found, torch.tensor(x[:4], dtype=torch.float32))
    numpy.savez(folder / "b.npz", first=x, second=numpy.zeros(3))
    assert len(read_samples(folder / "b.npz", (1, 3, 8, 8), 9, 0)) == 5
    assert _facts(folder, "given_models:Net", "--data", "a.npz")["edges"]


def test_tokens(folder: Path) -> None:
    numpy.savez(folder / "ids.npz", x=numpy.arange(30, dtype="int32").reshape(6, 5) % 7)
    given = ("--input", "2,5", "--data", "ids.npz")
    assert "fc.input" in _edges(_facts(folder, "given_models:Tokens", *given))


def _bad_data(folder: Path) -> dict[str, tuple[str, str]]:
    """What is given to ``--data``, and what the message must name."""
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 truncated")
    (folder / "text.csv").write_text("1,2")
    floats = numpy.zeros((2, 3, 8, 8), "float32")
    numpy.savez(folder / "narrow.npz", x=floats[..., :7])
    numpy.savez(folder / "none.npz", x=floats[:0])
    numpy.savez(folder / "bytes.npz", x=floats.astype("uint8"))
    numpy.savez(folder / "nothing.npz")
    objects = numpy.array([{"a": 1}], dtype=object)
    numpy.savez(folder / "pickled.npz", x=objects)
    return {
        "absent": ("absent", "no file or folder"),
        "empty": ("empty", "no images"),
        "broken": ("broken", "x.png cannot be read as an image"),
        "broken.npz": ("broken.npz", "cannot be read as arrays"),
        "text.csv": ("text.csv", "folder of images or an .npz"),
        "narrow": ("narrow.npz", "(2, 3, 8, 7)"),
        "none": ("none.npz", "no samples"),
        "bytes": ("bytes.npz", "uint8"),
        "nothing": ("nothing.npz", "no array"),
        "pickled": ("pickled.npz", "Object arrays cannot be loaded"),
    }


@pytest.mark.parametrize(
    "case",
    ["absent", "empty", "broken", "broken.npz", "text.csv", "narrow", "none", "bytes",
     "nothing", "pickled"],
)  # fmt: skip
def test_bad_data(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cause = _bad_data(folder)[case]
    assert _report("given_models:Net", "--data", path) == 1
    error = capsys.readouterr().err
    assert error.startswith("gdnsq-fx: ") and cause in error
    assert "Traceback" not in error


def test_images_need_an_image_shape(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = str(_images(folder))
    given = ("--input", "2,6", "--data", images)
    assert _report("given_models:regression", *given) == 1
    assert "1 or 3 channels" in capsys.readouterr().err


# --- usage ---


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("report",),
        ("report", "given_models:Net"),
        ("report", "resnet18", "--input", "1,3,8,8"),
        ("report", ":Net", "--input", "1,3,8,8"),
        ("report", "given_models:Net", "--input", "1,3,x"),
        ("report", "given_models:Net", "--input", "0,3,8,8"),
        ("report", "given_models:Net", "--input", "3"),
        ("report", "given_models:Net", "--input", "1,3,8,8", "--bits", "99"),
        ("report", "given_models:Net", "--input", "1,3,8,8", "--samples", "0"),
        ("report", "given_models:Net", "--input", "1,3,8,8", "--confirm", "-1"),
        ("unknown",),
        ("demo", "--bits", "0"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code
    assert status == 2


def test_unwritable_files_are_told_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report("given_models:fails", "--html", "absent/a.html") == 1
    assert "no folder absent" in capsys.readouterr().err
    assert _report("given_models:fails", "--json", str(folder)) == 1
    assert "is a folder" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["report", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "0.485 0.456 0.406" in " ".join(shown.split())
    for option in (
        "--input", "--weights", "--bits", "--weight-bits", "--act-bits", "--data",
        "--samples", "--batch", "--confirm", "--curvature", "--html", "--json",
        "--seed",
    ):  # fmt: skip
        assert option in shown
