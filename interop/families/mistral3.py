"""Mistral Small 4 as published: its text model. Vision tower and projector stay as they are."""

import dataclasses

from jaxmoe.interop.families.family import Prefix
from jaxmoe.interop.families.mistral4 import FAMILY as TEXT

FAMILY = dataclasses.replace(
    TEXT,
    model_type="mistral3",
    ignored=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
    text=("text_config",),
    text_type="mistral4",
    prefixes=(Prefix("language_model.model.", "language_model."), Prefix("model.language_model.")),
)
