"""The supported model families, one module each: a spec from config.json, and conversion rules.

Every module here that has a ``FAMILY`` is one; adding a family is adding its module.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.families.family import Family


def _find() -> dict[str, Family]:
    modules = (
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    )
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in sorted(families, key=lambda family: family.model_type)}


FAMILIES: Mapping[str, Family] = _find()

_ALIASES = {alias: family.model_type for family in FAMILIES.values() for alias in family.aliases}


def family_of(raw: Mapping[str, Any], file: str) -> Family:
    """The family of a config.json.

    Raises:
        UserError: its model_type is not supported.
    """
    model_type = _ALIASES.get(raw["model_type"], raw["model_type"])
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type[:100], FAMILIES, 1, cutoff=0.7)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"{file}: model_type {quote(model_type)} is not supported{hint}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
