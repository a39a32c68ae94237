"""DeepSeek-V2 (arXiv 2405.04434): latent attention, softmax router that may choose from the best groups only."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, latent
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.router import Groups
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    # Published configs say this though transformers' model has no code for anything else.
    common.check_constants(
        config, {"ep_size": 1, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False}
    )
    # The rotation is a product of complex numbers, in float32.
    attention = latent.latent_attention(config, rope_spec(config, interleaved=True, float32=True))
    bias = config.take("mlp_bias")
    sparse = common.moe(
        config,
        common.router(
            config,
            num_experts=config.size("n_routed_experts"),
            renormalize=False,
            weight_dtype="float32",
            logits_dtype="float32",
            groups=_groups(config),
            scale=config.number("routed_scaling_factor"),
        ),
        shared=common.shared_experts(config, "n_shared_experts", bias=bias),
    )
    first = config.take("first_k_dense_replace")
    ffns = common.by_index(config, lambda index: index < first, common.dense(config, bias=bias), sparse)
    return common.model_spec(config, attention, ffns, common.rms_norm(config))


def _groups(config: ConfigReader) -> Groups | None:
    method = config.take("topk_method")
    if method == "group_limited_greedy":
        return Groups(config.size("n_group"), config.size("topk_group"), "max", masked=0.0, weigh_masked=True)
    config.expect("topk_method", "greedy")
    for name in ("n_group", "topk_group"):
        config.take(name, None)  # configs of the method without groups give them too
    return None


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return latent.decoder_rules(spec)


FAMILY = Family(
    "deepseek_v2",
    _spec,
    _rules,
    # Of training from scratch: a balance loss per sequence and its factor.
    unused_fields=frozenset({"aux_loss_alpha", "pretraining_tp", "seq_aux"}),
)
