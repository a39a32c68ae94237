"""The thinker of Qwen3-Omni (arXiv 2509.17765) in a folder of its own: its text model. The towers stay as they are."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family, Prefix
from jaxmoe.interop.families.qwen3_vl_moe import text_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

# Published configs have these, which transformers' model has no code for. At any other value the model would not be
# the one that its config describes.
_UNREAD = {"shared_expert_intermediate_size": 0, "use_qk_norm": True, "use_sliding_window": False}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD)
    return text_spec(config, renormalize=config.take("norm_topk_prob"))


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(spec, *layouts.mlp_rules(), *layouts.expert_rules())


FAMILY = Family(
    "qwen3_omni_moe_thinker",
    _spec,
    _rules,
    ignored=(r"^(model\.)?(audio_tower|visual)\.",),
    unused_fields=frozenset(
        {"audio_end_token_id", "seconds_per_chunk", "vision_end_token_id", "vision_start_token_id"}
    ),
    text=("text_config",),
    prefixes=(Prefix(), Prefix("model.language_model.")),
)
