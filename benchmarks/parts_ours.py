"""jaxmoe's side of `step_parts.py`: each part is what the training step calls, jitted by itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from train_step import assembled_run, jax_batch

from jaxmoe.interop.torch_bridge import from_torch
from jaxmoe.kernels.expert_mlp import Experts, expert_mlp
from jaxmoe.kernels.expert_mlp.dispatch import make_dispatch
from jaxmoe.model.batch import Batch
from jaxmoe.model.decoder import output_head
from jaxmoe.model.feed_forward.router import route, router_stats
from jaxmoe.model.linear import linear, lookup
from jaxmoe.model.mixers.attend import attend
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.rope import apply_rope
from jaxmoe.model.norms import apply_norm, norm
from jaxmoe.model.precision import float32_matmuls
from jaxmoe.optim import build_optimizer
from jaxmoe.params import Tree, roles
from jaxmoe.run.assemble import Assembled
from jaxmoe.training.cross_entropy import linear_cross_entropy

Call = Callable[[], Any]

OPTIONS = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
"""XLA's options, as the training step has them."""


def calls(model: Any, tokens: np.ndarray) -> dict[str, Call]:
    """A function per part that computes it and waits; parts of a layer are those of the first.

    Args:
        model: the model in transformers, float32.
        tokens: (B, T).
    """
    mine = from_torch(model)
    run = assembled_run(mine.source, *tokens.shape)
    params, batch = mine.pure_params(), jax_batch(tokens)
    layer = jax.tree.map(lambda stacked: stacked[0], params["groups"][0][0])
    return (
        _attention(run, layer, batch)
        | _expert_path(run, layer, tokens.size)
        | _ends(run, params, batch)
        | _optimizer(run, params)
    )


def _call(function: Callable[..., Any], *operands: Any) -> Call:
    """`function`, jitted, of operands that stay the same."""

    def traced(*operands: Any) -> Any:
        with float32_matmuls(jnp.float32):
            return function(*operands)

    compiled = jax.jit(traced, compiler_options=OPTIONS)
    return lambda: jax.block_until_ready(compiled(*operands))


def _both(function: Callable[..., Any], *operands: Any, beside: Any = ()) -> Call:
    """`function` and the gradients of all its operands, for random gradients of what it gives.

    What it takes beside them has no gradient. It is no constant either: XLA would sort it while it compiles.
    """
    given = _like(jax.eval_shape(function, *operands, *beside))

    def both(given: Any, beside: Any, *operands: Any) -> Any:
        out, pull = jax.vjp(lambda *operands: function(*operands, *beside), *operands)
        return out, pull(given)

    return _call(both, given, beside, *operands)


