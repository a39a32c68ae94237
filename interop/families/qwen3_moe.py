"""Qwen3-MoE (arXiv 2505.09388): per-head query and key norms; dense layers among sparse ones by config."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

# Published configs (Qwen3-Coder) carry these though transformers' model has no code for them. At any other
# value the model would not be the one that its config describes.
_UNREAD = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD)
    norm, window = common.rms_norm(config), config.take("sliding_window", None)
    attention = common.attention(
        config,
        rope_spec(config),
        "attention_bias",
        head_norm=norm,
        window=window if config.take("use_sliding_window") else None,
    )
    sparse, step = common.moe(config, common.router(config)), config.size("decoder_sparse_step")
    ffns = common.every_step(config, step, common.dense(config), sparse)
    return common.model_spec(config, attention, ffns, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(spec, *layouts.mlp_rules(), *layouts.expert_rules())


FAMILY = Family("qwen3_moe", _spec, _rules, unused_fields=frozenset({"max_window_layers"}))
