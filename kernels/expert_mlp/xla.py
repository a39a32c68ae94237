"""The portable backend, in plain XLA operations; made to be fast on CPUs. Takes everything.

One loop over the experts that have rows, inside it one over blocks of an expert's rows, and inside that everything that
the layer does to a block while it is in the cache. Experts go in order: what a block writes past its expert's rows, the
next expert writes over. What lies between the products is never written for all rows, but for the pre-activation, which
the backward pass wants.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.expert_mlp.contract import Grads, Options
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch, gather_sum
from jaxmoe.kernels.expert_mlp.dropout import factors
from jaxmoe.kernels.expert_mlp.operands import Experts, Lora, is_packed, shape_of, unpacked
from jaxmoe.kernels.expert_mlp.row_blocks import Block, RowBlocks, choose_row_blocks, fold_blocks, fold_groups

_FLOAT32 = jnp.float32


class _Rows(NamedTuple):
    """What the backward pass knows of one block of slots.

    Those that are not the expert's own are to add nothing, whatever they hold; 0 times nan is nan, so that x and dout
    are zeros there, and what is computed with `pre` is made so.

    Attributes:
        inside: (b, 1) bool, which rows are the expert's own.
        x: (b, D).
        pre: (b, f), pre-activation.
        weight: (b, 1) float32, the router's.
        dout: (b, D), cotangent of the token's output.
        drop: of the inputs of the low-rank updates.
    """

    inside: jax.Array
    x: jax.Array
    pre: jax.Array
    weight: jax.Array
    dout: jax.Array
    drop: "_Drop"


class _Drop(NamedTuple):
    """What the inputs of both low-rank updates are multiplied with; None where nothing is dropped.

    Attributes:
        up: (b, D) float32.
        down: (b, F) float32.
    """

    up: Any = None
    down: Any = None


@functools.partial(jax.jit, static_argnames=("options", "save"))
def forward(
    options: Options,
    x_RD: jax.Array,
    experts: Experts,
    weights_RK: jax.Array,
    dispatch: Dispatch,
    *,
    save: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """The layer's output (R, D), and with `save` the pre-activation (S, f), S ≥ Z, that `backward` wants."""
    hidden = math.prod(shape_of(experts.gate_up)[1:-1])
    experts = _flat(experts)
    blocks = choose_row_blocks(dispatch.order.size, dispatch.group_sizes.size)
    token_S = _tokens(dispatch, blocks)
    slot_S = _padded(dispatch.order, blocks)

    def add_expert(expert: jax.Array, start: jax.Array, end: jax.Array, state: Any) -> Any:
        own = _of(experts, expert, x_RD.dtype)

        def add_block(state: Any, block: Block) -> Any:
            y_SD, pre_Sf = state
            drop = _drop(dispatch, own, block, slot_S)
            pre_bf = _up(options, x_RD[block.rows(token_S)], own, drop)
            # Rows after those of the last expert are read: they are of experts held elsewhere and add zeros.
            a_bF = jnp.where(block.inside, options.activation.value(_parts(options, pre_bf)), 0)
            a_bF = a_bF.astype(x_RD.dtype)
            y_bD = _with_lora(options, a_bF, own.down, own.lora.down_a, own.lora.down_b, drop.down)
            if own.down_bias is not None:
                y_bD += jnp.where(block.inside, own.down_bias.astype(_FLOAT32), 0)
            return block.put(y_SD, y_bD), None if pre_Sf is None else block.put(pre_Sf, pre_bf)

        return fold_blocks(add_block, state, start, end, blocks)

    # zeros_like also takes over the mesh axes that x varies over inside shard_map: a loop's carry must.
    y_SD = jnp.zeros_like(x_RD, shape=(token_S.size, x_RD.shape[1]))
    pre_Sf = jnp.zeros_like(x_RD, shape=(token_S.size, hidden)) if save else None
    y_SD, pre_Sf = fold_groups(add_expert, (y_SD, pre_Sf), dispatch.group_sizes)
    return gather_sum(y_SD, dispatch, weights_RK), pre_Sf


