"""What a user may ask for (`QuantConfig`) and what one quantizer is (`QuantSpec`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.patterns import any_matches, matches, patterns_of, require_match

Estimator = Literal["ste", "lsq", "ewgs", "aewgs"]
Offset = Literal["free", "half_step", "integer"]
Scope = Literal["compute", "full"]

MIN_BITS, MAX_BITS = 1, 16


@dataclass(frozen=True)
class QuantSpec:
    """The fixed choices of one quantizer; what is learned lives in the quantizer.

    Attributes:
        bits: target bit-width that a frozen tensor must not exceed, 1..16.
        estimator: how gradients pass the rounding (``quantize/estimators.py``).
        offset: which values the lowest level may take, in steps: any real number
            (``free``), multiples of a half (of activations of more than 2 bits and
            weights of more than 6 only whole ones), or whole multiples.
        per_channel: one step for each output channel (weights only).
    """

    bits: int
    estimator: Estimator = "lsq"
    offset: Offset = "half_step"
    per_channel: bool = False

    def __post_init__(self) -> None:
        _check_bits("bits", self.bits)
        _check_choice("estimator", self.estimator, get_args(Estimator))
        _check_choice("offset", self.offset, get_args(Offset))


@dataclass(frozen=True)
class Override:
    """Settings for the layers that one pattern selects; None keeps the general one."""

    weight_bits: int | None = None
    act_bits: int | None = None
    estimator: Estimator | None = None
    offset: Offset | None = None
    per_channel: bool | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            value = getattr(self, name)
            if value is not None:
                _check_bits(name, value)
        if self.estimator is not None:
            _check_choice("estimator", self.estimator, get_args(Estimator))
        if self.offset is not None:
            _check_choice("offset", self.offset, get_args(Offset))
        if self.per_channel is not None:
            _check_flag("per_channel", self.per_channel)


@dataclass(frozen=True)
class QuantConfig:
    """How a model is to be quantized.

    Patterns are `fnmatch` patterns on layer names (``"layer1.*"``, ``"*.conv?"``) or,
    with the prefix ``op:``, on operation names of the op table (``"op:linear"``,
    ``"op:conv*"``). A pattern that matches nothing is a `PatternError`, not a silence.

    Attributes:
        weight_bits: target bit-width of weights, 1..16.
        act_bits: target bit-width of activations, 1..16.
        per_channel: one weight step for each output channel, else one for the tensor.
        estimator: ``ste``, ``lsq``, ``ewgs`` or ``aewgs``.
        offset: ``free``, ``half_step`` or ``integer`` (see `QuantSpec`).
        first_last: least bit-width of the first convolution and the last linear layer;
            ``"exclude"`` leaves both in floating point as the paper does; None treats
            them like the rest.
        include: layers to quantize.
        exclude: layers to leave in floating point; stronger than ``include``.
        overrides: pattern -> `Override` (or a dict of its fields); later ones win, and
            they win over ``first_last``.
        scope: which tensors get a quantizer (see below).
        strict: operations that would stay in floating point although nobody excluded
            them are an error that lists each with its reason.

    The scope ``compute`` quantizes what is multiplied and accumulated: the inputs and
    weights of convolutions, linear layers, matrix products and recurrent layers, and
    the weights of embeddings.

    The scope ``full`` is for integer-only hardware: each tensor that one integer kernel
    hands to another lies on one grid, whoever reads it. Besides the above, quantized
    are the inputs of

    * sums, differences, maxima, minima and concatenations of tensors, which share one
      grid (one quantizer called on each of them);
    * products of tensors and the dividend of a quotient, on grids of their own;
    * averages, interpolation and smooth activation functions (sigmoid, GELU, ...).

    Not quantized in either scope: softmax and normalization, which compute in floating
    point (a tensor that others read from a grid reaches them from it, too), and masks
    added to what only a softmax reads; divisors (a grid may hold zero); Python scalars,
    scalar tensors and vectors of parameters (scales and shifts, 32 bits in integer
    kernels); the inputs of ReLU, max pooling and views, which commute with the rounding
    behind them; the outputs of the model. A table of parameters (a position embedding)
    is quantized as a weight where it meets another tensor.

    Raises:
        ConfigError: a value is outside its domain.
    """

    weight_bits: int = 2
    act_bits: int = 2
    per_channel: bool = True
    estimator: Estimator = "lsq"
    offset: Offset = "half_step"
    first_last: int | Literal["exclude"] | None = 8
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Override | Mapping[str, Any]] = field(
        default_factory=dict[str, "Override | Mapping[str, Any]"]
    )
    scope: Scope = "compute"
    strict: bool = False

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits)
        _check_bits("act_bits", self.act_bits)
        _check_choice("estimator", self.estimator, get_args(Estimator))
        _check_choice("offset", self.offset, get_args(Offset))
        if self.first_last not in (None, "exclude"):
            _check_bits("first_last", self.first_last)
        _check_flag("per_channel", self.per_channel)
        _check_choice("scope", self.scope, get_args(Scope))
        _check_flag("strict", self.strict)
        object.__setattr__(self, "include", patterns_of("include", self.include))
        object.__setattr__(self, "exclude", patterns_of("exclude", self.exclude))
        object.__setattr__(self, "overrides", _overrides(self.overrides))

    def selects(self, layer: str, operation: str) -> bool:
        """Whether include and exclude select this layer (name, operation name)."""
        return any_matches(self.include, layer, operation) and not any_matches(
            self.exclude, layer, operation
        )

    def for_layer(self, layer: str, operation: str, *, boundary: bool) -> QuantConfig:
        """This configuration as it applies to one layer.

        Args:
            layer: name of the layer.
            operation: name of its row in the op table.
            boundary: it is the first convolution or the last linear layer.
        """
        chosen = self
        if boundary and isinstance(self.first_last, int):
            chosen = replace(
                chosen,
                weight_bits=max(self.weight_bits, self.first_last),
                act_bits=max(self.act_bits, self.first_last),
            )
        for pattern, override in self.overrides.items():
            if matches(pattern, layer, operation):
                given = {k: v for k, v in _fields(override).items() if v is not None}
                chosen = replace(chosen, **given)
        return chosen

    def weight_spec(self) -> QuantSpec:
        """The quantizer of a weight under this configuration."""
        return QuantSpec(
            self.weight_bits, self.estimator, self.offset, self.per_channel
        )

    def act_spec(self) -> QuantSpec:
        """The quantizer of an activation under this configuration."""
        return QuantSpec(self.act_bits, self.estimator, self.offset)

    def check_patterns(self, layers: Iterable[tuple[str, str]]) -> None:
        """Raise if a pattern matches none of the (layer, operation) pairs.

        Raises:
            PatternError: names the pattern, its field and the layers there are.
        """
        known = list(layers)
        require_match("include", self.include, known)
        require_match("exclude", self.exclude, known)
        require_match("overrides", self.overrides, known)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it back."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> QuantConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: an unknown field or a value outside its domain.
        """
        try:
            return QuantConfig(**values)
        except TypeError as error:
            raise ConfigError(f"not a QuantConfig: {error}") from error


