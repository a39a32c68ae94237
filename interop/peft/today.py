"""A model's anatomy from its family's conversion rules, and what ties tensors of any layout to it."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxmoe.interop.peft.anatomy import Anatomy, Kind, Module, Piece
from jaxmoe.interop.rules import Binding, Rule, bind
from jaxmoe.interop.source import Source
from jaxmoe.interop.storage.slices import positions


@dataclasses.dataclass(frozen=True)
class Today:
    """A model as transformers 5 holds it in memory.

    Attributes:
        anatomy: its modules, and the linear layers that they were in transformers 4 or are in published folders.
        bindings: the part of our parameters that each tensor holds, by its name.
    """

    anatomy: Anatomy
    bindings: Mapping[str, Binding]


def today(source: Source) -> Today:
    """What transformers 5 makes of a model.

    Towers of other modalities have no rules and are left out.
    """
    layouts = _layouts(source)
    chosen = _in_memory(layouts, len(source.family.prefixes))
    bindings = bind(chosen, source.spec).of_tensor
    order = {rule.target: place for place, rule in enumerate(chosen)}
    modules: dict[str, list[Binding]] = {}
    for binding in bindings.values():
        modules.setdefault(binding.source.rpartition(".")[0], []).append(binding)
    for parts in modules.values():
        parts.sort(key=lambda part: order[_rule_target(part.target)])
    head = next((b.source.rpartition(".")[0] for b in bindings.values() if b.target == "lm_head"), None)
    pieces = dict(_pieces(source, list(layouts.values()), bindings))
    found = tuple(_module(name, parts, source.family.sealed) for name, parts in modules.items())
    return Today(Anatomy(found, head, pieces, whole=not source.family.text), bindings)


def _layouts(source: Source) -> dict[str, list[Rule]]:
    """All rules of each parameter by its target; those with the prefix that is used in memory, the last, come last."""
    rules: dict[str, list[Rule]] = {}
    for rule in source.family.rules(source.spec):
        rules.setdefault(rule.target, []).append(rule)
    return rules


def _in_memory(layouts: Mapping[str, Sequence[Rule]], prefixes: int) -> list[Rule]:
    """Of each parameter's layouts, that of transformers' modules.

    No rule says so, but the tests do of every family: of the last prefix, it is the last one where experts are bare
    parameters there. Where new checkpoints are laid out like the modules, experts are that in the first one.
    """
    own = {target: rules[-(len(rules) // prefixes) :] for target, rules in layouts.items()}
    experts = own.get("layers.{L}.experts.gate_up", [])
    bare = [
        rule.source for rule in experts if "{E}" not in rule.source and not rule.source.endswith(".weight")
    ]
    place = 0 if bare and experts[-1].source not in bare else -1
    return [rules[place] for rules in own.values()]


def _rule_target(target: str) -> str:
    """``groups.0.1.experts.down`` → ``layers.{L}.experts.down``."""
    return "layers.{L}." + target.split(".", 3)[3] if target.startswith("groups.") else target


def _module(name: str, parts: Sequence[Binding], sealed: frozenset[str]) -> Module:
    shapes = {part.source.rpartition(".")[2]: part.shape for part in parts}
    transposed = any(len(part.axes) == 3 and part.axes[1] == (part.declared.dims[-1],) for part in parts)
    kinds = {_kind(part) for part in parts} - {"other"}
    kind: Kind = kinds.pop() if kinds else "other"
    if kind == "linear" and name.rpartition(".")[2] in sealed:
        kind = "sealed"
    return Module(name, kind, shapes, transposed)


def _kind(part: Binding) -> Kind:
    if part.declared.role == "convolution":
        return "convolution"
    if not part.source.endswith(".weight") or len(part.axes) != 2:
        return "other"
    if part.declared.role == "router":
        return "router"
    if part.target == "embed":
        return "embedding"
    return "linear" if part.declared.role in ("matrix", "embedding") else "other"


def _pieces(
    source: Source, layouts: Sequence[Sequence[Rule]], bindings: Mapping[str, Binding]
) -> Iterator[tuple[str, Piece]]:
    """Linear layers of other layouts, by the module's name."""
    by_parameter = grouped(bindings.values())
    for place in range(max(map(len, layouts))):
        rules = [rules[min(place, len(rules) - 1)] for rules in layouts]
        for name, part in bind(rules, source.spec).of_tensor.items():
            if name in bindings or not name.endswith(".weight") or len(part.axes) != 2:
                continue
            for whole in by_parameter[part_of(part)]:
                piece = _piece(part, whole)
                if piece is not None:
                    yield name.removesuffix(".weight"), piece


def part_of(binding: Binding) -> tuple[str, int | None]:
    """The parameter that a tensor holds a part of, and the layer within its stack."""
    return binding.target, binding.index.get("L")


def grouped(bindings: Iterable[Binding]) -> dict[tuple[str, int | None], list[Binding]]:
    """Bindings by `part_of`."""
    found: dict[tuple[str, int | None], list[Binding]] = {}
    for binding in bindings:
        found.setdefault(part_of(binding), []).append(binding)
    return found


def _piece(part: Binding, whole: Binding) -> Piece | None:
    """Which rows of a tensor in memory a matrix of another layout is; None where it is no such part."""
    held, outer = part.held, whole.held
    if any(held[x].start < outer[x].start or held[x].stop > outer[x].stop for x in held):
        return None
    inputs = (whole.declared.dims[-1],)
    matrix = whole.axes[-2:]
    outputs = matrix[0] if matrix[1] == inputs else matrix[1]
    if part.axes[1] != inputs or inputs not in matrix or held[inputs[0]] != outer[inputs[0]]:
        return None
    sizes = dict(zip(whole.letters, whole.sizes, strict=True))
    inside = [slice(held[x].start - outer[x].start, held[x].stop - outer[x].start) for x in outputs]
    found = positions([sizes[x] for x in outputs], inside, range(len(outputs)))
    step = int(found[1] - found[0]) if len(found) > 1 else 1
    rows = range(int(found[0]), int(found[-1]) + 1, step)
    if len(rows) != len(found) or len(found) != part.shape[0]:
        return None
    expert = held["E"].start if "E" in whole.letters and len(whole.axes) == 3 else None
    if expert is None and len(whole.axes) == 3:
        return None
    return Piece(whole.source, expert, rows)
