"""What of an adapter cannot be had of a model, each in a line."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoe.config import QuantizationConfig
from jaxmoe.errors import UserError
from jaxmoe.interop.peft.today import Today
from jaxmoe.interop.places import Width
from jaxmoe.interop.quantizing import Recorded
from jaxmoe.interop.source import Source

if TYPE_CHECKING:
    from jaxmoe.interop.adapting import Adapted

_log = logging.getLogger(__name__)


def unadaptable(
    source: Source, model: Today, widths: Mapping[str, Width], saved: frozenset[str], init: str
) -> Iterator[str]:
    """Parameters that have no pair or cannot be trained, and pairs that cannot begin as `init` says."""
    holders = {module.full(name): module for module, name in model.anatomy.parameters()}
    for name in [*widths, *saved]:
        if name not in model.bindings:
            yield f"{name} is not a part of the language model: expected a parameter of it"
        elif model.bindings[name].declared.role == "constant":
            yield f"{name} is a constant that no gradient changes: expected a parameter that can be trained"
        elif model.bindings[name].target == "embed" and source.spec.tie_embeddings:
            yield (
                f"{name} is the output head as well (tie_word_embeddings), and PEFT would adapt one of the two alone: "
                "expected target_modules and modules_to_save without it"
            )
    for name, width in widths.items():
        if name in saved:
            yield f"{name} is adapted and trained as a whole: expected one of them"
        role = model.bindings[name].declared.role if name in model.bindings else "matrix"
        if role in ("vector", "decay"):
            yield f"{name} is not what a product is taken with: expected the weight of a linear layer, or of experts"
        if name in holders and init not in ("default", "gaussian"):
            module, parameter = holders[name], name.rpartition(".")[2]
            if module.kind != "linear":
                yield f"{name} is no linear layer: expected 'default' or 'gaussian' in place of adapter.init {init!r}"
            elif init == "orthogonal" and width.rank % 2:
                yield f"{name} has rank {width.rank}: expected an even one for adapter.init 'orthogonal'"
            elif init != "orthogonal" and width.rank > min(module.parameters[parameter]):
                yield (
                    f"{name} {list(module.parameters[parameter])} has rank {width.rank}: expected at most its smaller "
                    f"side for adapter.init {init!r}"
                )


def undroppable(model: Today, widths: Mapping[str, Width], dropout: float) -> Iterator[str]:
    """What dropout cannot be had of."""
    if dropout >= 1:
        yield f"lora_dropout {dropout:g} leaves nothing: expected less than 1; set adapter.dropout"
    for name in widths:
        if dropout and name in model.bindings and model.bindings[name].target == "lm_head":
            yield (
                f"{name} is adapted with dropout {dropout:g}, which the output head's fused loss does not have: "
                "expected adapter.dropout 0, or target_modules without it"
            )


def without_lengths(model: Today, widths: Mapping[str, Width]) -> Iterator[str]:
    """What DoRA cannot be had of."""
    holders = {module.full(name): module for module, name in model.anatomy.parameters()}
    for name in widths:
        if name in holders and holders[name].kind != "linear":
            yield f"{name} is no linear layer: expected adapter.dora false, or linear layers alone"


def uneven(adapted: "Adapted") -> Iterator[str]:
    """Parameters of ours whose parts would not be trained alike."""
    for places in adapted.places.values():
        if len({place.width for place in places}) > 1:
            told = ", ".join(
                f"{place.name} (rank {place.width.rank}, scale {place.width.scale:g})" for place in places
            )
            yield f"{told} are parts of one parameter here: expected one rank and alpha for them"
    if adapted.dora:
        yield from _lengths_of_parts(adapted)
    of_target: dict[str, list[str]] = {}
    for name, binding in adapted.model.bindings.items():
        of_target.setdefault(binding.target, []).append(name)
    for name in sorted(adapted.saved):
        missing = [
            other for other in of_target[adapted.model.bindings[name].target] if other not in adapted.saved
        ]
        if missing:
            yield (
                f"{name} is trained and {missing[0]} is not, which is a part of the same parameter: expected both or "
                "neither"
            )


def _lengths_of_parts(adapted: "Adapted") -> Iterator[str]:
    """Pairs of zeros leave a matrix as it is, and lengths that are trained do not."""
    for name, binding in adapted.model.bindings.items():
        places = adapted.places.get(binding.target)
        if places and name not in adapted.widths:
            yield (
                f"{places[0].name} is adapted and {name} is not, which is a part of the same parameter: expected both "
                "or neither with adapter.dora"
            )


def unquantised(adapted: "Adapted") -> Iterator[str]:
    """Adapted parameters that are not held in few bits."""
    for target, places in adapted.places.items():
        if target not in adapted.forms:
            yield (
                f"{places[0].name} is not held in few bits, and adapter.init 'loftq' begins with what these lose: "
                "expected target_modules without it"
            )


def undivided(adapted: "Adapted") -> Iterator[str]:
    """Parameters that stay as the checkpoint has them, of which pairs cannot begin as a part."""
    for target, places in adapted.places.items():
        if target in adapted.forms and adapted.forms[target].kept:
            yield (
                f"{places[0].name} stays in few bits as it is (model.quantization keep), and adapter.init "
                f"{adapted.init!r} takes a part out of it: expected 'default', 'gaussian' or 'orthogonal'"
            )


def check_base(folder: Path, quantization: QuantizationConfig | None) -> None:
    """Whether training goes on on the base that an adapter was trained on.

    Raises:
        UserError: it carries what quantising lost, and the base would not lose it.
    """
    recorded = Recorded.find(folder)
    if recorded is None or recorded.quantization == quantization:
        return
    now = "not quantised" if quantization is None else f"quantised as {quantization.kind}"
    if quantization is not None and quantization.kind == "keep":
        now = "as the checkpoint has it"
    told = f"adapter.path: {folder} was trained on a base in {recorded.told}, and here it is {now}"
    if recorded.init == "loftq":
        raise UserError(
            f"{told}: expected the same, as its factors hold what that loses; set model.quantization"
        )
    _log.warning("%s", told)
