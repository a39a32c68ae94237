"""A model in float32 multiplies in float32, also where the device's default is less."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import drawn
from jax.lax import Precision
from jax.sharding import AxisType, Mesh

from jaxmoe.model import decoder
from jaxmoe.model.batch import learning_batch
from jaxmoe.model.feed_forward.router import RouterSpec, route, router_stats
from jaxmoe.model.head import Head
from jaxmoe.training.cross_entropy import linear_cross_entropy
from jaxmoe.training.state import init_state
from jaxmoe.training.step import StepSpec, make_eval_step, make_train_step


def products(jaxpr):
    """(operand dtype, precision) of every matrix product, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            yield equation.invars[0].aval.dtype.name, equation.params["precision"]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def is_exact(precision):
    return precision in (Precision.HIGHEST, (Precision.HIGHEST, Precision.HIGHEST))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_float32_steps_are_float32(family):
    model = drawn.model_of(family, seed=1)
    spec = StepSpec(model.spec, jnp.dtype("float32"), True, aux_loss=0.1, z_loss=0.1)
    mesh = Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1, 1),
        ("data", "fsdp", "expert", "tensor"),
        axis_types=(AxisType.Auto,) * 4,
    )
    micro = learning_batch(*np.ones((3, 3, 11), np.int32))
    batch = jax.tree.map(lambda x: np.stack([x, x]), micro)
    with jax.set_mesh(mesh):
        everything = jax.tree.map(lambda _: True, model.spec.declared)
        state = init_state(model.pure_params(), optax.sgd(1.0), everything, 0, mesh)
        step = make_train_step(spec, optax.sgd(1.0), optax.constant_schedule(1.0), None)
        training = list(products(step.trace(state, batch).jaxpr))
        evaluation = list(products(make_eval_step(spec).trace(state.params, micro).jaxpr))
    assert len(training) > len(evaluation) > 10
    for dtype, precision in training + evaluation:
        assert dtype == "float32"
        assert is_exact(precision)


def test_bfloat16_steps_keep_the_device_default_but_for_the_router():
    spec = RouterSpec(num_experts=6, top_k=2, renormalize=True, weight_dtype="float32")

    def route_and_count(weight, x):
        return router_stats(route({"weight": weight}, spec, x), None)

    traced = jax.make_jaxpr(route_and_count)(jnp.ones((6, 4), jnp.bfloat16), jnp.ones((9, 4), jnp.bfloat16))
    found = list(products(traced.jaxpr))
    assert len(found) == 4
    assert all(is_exact(precision) for dtype, precision in found if dtype == "float32")

    hidden, head = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((7, 4))
    traced = jax.make_jaxpr(linear_cross_entropy)(hidden, Head(head), jnp.ones((2, 3), jnp.int32))
    assert [precision for _, precision in products(traced.jaxpr)] == [None]


def test_a_precision_that_the_user_set_stays():
    model = drawn.model_of("mixtral", seed=1)

    def logits(hidden):
        return decoder.logits(model.pure_params(), model.spec, hidden)

    with jax.default_matmul_precision("tensorfloat32"):
        ((_, precision),) = products(jax.make_jaxpr(logits)(jnp.ones((1, 2, 40))).jaxpr)
    assert not is_exact(precision)
    ((_, precision),) = products(jax.make_jaxpr(logits)(jnp.ones((1, 2, 40))).jaxpr)
    assert is_exact(precision)
