"""The portable backend, in plain XLA operations; made to be fast on CPUs. Takes everything.

One loop over the experts that have rows, inside it one over blocks of an expert's rows, and inside that everything that
the layer does to a block while it is in the cache. Nothing is padded: a block that runs past its expert's rows is
blended into the results under a mask. What lies between the products is never written for all rows, but for the
pre-activation, which the backward pass wants.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.expert_mlp.contract import Grads, Options
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch, gather_sum
from jaxmoe.kernels.expert_mlp.operands import Experts, Lora
from jaxmoe.kernels.expert_mlp.row_blocks import Block, choose_row_blocks, fold_blocks, fold_groups

_FLOAT32 = jnp.float32


class _Rows(NamedTuple):
    """What the backward pass knows of one block of slots.

    Attributes:
        x: (b, D).
        pre: (b, f), pre-activation.
        weight: (b,) float32, the router's.
        dout: (b, D), cotangent of the token's output.
    """

    x: jax.Array
    pre: jax.Array
    weight: jax.Array
    dout: jax.Array


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
    """The layer's output (R, D), and with `save` the pre-activation (Z, f) that `backward` wants."""
    experts = _flat(experts)
    token_Z = _tokens(dispatch)
    blocks = choose_row_blocks(token_Z.size, experts.down.shape[0])

    def add_expert(expert: jax.Array, start: jax.Array, end: jax.Array, state: Any) -> Any:
        own = _of(experts, expert)

        def add_block(state: Any, block: Block) -> Any:
            y_ZD, pre_Zf = state
            pre_bf = _up(options, x_RD[block.rows(token_Z)], own)
            a_bF = options.activation.value(_parts(options, pre_bf)).astype(x_RD.dtype)
            y_bD = _with_lora(options, a_bF, own.down, own.lora.down_a, own.lora.down_b)
            if own.down_bias is not None:
                y_bD += own.down_bias.astype(_FLOAT32)[None]
            return block.put(y_ZD, y_bD), None if pre_Zf is None else block.put(pre_Zf, pre_bf)

        return fold_blocks(add_block, state, start, end, token_Z.size, blocks)

    # zeros_like also takes over the mesh axes that x varies over inside shard_map: a loop's carry must.
    y_ZD = jnp.zeros_like(x_RD, shape=(token_Z.size, x_RD.shape[1]))
    pre_Zf = jnp.zeros_like(x_RD, shape=(token_Z.size, experts.gate_up.shape[1])) if save else None
    y_ZD, pre_Zf = fold_groups(add_expert, (y_ZD, pre_Zf), dispatch.group_sizes)
    return gather_sum(y_ZD, dispatch, weights_RK), pre_Zf


@functools.partial(jax.jit, static_argnames=("options", "wanted"))
def backward(
    options: Options,
    x_RD: jax.Array,
    experts: Experts,
    weights_RK: jax.Array,
    dispatch: Dispatch,
    pre_Zf: jax.Array,
    dout_RD: jax.Array,
    wanted: Grads,
) -> Grads:
    """Gradients of whatever is true in `wanted`; None for the rest."""
    flat = _flat(experts)
    token_Z = _tokens(dispatch)
    weight_Z = weights_RK.reshape(-1)[dispatch.order].astype(_FLOAT32)
    blocks = choose_row_blocks(token_Z.size, flat.down.shape[0])

    def add_expert(expert: jax.Array, start: jax.Array, end: jax.Array, state: Any) -> Any:
        own = _of(flat, expert)
        dexperts, dx_ZD, dweights_Z = state
        totals = jax.tree.map(
            lambda whole: jnp.zeros_like(whole, shape=whole.shape[1:], dtype=_FLOAT32), dexperts
        )

        def add_block(state: Any, block: Block) -> Any:
            totals, dx_ZD, dweights_Z = state
            token_b = block.rows(token_Z)
            # Other rows than the block's own are to add nothing, whatever they hold: 0 times nan is nan.
            x_bD, dout_bD = (jnp.where(block.inside, x[token_b], 0) for x in (x_RD, dout_RD))
            rows = _Rows(x_bD, block.rows(pre_Zf), block.rows(weight_Z), dout_bD)
            dx_bD, dweights_b, dexpert = _block_gradients(options, own, rows, block, wanted)
            return (
                jax.tree.map(jnp.add, totals, dexpert),
                None if dx_ZD is None else block.put(dx_ZD, dx_bD),
                None if dweights_Z is None else block.put(dweights_Z, dweights_b),
            )

        state = (totals, dx_ZD, dweights_Z)
        totals, dx_ZD, dweights_Z = fold_blocks(add_block, state, start, end, token_Z.size, blocks)
        put = lambda whole, total: lax.dynamic_update_index_in_dim(
            whole, total.astype(whole.dtype), expert, axis=0
        )
        return jax.tree.map(put, dexperts, totals), dx_ZD, dweights_Z

    dexperts = jax.tree.map(
        lambda want, array: jnp.zeros_like(x_RD, shape=array.shape) if want else None, wanted.experts, flat
    )
    dx_ZD = jnp.zeros_like(x_RD, shape=(token_Z.size, x_RD.shape[1])) if wanted.x else None
    dweights_Z = jnp.zeros_like(weight_Z) if wanted.weights else None
    state = fold_groups(add_expert, (dexperts, dx_ZD, dweights_Z), dispatch.group_sizes)
    dexperts, dx_ZD, dweights_Z = state
    return Grads(
        x=None if dx_ZD is None else gather_sum(dx_ZD, dispatch),
        weights=None if dweights_Z is None else dweights_Z[dispatch.inverse].astype(weights_RK.dtype),
        experts=jax.tree.map(
            lambda want, array, gradient: gradient.reshape(array.shape) if want else None,
            wanted.experts,
            experts,
            dexperts,
        ),
    )


