"""What a user may ask for; everything else is an error that says what is allowed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdnsq_fx.errors import ConfigError, GdnsqError, PatternError
from gdnsq_fx.patterns import matches
from gdnsq_fx.spec import Override, QuantConfig, QuantSpec

_LAYERS = [("stem", "conv2d"), ("body.0", "conv2d"), ("fc", "linear")]
_WRONG_BITS = [0, 17, -1, 2.5, 4.0, True, False, "4", None, [4], float("nan")]


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width_from_1_to_16(bits: int) -> None:
    config = QuantConfig(weight_bits=bits, act_bits=bits, first_last=bits)
    assert config.weight_spec().bits == config.act_spec().bits == bits
    assert Override(weight_bits=bits, act_bits=bits).weight_bits == bits


@pytest.mark.parametrize("bits", _WRONG_BITS)
@pytest.mark.parametrize("field", ["weight_bits", "act_bits"])
def test_any_other_width_is_refused(field: str, bits: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig(**{field: bits})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, GdnsqError)
    assert str(caught.value) == (
        f"{field} must be a whole number from 1 to 16, got {bits!r}; to leave a layer "
        "in floating point, use exclude"
    )
    with pytest.raises(ConfigError, match="bits must be a whole number"):
        QuantSpec(bits)
    if bits is not None:
        with pytest.raises(ConfigError, match=field):
            Override(**{field: bits})
        with pytest.raises(ConfigError, match=field):
            QuantConfig(overrides={"*": {field: bits}})


@pytest.mark.parametrize("value", [0, 17, 2.5, True, "8", "Exclude", []])
def test_first_last_is_a_width_or_exclude_or_none(value: Any) -> None:
    assert QuantConfig(first_last="exclude").first_last == "exclude"
    assert QuantConfig(first_last=None).first_last is None
    with pytest.raises(ConfigError, match="first_last must be"):
        QuantConfig(first_last=value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("estimator", "LSQ", "one of ste, lsq, ewgs, aewgs, got 'LSQ'"),
        ("estimator", None, "one of ste, lsq, ewgs, aewgs, got None"),
        ("offset", "symmetric", "one of free, half_step, integer, got 'symmetric'"),
        ("include", "layer1.*", r"write include=\('layer1.*',\)"),
        ("exclude", "fc", r"write exclude=\('fc',\)"),
        ("include", 5, "include"),
        ("exclude", (1,), "exclude"),
        ("overrides", {"fc": {"bits": 3}}, r"overrides\['fc'\].*weight_bits, act_bits"),
        ("overrides", {"fc": 3}, r"overrides\['fc'\]"),
        ("overrides", [("fc", {})], "overrides"),
        ("overrides", {"fc": {"estimator": "adam"}}, "one of ste"),
        ("per_channel", "no", "per_channel"),
    ],
)
def test_values_outside_their_domain(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuantConfig(**{field: value})


def test_configurations_do_not_change() -> None:
    patterns = ["a", "b"]
    config = QuantConfig(include=patterns)  # type: ignore[arg-type]
    patterns.append("c")
    assert config.include == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bits = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pattern", "layer", "operation", "wanted"),
    [
        ("*", "a.b", "conv2d", True),
        ("a.*", "a.b.c", "conv2d", True),
        ("a.?", "a.b", "conv2d", True),
        ("A.*", "a.b", "conv2d", False),
        ("conv2d", "a", "conv2d", False),
        ("op:conv2d", "a", "conv2d", True),
        ("op:conv*", "a", "conv_transpose1d", True),
        ("op:linear", "op:linear", "conv2d", False),
        ("[ab].x", "b.x", "conv2d", True),
    ],
)
def test_matching(pattern: str, layer: str, operation: str, wanted: bool) -> None:
    assert matches(pattern, layer, operation) is wanted


def test_exclude_is_stronger_than_include() -> None:
    config = QuantConfig(include=("op:conv2d", "fc"), exclude=("body.*",))
    assert [config.selects(*one) for one in _LAYERS] == [True, False, True]


def test_later_overrides_win_and_win_over_first_last() -> None:
    config = QuantConfig(
        weight_bits=2,
        act_bits=3,
        overrides={
            "op:conv*": {"weight_bits": 5, "estimator": "ste"},
            "body.*": Override(weight_bits=1),
        },
    )
    plain = config.for_layer("fc", "linear", boundary=False)
    assert (plain.weight_bits, plain.act_bits) == (2, 3)
    last = config.for_layer("fc", "linear", boundary=True)
    assert (last.weight_bits, last.act_bits) == (8, 8)
    first = config.for_layer("stem", "conv2d", boundary=True)
    assert (first.weight_bits, first.act_bits, first.estimator) == (5, 8, "ste")
    body = config.for_layer("body.0", "conv2d", boundary=False)
    assert (body.weight_bits, body.act_bits, body.estimator) == (1, 3, "ste")


def test_first_last_is_a_least_width() -> None:
    config = QuantConfig(weight_bits=12, act_bits=4, first_last=6)
    last = config.for_layer("fc", "linear", boundary=True)
    assert (last.weight_bits, last.act_bits) == (12, 6)


def test_patterns_that_match_nothing_show_what_there_is() -> None:
    QuantConfig(exclude=("st*", "op:linear")).check_patterns(_LAYERS)
    with pytest.raises(PatternError) as caught:
        QuantConfig(exclude=("stem", "boddy.*")).check_patterns(_LAYERS)
    assert str(caught.value) == (
        "exclude: the pattern 'boddy.*' matches no layer. Layers: stem, body.0, fc. "
        "Operations (prefix 'op:'): conv2d, linear"
    )
    many = [(f"layer{i}", "linear") for i in range(30)]
    with pytest.raises(PatternError, match=r"layer19, \.\.\.\. Operations"):
        QuantConfig(overrides={"op:conv": {}}).check_patterns(many)


_bits = st.integers(1, 16)
_estimators = st.sampled_from(["ste", "lsq", "ewgs", "aewgs"])
_offsets = st.sampled_from(["free", "half_step", "integer"])
_texts = st.lists(st.text(max_size=5), max_size=3).map(tuple)
_overrides = st.builds(
    Override,
    weight_bits=st.none() | _bits,
    act_bits=st.none() | _bits,
    estimator=st.none() | _estimators,
    offset=st.none() | _offsets,
    per_channel=st.none() | st.booleans(),
)
_configs = st.builds(
    QuantConfig,
    weight_bits=_bits,
    act_bits=_bits,
    per_channel=st.booleans(),
    estimator=_estimators,
    offset=_offsets,
    first_last=st.none() | st.just("exclude") | _bits,
    include=_texts,
    exclude=_texts,
    overrides=st.dictionaries(st.text(max_size=5), _overrides, max_size=3),
)


@given(_configs)
def test_dictionaries_survive_json(config: QuantConfig) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    assert QuantConfig.from_dict(values) == config


@pytest.mark.parametrize(
    "values",
    [{"bits": 4}, {"weight_bits": 0}, {"overrides": {"a": {"b": 1}}}, [], None],
)
def test_foreign_dictionaries_are_refused(values: Any) -> None:
    with pytest.raises(ConfigError):
        QuantConfig.from_dict(values)
