"""Parameters chosen by the names of their tensors in the checkpoint."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import jax

from jaxmoe.errors import UserError
from jaxmoe.interop.rules import Binding, Bindings
from jaxmoe.interop.source import Source
from jaxmoe.model.spec import LayerGroup, ModelSpec, repeated
from jaxmoe.params import Tree, named

_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of a model is trained.

    Attributes:
        source: the model, its layers grouped so that every parameter is trained as a whole or not at all.
        mask: whether each parameter is trainable, a tree like `ModelSpec.declared`.
    """

    source: Source
    mask: Tree


def select(
    source: Source, trainable: Sequence[str] | None, frozen: Sequence[str], choosing: bool = False
) -> Selection:
    """Which parameters are trained: those of `trainable` without those of `frozen`, never what no gradient changes.

    A pattern is a regular expression that is searched in the names of tensors as they are on disk, such as
    ``model.layers.0.self_attn.q_proj.weight``. Layers may differ; experts of one layer, and gate and up of one
    matrix, are one parameter here and may not.

    Args:
        source: the model.
        trainable: patterns; None for all tensors.
        frozen: patterns.
        choosing: there is a loss of parameters that only make a choice (`Param.chooses`).

    Raises:
        UserError: a pattern is none or matches nothing, one parameter would be trained in part, or nothing would be
            trained.
    """
    chosen = None if trainable is None else _compiled("trainable", trainable)
    excluded = _compiled("frozen", frozen)
    names = [*source.bindings.of_tensor, *_copies(source)]
    for key, patterns in (("trainable", chosen or []), ("frozen", excluded)):
        for pattern in patterns:
            if not any(pattern.search(name) for name in names):
                raise UserError(
                    f"{key}: {pattern.pattern!r} matches no tensor of the model{_nearest(pattern, names)}"
                )

    constant = _constants(source, choosing)
    for pattern in chosen or []:
        found = [name for name in names if pattern.search(name)]
        if constant.issuperset(found):
            raise UserError(
                f"trainable: {pattern.pattern!r} matches {found[0]}, which no gradient changes: expected a pattern of "
                "what can be trained"
            )

    def is_trained(names: Iterable[str]) -> bool:
        names = list(names)
        wanted = chosen is None or any(pattern.search(name) for pattern in chosen for name in names)
        return wanted and not any(pattern.search(name) for pattern in excluded for name in names)

    copies: dict[str, list[str]] = {}
    for copy, original in _copies(source).items():
        copies.setdefault(original, []).append(copy)

    def trained(binding: Binding) -> bool:
        return is_trained([binding.source, *copies.get(binding.source, ())])

    source = regrouped(source, _signatures(source.spec, source.bindings, trained))
    of_parameter = source.bindings.of_parameter
    mask = {
        name: declared.learns(choosing) and trained(of_parameter[name][0])
        for name, declared in named(source.spec.declared)
    }
    if not any(mask.values()):
        raise UserError(
            f"trainable and frozen leave nothing of the model's {len(mask)} parameters to train: "
            "expected some that are trainable and not frozen"
        )
    return Selection(
        source, jax.tree.unflatten(jax.tree.structure(source.spec.declared), list(mask.values()))
    )


def _compiled(key: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(
            f"{key}: found {error.pattern!r}, which is no regular expression: {error.msg}"
        ) from None


def _constants(source: Source, choosing: bool) -> set[str]:
    """Tensors that no gradient changes."""
    parts = source.bindings.of_tensor.values()
    return {part.source for part in parts if not part.declared.learns(choosing)}


def _copies(source: Source) -> Mapping[str, str]:
    """Tensors that repeat others, whether the folder has them or not: a tied output head is still called so."""
    rules = source.family.rules(source.spec)
    return {
        copy: rule.source
        for rule in rules
        for copy in rule.copies
        if rule.source in source.bindings.of_tensor
    }


def _nearest(pattern: re.Pattern[str], names: Sequence[str]) -> str:
    """Names that look like a pattern that matches none, one for each of their kind."""
    kinds = {re.sub(r"\.\d+\.", ".0.", name): name for name in reversed(names)}
    text = re.sub(r"\\(.)", r"\1", pattern.pattern)
    near = difflib.get_close_matches(text, kinds, _LISTED, cutoff=0.3) or list(kinds)[:_LISTED]
    return f"; its tensors are called {', '.join(near)}"


def regrouped(source: Source, signatures: Sequence[Hashable]) -> Source:
    """Group layers anew by what they are and by what is done with them.

    Args:
        source: the model.
        signatures: of every layer, something that is equal where the same is done.
    """
    layers = list(zip(source.spec.layers, signatures, strict=True))
    groups = tuple(
        LayerGroup(tuple(layer for layer, _ in pattern), repeats) for pattern, repeats in repeated(layers)
    )
    return (
        source
        if groups == source.spec.groups
        else source.grouped(dataclasses.replace(source.spec, groups=groups))
    )


def _signatures(
    spec: ModelSpec, bindings: Bindings, trained: Callable[[Binding], bool]
) -> list[frozenset[str]]:
    """Of every layer, the parameters that are trained.

    Raises:
        UserError: a layer's part of a parameter would be trained in part.
    """
    found = []
    for layer in range(len(spec.layers)):
        group, place, repeat = spec.locate(layer)
        prefix = f"groups.{group}.{place}."
        own: set[str] = set()
        for name, parts in _of_layer(bindings, prefix):
            ours = [part for part in parts if part.index.get("L", repeat) == repeat]
            verdicts = [trained(part) for part in ours]
            if any(verdicts) and not all(verdicts):
                yes, no = ours[verdicts.index(True)].source, ours[verdicts.index(False)].source
                raise UserError(
                    f"trainable and frozen train {yes} and freeze {no}, which are parts of one parameter: "
                    "expected patterns that match both or neither, such as without the number of the expert"
                )
            if all(verdicts):
                own.add(name)
        found.append(frozenset(own))
    return found


def _of_layer(bindings: Bindings, prefix: str) -> Iterator[tuple[str, tuple[Binding, ...]]]:
    for name, parts in bindings.of_parameter.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), parts
