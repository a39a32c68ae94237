"""Mamba 2's layer beside its definition, one token after the other in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.batch import make_batch
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.mamba2 import Mamba2Spec
from jaxmoe.model.norms import NormSpec
from jaxmoe.params import named

BATCH, LENGTH, WIDTH = 2, 150, 11
SPEC = Mamba2Spec(
    num_heads=6,
    num_groups=3,
    head_dim=5,
    state_size=7,
    taps=4,
    norm=NormSpec(1e-2),
    least_step=0.3,
    most_step=1.4,
)
PLAIN = dataclasses.replace(SPEC, convolution_bias=False, least_step=0.0, most_step=np.inf, taps=3)
SEGMENTS = np.stack(
    [
        np.repeat([1, 2, 3, 4, 5], [11, 1, 70, 46, 22]),
        np.repeat([1, 2, 0], [64, 63, 23]),
    ]
)
"""Borders within chunks of 64, at their ends, and two in one chunk; padding."""


def weights(spec, width=WIDTH):
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: (p.init == "ones") + 0.4 * noise.standard_normal(p.shape), spec.params(width)
    )


def by_token(spec, params, x_BTD, segments):
    """The definition."""
    own, silu = params["mamba"], jax.nn.silu
    z, xbc, dt = jnp.split(
        x_BTD @ own["in_proj"].T, np.cumsum([z_width(spec), sum(spec._convolved)]), axis=-1
    )
    back = spec.taps - 1
    before = jnp.pad(xbc, ((0, 0), (back, 0), (0, 0)))
    numbers = np.pad(segments, ((0, 0), (back, 0)), constant_values=-1)
    total = own.get("convolution_bias", jnp.zeros(1))[None, None]
    for tap in range(spec.taps):
        same = numbers[:, tap : tap + LENGTH] == segments
        total = total + own["convolution"][None, None, :, 0, tap] * jnp.where(
            same[..., None], before[:, tap : tap + LENGTH], 0.0
        )
    x, keys, queries = jnp.split(silu(total), np.cumsum(spec._convolved[:2]), axis=-1)
    x = x.reshape(BATCH, LENGTH, spec.num_heads, -1)
    keys, queries = (
        jnp.repeat(
            part.reshape(BATCH, LENGTH, spec.num_groups, -1), spec.num_heads // spec.num_groups, axis=2
        )
        for part in (keys, queries)
    )
    dt = jnp.clip(jax.nn.softplus(dt + own["step_bias"][None, None]), spec.least_step, spec.most_step)
    goes_on = jnp.asarray(np.diff(segments, axis=1, prepend=-1) == 0)

    def step(state, token):
        dt, key, x, query, goes_on = token
        kept = jnp.exp(-jnp.exp(own["decay"])[None] * dt) * goes_on[:, None]
        state = kept[..., None, None] * state + (dt[..., None] * key)[..., None] * x[:, :, None]
        return state, jnp.einsum("bnhv,bnh->bnv", state, query)

    tokens = jax.tree.map(lambda each: jnp.moveaxis(each, 1, 0), (dt, keys, x, queries, goes_on))
    read = jnp.moveaxis(jax.lax.scan(step, jnp.zeros((BATCH, *spec.state_shape)), tokens)[1], 0, 1)
    gated = (read + own["skip"][None, None, :, None] * x).reshape(z.shape) * silu(z)
    groups = gated.reshape(BATCH, LENGTH, spec.num_groups, -1)
    normal = groups / jnp.sqrt(jnp.mean(groups**2, axis=-1, keepdims=True) + spec.norm.eps)
    return (own["norm"][None, None] * normal.reshape(z.shape)) @ own["out_proj"].T


def z_width(spec):
    return spec.num_heads * spec.head_dim


def context_of(segments, dtype=jnp.float32, fresh=True, packed=True):
    batch = make_batch(jnp.zeros(segments.shape, jnp.int32), None, jnp.asarray(segments, jnp.int32))
    return make_context((), batch, dtype, fresh=fresh, packed=packed)


@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["bounded", "plain"])
def test_the_layer_is_its_definition(spec):
    """What it gives for packed rows, and every gradient."""
    params = weights(spec)
    rng = np.random.default_rng(1)
    x, cotangent = rng.standard_normal((2, BATCH, LENGTH, WIDTH))
    cotangent *= (SEGMENTS > 0)[..., None]

    def results(layer, dtype):
        given = jax.tree.map(lambda each: jnp.asarray(each, dtype), (params, x))
        out, pullback = jax.vjp(layer, *given)
        return jnp.where(jnp.asarray(SEGMENTS > 0)[..., None], out, 0), pullback(
            jnp.asarray(cotangent, dtype)
        )

    with jax.enable_x64(True):
        want = jax.tree.map(
            np.asarray, jax.jit(lambda: results(lambda p, x: by_token(spec, p, x, SEGMENTS), jnp.float64))()
        )
    context = context_of(SEGMENTS)
    got = jax.jit(lambda: results(lambda p, x: spec.apply(p, x, context), jnp.float32))()
    for (name, mine), (_, theirs) in zip(named(got), named(want), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0, err_msg=name)


def test_one_token_at_a_time_is_the_whole():
    """After prompts with padding behind them; bounds of steps hold in both."""
    params = jax.tree.map(lambda each: jnp.asarray(each, jnp.float32), weights(SPEC))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32)
    whole = SPEC.apply(params, x, context_of(np.ones((BATCH, LENGTH), np.int32)))
    lengths = np.array([70, 3])  # shorter than the convolution, too
    segments = (np.arange(80)[None] < lengths[:, None]).astype(np.int32)
    cache = SPEC.init_cache(1, BATCH, LENGTH, jnp.float32)
    out, cache = SPEC.decode(params, x[:, :80], context_of(segments, packed=False), cache, jnp.int32(0))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out[row, :length], whole[row, :length], atol=1e-5)
    for step in range(9):
        at = jnp.asarray(lengths + step)[:, None, None]
        token = jnp.take_along_axis(x, at, axis=1)
        one = context_of(np.ones((BATCH, 1), np.int32), fresh=False, packed=False)
        out, cache = SPEC.decode(params, token, one, cache, jnp.int32(0))
        np.testing.assert_allclose(out, jnp.take_along_axis(whole, at, axis=1), atol=1e-5)


def test_long_rows_in_bfloat16():
    """Decays of the strongest and the weakest kind over 8,192 tokens leave all gradients finite."""
    params = jax.tree.map(lambda each: jnp.asarray(each, jnp.bfloat16), weights(PLAIN))
    params["mamba"]["decay"] = jnp.linspace(-8, 6, PLAIN.num_heads).astype(jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8192, WIDTH)), jnp.bfloat16)
    context = context_of(np.ones((1, 8192), np.int32), jnp.bfloat16)

    @jax.jit
    def gradients(params, x):
        loss = lambda params, x: jnp.sum(PLAIN.apply(params, x, context).astype(jnp.float32) ** 2)
        return jax.grad(loss, argnums=(0, 1))(params, x)

    for name, gradient in named(gradients(params, x)):
        assert np.isfinite(np.asarray(gradient, np.float32)).all(), name
        assert np.asarray(gradient, np.float32).any(), name
