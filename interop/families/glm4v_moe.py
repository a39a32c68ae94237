"""GLM-4.5V (arXiv 2507.01006): its text model, which is GLM-4.5's. The vision tower stays as it is."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family, Prefix
from jaxmoe.interop.families.glm4_moe import rules, text_spec
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, {"use_qk_norm": False})
    return text_spec(config, qk_norm=False, sections=True)


FAMILY = Family(
    "glm4v_moe",
    _spec,
    rules,
    ignored=(r"^model\.visual\.",),
    speculative=("num_nextn_predict_layers",),
    unused_fields=frozenset(
        {
            "image_end_token_id",
            "image_start_token_id",
            "image_token_id",
            "video_end_token_id",
            "video_start_token_id",
            "video_token_id",
        }
    ),
    text=("text_config",),
    prefixes=(Prefix("model.language_model."),),
)
