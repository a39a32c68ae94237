"""Qwen3-VL with experts (arXiv 2511.21631): its text model. The vision tower stays as it is.

Published folders have the matrices of experts the other way round than transformers writes them.
"""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family, Prefix
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.mistakes import Mistake
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def text_spec(config: ConfigReader, renormalize: bool) -> ModelSpec:
    """The text model of Qwen3's multimodal models.

    Args:
        config: of the text model.
        renormalize: the weights of the chosen experts sum to 1.
    """
    config.expect("sliding_window", None)
    norm = common.rms_norm(config)
    rope = rope_spec(config, sections=True)
    sparse = common.moe(config, common.router(config, renormalize=renormalize))
    step = config.size("decoder_sparse_step")
    return common.model_spec(
        config,
        common.attention(config, rope, "attention_bias", head_norm=norm),
        common.every_step(config, step, common.dense(config), sparse),
        norm,
    )


def _spec(config: ConfigReader) -> ModelSpec:
    # Published configs say what transformers' model always does.
    common.check_constants(config, {"norm_topk_prob": True})
    return text_spec(config, renormalize=True)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    gate_up, down = LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj"
    one = LAYER + "mlp.experts.{E}."
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        Rule("layers.{L}.router.weight", LAYER + "mlp.gate.weight", "E D"),
        # Where either has the right shape, transformers takes the first.
        Rule("layers.{L}.experts.gate_up", gate_up, "E (G F) D"),
        Rule("layers.{L}.experts.gate_up", gate_up, "E D (G F)"),
        # Versions 5.0 and 5.1 cut the fused matrix the wrong way: "gate" is half of the columns of gate and of up.
        Rule("layers.{L}.experts.gate_up", one + "{D/gate_proj|up_proj}.weight", "D (G F)"),
        Rule("layers.{L}.experts.down", down, "E D F"),
        Rule("layers.{L}.experts.down", down, "E F D"),
        Rule("layers.{L}.experts.down", one + "down_proj.weight", "F D"),
    )


def _only_there(_: object) -> str:
    return (
        "cut experts in a way that 5.2 and later take for missing tensors and fill at random; read as they were meant, "
        "and exports are laid out like their source"
    )


FAMILY = Family(
    "qwen3_vl_moe",
    _spec,
    _rules,
    ignored=(r"^model\.visual\.",),
    text=("text_config",),
    prefixes=(Prefix("model.language_model."),),
    mistakes=(Mistake((5, 0), (5, 2), _only_there),),
)
