"""Gemma 4 as published, with towers for images and sound, which stay as they are: its text model."""

import dataclasses

from jaxmoe.interop.families.family import Prefix
from jaxmoe.interop.families.gemma4_text import FAMILY as TEXT

FAMILY = dataclasses.replace(
    TEXT,
    model_type="gemma4",
    ignored=(r"^model\.(vision_tower|audio_tower|embed_vision|embed_audio)\.",),
    unused_fields=TEXT.unused_fields | {"vision_soft_tokens_per_image", "eoa_token_id"},
    text=("text_config",),
    prefixes=(Prefix("model.language_model."),),
)
