"""Conversion rules: a table that reads both ways.

A `Rule` pairs one parameter with the tensors of a checkpoint that hold it::

    Rule("layers.{L}.experts.gate_up", "model.layers.{L}.mlp.experts.{E}.{G:gate_proj|up_proj}.weight", "F D")

``{L}`` and ``{E}`` in the source are indices; ``{G:gate_proj|up_proj}`` spells index 0 and 1 of letter G as
words; the last string gives the axes of one such tensor. All letters are those of the parameter's declaration
(`jaxmoe.params`), so the arrangement follows: einops "F D -> F D" for one tensor, at place [L, E, G] of the
parameter (L, E, G, F, D). Parentheses fuse letters into one axis: "E (G F) D" is a fused layout.
``{D/first|second}`` spells the halves of letter D, which the axes have as well: a tensor that was cut.

`bind` turns the rules of a family into one `Binding` per tensor; reading takes a binding left to right,
writing right to left.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import einops
import numpy as np

from jaxmoe.model.spec import ModelSpec
from jaxmoe.params import Param, named

_FIELD = re.compile(r"\{([A-Z])(?:([:/])([^}]*))?\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter, where its tensors are, and the axes of one of them.

    Attributes:
        target: parameter name; ``layers.{L}.…`` for those of layer L, whichever group it is in.
        source: tensor name with fields.
        axes: letters of one source tensor, parentheses fusing several into one axis.
        copies: further tensor names that hold the same values where they exist (a tied output head); checked
            on load, written again on export.
    """

    target: str
    source: str
    axes: str
    copies: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Binding:
    """One checkpoint tensor and the part of one parameter that it holds.

    Attributes:
        source: tensor name.
        target: parameter name, such as ``groups.0.0.experts.gate_up``.
        declared: the parameter's declaration.
        index: letters that the tensor's name fixes, with their index.
        axes: the tensor's axes, each a tuple of letters.
        ranges: letters of which the tensor holds a part, with its bounds.
    """

    source: str
    target: str
    declared: Param
    index: Mapping[str, int]
    axes: tuple[tuple[str, ...], ...]
    ranges: Mapping[str, slice] = dataclasses.field(default_factory=dict)

    @property
    def held(self) -> dict[str, slice]:
        """The part of the parameter that the tensor holds: a slice with bounds per letter, in its own order."""
        sizes = zip(self.declared.dims, self.declared.shape, strict=True)
        whole = {letter: slice(0, size) for letter, size in sizes}
        return {**whole, **self.ranges, **{letter: slice(i, i + 1) for letter, i in self.index.items()}}

    def within(self, box: Sequence[slice]) -> dict[str, slice]:
        """A box on the tensor's `letters` → the part of the parameter that it is, a slice per letter."""
        held = self.held
        inside = {
            letter: slice(held[letter].start + part.start, held[letter].start + part.stop)
            for letter, part in zip(self.letters, box, strict=True)
        }
        return held | inside

    @property
    def letters(self) -> tuple[str, ...]:
        """The tensor's letters in its own order, fused axes taken apart."""
        return tuple(itertools.chain.from_iterable(self.axes))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size per letter of `letters`."""
        held = self.held
        return tuple(held[letter].stop - held[letter].start for letter in self.letters)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape on disk."""
        sizes = iter(self.sizes)
        return tuple(math.prod(next(sizes) for _ in group) for group in self.axes)

    @property
    def place(self) -> tuple[int | slice, ...]:
        """Index of the tensor's part within the parameter."""
        return tuple(self.index.get(letter, part) for letter, part in self.held.items())

    def to_parameter(self, factored: np.ndarray) -> np.ndarray:
        """(axes `letters`) → the parameter's own order of the letters that the name leaves free."""
        return einops.rearrange(factored, f"{' '.join(self.letters)} -> {' '.join(self._free)}")

    def to_tensor(self, part: np.ndarray) -> np.ndarray:
        """The parameter's part at `place` → the tensor as it is on disk."""
        fused = " ".join(f"({' '.join(group)})" for group in self.axes)
        return einops.rearrange(part, f"{' '.join(self._free)} -> {fused}")

    @property
    def _free(self) -> tuple[str, ...]:
        return tuple(letter for letter in self.declared.dims if letter not in self.index)


@dataclasses.dataclass(frozen=True)
class Bindings:
    """All bindings of a model, and what of a checkpoint they do not meet.

    Attributes:
        of_tensor: the binding of each tensor, copies included.
        of_parameter: bindings that together fill each parameter, copies excluded.
        copies: tensor name of a copy → the tensor that it repeats.
        missing: tensors that the model needs and the checkpoint lacks.
        surplus: tensors that no rule takes.
    """

    of_tensor: Mapping[str, Binding]
    of_parameter: Mapping[str, tuple[Binding, ...]]
    copies: Mapping[str, str]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]