def _block_gradients(
    options: Options, own: Experts, rows: _Rows, block: Block, wanted: Grads
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
        da_bF += _product(dlow_br, down_a)
    weight_b1 = rows.weight[:, None]
    a_bF, dpre_parts = options.activation.value_and_grad(_parts(options, rows.pre), weight_b1 * da_bF)
    dpre_bf = jnp.where(block.inside, jnp.concatenate(dpre_parts, axis=-1), 0).astype(dtype)
    # The router's weight goes with the narrower side of the outer products.
    weighted_bF = jnp.where(block.inside, weight_b1 * a_bF, 0).astype(dtype)
    # Several products read them, and XLA would have each make them.
    dpre_bf, weighted_bF = lax.optimization_barrier((dpre_bf, weighted_bF))

    dweights_b = None
    if wanted.weights:
        dweights_b = jnp.sum(da_bF * a_bF, axis=-1)
        if own.down_bias is not None:
            dweights_b += _times(rows.dout.astype(_FLOAT32), own.down_bias)
    dlow_up_br: Any = None
    if up_b is not None:
        dlow_up_br = (scale * _product(dpre_bf, up_b)).astype(dtype)
    dx_bD = None
    if wanted.x:
        dx_bD = _product(dpre_bf, own.gate_up)
        if up_a is not None:
            dx_bD += _product(dlow_up_br, up_a)

    want, lora_want = wanted.experts, wanted.experts.lora
    lora: dict[str, Any] = {}
    if lora_want.gate_up_a:
        lora["gate_up_a"] = _outer(dlow_up_br, rows.x)
    if lora_want.gate_up_b:
        lora["gate_up_b"] = scale * _outer(dpre_bf, _times(rows.x, up_a).astype(dtype))
    if lora_want.down_a:
        lora["down_a"] = _outer(dlow_br, weighted_bF)
    if lora_want.down_b:
        lora["down_b"] = scale * _outer(rows.dout, _times(weighted_bF, down_a).astype(dtype))
    return (
        dx_bD,
        dweights_b,
        Experts(
            gate_up=_outer(dpre_bf, rows.x) if want.gate_up else None,
            down=_outer(rows.dout, weighted_bF) if want.down else None,
            gate_up_bias=jnp.sum(dpre_bf.astype(_FLOAT32), axis=0) if want.gate_up_bias else None,
            down_bias=_weighted_sum(rows, block) if want.down_bias else None,
            lora=Lora(**lora),
        ),
    )


def _up(options: Options, x_bD: jax.Array, own: Experts) -> jax.Array:
    """The pre-activation (b, f), parts one after the other, in x's dtype."""
    pre_bf = _with_lora(options, x_bD, own.gate_up, own.lora.gate_up_a, own.lora.gate_up_b)
    if own.gate_up_bias is not None:
        pre_bf += own.gate_up_bias.astype(_FLOAT32)[None]
    return pre_bf.astype(x_bD.dtype)


def _with_lora(options: Options, x: jax.Array, weight: jax.Array, a: Any, b: Any) -> jax.Array:
    """x (b, in) times weight (out, in), and its low-rank update: (b, out) float32."""
    out = _times(x, weight)
    if a is not None:
        out += options.lora_scale * _times(_times(x, a).astype(x.dtype), b)
    return out


def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    """(b, in) and (out, in), or (in,) → (b, out), or (b,), summed in float32."""
    return lax.dot_general(x, weight, (((1,), (weight.ndim - 1,)), ((), ())), preferred_element_type=_FLOAT32)


def _product(dout: jax.Array, weight: jax.Array) -> jax.Array:
    """(b, out) and (out, in) → (b, in), summed in float32."""
    return lax.dot_general(dout, weight, (((1,), (0,)), ((), ())), preferred_element_type=_FLOAT32)


def _outer(dout: jax.Array, x: jax.Array) -> jax.Array:
    """(b, out) and (b, in) → (out, in), summed over the rows in float32."""
    return lax.dot_general(dout, x, (((0,), (0,)), ((), ())), preferred_element_type=_FLOAT32)


def _weighted_sum(rows: _Rows, block: Block) -> jax.Array:
    """Σ weight · dout over the block's own rows: (D,)."""
    weight_b1 = jnp.where(block.inside, rows.weight[:, None], 0)
    return jnp.sum(weight_b1 * rows.dout.astype(_FLOAT32), axis=0)


def _parts(options: Options, pre_bf: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.split(pre_bf.astype(_FLOAT32), options.activation.parts, axis=-1))


def _tokens(dispatch: Dispatch) -> jax.Array:
    """(Z,) int32: the token of each slot, in expert order."""
    return dispatch.order // dispatch.inverse.shape[1]


def _flat(experts: Experts) -> Experts:
    """With gate and up as one matrix: (E, f, D), (E, f), (E, f, r)."""
    join = lambda x: None if x is None else x.reshape(x.shape[0], -1, *x.shape[3:])
    lora = experts.lora._replace(gate_up_b=join(experts.lora.gate_up_b))
    return experts._replace(gate_up=join(experts.gate_up), gate_up_bias=join(experts.gate_up_bias), lora=lora)


def _of(experts: Experts, expert: jax.Array) -> Experts:
    """The arrays of one expert."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, expert, keepdims=False), experts)