@functools.partial(jax.jit, static_argnames=("options", "wanted"))
def backward(
    options: Options,
    x_RD: jax.Array,
    experts: Experts,
    weights_RK: jax.Array,
    dispatch: Dispatch,
    pre_Sf: jax.Array,
    dout_RD: jax.Array,
    wanted: Grads,
) -> Grads:
    """Gradients of whatever is true in `wanted`; None for the rest."""
    flat = _flat(experts)
    blocks = choose_row_blocks(dispatch.order.size, dispatch.group_sizes.size)
    token_S = _tokens(dispatch, blocks)
    slot_S = _padded(dispatch.order, blocks)
    weight_S = _padded(weights_RK.reshape(-1)[dispatch.order].astype(_FLOAT32), blocks)

    def add_expert(expert: jax.Array, start: jax.Array, end: jax.Array, state: Any) -> Any:
        own = _of(flat, expert, x_RD.dtype)
        dexperts, dx_SD, dweights_S = state
        totals = jax.tree.map(
            lambda whole: jnp.zeros_like(whole, shape=whole.shape[1:], dtype=_FLOAT32), dexperts
        )

        def add_block(state: Any, block: Block) -> Any:
            totals, dx_SD, dweights_S = state
            token_b = block.rows(token_S)
            rows = _Rows(
                block.inside,
                jnp.where(block.inside, x_RD[token_b], 0),
                block.rows(pre_Sf),
                block.rows(weight_S)[:, None],
                jnp.where(block.inside, dout_RD[token_b], 0),
                _drop(dispatch, own, block, slot_S),
            )
            dx_bD, dweights_b, dexpert = _block_gradients(options, own, rows, wanted)
            return (
                jax.tree.map(jnp.add, totals, dexpert),
                None if dx_SD is None or dx_bD is None else block.put(dx_SD, dx_bD),
                None if dweights_S is None or dweights_b is None else block.put(dweights_S, dweights_b),
            )

        state = (totals, dx_SD, dweights_S)
        totals, dx_SD, dweights_S = fold_blocks(add_block, state, start, end, blocks)
        put = lambda whole, total: lax.dynamic_update_index_in_dim(
            whole, total.astype(whole.dtype), expert, axis=0
        )
        return jax.tree.map(put, dexperts, totals), dx_SD, dweights_S

    dexperts = jax.tree.map(
        lambda want, array: jnp.zeros_like(x_RD, shape=array.shape) if want else None, wanted.experts, flat
    )
    dx_SD = jnp.zeros_like(x_RD, shape=(token_S.size, x_RD.shape[1])) if wanted.x else None
    dweights_S = jnp.zeros_like(weight_S) if wanted.weights else None
    state = fold_groups(add_expert, (dexperts, dx_SD, dweights_S), dispatch.group_sizes)
    dexperts, dx_SD, dweights_S = state
    return Grads(
        x=None if dx_SD is None else gather_sum(dx_SD, dispatch),
        weights=None if dweights_S is None else dweights_S[dispatch.inverse].astype(weights_RK.dtype),
        experts=jax.tree.map(
            lambda want, array, gradient: gradient.reshape(array.shape) if want else None,
            wanted.experts,
            experts,
            dexperts,
        ),
    )