def bind(
    rules: Sequence[Rule],
    spec: ModelSpec,
    shapes: Mapping[str, Sequence[int]] | None = None,
    ignored: Sequence[str] = (),
) -> Bindings:
    """Apply `rules` to a model.

    Where several rules have the same target they are alternative layouts: per layer, the first whose tensors
    are in `shapes` and have the right shapes is used, so a checkpoint may hold its experts one by one or fused,
    and fused ones either way round. If none has the right shapes, it is the first whose tensors are there.

    Args:
        rules: of the family.
        spec: the model.
        shapes: of the checkpoint's tensors by name; without it the first layout of each parameter is taken.
        ignored: regular expressions of tensors that are not the model's (copied as they are on export).

    Raises:
        ValueError: a parameter has no rule, or a rule's letters do not cover its parameter: a family's mistake.
    """
    present = None if shapes is None else shapes.keys()
    of_tensor: dict[str, Binding] = {}
    of_parameter: dict[str, list[Binding]] = {}
    copies: dict[str, str] = {}
    missing: list[str] = []
    for part in _parts(spec):
        candidates = [rule for rule in rules if rule.target == part.rule_target]
        if not candidates:
            raise ValueError(f"no rule for parameter {part.name} ({part.rule_target})")
        rule, layout = _layout(candidates, part, shapes)
        for binding in layout:
            if binding.source in of_tensor:
                raise ValueError(
                    f"{binding.source} is taken by both {of_tensor[binding.source].target} and {part.name}"
                )
            of_tensor[binding.source] = binding
            of_parameter.setdefault(part.name, []).append(binding)
            if present is not None and binding.source not in present:
                missing.append(binding.source)
        for copy in rule.copies:
            if present is not None and copy in present:
                of_tensor[copy] = dataclasses.replace(layout[0], source=copy)
                copies[copy] = layout[0].source
    extra = (present or set()) - of_tensor.keys()
    surplus = sorted(name for name in extra if not any(re.search(pattern, name) for pattern in ignored))
    return Bindings(
        of_tensor,
        {name: tuple(parts) for name, parts in of_parameter.items()},
        copies,
        tuple(missing),
        tuple(surplus),
    )


def tensor_count(rules: Sequence[Rule], spec: ModelSpec) -> int:
    """How many tensors a model has, of its layouts in the one with the most; `bind` makes an object of each."""
    layouts: dict[str, list[list[tuple[str, str, str]]]] = {}
    for rule in rules:
        layouts.setdefault(rule.target, []).append(_FIELD.findall(rule.source))
    count = 0
    for part in _parts(spec):
        size_of = dict(zip(part.declared.dims, part.declared.shape, strict=True)) | {"L": 1}
        count += max(
            math.prod(words.count("|") + 1 if words else size_of[letter] for letter, _, words in fields)
            for fields in layouts.get(part.rule_target, [[]])
        )
    return count


class _Part(NamedTuple):
    """A parameter outside the layers, or one layer's part of a stacked one."""

    name: str
    declared: Param
    rule_target: str
    layer: int | None
    repeat: int | None


def _parts(spec: ModelSpec) -> Iterator[_Part]:
    inside: dict[tuple[int, int], list[tuple[str, Param]]] = {}
    for name, declared in named(spec.declared):
        if name.startswith("groups."):
            _, group, place, _ = name.split(".", 3)
            inside.setdefault((int(group), int(place)), []).append((name, declared))
        else:
            yield _Part(name, declared, name, None, None)
    for layer in range(len(spec.layers)):
        group_index, place_index, repeat = spec.locate(layer)
        for name, declared in inside[group_index, place_index]:
            yield _Part(name, declared, "layers.{L}." + name.split(".", 3)[3], layer, repeat)


def _layout(
    candidates: Sequence[Rule], part: _Part, shapes: Mapping[str, Sequence[int]] | None
) -> tuple[Rule, list[Binding]]:
    """The rule whose tensors the checkpoint has, and its bindings."""
    layouts = [(rule, _expand(rule, part)) for rule in candidates]
    if shapes is None:
        return layouts[0]

    def fits(bindings: Sequence[Binding], exactly: bool) -> bool:
        there = [binding for binding in bindings if binding.source in shapes]
        return bool(there) and not (exactly and any(tuple(shapes[b.source]) != b.shape for b in there))

    for exactly in (True, False):
        for rule, bindings in layouts:
            if fits(bindings, exactly):
                return rule, bindings
    return layouts[0]


def _expand(rule: Rule, part: _Part) -> list[Binding]:
    """The bindings of one rule for one part, experts in numeric order."""
    axes = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", rule.axes))
    size_of = dict(zip(part.declared.dims, part.declared.shape, strict=True))
    fields = _FIELD.findall(rule.source)
    letters = [letter for letter, mark, _ in fields if mark != "/"]
    letters += [letter for group in axes for letter in group]
    unknown = {letter for letter, _, _ in fields} - size_of.keys()
    if sorted(letters) != sorted(part.declared.dims) or unknown:
        raise ValueError(f"{rule} gives letters {letters} for {part.name}, declared as {part.declared.dims}")
    choices = [
        _cut(letter, spelt.split("|"), size_of[letter])
        if mark == "/"
        else _places(rule, part, letter, spelt.split("|") if spelt else None)
        for letter, mark, spelt in fields
    ]
    template = _FIELD.sub(r"{\1}", rule.source)
    return [
        Binding(
            source=template.format(**{letter: word for letter, _, word in choice}),
            target=part.name,
            declared=part.declared,
            index={letter: place for letter, place, _ in choice if isinstance(place, int)},
            axes=axes,
            ranges={letter: place for letter, place, _ in choice if isinstance(place, slice)},
        )
        for choice in itertools.product(*choices)
    ]


_Choice = tuple[str, int | slice, str]
"""A letter, a place on it, and how a tensor's name spells that."""


def _places(rule: Rule, part: _Part, letter: str, words: Sequence[str] | None) -> list[_Choice]:
    size = part.declared.shape[part.declared.dims.index(letter)]
    if words is not None and len(words) != size:
        raise ValueError(f"{rule} spells {len(words)} words for {letter}={size} of {part.name}")
    if letter == "L":
        return [("L", part.repeat or 0, str(part.layer))]
    return [(letter, i, words[i] if words else str(i)) for i in range(size)]


def _cut(letter: str, words: Sequence[str], size: int) -> list[_Choice]:
    """As torch.chunk cuts: what does not divide is missing from the last part."""
    step = -(-size // len(words))
    bounds = [slice(min(i * step, size), min((i + 1) * step, size)) for i in range(len(words))]
    return [(letter, part, word) for part, word in zip(bounds, words, strict=True)]
