"""Hunyuan-A13B (Tencent, 2025): query and key norms after rotation, one shared expert, renormalised softmax."""

from typing import Any

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.config_json import ConfigReader, is_positive
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.mistakes import Mistake
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.grouped_query import QKNorm
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.spec import ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {
    "group_limited_greedy": False,
    "mlp_bias": False,
    "moe_layer_num_skipped": 0,
    "norm_topk_prob": True,
    "norm_type": "rms",
    "position_embedding_xdrope": False,
    "routed_scaling_factor": 1.0,
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_mla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
}


def _spec(config: ConfigReader) -> ModelSpec:
    depth, hidden, head_dim = common.depth(config), config.size("intermediate_size"), config.size("head_dim")
    common.check_constants(config, _UNREAD | {"attention_head_dim": head_dim})
    config.expect("moe_intermediate_size", hidden, [hidden] * depth, None)
    config.expect("num_shared_expert", 1, [1] * depth, None)
    norm = common.rms_norm(config)
    routers = [
        common.router(
            config,
            top_k=top_k,
            renormalize=True,
            weight_dtype="float32",
            logits_dtype="float32",
            float32=True,
        )
        for top_k in _chosen(config, depth)
    ]
    shared = common.shared_expert(hidden)
    return common.model_spec(
        config,
        common.attention(
            config, _rope(config, head_dim), "attention_bias", qk_norm=QKNorm(norm, "head", after_rope=True)
        ),
        [common.moe(config, router, "intermediate_size", shared=shared) for router in routers],
        norm,
    )


def _rope(config: ConfigReader, width: int) -> RopeSpec:
    """With ``alpha``, published ones of type "dynamic" are the default at a larger base; nothing else is read."""
    given: dict[str, Any] = config.take("rope_parameters")
    theta, alpha = given.get("rope_theta"), given.get("alpha")
    if given.get("rope_type") != "dynamic" or not alpha:
        return rope_spec(config)
    for name, value in (("rope_theta", theta), ("alpha", alpha)):
        if not is_positive(value):
            raise UserError(
                f"{config.file}: {name} = {quote(value)} of the rotation: expected a positive number"
            )
    if width < 4:  # its exponent has width - 2 in the denominator
        raise UserError(f"{config.file}: head_dim = {width}: expected at least 4 with alpha in the rotation")
    return rope_spec(config, {"rope_theta": theta * alpha ** (width / (width - 2))})


def _chosen(config: ConfigReader, depth: int) -> list[int]:
    """Experts per token of every layer."""
    value = config.take("moe_topk")
    if not isinstance(value, list):
        return [config.size("moe_topk")] * depth
    if len(value) != depth or not all(isinstance(k, int) and k > 0 for k in value):
        raise UserError(f"{config.file}: moe_topk = {quote(value)}: expected {depth} positive integers")
    return value


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules(routers=("gate.wg",)),
        *layouts.shared_rules("mlp.shared_mlp"),
        attention=(
            *layouts.attention_rules(),
            Rule("layers.{L}.attention.q_norm", LAYER + "self_attn.query_layernorm.weight", "H"),
            Rule("layers.{L}.attention.k_norm", LAYER + "self_attn.key_layernorm.weight", "H"),
        ),
    )


def _first_weights(_: object) -> str:
    """Of modeling_hunyuan_v1_moe.py: weights were scattered to their experts and then taken from the first K of these.

    And of modeling_utils.py: ``rope_fn(module.config)`` overwrote the frequencies that the model had computed with
    ``alpha``.
    """
    return (
        "gave the chosen experts the weights of the first ones and left alpha out of the rotation; read as other "
        "versions compute. If it was trained with that version, train again from what it was made of"
    )


# Dropout, token ids and parts that other models of the original code have.
_UNUSED = """
add_classification_head anyres_pooling_size anyres_vit_max_image_size anyres_vit_two_views attention_dropout
cla_share_factor class_num dense_list eod_token_id im_end_id im_newline_id im_start_id image_token_id kv_lora_rank
mask_init_id moe_drop_tokens moe_random_routing_dropped_token n_group num_media_embeds org_vocab_size pad_id pool_type
pretraining_tp q_lora_rank qk_nope_head_dim qk_rope_head_dim sep_token_id skip_cls_token text_end_id text_start_id
topk_group v_head_dim video_end_id video_start_id vit_add_patchemb_bias vit_input_resolution vit_mapping_type
vit_norm_type vit_patch vit_path vit_remove_prenorm vit_token vit_type vit_used_rms_norm xdrope_section
"""

FAMILY = Family(
    "hunyuan_v1_moe",
    _spec,
    _rules,
    unused_fields=frozenset(_UNUSED.split()),
    mistakes=(Mistake((5, 0), (5, 1), _first_weights),),
)
