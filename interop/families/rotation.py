"""Reading the rotation of queries and keys from a config.json."""

import math
from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import UserError, listed, quote, shortened
from jaxmoe.interop.bounds import MAX_POSITIONS
from jaxmoe.interop.config_json import ConfigReader, is_positive
from jaxmoe.interop.families.common import head_dim
from jaxmoe.model.mixers.rope import Dynamic, Linear, Llama3, LongRope, Proportional, RopeSpec, Scaling, Yarn

_NUMBERS = frozenset(
    {
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "low_freq_factor",
        "high_freq_factor",
    }
)

_STRETCHES = frozenset({"factor", "attention_factor"})

# How other types stretch, and what a model was before: no formula but that of the type reads them.
_IDLE = frozenset(
    {
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
    }
)

KINDS = ("full_attention", "sliding_attention")
"""Of layers."""


def rope_spec(
    config: ConfigReader,
    given: Mapping[str, Any] | None = None,
    sections: bool = False,
    partial: bool = False,
    **options: Any,
) -> RopeSpec:
    """The rotation from ``rope_parameters`` (or the older rope_theta and rope_scaling, already merged into it).

    Args:
        config: of the model.
        given: other parameters than ``rope_parameters``, such as those of one kind of layer.
        sections: features may be split between positions in time, height and width, which are one and the same
            for text.
        partial: transformers' model rotates the part of each head that partial_rotary_factor says. Most rotate whole
            heads, and it must be 1.
        options: further fields of the spec.

    Raises:
        UserError: an unknown rope type, a missing, unknown or malformed parameter of it.
    """
    width = head_dim(config)
    rope = _Parameters(config, dict(config.take("rope_parameters") if given is None else given))
    if not isinstance(rope.kind, str) or rope.kind not in _SCALINGS:
        raise UserError(
            f"{config.file}: rope type {quote(rope.kind)} is not supported; supported: {', '.join(_SCALINGS)}"
        )
    share = rope.pop("partial_rotary_factor", 1.0)
    if share != 1 and not partial and rope.kind != "proportional":
        raise UserError(
            f"{config.file}: partial_rotary_factor = {share!r} is not supported; expected 1.0: transformers' model "
            "rotates whole heads"
        )
    rotary = width if rope.kind == "proportional" else int(width * share)
    least = 4 if rope.kind == "dynamic" else 2  # its exponent has rotary - 2 in the denominator
    if share > 1 or rotary % 2 or rotary < least:
        raise UserError(
            f"{config.file}: heads of width {width} with partial_rotary_factor {share} would rotate {rotary} features: "
            f"expected an even number of them from {least} to {width}"
        )
    if sections:
        rope.check_sections(rotary // 2)
    theta = rope.need("rope_theta")
    if rope.kind == "yarn" and theta <= 1:
        raise UserError(
            f"{config.file}: rope_theta = {theta!r} of rope type 'yarn': expected a number above 1"
        )
    pairs = int(share * width // 2) if rope.kind == "proportional" else rotary // 2
    scaling = _SCALINGS[rope.kind](rope, pairs)
    rope.finish()
    return RopeSpec(theta, rotary, scaling, **options)


def rotation_of(config: ConfigReader, kind: str) -> Mapping[str, Any]:
    """The part of ``rope_parameters`` for layers of one kind, where each kind has a rotation of its own.

    Raises:
        UserError: there is none, or something that transformers' model would not read.
    """
    rotations = config.take("rope_parameters")
    given = rotations.get(kind)
    if not isinstance(given, dict):
        raise UserError(f"{config.file}: rope_parameters lack an object {kind!r}")
    beside = {name: value for name, value in rotations.items() if name not in KINDS and value is not None}
    # Some published configs have this in both places; transformers' model reads that of the kind of layer.
    original = "original_max_position_embeddings"
    if beside.get(original) == given.get(original, beside.get(original)):
        beside.pop(original, None)
    unread = sorted(beside)
    if unread:
        raise UserError(
            f"{config.file}: rope_parameters have unknown entries "
            f"{listed([shortened(name, 60) for name in unread], 8)}"
        )
    if given.get("truncate", True) is not True:  # it looks for this beside the kinds of layers
        raise UserError(
            f"{config.file}: truncate = {quote(given['truncate'])} of the rotation of {kind!r} is not supported; "
            "expected true"
        )
    return given


def yarn_magnitude(factor: float, multiplier: float = 1.0) -> float:
    """What YaRN (arXiv 2309.00071) multiplies queries and keys with when it stretches a context by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


class _Parameters:
    """Those of one rotation, of which some have been taken.

    Attributes:
        kind: the rope type.
        positions: that the model is made for.
    """

    def __init__(self, config: ConfigReader, given: dict[str, Any]) -> None:
        self._file, self._given = config.file, given
        for name in _NUMBERS & given.keys():
            if given[name] is not None and not is_positive(given[name]):
                raise UserError(
                    f"{config.file}: {name} = {quote(given[name])} of the rotation: expected a positive number"
                )
        self.kind: Any = given.pop("rope_type", "default")
        given.pop("type", None)
        self.positions = config.size("max_position_embeddings", MAX_POSITIONS)

    def pop(self, name: str, default: Any = None) -> Any:
        """Take a parameter; null is as if it were not there."""
        value = self._given.pop(name, None)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """Take a parameter that must be there."""
        value = self.pop(name)
        if value is None:
            raise UserError(f"{self._file}: rope_parameters of type {self.kind!r} lack {name!r}")
        return value

    def factors(self, name: str, pairs: int) -> tuple[float, ...]:
        """Take a positive number for every pair of features."""
        values = self.need(name)
        if not isinstance(values, list) or len(values) != pairs or not all(map(is_positive, values)):
            raise UserError(f"{self._file}: {name} of the rotation: expected {pairs} positive numbers")
        return tuple(values)

    def check_sections(self, pairs: int) -> None:
        """Take the split of `pairs` pairs of features."""
        parts = self.pop("mrope_section")
        for name in ("mrope_interleaved", "interleaved"):
            self.pop(name)
        if parts is None:
            return
        sizes = [part for part in parts if is_positive(part)] if isinstance(parts, list | tuple) else []
        if len(sizes) != 3 or len(parts) != 3 or sum(sizes) != pairs:
            raise UserError(
                f"{self._file}: mrope_section = {quote(parts)}: expected three positive integers whose sum is {pairs}"
            )

    def refuse(self, name: str, value: Any, expected: str) -> UserError:
        """The error of a value out of range."""
        return UserError(
            f"{self._file}: {name} = {quote(value)} of rope type {self.kind!r}: expected {expected}"
        )

    def finish(self) -> None:
        """Refuse what has not been taken, unless it says nothing without what has been refused then."""
        unread = {name: v for name, v in self._given.items() if v is not None and name not in _IDLE}
        for name in sorted(_STRETCHES & unread.keys()):
            if unread.pop(name) != 1:
                raise self.refuse(name, self._given[name], "1 or no such entry, which it does not read")
        if unread:
            names = listed([shortened(name, 60) for name in sorted(unread)], 8)
            raise UserError(
                f"{self._file}: rope_parameters of type {self.kind!r} have unknown entries {names}"
            )


def _default(_: _Parameters, __: int) -> Scaling:
    return None


def _linear(rope: _Parameters, _: int) -> Scaling:
    return Linear(rope.need("factor"))


def _proportional(rope: _Parameters, pairs: int) -> Scaling:
    return Proportional(pairs, rope.pop("factor", 1.0))


def _dynamic(rope: _Parameters, _: int) -> Scaling:
    return Dynamic(rope.need("factor"), rope.positions)


def _llama3(rope: _Parameters, _: int) -> Scaling:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = Llama3(*(rope.need(name) for name in names))
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        expected = f"more than low_freq_factor, {scaling.low_freq_factor!r}"
        raise rope.refuse("high_freq_factor", scaling.high_freq_factor, expected)
    return scaling


def _longrope(rope: _Parameters, pairs: int) -> Scaling:
    original = rope.pop("original_max_position_embeddings", rope.positions)
    factor = rope.pop("factor", rope.positions / original)
    if original <= 1:
        raise rope.refuse("original_max_position_embeddings", original, "a number above 1")
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention = rope.pop("attention_factor", default)
    return LongRope(
        rope.factors("short_factor", pairs), rope.factors("long_factor", pairs), original, attention
    )


def _yarn(rope: _Parameters, _: int) -> Scaling:
    original = rope.pop("original_max_position_embeddings", rope.positions)
    factor = rope.pop("factor", rope.positions / original)
    mscale, all_dim = rope.pop("mscale"), rope.pop("mscale_all_dim")

    if mscale and all_dim:
        default = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    else:
        default = yarn_magnitude(factor)
    truncate = rope.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise rope.refuse("truncate", truncate, "true or false")
    return Yarn(
        factor,
        original,
        rope.pop("attention_factor", default),
        rope.pop("beta_fast", 32.0),
        rope.pop("beta_slow", 1.0),
        truncate,
    )


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