def _like(shapes: Any) -> Any:
    """Random arrays."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = (jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True))
    return jax.tree.unflatten(structure, drawn)


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def _attention(run: Assembled, layer: Tree, batch: Batch) -> dict[str, Call]:
    """Attention forward and backward, its projections, and the norms and rotations of a layer."""
    spec = run.spec.layers[0]
    mixer: Any = spec.mixer
    rows, width = batch.tokens.shape, run.spec.width
    context = make_context(
        run.spec.rotations, batch, jnp.float32, packed=run.step_spec.packed, device=run.device
    )
    q = _normal(*rows, mixer.num_heads, mixer.head_dim)
    k = _normal(*rows, mixer.num_kv_heads, mixer.head_dim)
    x, attended = _normal(*rows, width), q.reshape(*rows, -1)
    attending = functools.partial(attend, scale=mixer.head_dim**-0.5, device=run.device)
    forward = _call(
        lambda q, k, v, documents: jax.vjp(lambda *qkv: attending(*qkv, documents), q, k, v),
        q,
        k,
        k,
        context.documents,
    )
    out, pull = forward()
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {name: layer["attention"][name] for name in names}

    def projections(weights: Tree, x: jax.Array, attended: jax.Array) -> list[jax.Array]:
        of = {name: attended if name == "o_proj" else x for name in names}
        return [linear(of[name], weights[name]) for name in names]

    scales = {name: layer[name] for name in ("attention_norm", "ffn_norm")}
    scales |= {name: layer["attention"][name] for name in ("q_norm", "k_norm")}

    def norms(scales: Tree, x: jax.Array, after: jax.Array, q: jax.Array, k: jax.Array, *tables: Any) -> Any:
        turned = [
            apply_rope(mixer.rope, apply_norm(mixer.qk_norm.norm, heads, scales[name]), tables)
            for name, heads in (("q_norm", q), ("k_norm", k))
        ]
        return (
            norm(scales, "attention_norm", spec.norm, x),
            norm(scales, "ffn_norm", spec.norm, after),
            *turned,
        )

    return {
        "attention, forward": forward,
        "attention, backward": _call(lambda pull, dout: pull(dout), pull, _like(out)),
        "attention's projections": _both(projections, weights, x, attended),
        "norms and rotation": _both(norms, scales, x, x[::-1], q, k, beside=context.rotations[mixer.rope]),
    }


def _expert_path(run: Assembled, layer: Tree, rows: int) -> dict[str, Call]:
    """Router, experts as a whole and by passes, their activation and the order of their rows."""
    ffn: Any = run.spec.layers[0].ffn
    experts = Experts(**layer["experts"])
    x = _normal(rows, run.spec.width)
    routing = route(layer["router"], ffn.router, x)

    def router(params: Tree, x: jax.Array) -> Any:
        routing = route(params, ffn.router, x)
        stats = router_stats(routing, jnp.ones((rows,), jnp.bool_))
        return routing.weights, stats.probability, stats.z

    def whole(x: jax.Array, experts: Experts, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        return expert_mlp(x, experts, chosen, weights, activation=ffn.activation, device=run.device)

    slots, hidden = rows * ffn.router.top_k, ffn.hidden
    pre_Zf, a_ZF = _normal(slots, ffn.activation.parts * hidden), _normal(slots, hidden)
    forward = _call(
        lambda x, experts, weights, chosen: jax.vjp(lambda x, w: whole(x, experts, w, chosen), x, weights),
        *(x, experts, routing.weights, routing.experts),
    )
    out, pull = forward()
    activation = ffn.activation

    def parts(pre_Zf: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(pre_Zf, activation.parts, axis=-1))

    def slopes(pre_Zf: jax.Array, da_ZF: jax.Array) -> Any:
        a_ZF, dparts = activation.value_and_grad(parts(pre_Zf), da_ZF)
        return a_ZF, jnp.concatenate(dparts, axis=-1)

    values = _call(lambda pre_Zf: activation.value(parts(pre_Zf)), pre_Zf)
    gradients = _call(slopes, pre_Zf, a_ZF)

    return {
        "router": _both(router, layer["router"], x),
        "experts": _both(whole, x, experts, routing.weights, beside=(routing.experts,)),
        "· forward": forward,
        "· backward, dX": _call(lambda pull, dout: pull(dout), pull, _like(out)),
        "· dispatch": _call(lambda chosen: make_dispatch(chosen, ffn.router.num_experts), routing.experts),
        "· activation": lambda: (values(), gradients()),
    }


def _ends(run: Assembled, params: Tree, batch: Batch) -> dict[str, Call]:
    """Embedding and output head, each with its gradients."""
    head = output_head(params, run.spec)

    def loss(hidden: jax.Array, head: Any, batch: Batch) -> jax.Array:
        return linear_cross_entropy(hidden, head, batch.targets, batch.weights) / batch.tokens.size

    return {
        "embedding": _both(
            lambda table, tokens: lookup(table, tokens, jnp.float32), params["embed"], beside=(batch.tokens,)
        ),
        "head and cross-entropy": _call(
            jax.value_and_grad(loss, argnums=(0, 1)),
            _normal(*batch.tokens.shape, run.spec.width),
            head,
            batch,
        ),
    }


def _optimizer(run: Assembled, params: Tree) -> dict[str, Call]:
    """AdamW alone, and with clipping; each takes over its weights and moments, as the step does."""
    grads = _like(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))

    def updating(clip_norm: float | None) -> Call:
        config = run.config.optimizer.model_copy(update={"clip_norm": clip_norm})
        optimizer = build_optimizer(config, roles(run.spec.declared), run.config.train.steps)
        weights = jax.tree.map(jnp.array, params)
        box = [(weights, jax.jit(optimizer.init)(weights))]

        def update(kept: Any, grads: Tree) -> Any:
            updates, state = optimizer.update(grads, kept[1], kept[0])
            return optax.apply_updates(kept[0], updates), state

        compiled = jax.jit(update, donate_argnums=0, compiler_options=OPTIONS)

        def call() -> None:
            box[0] = jax.block_until_ready(compiled(box[0], grads))

        return call

    return {"clipping and AdamW": updating(1.0), "· AdamW": updating(None)}
