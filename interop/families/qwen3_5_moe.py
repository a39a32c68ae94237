"""Qwen3.5 with experts as published (Qwen, 2026): its text model. The vision tower stays as it is."""

import dataclasses

from jaxmoe.interop.families.family import Prefix
from jaxmoe.interop.families.qwen3_5_moe_text import FAMILY as TEXT

FAMILY = dataclasses.replace(
    TEXT,
    model_type="qwen3_5_moe",
    unused_fields=TEXT.unused_fields | {"language_model_only"},
    text=("text_config",),
    prefixes=(Prefix("model.language_model."),),
)