def _block_gradients(
    options: Options, own: Experts, rows: _Rows, wanted: Grads
) -> tuple[jax.Array | None, jax.Array | None, Experts]:
    """Of one block of an expert's rows: gradients of x (b, D) and of the router's weights (b,), and what the rows add
    to those of the expert, in float32."""
    dtype, scale = rows.x.dtype, options.lora_scale
    down_a, down_b, up_a, up_b = own.lora.down_a, own.lora.down_b, own.lora.gate_up_a, own.lora.gate_up_b
    # Not yet times the router's weight: the product with the activation is the gradient of that weight.
    da_bF = _product(rows.dout, own.down)
    dlow_br: Any = None
    if down_b is not None:
        dlow_br = (scale * _product(rows.dout, down_b)).astype(dtype)
        da_bF += _dropped(_product(dlow_br, down_a), rows.drop.down)
    a_bF, dpre_parts = options.activation.value_and_grad(_parts(options, rows.pre), rows.weight * da_bF)
    own_rows = lambda x: jnp.where(rows.inside, x, 0)
    dpre_bf = jnp.concatenate([own_rows(part) for part in dpre_parts], axis=-1).astype(dtype)
    # The router's weight goes with the narrower side of the outer products.
    weighted_bF = own_rows(rows.weight * a_bF).astype(dtype)
    # Several products read them, and XLA would have each make them.
    dpre_bf, weighted_bF = lax.optimization_barrier((dpre_bf, weighted_bF))

    dweights_b = None
    if wanted.weights:
        dweights_b = jnp.sum(da_bF * a_bF, axis=-1)
        if own.down_bias is not None:
            dweights_b += _times(rows.dout.astype(_FLOAT32), own.down_bias)
        dweights_b = jnp.where(rows.inside[:, 0], dweights_b, 0)
    dlow_up_br: Any = None
    if up_b is not None:
        dlow_up_br = (scale * _product(dpre_bf, up_b)).astype(dtype)
    dx_bD = None
    if wanted.x:
        dx_bD = _product(dpre_bf, own.gate_up)
        if up_a is not None:
            dx_bD += _dropped(_product(dlow_up_br, up_a), rows.drop.up)

    outer = _OuterFactors(rows, dpre_bf, weighted_bF, dlow_up_br, dlow_br)
    return dx_bD, dweights_b, _parameter_gradients(options, own, outer, wanted.experts)


class _OuterFactors(NamedTuple):
    """What the outer products of a block are of.

    Attributes:
        rows: the block's.
        dpre: (b, f), cotangent of the pre-activation.
        weighted: (b, F), the activation times the router's weight.
        dlow_up, dlow: (b, r), cotangents of the low sides of both low-rank updates, where there are.
    """

    rows: _Rows
    dpre: jax.Array
    weighted: jax.Array
    dlow_up: Any
    dlow: Any


def _parameter_gradients(options: Options, own: Experts, of: _OuterFactors, wanted: Experts) -> Experts:
    """What a block's rows add to the gradients of their expert, in float32."""
    x, dout = of.rows.x, of.rows.dout
    up_sees, down_sees = _dropped(x, of.rows.drop.up), _dropped(of.weighted, of.rows.drop.down)
    lora: dict[str, Any] = {}
    if wanted.lora.gate_up_a:
        lora["gate_up_a"] = _outer(of.dlow_up, up_sees)
    if wanted.lora.gate_up_b:
        low_br = _times(up_sees, own.lora.gate_up_a).astype(x.dtype)
        lora["gate_up_b"] = options.lora_scale * _outer(of.dpre, low_br)
    if wanted.lora.down_a:
        lora["down_a"] = _outer(of.dlow, down_sees)
    if wanted.lora.down_b:
        low_br = _times(down_sees, own.lora.down_a).astype(x.dtype)
        lora["down_b"] = options.lora_scale * _outer(dout, low_br)
    return Experts(
        gate_up=_outer(of.dpre, x) if wanted.gate_up else None,
        down=_outer(dout, of.weighted) if wanted.down else None,
        gate_up_bias=jnp.sum(of.dpre.astype(_FLOAT32), axis=0) if wanted.gate_up_bias else None,
        down_bias=jnp.sum(of.rows.weight * dout.astype(_FLOAT32), axis=0) if wanted.down_bias else None,
        lora=Lora(**lora),
    )


