"""Which parameters of a model an adapter's config targets, by PEFT's own rules (0.21).

One rule is stricter: "all-linear" leaves out routers and towers of other modalities, which PEFT takes where they are
linear layers. What PEFT makes of names from transformers 4 (experts as linear layers) is in `Anatomy.in_pieces`.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from jaxmoe.errors import UserError, listed, quote
from jaxmoe.interop.peft.anatomy import Anatomy, Module
from jaxmoe.interop.peft.config import ALL_LINEAR, AdapterConfig
from jaxmoe.interop.storage.problems import raise_problems

_LISTED = 3
_ADAPTABLE = ("linear", "embedding", "router")
_REFUSED = {
    "convolution": "a convolution",
    "sealed": "which PEFT cannot adapt, because transformers reads its weight and does not call it",
}
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted parameter.

    Attributes:
        module: that holds it.
        parameter: its name within that.
        rank: per expert.
        scale: the factor on B A.
        alone: it was targeted by its own name (``target_parameters``), not with its module.
    """

    module: Module
    parameter: str
    rank: int
    scale: float
    alone: bool

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return self.module.full(self.parameter)


@dataclasses.dataclass(frozen=True)
class Matched:
    """What a config asks of a model.

    Attributes:
        targets: by the parameter's name, in the model's order.
        saved: names of the parameters that are trained and stored as a whole (``modules_to_save``).
    """

    targets: Mapping[str, Target]
    saved: tuple[str, ...]


def match(config: AdapterConfig, anatomy: Anatomy, where: object, *, strict: bool = True) -> Matched:
    """Resolve a config on a model.

    Args:
        config: what to match.
        anatomy: the model's modules.
        where: what the config is called in messages.
        strict: refuse every pattern that matches nothing. PEFT ignores one as long as another matches.

    Raises:
        UserError: a pattern that is no regular expression, matches nothing or matches what cannot be adapted.
    """
    problems: list[str] = []
    matcher = _Matcher(config, anatomy, problems)
    try:
        targets = {target.name: target for target in matcher.targets()}
        if strict:
            matcher.check_patterns(targets)
    except re.error as error:
        raise UserError(
            f"{where}: found {quote(error.pattern)}, which is no regular expression: {error.msg}"
        ) from None
    except (OverflowError, RecursionError) as error:
        raise UserError(f"{where}: a pattern is no regular expression that can be used: {error}") from None
    if not targets and not problems:
        problems.append(
            "target_modules and target_parameters match nothing that can be adapted: expected some of "
            f"{_nearest('', matcher.adaptable)}"
        )
    raise_problems(where, problems)
    return Matched(targets, tuple(matcher.saved()))


