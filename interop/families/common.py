"""Rules and config readings that several families share."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.router import Groups, RouterSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec, group_layers

LAYER = "model.layers.{L}."


def trunk_rules(tied: bool) -> tuple[Rule, ...]:
    """Embedding, final norm and output head, with whichever biases the spec has."""
    embed = Rule("embed", "model.embed_tokens.weight", "V D", copies=("lm_head.weight",) if tied else ())
    norm = (Rule("norm", "model.norm.weight", "D"), Rule("norm_bias", "model.norm.bias", "D"))
    head = (Rule("lm_head", "lm_head.weight", "V D"), Rule("lm_head_bias", "lm_head.bias", "V"))
    return (embed, *norm, *(head[1:] if tied else head))


PRE_NORMS: Mapping[str, str] = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def norm_rules(modules: Mapping[str, str] = PRE_NORMS) -> tuple[Rule, ...]:
    """The norms of a layer, with their biases where the spec has any.

    Args:
        modules: the module of each norm; by default those of most pre-norm layers.
    """
    return tuple(
        Rule("layers.{L}." + name + ours, LAYER + module + theirs, "D")
        for name, module in modules.items()
        for ours, theirs in (("", ".weight"), ("_bias", ".bias"))
    )


def attention_rules(query_norm: str = "H", key_norm: str = "H") -> tuple[Rule, ...]:
    """Grouped-query attention, with whichever biases, norms, sinks and gate the spec has."""

    def rule(target: str, source: str, axes: str) -> Rule:
        return Rule("layers.{L}.attention." + target, LAYER + "self_attn." + source, axes)

    projections = {"q": "Q D", "k": "U D", "v": "W D", "o": "D P", "gate": "P D"}
    return (
        *(rule(f"{name}_proj", f"{name}_proj.weight", axes) for name, axes in projections.items()),
        *(rule(f"{name}_bias", f"{name}_proj.bias", axes.split()[0]) for name, axes in projections.items()),
        rule("q_norm", "q_norm.weight", query_norm),
        rule("k_norm", "k_norm.weight", key_norm),
        rule("sinks", "sinks", "N"),
    )


def expert_rules(block: str, words: tuple[str, str, str], router: str = "gate") -> tuple[Rule, ...]:
    """Router and experts: one by one under `block`, or fused under ``mlp`` as transformers holds them in memory.

    Args:
        block: module that holds them, such as "mlp".
        words: names of gate, up and down.
        router: module of the router's matrix.
    """
    gate, up, down = words
    gate_up = f"{block}.experts.{{E}}.{{G:{gate}|{up}}}.weight"
    routers = tuple(dict.fromkeys((f"{block}.{router}.weight", f"mlp.{router}.weight")))
    return (
        *(Rule("layers.{L}.router.weight", LAYER + source, "E D") for source in routers),
        Rule("layers.{L}.experts.gate_up", LAYER + gate_up, "F D"),
        Rule("layers.{L}.experts.gate_up", LAYER + "mlp.experts.gate_up_proj", "E (G F) D"),
        Rule("layers.{L}.experts.down", LAYER + f"{block}.experts.{{E}}.{down}.weight", "D F"),
        Rule("layers.{L}.experts.down", LAYER + "mlp.experts.down_proj", "E D F"),
    )


def shared_rules(block: str) -> tuple[Rule, ...]:
    """The gated feed-forward in module `block` that every token of a MoE layer goes through."""
    return (
        Rule("layers.{L}.shared.gate_up", LAYER + block + ".{G:gate_proj|up_proj}.weight", "I D"),
        Rule("layers.{L}.shared.down", LAYER + block + ".down_proj.weight", "D I"),
        Rule("layers.{L}.shared.gate_up_bias", LAYER + block + ".{G:gate_proj|up_proj}.bias", "I"),
        Rule("layers.{L}.shared.down_bias", LAYER + block + ".down_proj.bias", "D"),
    )


def correction_rule(source: str, axes: str = "E") -> Rule:
    """The constant per expert that is added to the scores for the choice alone."""
    return Rule("layers.{L}.router.correction", LAYER + source, axes)


def mlp_rules() -> tuple[Rule, ...]:
    """Dense gated feed-forward, with biases where the spec has them."""
    return (
        Rule("layers.{L}.mlp.gate_up", LAYER + "mlp.{G:gate_proj|up_proj}.weight", "I D"),
        Rule("layers.{L}.mlp.down", LAYER + "mlp.down_proj.weight", "D I"),
        Rule("layers.{L}.mlp.gate_up_bias", LAYER + "mlp.{G:gate_proj|up_proj}.bias", "I"),
        Rule("layers.{L}.mlp.down_bias", LAYER + "mlp.down_proj.bias", "D"),
    )


def model_spec(
    config: ConfigReader, layers: Sequence[LayerSpec], norm: NormSpec, **options: Any
) -> ModelSpec:
    """The layers with the trunk that most families share; `options` are further fields of the spec."""
    return ModelSpec(
        width=config.size("hidden_size"),
        vocab_size=config.size("vocab_size"),
        groups=group_layers(layers),
        norm=norm,
        tie_embeddings=config.take("tie_word_embeddings"),
        init_std=config.number("initializer_range", zero=True),
        **options,
    )


def grouped_sigmoid_router(config: ConfigReader, experts: str = "n_routed_experts") -> RouterSpec:
    """DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2), which many families share.

    Args:
        config: with n_group and topk_group (null where experts are not grouped), norm_topk_prob and
            routed_scaling_factor.
        experts: the field that counts the experts.
    """
    grouped = config.take("n_group", None) is not None or config.take("topk_group", None) is not None
    return RouterSpec(
        num_experts=config.size(experts),
        top_k=config.size("num_experts_per_tok"),
        renormalize=config.take("norm_topk_prob"),
        weight_dtype="float32",
        score="sigmoid",
        logits_dtype="float32",
        correction="score",
        groups=Groups(config.size("n_group"), config.size("topk_group"), "top2") if grouped else None,
        sum_offset=1e-20,
        scale=config.number("routed_scaling_factor"),
    )


def kinds(config: ConfigReader, name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """A field that says of every layer what it is, such as ``layer_types``.

    Raises:
        UserError: not one entry per layer, or one that is not `allowed`.
    """
    value, layers = config.take(name), config.size("num_hidden_layers", MAX_LAYERS)
    if not isinstance(value, list | tuple) or len(value) != layers or not set(value) <= set(allowed):
        raise UserError(
            f"{config.file}: {name} = {quote(value)}: expected {layers} entries, each {' or '.join(map(repr, allowed))}"
        )
    return tuple(value)


def windows(config: ConfigReader) -> list[int | None]:
    """The window of every layer, from ``layer_types`` and ``sliding_window``."""
    types = kinds(config, "layer_types", ("sliding_attention", "full_attention"))
    config.take("sliding_window", None)  # published configs give one though no layer has it
    return [config.size("sliding_window") if kind == "sliding_attention" else None for kind in types]


def head_dim(config: ConfigReader) -> int:
    """``head_dim`` where the config gives one, else hidden_size / num_attention_heads."""
    if config.take("head_dim", None) is not None:
        return config.size("head_dim")
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if width % heads:
        raise UserError(f"{config.file}: hidden_size {width} is not divisible by num_attention_heads {heads}")
    return width // heads
