"""Aria as published (arXiv 2410.05993): its text model. Vision tower and projector stay as they are."""

import dataclasses

from jaxmoe.interop.families.aria_text import FAMILY as TEXT
from jaxmoe.interop.families.family import Prefix

FAMILY = dataclasses.replace(
    TEXT,
    model_type="aria",
    ignored=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
    unused_fields=TEXT.unused_fields | {"max_value_projector_patch_to_query_dict"},  # transformers saves it
    text=("text_config",),
    prefixes=(Prefix("language_model.model.", "language_model."), Prefix("model.language_model.")),
)
