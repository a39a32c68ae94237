"""Gemma 4's text model with experts: a dense feed-forward beside them, wide full-attention layers without values.

A layer of one kind has its own head width, key-value heads and rotation.
"""

import dataclasses

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec, rotation_of
from jaxmoe.interop.rules import Rule
from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.model.feed_forward.moe import DenseMoESpec
from jaxmoe.model.feed_forward.router import InputScale
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import ModelSpec

# Of the smaller, dense models: per-layer embeddings, layers that reuse keys and values, and what goes with them.
_WITHOUT = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    config.expect("enable_moe_block", True)
    config.expect("use_bidirectional_attention", None, "vision")  # text alone is causal with "vision" too
    for name, value in _WITHOUT.items():
        config.expect(name, value)
    norm, activation = common.rms_norm(config, "rms_float32"), Activation("gelu_tanh")
    router = common.router(
        config,
        top_k=config.size("top_k_experts"),
        renormalize=True,
        weight_dtype="float32",
        expert_scale=True,
        input_scale=InputScale(norm),
    )
    experts = common.moe(config, router, activation=activation)
    dense = dataclasses.replace(common.dense(config), activation=activation)
    readers = config.of_layers("head_dim", "num_key_value_heads")
    cap = config.take("final_logit_softcapping", None)
    return common.model_spec(
        config,
        [
            _attention(reader, window, norm)
            for reader, window in zip(readers, common.windows(config), strict=True)
        ],
        DenseMoESpec(dense, experts, norm),
        norm,
        layer={"placement": "sandwich", "output_scale": True},
        embedding_scale=config.size("hidden_size") ** 0.5,
        logit_softcap=None if cap is None else config.number("final_logit_softcapping"),
    )


def _attention(layer: ConfigReader, window: int | None, norm: NormSpec) -> AttentionSpec:
    rotation = rotation_of(layer, "full_attention" if window is None else "sliding_attention")
    # Read by transformers' config class, which makes of them what the layers' own fields say.
    for name in ("global_head_dim", "num_global_key_value_heads"):
        layer.take(name, None)
    return common.attention(
        layer,
        rope_spec(layer, rotation),
        "attention_bias",
        qk_norm=QKNorm(norm, "head", values=True),
        window=window,
        scale=1.0,
        values_from_keys=layer.take("attention_k_eq_v") and window is None,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    norms = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
        "dense_post_norm": "post_feedforward_layernorm_1",
        "experts_norm": "pre_feedforward_layernorm_2",
        "experts_post_norm": "post_feedforward_layernorm_2",
    }
    return (
        *layouts.trunk_rules(spec.tie_embeddings),
        *(Rule(f"layers.{{L}}.{ours}", f"{LAYER}{theirs}.weight", "D") for ours, theirs in norms.items()),
        *layouts.attention_rules(),
        *layouts.mlp_rules(),
        Rule("layers.{L}.router.weight", LAYER + "router.proj.weight", "E D"),
        Rule("layers.{L}.router.input_scale", LAYER + "router.scale", "D"),
        Rule("layers.{L}.router.expert_scale", LAYER + "router.per_expert_scale", "E"),
        Rule("layers.{L}.experts.gate_up", LAYER + "experts.gate_up_proj", "E (G F) D"),
        Rule("layers.{L}.experts.down", LAYER + "experts.down_proj", "E D F"),
        Rule("layers.{L}.output_scale", LAYER + "layer_scalar", "J"),
    )


FAMILY = Family("gemma4_text", _spec, _rules, unused_fields=frozenset({"vocab_size_per_layer_input"}))