class _Matcher:
    def __init__(self, config: AdapterConfig, anatomy: Anatomy, problems: list[str]) -> None:
        self.config, self.anatomy, self.problems = config, anatomy, problems
        self.by_name = anatomy.by_name
        self.names = list(dict.fromkeys(_with_parents(module.name for module in anatomy.modules)))
        self.adaptable = [module.name for module in anatomy.modules if module.kind in _ADAPTABLE]

    def targets(self) -> Iterator[Target]:
        """In the order of the model. A module that is targeted as a whole has no parameter targeted as well."""
        modules = set(self._modules())
        endings = self.config.target_parameters or ()
        for module, parameter in self.anatomy.parameters():
            full = module.full(parameter)
            whole = module.name in modules and parameter == "weight"
            alone = _ends_with(full, endings)
            if whole and alone:
                self.problems.append(
                    f"{full} is matched by target_modules and by target_parameters: expected one of them"
                )
            if whole:
                yield self._target(module, parameter, module.name, alone=False)
            elif alone and module.kind in _REFUSED:
                self.problems.append(
                    f"target_parameters match {full}, {_REFUSED[module.kind]}: expected parameters of linear layers, "
                    "embeddings or experts"
                )
            elif alone and 2 <= len(module.parameters[parameter]) <= 3:
                yield self._target(module, parameter, full, alone=True)
            elif alone:
                shape = list(module.parameters[parameter])
                self.problems.append(
                    f"target_parameters match {full} of shape {shape}: expected parameters of two or three axes"
                )

    def _target(self, module: Module, parameter: str, key: str, *, alone: bool) -> Target:
        rank = resolve(self.config.rank_pattern, key, self.config.r)
        alpha = resolve(self.config.alpha_pattern, key, self.config.lora_alpha)
        return Target(module, parameter, rank, self.config.scale(rank, alpha), alone)

    def _modules(self) -> Iterator[str]:
        for name in self.names:
            if self._is_excluded(name) or not self._is_targeted(name):
                continue
            module = self.by_name.get(name)
            if module is not None and module.kind in _ADAPTABLE:
                yield name
            else:
                kind = "other" if module is None else module.kind
                what = _REFUSED.get(kind, "which is no linear layer and no embedding")
                self.problems.append(
                    f"target_modules match {name}, {what}: expected modules such as "
                    f"{_nearest(name, self.adaptable)}"
                )

    def _is_targeted(self, name: str) -> bool:
        wanted = self.config.target_modules
        if wanted is None:
            return False
        if isinstance(wanted, str):
            if wanted.lower() != ALL_LINEAR:
                return re.fullmatch(wanted, name) is not None
            module = self.by_name.get(name)
            return (
                module is not None
                and module.kind == "linear"
                and not module.aside
                and name != self.anatomy.head
            )
        return name in wanted or (_ends_with(name, wanted) and self._in_layers(name))

    def _in_layers(self, name: str) -> bool:
        layers = self.config.layers_to_transform
        if layers is None or layers == ():
            return True
        patterns = self.config.layers_pattern or ()
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        # The first number after a list is the layer's; an expert's comes later.
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((hit for text in expressions if (hit := re.match(text, name))), None)
        return found is not None and int(found[1]) in ((layers,) if isinstance(layers, int) else layers)

    def _is_excluded(self, name: str) -> bool:
        excluded = self.config.exclude_modules
        if isinstance(excluded, str) and excluded:
            if re.fullmatch(excluded, name):
                return True
        elif excluded and (name in excluded or _ends_with(name, excluded)):
            return True
        saved = self.config.modules_to_save or ()
        return any(re.match(rf"(^|.*\.){pattern}($|\..*)", name) for pattern in saved)

    def saved(self) -> Iterator[str]:
        """Parameters of all modules whose names end in one of ``modules_to_save``, at a dot or not."""
        wanted = self.config.modules_to_save or ()
        whole = [name for name in self.names if any(name.endswith(ending) for ending in wanted)]
        for module, parameter in self.anatomy.parameters():
            if any(module.name == name or module.name.startswith(name + ".") for name in whole):
                yield module.full(parameter)

    def check_patterns(self, targets: Mapping[str, Target]) -> None:
        """Report each pattern that matches nothing at all."""
        full = [module.full(parameter) for module, parameter in self.anatomy.parameters()]
        self._check("target_modules", self.names, _ends_with, self.adaptable)
        self._check("exclude_modules", self.names, _ends_with)
        self._check("target_parameters", full, _ends_with)
        self._check("modules_to_save", self.names, lambda name, ends: any(map(name.endswith, ends)))
        keys = [target.name if target.alone else target.module.name for target in targets.values()]
        self._check("rank_pattern", keys, _matches_key)
        self._check("alpha_pattern", keys, _matches_key)

    def _check(
        self,
        field: str,
        names: Sequence[str],
        matches: Callable[[str, Sequence[str]], bool],
        near: Sequence[str] | None = None,
    ) -> None:
        given = getattr(self.config, field)
        if isinstance(given, str):
            if given.lower() == ALL_LINEAR:
                return
            given, matches = [given], lambda name, patterns: re.fullmatch(patterns[0], name) is not None
        for pattern in given or ():
            if not any(matches(name, [pattern]) for name in names):
                self.problems.append(
                    f"{field}: {pattern!r} matches nothing: expected names such as {_nearest(pattern, near or names)}"
                )


def resolve(patterns: Mapping[str, _Value], key: str, default: _Value) -> _Value:
    """The value of the first pattern that matches the end of a name, as ``rank_pattern`` is read.

    Args:
        patterns: regular expressions.
        key: a module's name, or the full name of a parameter that is adapted alone.
        default: without a match.
    """
    return next((value for pattern, value in patterns.items() if _matches_key(key, [pattern])), default)


def _matches_key(key: str, patterns: Sequence[str]) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", key) for pattern in patterns)


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _with_parents(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            yield ".".join(parts[:depth])


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Names that look like a pattern, one for each of their kind."""
    kinds = {re.sub(r"\.\d+\.", ".0.", name): name for name in reversed(names)}
    ends = {name.rpartition(".")[2]: name for name in reversed(names)}
    text = re.sub(r"\\(.)", r"\1", pattern)
    near = difflib.get_close_matches(text.rpartition(".")[2], ends, _LISTED, cutoff=0.5)
    found = [ends[end] for end in near] or [
        kinds[kind] for kind in difflib.get_close_matches(text, kinds, _LISTED, cutoff=0.3)
    ]
    return listed((found or list(kinds.values()))[:_LISTED], _LISTED) or "none: the model has no such thing"
