"""The one decoder: a pure function of parameters and a batch, one `lax.scan` per group of layers."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.codecs import PACKED
from jaxmoe.kernels.devices import Device
from jaxmoe.model.batch import Batch
from jaxmoe.model.blocks import Slot
from jaxmoe.model.dropout import Dropout
from jaxmoe.model.feed_forward.router import RouterStats
from jaxmoe.model.head import Head, LogitSpec
from jaxmoe.model.linear import along_last, gathered, in_dtype, letters_of, lookup, with_dropout
from jaxmoe.model.mixers.context import Context, make_context
from jaxmoe.model.mixers.selected_keys import IndexerStats, Selection
from jaxmoe.model.norms import norm
from jaxmoe.model.precision import float32_matmuls, scaled
from jaxmoe.model.spec import LayerGroup, LayerSpec, ModelSpec
from jaxmoe.parallel.sharding import constrain, current_mesh
from jaxmoe.params import Param, Repeat, Tree

Cache = tuple[tuple[Tree, ...], ...]
"""Of every group of layers, for each place in its pattern: what its mixer keeps, over all repeats; None without one."""


class Outputs(NamedTuple):
    """What a model gives for a batch.

    Attributes:
        hidden_BTD: (B, T, D) in the compute dtype, after the final norm.
        router: the router statistics with a leading axis over the MoE layers; None if there are none.
        indexer: those of the indexers, of all layers together; None where nobody asked or there are none.
    """

    hidden_BTD: jax.Array
    router: RouterStats | None
    indexer: IndexerStats | None


def outputs(
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
    indexers: bool = False,
) -> Outputs:
    """Everything up to the final norm, and the statistics of layers.

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
        indexers: compute the statistics of indexers, for which attention's weights are computed once more.
    """
    with float32_matmuls(dtype):
        context = make_context(spec.rotations, batch, dtype, packed=packed, key=key, device=device)
        stats = IndexerStats(jnp.zeros(()), jnp.zeros(())) if indexers else None
        context = dataclasses.replace(context, dropout=dropout, selection=Selection(stats=stats))
        return _outputs(params, spec, batch.tokens, context, dtype, remat=remat)[0]


def hidden_states(
    params: Tree, spec: ModelSpec, batch: Batch, *, dtype: Any, **options: Any
) -> tuple[Float[Array, "B T D"], RouterStats | None]:
    """The first two of `outputs`, with its arguments."""
    return outputs(params, spec, batch, dtype=dtype, **options)[:2]


def _outputs(
    params: Tree,
    spec: ModelSpec,
    tokens: jax.Array,
    context: Context,
    dtype: Any,
    *,
    remat: bool = False,
    cache: Cache | None = None,
) -> tuple[Outputs, Cache]:
    # Rows of the table are looked up whole: split along D, the lookup's result would have to be resharded.
    table = jax.tree.map(constrain, params["embed"], letters_of(params["embed"], "V."))
    x_BTD = constrain(lookup(table, tokens, dtype), "BTD")
    if spec.embedding_scale != 1.0:
        x_BTD = x_BTD * jnp.asarray(spec.embedding_scale, dtype)
    stats: list[RouterStats] = []
    caches: list[Any] = []
    for index, group in enumerate(spec.groups):
        key = None if context.key is None else jax.random.fold_in(context.key, index)
        trees = (spec.declared["groups"][index], params["groups"][index])
        group_context = dataclasses.replace(context, key=key)
        group_cache = None if cache is None else cache[index]
        x_BTD, selection, group_stats, group_cache = _run_group(
            group, *trees, x_BTD, group_context, remat, group_cache
        )
        number = context.layer + len(group.pattern) * group.repeats
        context = dataclasses.replace(context, selection=selection, layer=number)
        stats.extend(group_stats)
        caches.append(group_cache)
    x_BTD = norm(params, "norm", spec.norm, x_BTD)
    router = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None
    return Outputs(x_BTD, router, context.selection.stats), tuple(caches)


def init_cache(spec: ModelSpec, batch: int, length: int, dtype: Any) -> Cache:
    """What mixers keep of tokens that were read, before there are any.

    Args:
        spec: the model.
        batch: B.
        length: tokens that a text has at most.
        dtype: compute dtype.
    """
    return tuple(
        tuple(
            None if layer.mixer is None else layer.mixer.init_cache(group.repeats, batch, length, dtype)
            for layer in group.pattern
        )
        for group in spec.groups
    )


def decode(
    params: Tree,
    spec: ModelSpec,
    batch: Batch,
    cache: Cache,
    *,
    dtype: Any,
    fresh: bool,
    length: jax.Array | int | None = None,
    device: Device | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """`hidden_states` of tokens that follow on those that the cache has.

    Args:
        params: as in `hidden_states`.
        spec: the model.
        batch: token ids at consecutive positions, one document per row; padding (segment 0) comes after it.
        cache: as from `init_cache`.
        dtype: compute dtype.
        fresh: the cache has nothing yet.
        length: () int32, tokens that the text will have when it is complete: some rotations go by that. By default
            those of this batch are its last.
        device: that computes; None for the one at hand.

    Returns:
        (B, T, D) in `dtype`, and the cache with these tokens in it.
    """
    with float32_matmuls(dtype):
        context = make_context(
            spec.rotations, batch, dtype, packed=False, device=device, fresh=fresh, length=length
        )
        found, cache = _outputs(params, spec, batch.tokens, context, dtype, cache=cache)
        return found.hidden_BTD, cache


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
    cache: tuple[Tree, ...] | None,
) -> tuple[jax.Array, Selection, list[RouterStats], tuple[Tree, ...] | None]:
    """Scan over the repeats of a group, whose first layer is that of the context. The statistics of its MoE layers
    come back in layer order.

    What one layer gives the next is its output and `Context.selection`, which both come back too. A cache is carried
    whole from layer to layer: a mixer writes a few tokens into it, where a scan's output would be a copy of it all.
    """

    sparse = [{}] * len(params) if cache is None else _sparse(group, declared, params, x_BTD)
    params = tuple(
        {name: tree for name, tree in weights.items() if name not in apart}
        for weights, apart in zip(params, sparse, strict=True)
    )

    def run_layer(
        place: int,
        weights: Tree,
        x: jax.Array,
        selection: Selection,
        layer_key: jax.Array | None,
        repeat: jax.Array,
        slot: Any,
    ) -> Any:
        own = {name: tree for name, tree in declared[place].items() if name not in sparse[place]}
        weights = _for_compute(own, weights, x.dtype)
        weights |= {name: Repeat(tree, repeat) for name, tree in sparse[place].items()}
        if layer_key is not None and context.dropout:
            weights = with_dropout(weights, Dropout(layer_key, context.dropout))
        number = context.layer + repeat * len(group.pattern) + place
        own_context = dataclasses.replace(context, key=layer_key, layer=number, selection=selection)
        return _layer(group.pattern[place], weights, x, own_context, slot)

    if remat:
        run_layer = jax.checkpoint(run_layer, static_argnums=(0,), prevent_cse=False)

    def body(carry: tuple[jax.Array, Any, Any], scanned: tuple[tuple[Tree, ...], Any, jax.Array]) -> Any:
        (x, selection, caches), (pattern_params, repeat_key, repeat) = carry, scanned
        layer_stats, written = [], []
        for place, weights in enumerate(pattern_params):
            layer_key = None if repeat_key is None else jax.random.fold_in(repeat_key, place)
            slot = None if caches is None else (caches[place], repeat)
            x, selection, stats, new = run_layer(place, weights, x, selection, layer_key, repeat, slot)
            written.append(new)
            if stats is not None:
                layer_stats.append(stats)
        return (x, selection, None if caches is None else tuple(written)), layer_stats

    keys = None if context.key is None else jax.random.split(context.key, group.repeats)
    scanned = (params, keys, jnp.arange(group.repeats, dtype=jnp.int32))
    begun = (x_BTD, _begun_selection(group, x_BTD, context, cache), cache)
    (x_BTD, selection, cache), stats = jax.lax.scan(body, begun, scanned)
    if not stats:
        return x_BTD, selection, [], cache
    # (repeats, …) per place in the pattern → (repeats * places, …), that is layer order.
    merged = jax.tree.map(lambda *places: jnp.stack(places, axis=1).reshape(-1, *places[0].shape[1:]), *stats)
    return x_BTD, selection, [merged], cache


def _begun_selection(
    group: LayerGroup, x_BTD: jax.Array, context: Context, cache: tuple[Tree, ...] | None
) -> Selection:
    """The selection that a scan begins with: it has the shape of those that it goes on with."""
    keys = context.selection.keys
    for place, layer in enumerate(group.pattern):
        if keys is None and layer.mixer is not None:
            slot = None if cache is None else (cache[place], jnp.zeros((), jnp.int32))
            keys = layer.mixer.unselected(x_BTD, context, slot)
    return context.selection._replace(keys=keys)


def _sparse(
    group: LayerGroup, declared: tuple[Tree, ...], params: tuple[Tree, ...], x_BTD: jax.Array
) -> list[dict[str, Tree]]:
    """Of each place in the pattern, the parameters that a scan must not cut out: a token reads a part of them.

    They are left to it where that is a cast, or where a mesh has its own cuts.
    """

    def ready(parameter: Param, value: Any) -> bool:
        return isinstance(value, PACKED) or (
            isinstance(value, jax.Array) and value.dtype == parameter.dtype(x_BTD.dtype)
        )

    if current_mesh() is not None:
        return [{}] * len(params)
    names = [
        () if layer.ffn is None else layer.ffn.sparse_params(x_BTD.shape[0] * x_BTD.shape[1])
        for layer in group.pattern
    ]
    return [
        {
            name: weights[name]
            for name in own
            if all(jax.tree.leaves(jax.tree.map(ready, tree[name], weights[name])))
        }
        for own, tree, weights in zip(names, declared, params, strict=True)
    ]


def _for_compute(declared: Tree, values: Tree, dtype: Any) -> Tree:
    """Parameters of one layer in `dtype`, but for those kept in float32; constants without gradient."""

    def prepare(parameter: Param, value: Any) -> Any:
        value = gathered(in_dtype(value, parameter.dtype(dtype)), parameter.dims.removeprefix("L"))
        return jax.lax.stop_gradient(value) if parameter.role == "constant" else value

    return jax.tree.map(prepare, declared, values)


def _layer(
    layer: LayerSpec, params: Tree, x_BTD: jax.Array, context: Context, slot: Slot | None
) -> tuple[jax.Array, Selection, RouterStats | None, Tree | None]:
    """What comes out of a layer (B, T, D), the keys that layers after it see, the statistics of its router, and its
    cache where it has one.

    Args:
        slot: the cache of its mixer and which repeat it is; None where every token is at hand.
    """

    def before(name: str, x: jax.Array) -> jax.Array:
        return norm(params, f"{name}_norm", layer.norm_before(name), x) if layer.normed_before else x

    def add(
        name: str, scales: tuple[float, float], x: jax.Array, normed: jax.Array, out: jax.Array
    ) -> jax.Array:
        if layer.normed_after:
            out = norm(params, f"{name}_post_norm", layer.norm, out)
        stream = normed if layer.from_normed else x
        return constrain(scaled(stream, scales[0]) + scaled(out, scales[1]), "BTD")

    normed, stats, cache = x_BTD, None, None
    if layer.mixer is not None:
        normed = before("attention", x_BTD)
        selection, cache = layer.mixer.select(params, normed, context, slot)
        context = dataclasses.replace(context, selection=selection)
        if slot is None:
            mixed = layer.mixer.apply(params, normed, context)
        else:
            mixed, cache = layer.mixer.decode(params, normed, context, cache, slot[1])
        x_BTD = add("attention", layer.mixer_scales, x_BTD, normed, mixed)
    if layer.ffn is not None:
        if layer.mixer is None or not layer.one_norm:
            normed = before("ffn", x_BTD)
        out, stats = layer.ffn.apply(params, normed, x_BTD, context)
        x_BTD = add("ffn", layer.ffn_scales, x_BTD, normed, out)
    if layer.output_scale:
        x_BTD = x_BTD * along_last(params["output_scale"], x_BTD)
    return x_BTD, context.selection, stats, cache
