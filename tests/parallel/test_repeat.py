"""Experts among those of all layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.codecs import four_bit
from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.parallel.experts import experts_on_mesh
from jaxmoe.params import Repeat

REPEATS, EXPERTS, HIDDEN, WIDTH, TOKENS, TOP = 3, 7, 10, 16, 4, 2


@pytest.mark.parametrize("packed", [False, True])
def test_they_are_those_that_are_cut_out(packed):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {
        "gate_up": draw(REPEATS, EXPERTS, 2, HIDDEN, WIDTH),
        "down": draw(REPEATS, EXPERTS, WIDTH, HIDDEN),
        "gate_up_bias": draw(REPEATS, EXPERTS, 2, HIDDEN),
        "down_bias": draw(REPEATS, EXPERTS, WIDTH),
    }
    if packed:
        each = jax.vmap(jax.vmap(lambda x: four_bit.quantize(x, "nf4")))
        params |= {name: each(params[name]) for name in ("gate_up", "down")}
    chosen = jnp.asarray([rng.permutation(EXPERTS)[:TOP] for _ in range(TOKENS)], jnp.int32)
    rest = (Activation(), draw(TOKENS, WIDTH), chosen, draw(TOKENS, TOP))
    outputs = []
    for index in range(REPEATS):
        outputs.append(experts_on_mesh(Repeat(params, jnp.int32(index)), *rest))
        want = experts_on_mesh(jax.tree.map(lambda x, index=index: x[index], params), *rest)
        np.testing.assert_allclose(outputs[-1], want, rtol=1e-6, atol=1e-6)
    assert not np.allclose(outputs[0], outputs[1])
