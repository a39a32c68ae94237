"""The one decoder: a pure function of parameters and a batch, one `lax.scan` per group of layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.model.attention import Sequence, attention, sequence
from jaxmoe.model.mlp import mlp
from jaxmoe.model.moe import MoESpec, moe
from jaxmoe.model.norms import rms_norm
from jaxmoe.model.precision import float32_matmuls
from jaxmoe.model.router import RouterStats
from jaxmoe.params import Tree
from jaxmoe.sharding import BATCH_AXES, constrain
from jaxmoe.spec import LayerGroup, LayerSpec, ModelSpec


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
        params: the tree of `jaxmoe.spec.model_params`, in any float dtype.
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
    stats: list[RouterStats] = []
    for index, (group, group_params) in enumerate(zip(spec.groups, params["groups"], strict=True)):
        group_key = None if key is None else jax.random.fold_in(key, index)
        x_BTD, group_stats = _run_group(group, group_params, x_BTD, sequence_info, valid_BT, group_key, remat)
        stats.extend(group_stats)
    x_BTD = rms_norm(x_BTD, params["norm"], spec.norm_eps)
    return x_BTD, jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None


def output_head(params: Tree, spec: ModelSpec) -> jax.Array:
    """The output matrix (V, D)."""
    return params["embed"] if spec.tie_embeddings else params["lm_head"]


def logits(params: Tree, spec: ModelSpec, hidden_BTD: jax.Array) -> jax.Array:
    """Hidden states (B, T, D) → float32 logits (B, T, V)."""
    head_VD = output_head(params, spec).astype(hidden_BTD.dtype)
    with float32_matmuls(hidden_BTD.dtype):
        return jnp.einsum("btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=jnp.float32)


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

    def run_layer(layer: LayerSpec, layer_params: Tree, x: jax.Array, layer_key: jax.Array | None) -> Any:
        cast = jax.tree.map(lambda p: p.astype(x.dtype), layer_params)
        return _layer(layer, cast, x, sequence_info, valid_BT, layer_key)

    if remat:
        run_layer = jax.checkpoint(run_layer, static_argnums=(0,), prevent_cse=False)

    def body(x: jax.Array, scanned: tuple[tuple[Tree, ...], jax.Array | None]) -> Any:
        pattern_params, repeat_key = scanned
        layer_stats = []
        for place, (layer, layer_params) in enumerate(zip(group.pattern, pattern_params, strict=True)):
            layer_key = None if repeat_key is None else jax.random.fold_in(repeat_key, place)
            x, stats = run_layer(layer, layer_params, x, layer_key)
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
    normed = rms_norm(x_BTD, params["attention_norm"], layer.norm_eps)
    x_BTD = constrain(x_BTD + attention(params["attention"], layer.mixer, normed, sequence_info), BATCH_AXES)
    normed = rms_norm(x_BTD, params["ffn_norm"], layer.norm_eps)
    if isinstance(layer.ffn, MoESpec):
        out, stats = moe(params, layer.ffn, normed, valid_BT, key)
    else:
        out, stats = mlp(params["mlp"], normed), None
    return constrain(x_BTD + out, BATCH_AXES), stats
