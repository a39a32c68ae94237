"""The one decoder: a pure function of parameters and a batch, one `lax.scan` per group of layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.model.feed_forward.mlp import MLPSpec, mlp
from jaxmoe.model.feed_forward.moe import moe
from jaxmoe.model.feed_forward.router import RouterStats
from jaxmoe.model.head import Head, LogitSpec
from jaxmoe.model.mixers.grouped_query import Sequence, attention, sequence
from jaxmoe.model.norms import norm
from jaxmoe.model.precision import float32_matmuls, scaled
from jaxmoe.model.spec import DenseMoESpec, LayerGroup, LayerSpec, ModelSpec, layer_params
from jaxmoe.parallel.sharding import BATCH_AXES, constrain
from jaxmoe.params import Tree, for_compute


class Batch(NamedTuple):
    """Token ids and how they are packed.

    Attributes:
        tokens: (B, T) int32.
        positions: (B, T) int32, counted from 0 in every document.
        segment_ids: (B, T) int32: documents of a row are numbered from 1, padding is 0; None when every row is
            one whole document.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None


def make_batch(
    tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> Batch:
    """Fill in positions (B, T): each token's distance from the start of its segment."""
    if positions is None:
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        positions = index
        if segment_ids is not None:
            starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
            positions = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return Batch(tokens, positions, segment_ids)


def hidden_states(
    params: Tree,
    spec: ModelSpec,
    batch: Batch,
    *,
    dtype: Any,
    remat: bool = False,
    packed: bool = True,
    key: jax.Array | None = None,
) -> tuple[jax.Array, RouterStats | None]:
    """Everything up to the final norm.

    Args:
        params: the tree of `jaxmoe.model.spec.model_params`, in any float dtype.
        spec: the model.
        batch: token ids.
        dtype: compute dtype; each layer's parameters are cast as the layer runs, never the whole model at once.
        remat: keep only each layer's input for the backward pass and compute the rest again.
        packed: rows may hold several documents. False says that each holds one, from its start, and then
            padding: causality hides that from every token, so that attention needs no (T, T) mask.
        key: PRNG key for router jitter, in training.

    Returns:
        (B, T, D) in `dtype`, and the router statistics with a leading axis over the MoE layers (None if there
        are none).
    """
    with float32_matmuls(dtype):
        return _hidden_states(params, spec, batch, dtype, remat, packed, key)


def _hidden_states(
    params: Tree,
    spec: ModelSpec,
    batch: Batch,
    dtype: Any,
    remat: bool,
    packed: bool,
    key: jax.Array | None,
) -> tuple[jax.Array, RouterStats | None]:
    sequence_info = sequence(spec.ropes, batch.positions, batch.segment_ids if packed else None, dtype)
    valid_BT = None if batch.segment_ids is None else batch.segment_ids > 0
    # Rows of the table are looked up whole: split along D, the lookup's result would have to be resharded.
    x_BTD = constrain(constrain(params["embed"], "tensor")[batch.tokens].astype(dtype), BATCH_AXES)
    if spec.embedding_scale != 1.0:
        x_BTD = x_BTD * jnp.asarray(spec.embedding_scale, dtype)
    stats: list[RouterStats] = []
    for index, (group, group_params) in enumerate(zip(spec.groups, params["groups"], strict=True)):
        group_key = None if key is None else jax.random.fold_in(key, index)
        x_BTD, group_stats = _run_group(group, group_params, x_BTD, sequence_info, valid_BT, group_key, remat)
        stats.extend(group_stats)
    x_BTD = norm(params, "norm", spec.norm, x_BTD)
    return x_BTD, jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None


def output_head(params: Tree, spec: ModelSpec) -> Head:
    """The output head."""
    weight = params["embed"] if spec.tie_embeddings else params["lm_head"]
    return Head(weight, params.get("lm_head_bias"), LogitSpec(spec.logit_scale, spec.logit_softcap))


def logits(params: Tree, spec: ModelSpec, hidden_BTD: jax.Array) -> jax.Array:
    """Hidden states (B, T, D) → float32 logits (B, T, V)."""
    with float32_matmuls(hidden_BTD.dtype):
        return output_head(params, spec).logits(hidden_BTD)


def _run_group(
    group: LayerGroup,
    params: tuple[Tree, ...],
    x_BTD: jax.Array,
    sequence_info: Sequence,
    valid_BT: jax.Array | None,
    key: jax.Array | None,
    remat: bool,
) -> tuple[jax.Array, list[RouterStats]]:
    """Scan over the repeats of a group. The statistics of its MoE layers come back in layer order."""

    def run_layer(layer: LayerSpec, weights: Tree, x: jax.Array, layer_key: jax.Array | None) -> Any:
        declared = layer_params(layer, x.shape[-1])
        return _layer(layer, for_compute(declared, weights, x.dtype), x, sequence_info, valid_BT, layer_key)

    if remat:
        run_layer = jax.checkpoint(run_layer, static_argnums=(0,), prevent_cse=False)

    def body(x: jax.Array, scanned: tuple[tuple[Tree, ...], jax.Array | None]) -> Any:
        pattern_params, repeat_key = scanned
        layer_stats = []
        for place, (layer, weights) in enumerate(zip(group.pattern, pattern_params, strict=True)):
            layer_key = None if repeat_key is None else jax.random.fold_in(repeat_key, place)
            x, stats = run_layer(layer, weights, x, layer_key)
            if stats is not None:
                layer_stats.append(stats)
        return x, layer_stats

    keys = None if key is None else jax.random.split(key, group.repeats)
    x_BTD, stats = jax.lax.scan(body, x_BTD, (params, keys))
    if not stats:
        return x_BTD, []
    # (repeats, …) per place in the pattern → (repeats * places, …), that is layer order.
    merged = jax.tree.map(lambda *places: jnp.stack(places, axis=1).reshape(-1, *places[0].shape[1:]), *stats)
    return x_BTD, [merged]


def _layer(
    layer: LayerSpec,
    params: Tree,
    x_BTD: jax.Array,
    sequence_info: Sequence,
    valid_BT: jax.Array | None,
    key: jax.Array | None,
) -> tuple[jax.Array, RouterStats | None]:
    def before(name: str, x: jax.Array) -> jax.Array:
        return x if layer.placement == "post" else norm(params, f"{name}_norm", layer.norm, x)

    def add(name: str, x: jax.Array, out: jax.Array) -> jax.Array:
        if layer.placement in ("post", "sandwich"):
            out = norm(params, f"{name}_post_norm", layer.norm, out)
        return constrain(x + scaled(out, layer.residual_scale), BATCH_AXES)

    normed = before("attention", x_BTD)
    mixed_BTD = add("attention", x_BTD, attention(params["attention"], layer.mixer, normed, sequence_info))
    if layer.placement != "parallel":
        normed = before("ffn", mixed_BTD)
    out, stats = _feed_forward(layer, params, mixed_BTD, normed, valid_BT, key)
    out = add("ffn", mixed_BTD, out)
    return out * params["output_scale"] if layer.output_scale else out, stats


def _feed_forward(
    layer: LayerSpec,
    params: Tree,
    x_BTD: jax.Array,
    normed_BTD: jax.Array,
    valid_BT: jax.Array | None,
    key: jax.Array | None,
) -> tuple[jax.Array, RouterStats | None]:
    """What a layer adds to the residual stream x after its mixer, from norm(x)."""
    ffn = layer.ffn
    if isinstance(ffn, MLPSpec):
        return mlp(params["mlp"], ffn, normed_BTD), None
    if not isinstance(ffn, DenseMoESpec):
        return moe(params, ffn, normed_BTD, valid_BT, key)
    dense_BTD = norm(params, "dense_post_norm", ffn.norm, mlp(params["mlp"], ffn.dense, normed_BTD))
    experts_see = norm(params, "experts_norm", ffn.norm, x_BTD)
    out, stats = moe(params, ffn.moe, experts_see, valid_BT, key, router_sees=x_BTD)
    return dense_BTD + norm(params, "experts_post_norm", ffn.norm, out), stats