def _up(options: Options, x_bD: jax.Array, own: Experts, drop: _Drop) -> jax.Array:
    """The pre-activation (b, f), parts one after the other, in x's dtype."""
    pre_bf = _with_lora(options, x_bD, own.gate_up, own.lora.gate_up_a, own.lora.gate_up_b, drop.up)
    if own.gate_up_bias is not None:
        pre_bf += own.gate_up_bias.astype(_FLOAT32)[None]
    return pre_bf.astype(x_bD.dtype)


def _with_lora(options: Options, x: jax.Array, weight: jax.Array, a: Any, b: Any, drop: Any) -> jax.Array:
    """x (b, in) times weight (out, in), and its low-rank update: (b, out) float32."""
    out = _times(x, weight)
    if a is not None:
        out += options.lora_scale * _times(_times(_dropped(x, drop), a).astype(x.dtype), b)
    return out


def _drop(dispatch: Dispatch, own: Experts, block: Block, slot_S: jax.Array) -> _Drop:
    """Of the updates of one expert that are there, for its rows."""
    of = dispatch.dropout
    if of is None:
        return _Drop()

    def drawn(key: jax.Array, a: Any) -> Any:
        return None if a is None else factors(key, block.rows(slot_S), a.shape[-1], of.rate)

    return _Drop(drawn(of.up, own.lora.gate_up_a), drawn(of.down, own.lora.down_a))


def _dropped(x: jax.Array, drop: Any) -> jax.Array:
    """x (b, …) times what `_drop` gives, in x's dtype."""
    return x if drop is None else (x * drop).astype(x.dtype)


def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    """(b, in) and (out, in), or (in,) → (b, out), or (b,), summed in float32."""
    return lax.dot_general(x, weight, (((1,), (weight.ndim - 1,)), ((), ())), preferred_element_type=_FLOAT32)


def _product(dout: jax.Array, weight: jax.Array) -> jax.Array:
    """(b, out) and (out, in) → (b, in), summed in float32."""
    return lax.dot_general(dout, weight, (((1,), (0,)), ((), ())), preferred_element_type=_FLOAT32)


def _outer(dout: jax.Array, x: jax.Array) -> jax.Array:
    """(b, out) and (b, in) → (out, in), summed over the rows in float32."""
    return lax.dot_general(dout, x, (((0,), (0,)), ((), ())), preferred_element_type=_FLOAT32)


def _parts(options: Options, pre_bf: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.split(pre_bf.astype(_FLOAT32), options.activation.parts, axis=-1))


def _tokens(dispatch: Dispatch, blocks: RowBlocks) -> jax.Array:
    """(S,) int32: the token of each slot, in expert order, and of what blocks read past them."""
    return _padded(dispatch.order // dispatch.inverse.shape[1], blocks)


def _padded(x_Z: jax.Array, blocks: RowBlocks) -> jax.Array:
    """x (S,) with zeros after the last slot, for the last block."""
    return jnp.pad(x_Z, (0, blocks.padding))


def _flat(experts: Experts) -> Experts:
    """With gate and up as one matrix: (E, f, D), (E, f), (E, f, r); what is packed stays so."""
    join = lambda x: x if x is None or is_packed(x) else x.reshape(x.shape[0], -1, *x.shape[3:])
    lora = experts.lora._replace(gate_up_b=join(experts.lora.gate_up_b))
    return experts._replace(gate_up=join(experts.gate_up), gate_up_bias=join(experts.gate_up_bias), lora=lora)


def _of(experts: Experts, expert: jax.Array, dtype: Any) -> Experts:
    """The arrays of one expert, in `dtype`: of what is packed, no other expert is ever unpacked."""
    # On a CPU XLA cuts 16-bit floats in float32. Bound to the expert, what is widened is cut first; unbound it is all
    # experts, before the loop over those with rows.
    experts, expert = lax.optimization_barrier((experts, expert))
    own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, expert, keepdims=False), experts)
    own = unpacked(own, dtype)
    return own._replace(gate_up=own.gate_up.reshape(-1, own.gate_up.shape[-1]))
