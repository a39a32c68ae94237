"""The one decoder: a pure function of parameters and a batch, one `lax.scan` per group of layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.kernels.devices import Device
from jaxmoe.model.batch import Batch
from jaxmoe.model.dropout import Dropout
from jaxmoe.model.feed_forward.router import RouterStats
from jaxmoe.model.head import Head, LogitSpec
from jaxmoe.model.linear import along_last, gathered, in_dtype, letters_of, lookup, with_dropout
from jaxmoe.model.mixers.context import Context, make_context
from jaxmoe.model.norms import norm
from jaxmoe.model.precision import float32_matmuls, scaled
from jaxmoe.model.spec import LayerGroup, LayerSpec, ModelSpec
from jaxmoe.parallel.sharding import constrain
from jaxmoe.params import Param, Tree


def hidden_states(
    params: Tree,
    spec: ModelSpec,
    batch: Batch,
    *,
    dtype: Any,
    remat: bool = False,
    packed: bool = True,
    key: jax.Array | None = None,
    device: Device | None = None,
    dropout: float = 0.0,
) -> tuple[Float[Array, "B T D"], RouterStats | None]:
    """Everything up to the final norm.

    Args:
        params: the tree of `ModelSpec.declared`, in any float dtype; a matrix may be any weight of
            `jaxmoe.model.linear`.
        spec: the model.
        batch: token ids.
        dtype: compute dtype; each layer's parameters are cast as the layer runs, never the whole model at once.
        remat: keep only each layer's input for the backward pass and compute the rest again.
        packed: rows may hold several documents. False says that each holds one, from its start, and then
            padding: causality hides that from every token, so that attention needs no mask of documents.
        key: PRNG key for router jitter and dropout, in training.
        device: that computes; None for the one at hand.
        dropout: share that low-rank pairs of layers drop of their inputs, where there is a key.

    Returns:
        (B, T, D) in `dtype`, and the router statistics with a leading axis over the MoE layers (None if there
        are none).
    """
    with float32_matmuls(dtype):
        context = make_context(spec.rotations, batch, dtype, packed=packed, key=key, device=device)
        context = dataclasses.replace(context, dropout=dropout)
        return _hidden_states(params, spec, batch.tokens, context, dtype, remat)


def _hidden_states(
    params: Tree, spec: ModelSpec, tokens: jax.Array, context: Context, dtype: Any, remat: bool
) -> tuple[jax.Array, RouterStats | None]:
    # Rows of the table are looked up whole: split along D, the lookup's result would have to be resharded.
    table = jax.tree.map(constrain, params["embed"], letters_of(params["embed"], "V."))
    x_BTD = constrain(lookup(table, tokens, dtype), "BTD")
    if spec.embedding_scale != 1.0:
        x_BTD = x_BTD * jnp.asarray(spec.embedding_scale, dtype)
    stats: list[RouterStats] = []
    for index, group in enumerate(spec.groups):
        key = None if context.key is None else jax.random.fold_in(context.key, index)
        trees = (spec.declared["groups"][index], params["groups"][index])
        x_BTD, group_stats = _run_group(group, *trees, x_BTD, dataclasses.replace(context, key=key), remat)
        stats.extend(group_stats)
    x_BTD = norm(params, "norm", spec.norm, x_BTD)
    return x_BTD, jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None


def output_head(params: Tree, spec: ModelSpec) -> Head:
    """The output head."""
    weight = params["embed"] if spec.tie_embeddings else params["lm_head"]
    return Head(weight, params.get("lm_head_bias"), LogitSpec(spec.logit_scale, spec.logit_softcap))


def logits(params: Tree, spec: ModelSpec, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Hidden states (B, T, D) → float32 logits (B, T, V)."""
    with float32_matmuls(hidden_BTD.dtype):
        return output_head(params, spec).logits(hidden_BTD)


def _run_group(
    group: LayerGroup,
    declared: tuple[Tree, ...],
    params: tuple[Tree, ...],
    x_BTD: jax.Array,
    context: Context,
    remat: bool,
) -> tuple[jax.Array, list[RouterStats]]:
    """Scan over the repeats of a group. The statistics of its MoE layers come back in layer order."""

    def run_layer(place: int, weights: Tree, x: jax.Array, layer_key: jax.Array | None) -> Any:
        weights = _for_compute(declared[place], weights, x.dtype)
        if layer_key is not None and context.dropout:
            weights = with_dropout(weights, Dropout(layer_key, context.dropout))
        return _layer(group.pattern[place], weights, x, dataclasses.replace(context, key=layer_key))

    if remat:
        run_layer = jax.checkpoint(run_layer, static_argnums=(0,), prevent_cse=False)

    def body(x: jax.Array, scanned: tuple[tuple[Tree, ...], jax.Array | None]) -> Any:
        pattern_params, repeat_key = scanned
        layer_stats = []
        for place, weights in enumerate(pattern_params):
            layer_key = None if repeat_key is None else jax.random.fold_in(repeat_key, place)
            x, stats = run_layer(place, weights, x, layer_key)
            if stats is not None:
                layer_stats.append(stats)
        return x, layer_stats

    keys = None if context.key is None else jax.random.split(context.key, group.repeats)
    x_BTD, stats = jax.lax.scan(body, x_BTD, (params, keys))
    if not stats:
        return x_BTD, []
    # (repeats, …) per place in the pattern → (repeats * places, …), that is layer order.
    merged = jax.tree.map(lambda *places: jnp.stack(places, axis=1).reshape(-1, *places[0].shape[1:]), *stats)
    return x_BTD, [merged]


def _for_compute(declared: Tree, values: Tree, dtype: Any) -> Tree:
    """Parameters of one layer in `dtype`, but for those kept in float32; constants without gradient."""

    def prepare(parameter: Param, value: Any) -> Any:
        value = gathered(in_dtype(value, parameter.dtype(dtype)), parameter.dims.removeprefix("L"))
        return jax.lax.stop_gradient(value) if parameter.role == "constant" else value

    return jax.tree.map(prepare, declared, values)


def _layer(
    layer: LayerSpec, params: Tree, x_BTD: jax.Array, context: Context
) -> tuple[jax.Array, RouterStats | None]:
    """What comes out of a layer (B, T, D), and the statistics of its router."""

    def before(name: str, x: jax.Array) -> jax.Array:
        return norm(params, f"{name}_norm", layer.norm, x) if layer.normed_before else x

    def add(
        name: str, scales: tuple[float, float], x: jax.Array, normed: jax.Array, out: jax.Array
    ) -> jax.Array:
        if layer.normed_after:
            out = norm(params, f"{name}_post_norm", layer.norm, out)
        stream = normed if layer.from_normed else x
        return constrain(scaled(stream, scales[0]) + scaled(out, scales[1]), "BTD")

    normed, stats = x_BTD, None
    if layer.mixer is not None:
        normed = before("attention", x_BTD)
        x_BTD = add(
            "attention", layer.mixer_scales, x_BTD, normed, layer.mixer.apply(params, normed, context)
        )
    if layer.ffn is not None:
        if layer.mixer is None or not layer.one_norm:
            normed = before("ffn", x_BTD)
        out, stats = layer.ffn.apply(params, normed, x_BTD, context)
        x_BTD = add("ffn", layer.ffn_scales, x_BTD, normed, out)
    return x_BTD * along_last(params["output_scale"], x_BTD) if layer.output_scale else x_BTD, stats
