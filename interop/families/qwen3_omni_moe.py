"""Qwen3-Omni as published (arXiv 2509.17765): its thinker's text model. Towers, talker and vocoder stay as they are."""

import dataclasses

from jaxmoe.interop.families.family import Prefix
from jaxmoe.interop.families.qwen3_omni_moe_thinker import FAMILY as THINKER

FAMILY = dataclasses.replace(
    THINKER,
    model_type="qwen3_omni_moe",
    ignored=(r"^thinker\.(model\.)?(audio_tower|visual)\.", r"^(talker|code2wav)\."),
    text=("thinker_config", "text_config"),
    prefixes=(Prefix("thinker.model.", "thinker."), Prefix("thinker.model.language_model.", "thinker.")),
)
