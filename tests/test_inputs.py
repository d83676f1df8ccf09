"""A batch is inputs alone, or inputs then targets; the example input decides."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gdnsq_fx.errors import BatchStructureError, DeviceMismatchError, GdnsqError
from gdnsq_fx.inputs import (
    Batch,
    InputStructure,
    batch_size,
    check_device,
    model_device,
)

_X = torch.zeros(8, 3, 4, 4)
_A = torch.zeros(8, 5)
_B = torch.zeros(8, 7, dtype=torch.int64)
_Y = torch.arange(8)
_Z = torch.ones(8, 2)


def _split(example: Any, batch: Any) -> Batch:
    return InputStructure.of(example).split(batch)


def _same(left: Any, right: Any) -> bool:
    """Compare containers by type and tensors by identity."""
    if isinstance(left, (tuple, list)):
        pairs: Any = zip(left, right, strict=True)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return type(left) is type(right) and all(_same(a, b) for a, b in pairs)  # pyright: ignore[reportUnknownArgumentType]
    return left is right


def _error(example: Any, batch: Any) -> str:
    with pytest.raises(BatchStructureError) as caught:
        _split(example, batch)
    return str(caught.value)


@pytest.mark.parametrize(
    ("example", "batch", "args", "targets"),
    [
        (_X, _X, (_X,), None),
        (_X, (_X,), (_X,), None),
        (_X, [_X], (_X,), None),
        (_X, (_X, _Y), (_X,), _Y),
        (_X, [_X, _Y], (_X,), _Y),
        (_X, [_X, _Y, _Z], (_X,), (_Y, _Z)),
        (_X, (_X, {"boxes": _Y}), (_X,), {"boxes": _Y}),
        (_X, (_X, "label"), (_X,), "label"),
        (_X, (_X, None), (_X,), None),
        (_A, (_A, _A), (_A,), _A),
        ((_X,), (_X,), (_X,), None),
        ((_X,), (_X, _Y), (_X,), _Y),
        ((_X,), ([_X], _Y), (_X,), _Y),
        ((_A, _B), (_A, _B), (_A, _B), None),
        ((_A, _B), [_A, _B], (_A, _B), None),
        ((_A, _B), ((_A, _B),), (_A, _B), None),
        ((_A, _B), ((_A, _B), _Y), (_A, _B), _Y),
        ((_A, _B), [[_A, _B], _Y], (_A, _B), _Y),
        ((_A, _B), (_A, _B, _Y), (_A, _B), _Y),
        ((_A, _B), [_A, _B, _Y, _Z], (_A, _B), (_Y, _Z)),
        ((_A, _B), [(_A, _B), _Y, _Z], (_A, _B), (_Y, _Z)),
        ([_A, _B], (_A, _B, _Y), (_A, _B), _Y),
        (((_A, _B),), ((_A, _B), _Y), ((_A, _B),), _Y),
        (((_A, _B), _X), [[_A, _B], _X, _Y], ((_A, _B), _X), _Y),
        (((_A, _B), _X), [[[_A, _B], _X], _Y], ((_A, _B), _X), _Y),
        (([_A, _B], _X), ((_A, _B), _X), ([_A, _B], _X), None),
        ((_A, None, 2, "mode", True), (_A, None, 3, "x", False, _Y), None, _Y),
    ],
)
def test_positional_forms(example: Any, batch: Any, args: Any, targets: Any) -> None:
    found = _split(example, batch)
    assert _same(found.args, batch[:5] if args is None else args)
    assert found.kwargs == {}
    assert _same(found.targets, targets) or found.targets == targets


def test_both_readings_fit_then_inputs_alone() -> None:
    example = (_A, _B)
    found = _split(example, (_A, _Y.reshape(8, 1)))
    assert len(found.args) == 2
    assert found.targets is None


@pytest.mark.parametrize("outer", [tuple, list])
def test_keyword_forms(outer: Any) -> None:
    example = {"ids": _B, "mask": _A}
    batch = {"mask": _A, "ids": _B}
    for form, targets in [
        (batch, None),
        (outer([batch]), None),
        (outer([batch, _Y]), _Y),
        (outer([batch, _Y, _Z]), (_Y, _Z)),
        (OrderedDict(batch), None),
        (outer([UserDict(batch), _Y]), _Y),
    ]:
        found = _split(example, form)
        assert found.args == ()
        assert found.kwargs.keys() == example.keys()
        assert found.kwargs["ids"] is _B and found.kwargs["mask"] is _A
        assert _same(found.targets, targets)


def _targets_shape(batch: Batch) -> torch.Size:
    assert isinstance(batch.targets, Tensor)
    return batch.targets.shape


def test_data_loader_forms() -> None:
    def batches(dataset: Any) -> list[Any]:
        return list(DataLoader(dataset, batch_size=4))

    for batch in batches(TensorDataset(_X)):
        assert _split(_X, batch).targets is None
    for batch in batches(TensorDataset(_X, _Y)):
        assert _targets_shape(_split(_X, batch)) == (4,)
    for batch in batches(TensorDataset(_A, _B, _Y)):
        found = _split((_A, _B), batch)
        assert [len(arg) for arg in found.args] == [4, 4]
        assert _targets_shape(found) == (4,)
    nested = [((_A[i], (_B[i], _X[i])), _Y[i]) for i in range(8)]
    for batch in batches(nested):
        found = _split((_A, (_B, _X)), batch)
        assert isinstance(batch[0], list) and isinstance(found.args[1], tuple)
        assert _targets_shape(found) == (4,)
    mapped = [({"ids": _B[i]}, _Y[i]) for i in range(8)]
    for batch in batches(mapped):
        assert _split({"ids": _B}, batch).kwargs["ids"].shape == (4, 7)


class _Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_named_tuples_are_tuples_and_keep_their_type() -> None:
    found = _split((_X, _Pair(_A, _B)), ((_X, _Pair(_A, _B)), _Y))
    assert found.args[1].left is _A
    assert _split(_X, _Pair(_X, _Y)).targets is _Y


@pytest.mark.parametrize(
    ("dtype", "fits"),
    [
        (torch.float16, True),
        (torch.float64, True),
        (torch.int64, False),
        (torch.bool, False),
        (torch.complex64, False),
    ],
)
def test_dtype_kinds(dtype: torch.dtype, fits: bool) -> None:
    batch = torch.zeros(2, 3, 9, 9, dtype=dtype)
    if fits:
        assert _split(_X, batch).args[0] is batch
    else:
        assert f"Tensor[2, 3, 9, 9] {str(dtype)[6:]}" in _error(_X, batch)


@pytest.mark.parametrize(
    ("example", "batch"),
    [
        (_X, _A),
        (_X, (_A, _Y)),
        (_X, ((_X,), _Y)),
        (_X, {"x": _X}),
        (_X, None),
        (_X, []),
        (_X, "text"),
        ((_X,), _X),
        ((_A, _B), _A),
        ((_A, _B), (_A,)),
        ((_A, _B), ()),
        ((_A, _B), (_A, _X)),
        ((_A, _B), ((_A,), _B)),
        ((_A, 1), (_A, 1.0)),
        ((_A, 1), (_A, True)),
        ((_A, None), (_A, _B)),
        ((_A, _B), {"a": _A, "b": _B}),
        ({"ids": _B}, _B),
        ({"ids": _B}, (_B, _Y)),
        ({"ids": _B}, {"ids": _X}),
        ({"ids": _B}, {}),
    ],
)
def test_other_structures_are_errors(example: Any, batch: Any) -> None:
    message = _error(example, batch)
    assert message.startswith("expected ")
    assert "optionally followed by targets; got " in message


def test_error_shows_both_structures() -> None:
    example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 7, dtype=torch.int64))
    message = _error(example, [torch.zeros(8, 3, 32, 32), "cat"])
    assert message == (
        "expected (Tensor[*, 3, 32, 32] float32, Tensor[*, 7] int64), optionally"
        " followed by targets; got [Tensor[8, 3, 32, 32] float32, str] (batch[1] is"
        " str, not Tensor[*, 7] int64); yield such batches, or prepare the model with"
        " an example input that is like them"
    )


def test_errors_show_every_kind_of_value() -> None:
    message = _error((_X,), ({"k": (None,)}, 1, torch.tensor(2.0), object, [_A] * 99))
    assert "expected (Tensor[*, 3, 4, 4] float32,), optionally" in message
    assert "got ({'k': (None,)}, int, Tensor[] float32, type, [Tensor[8, 5]" in message
    assert "... 99 items]" in message
    assert len(message) < 700


@pytest.mark.parametrize("rest", [None, [], [_Y]])
def test_error_names_missing_and_extra_keys(rest: list[Tensor] | None) -> None:
    example = {"ids": _B, "mask": _A}

    def message(inputs: dict[str, Tensor]) -> str:
        return _error(example, inputs if rest is None else [inputs, *rest])

    both = message({"ids": _B, "labels": _Y})
    assert "missing keys ['mask'] and extra keys ['labels']" in both
    assert "has extra keys ['labels']" in message({**example, "labels": _Y})
    assert "has missing keys ['ids']" in message({"mask": _A})


def test_error_names_keys_of_nested_mappings() -> None:
    message = _error((_X, {"ids": _B, "mask": _A}), (_X, {"ids": _B}, _Y))
    assert "batch[1] has missing keys ['mask']" in message


def test_args_kwargs() -> None:
    assert _same(InputStructure.of(_X).args_kwargs(_X)[0], (_X,))
    assert _same(InputStructure.of([_A, _B]).args_kwargs([_A, _B])[0], (_A, _B))
    args, kwargs = InputStructure.of({"x": _X}).args_kwargs({"x": _A[:, :, None, None]})
    assert args == () and kwargs["x"].shape == (8, 5, 1, 1)
    with pytest.raises(BatchStructureError, match="targets where only inputs"):
        InputStructure.of(_X).args_kwargs((_X, _Y))
    with pytest.raises(BatchStructureError, match="expected"):
        InputStructure.of(_X).args_kwargs(_A)


@pytest.mark.parametrize("example", [None, 3, "text", object(), {1: _X}])
def test_examples_that_are_no_inputs(example: Any) -> None:
    with pytest.raises(BatchStructureError, match="the example input"):
        InputStructure.of(example)


def test_structure_is_light() -> None:
    class Local:
        pass

    example = (torch.zeros(1000, 1000), {"a": [_B, 1, None, Local()]})
    structure = InputStructure.of(example)
    data = pickle.dumps(structure)
    assert len(data) < 2000
    assert pickle.loads(data) == structure == copy.deepcopy(structure)
    assert hash(structure) == hash(copy.deepcopy(structure))


_LEAVES = st.sampled_from([_X, _A, _B, None, 1, "s"])
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    ),
    max_leaves=6,
)


def _collated(value: Any) -> Any:
    """Turn every tuple into a list, as collation does."""
    if isinstance(value, tuple):
        return [_collated(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {key: _collated(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value


@given(st.one_of(st.just(_X), st.lists(_VALUES, max_size=3).map(tuple)), _VALUES)
def test_inputs_with_one_target(example: Any, target: Any) -> None:
    structure = InputStructure.of(example)
    args, _ = structure.args_kwargs(example)
    for batch in ((example, target), [_collated(example), target]):
        found = structure.split(batch)
        if example == ():
            continue  # nothing tells an empty tuple of inputs from a target
        assert InputStructure.of(found.args) == InputStructure.of(args)
        assert found.targets is target
    assert structure.split(example).targets is None


@given(_VALUES, _VALUES)
def test_nothing_but_typed_errors(example: Any, batch: Any) -> None:
    try:
        InputStructure.of(example).split(batch)
    except GdnsqError as error:
        assert str(error)


def test_model_device() -> None:
    assert model_device(nn.ReLU()) is None
    assert model_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert model_device(nn.BatchNorm2d(2, affine=False)) == torch.device("cpu")


def test_check_device() -> None:
    model = nn.Linear(2, 2)
    far = torch.zeros(1, device="meta")
    check_device(model, (_X, [_A, (1, None)]), {"k": {"a": _B}})
    check_device(nn.ReLU(), (_X, far), {})
    for args, kwargs, where in [
        ((far,), {}, r"args\[0\]"),
        ((_X, [1, {"b": (_X, far)}]), {}, r"args\[1\]\[1\]\['b'\]\[1\]"),
        ((_X,), {"k": {"a": far}}, r"kwargs\['k'\]\['a'\]"),
    ]:
        match = rf"model is on cpu.*{where} is on meta.*input\.to\('cpu'\) or model\.to"
        with pytest.raises(DeviceMismatchError, match=match):
            check_device(model, args, kwargs)
    with pytest.raises(DeviceMismatchError, match="model is on meta"):
        check_device(model.to("meta"), (_X,), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "size"),
    [
        ((_X,), {}, 8),
        ((torch.tensor(1.0), 3, [None, {"a": torch.zeros(5, 2)}], _X), {}, 5),
        ((), {"mode": "x", "ids": _B[:3]}, 3),
        ((torch.zeros(0, 3),), {}, 0),
        ((torch.tensor(1.0),), {"n": 4}, 1),
        ((), {}, 1),
    ],
)
def test_batch_size(
    args: tuple[Any, ...], kwargs: dict[str, Tensor], size: int
) -> None:
    assert batch_size(args, kwargs) == size
