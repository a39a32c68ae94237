"""The supported model families, one file each: a spec from config.json, and conversion rules.

Adding a family is adding its module here.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.families import mixtral, olmoe, qwen3_moe
from jaxmoe.interop.families.family import Family

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (mixtral.FAMILY, olmoe.FAMILY, qwen3_moe.FAMILY)
}


def family_of(raw: Mapping[str, Any], file: str) -> Family:
    """The family of a config.json.

    Raises:
        UserError: its model_type is not supported.
    """
    model_type = raw["model_type"]
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"{file}: model_type {model_type!r} is not supported{hint}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
