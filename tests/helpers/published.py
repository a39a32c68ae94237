"""Published models whose config.json is known field for field, and how many parameters they have."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.configs import published

_NAMES = (
    "Mixtral-8x7B",
    "Mixtral-8x22B",
    "Qwen3-30B-A3B",
    "Qwen3-235B-A22B",
    "Qwen3-Coder-30B-A3B",
    "OLMoE-1B-7B",
)

CONFIGS: Mapping[str, Mapping[str, Any]] = {name: published()[name].config for name in _NAMES}
PARAMETERS: Mapping[str, int | None] = {name: published()[name].parameters for name in _NAMES}