def _fields(override: Override | Mapping[str, Any]) -> dict[str, Any]:
    return asdict(override) if isinstance(override, Override) else dict(override)


def _overrides(given: object) -> dict[str, Override]:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"overrides is a mapping of pattern to settings, got {given!r}; write "
            'overrides={"layer1.*": {"weight_bits": 4}}'
        )
    entries: Mapping[Any, Any] = given
    return {str(pattern): _override(pattern, one) for pattern, one in entries.items()}


def _override(pattern: str, given: Override | Mapping[str, Any]) -> Override:
    try:
        return given if isinstance(given, Override) else Override(**given)
    except ConfigError as error:
        raise ConfigError(f"overrides[{pattern!r}]: {error}") from error
    except TypeError as error:
        raise ConfigError(
            f"overrides[{pattern!r}]: {error}; the fields are "
            f"{', '.join(Override.__dataclass_fields__)}"
        ) from error


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def _check_bits(name: str, bits: object) -> None:
    whole = bits if isinstance(bits, int) and not isinstance(bits, bool) else 0
    if not MIN_BITS <= whole <= MAX_BITS:
        raise ConfigError(
            f"{name} must be a whole number from {MIN_BITS} to {MAX_BITS}, "
            f"got {bits!r}; to leave a layer in floating point, use exclude"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
