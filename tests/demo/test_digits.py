"""The digits demo: its split, its loader, a short real training run."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, fx, nn

from gdnsq_fx.demo.digits import (
    DigitsData,
    accuracy,
    load_digits_split,
    train_digits,
    train_loader,
)
from gdnsq_fx.demo.network import DigitsNet
from gdnsq_fx.errors import ConfigError, MissingExtraError


@pytest.fixture(scope="module")
def data() -> DigitsData:
    return load_digits_split()


def _equal(
    left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]
) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d)
        for (a, b), (c, d) in zip(left, right, strict=True)
    )


def test_shapes_types_and_range(data: DigitsData) -> None:
    assert data.train_images.shape == (1347, 1, 8, 8)
    assert data.test_images.shape == (450, 1, 8, 8)
    assert data.train_labels.shape == (1347,)
    assert data.test_labels.shape == (450,)
    for images in (data.train_images, data.test_images):
        assert images.dtype == torch.float32
        assert images.min() == 0.0
        assert images.max() == 1.0
    for labels in (data.train_labels, data.test_labels):
        assert labels.dtype == torch.int64


def test_split_is_disjoint_and_complete(data: DigitsData) -> None:
    train = {tuple(image.flatten().tolist()) for image in data.train_images}
    test = {tuple(image.flatten().tolist()) for image in data.test_images}
    assert not train & test
    # All 1,797 images differ, so sets of pixels count them.
    assert len(train | test) == 1797


def test_split_is_stratified(data: DigitsData) -> None:
    train, test = data.train_labels.bincount(), data.test_labels.bincount()
    assert len(train) == len(test) == 10
    torch.testing.assert_close(test / 450, train / 1347, atol=2e-3, rtol=0.0)


def test_split_follows_its_seed_only(data: DigitsData) -> None:
    torch.rand(3)
    again, other = load_digits_split(), load_digits_split(seed=1)
    assert torch.equal(again.test_images, data.test_images)
    assert torch.equal(again.train_labels, data.train_labels)
    assert not torch.equal(other.test_images, data.test_images)


def test_missing_sklearn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "gdnsq-fx\[demo\]"'):
        load_digits_split()


def test_loader_reiterates_with_fresh_batches(data: DigitsData) -> None:
    loader = train_loader(data)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == 1347 // 64
    assert not _equal(first, second)
    images, labels = first[0]
    assert images.shape == (64, 1, 8, 8)
    assert labels.shape == (64,)


def test_loader_is_reproducible_by_seed(data: DigitsData) -> None:
    left, right = train_loader(data, seed=3), train_loader(data, seed=3)
    next(iter(left))  # a pass left halfway must not disturb the next
    list(right)
    assert _equal(list(left), list(right))
    assert not _equal(list(train_loader(data, seed=4)), list(train_loader(data)))


def test_loader_shifts_by_at_most_one_pixel(data: DigitsData) -> None:
    padded = torch.nn.functional.pad(data.train_images, (1, 1, 1, 1))
    shifted = {
        (tuple(padded[i, 0, y : y + 8, x : x + 8].flatten().tolist()), label)
        for i, label in enumerate(data.train_labels.tolist())
        for y in range(3)
        for x in range(3)
    }
    images, labels = next(iter(train_loader(data, batch_size=512)))
    drawn = zip(images, labels.tolist(), strict=True)
    assert all((tuple(i.flatten().tolist()), label) in shifted for i, label in drawn)


@pytest.mark.parametrize("batch_size", [0, 1348])
def test_loader_refuses_batch_sizes(data: DigitsData, batch_size: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to 1347"):
        train_loader(data, batch_size=batch_size)


def test_network_traces_and_convolutions_see_no_negatives(data: DigitsData) -> None:
    model = DigitsNet().eval()
    graph = fx.symbolic_trace(model)
    images = data.test_images[:32]
    assert torch.equal(graph(images), model(images))
    lowest: list[float] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs: lowest.append(inputs[0].min().item())
            )
    model(images)
    assert len(lowest) == 8
    assert min(lowest) >= 0.0


def test_initial_weights_follow_their_seed_only() -> None:
    before = torch.random.get_rng_state()
    model = DigitsNet(seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(DigitsNet(seed=5).stem.weight, model.stem.weight)
    assert not torch.equal(DigitsNet(seed=6).stem.weight, model.stem.weight)


def test_short_training_run_beats_chance(data: DigitsData) -> None:
    model = DigitsNet()
    assert accuracy(model, data.test_images, data.test_labels) < 40.0
    result = train_digits(model, data, epochs=2, progress=False)
    assert result > 80.0
    assert result == accuracy(model, data.test_images, data.test_labels)
    assert not model.training


def test_training_follows_its_seed_only(data: DigitsData) -> None:
    # Dropout draws from the global random state, which training must seed and restore.
    models = [nn.Sequential(nn.Dropout(0.2), DigitsNet(width=8)) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(3)
        before = torch.random.get_rng_state()
        train_digits(model, data, epochs=1, seed=seed, progress=False)
        assert torch.equal(torch.random.get_rng_state(), before)
    left, right, other = (model.state_dict()["1.head.weight"] for model in models)
    torch.testing.assert_close(left, right, rtol=0.0, atol=0.0)
    assert not torch.equal(left, other)


def test_training_refuses_no_epochs(data: DigitsData) -> None:
    with pytest.raises(ConfigError, match="at least 1 epoch"):
        train_digits(DigitsNet(), data, epochs=0)


def test_accuracy_restores_the_mode_of_every_module(data: DigitsData) -> None:
    model = DigitsNet()
    model.block1.bn1.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.bn.running_mean
    assert statistics is not None
    kept = statistics.clone()
    accuracy(model, data.test_images, data.test_labels)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(statistics, kept)

    with pytest.raises(RuntimeError):
        accuracy(model, data.test_images[:, :, :, 0], data.test_labels)
    assert [module.training for module in model.modules()] == modes


def test_accuracy_counts_right_answers() -> None:
    # Three batches; the images are the logits, and every fourth label is wrong.
    labels = torch.arange(600) % 10
    logits = nn.functional.one_hot(labels, 10).float()
    wrong = torch.where(torch.arange(600) % 4 == 0, (labels + 1) % 10, labels)
    assert accuracy(nn.Identity(), logits, wrong) == 75.0


def test_accuracy_refuses_unpaired_labels(data: DigitsData) -> None:
    with pytest.raises(ConfigError, match="450 images and 1347 labels"):
        accuracy(DigitsNet(), data.test_images, data.train_labels)
