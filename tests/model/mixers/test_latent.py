"""Latent attention beside what tests/interop shows of its families: texts in parts, meshes, long rows, adapters."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity, reading
from jax.sharding import PartitionSpec as P

from jaxmoe.interop.source import config_source
from jaxmoe.model import decoder
from jaxmoe.model.batch import Batch
from jaxmoe.model.linear import LowRank
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.latent import LatentAttentionSpec
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.sampling import Generator, generate
from jaxmoe.parallel.sharding import make_mesh, partition_spec, shardings

FAMILIES = ("deepseek_v3", "deepseek_v32", "glm_moe_dsa")
VARIANTS = [(name, index) for name in FAMILIES for index in range(1 + len(families.case_of(name).variants))]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_text_in_parts_is_the_text_at_once(name, variant):
    params, spec = reading.model_of(name, variant)
    text, one = reading.prompt_of(spec, 150), Generator(params, spec, dtype=jnp.float32)
    for length in (30, 120, 121, 60, 150):  # the fourth is a beginning, from which the last one goes on
        want = reading.whole(params, spec, text[:length])[-1]
        parity.assert_close(one.feed(text[:length]), want, 1e-5, f"logits after {length} tokens")


def test_what_is_cached_is_narrow():
    """One vector and one key per token, however many heads there are."""
    spec = reading.model_of("deepseek_v3")[1]
    config = families.config_json("deepseek_v3")
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    for leaf in jax.tree.leaves(decoder.init_cache(spec, 2, 50, jnp.bfloat16)):
        assert leaf.shape[1:] == (2, 50, width)


def test_a_mesh_continues_a_text():
    params, spec = reading.model_of("deepseek_v3")
    options = {"tokens": 6, "temperature": 0.0, "seed": 0, "dtype": jnp.float32}
    prompt = reading.prompt_of(spec, 20)
    want = generate(params, spec, prompt, **options)
    mesh = make_mesh(fsdp=2, tensor=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(spec.declared, mesh))
        assert generate(placed, spec, prompt, **options) == want


def test_where_its_parameters_lie():
    """Whole heads, and latent widths where model widths would lie."""
    spec = config_source(families.config_json("deepseek_v3")).spec
    declared = spec.layers[0].params(spec.width)["attention"]
    assert {name: tuple(partition_spec(one)) for name, one in declared.items() if "norm" not in name} == {
        "q_a_proj": (None, "fsdp"),
        "q_b_proj": ("tensor", "fsdp"),
        "kv_a_proj": (None, "fsdp"),
        "kv_b_proj": ("tensor", "fsdp"),
        "o_proj": ("fsdp", "tensor"),
    }
    assert partition_spec(declared["q_a_norm"]) == P()


SPEC = LatentAttentionSpec(
    2, 12, 8, 13, 20, 18, RopeSpec(1e4, 8, interleaved=True), NormSpec(1e-6), bias=True
)
WIDTH = 24


def drawn(seed=0):
    noise = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray((p.init == "ones") + 0.2 * noise.standard_normal(p.shape), jnp.float32)
    return jax.tree.map(draw, SPEC.params(WIDTH))


def context_of(length, dtype=jnp.float32, segments=None, fresh=True, start=0):
    positions = jnp.asarray(start + np.arange(length)[None], jnp.int32)
    segments = jnp.ones((1, length), jnp.int32) if segments is None else segments
    return make_context({SPEC.rope}, Batch(None, positions, segments), dtype, fresh=fresh)


def test_gradients_of_long_rows_are_finite_in_bfloat16():
    length = 8192
    x = jax.random.normal(jax.random.key(0), (1, length, WIDTH), jnp.bfloat16)
    segments = (jnp.arange(length)[None] >= 5000) + 1
    context = context_of(length, jnp.bfloat16, segments)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn())

    @jax.jit
    def gradients(params, x):
        loss = lambda params, x: jnp.sum(jnp.square(SPEC.apply(params, x, context).astype(jnp.float32)))
        return jax.grad(loss, argnums=(0, 1))(params, x)

    for leaf in jax.tree.leaves(gradients(params, x)):
        assert jnp.isfinite(leaf).all()
        assert jnp.any(leaf != 0)


def test_a_pair_on_the_part_that_a_cache_goes_through():
    """In attention to a cache kv_b is taken apart, and its pair is a part of it."""
    params, rng = drawn(), np.random.default_rng(5)
    kv_b = params["attention"]["kv_b_proj"]
    a, b = (
        jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)
        for shape in ((3, kv_b.shape[1]), (kv_b.shape[0], 3))
    )
    params["attention"]["kv_b_proj"] = LowRank(kv_b, a, b, 1.5)
    x = jnp.asarray(rng.standard_normal((1, 19, WIDTH)), jnp.float32)
    want = SPEC.apply(params, x, context_of(19))
    cache, repeat = SPEC.init_cache(3, 1, 30, jnp.float32), jnp.int32(1)
    first, cache = SPEC.decode(params, x[:, :11], context_of(11), cache, repeat)
    then, cache = SPEC.decode(params, x[:, 11:], context_of(8, fresh=False, start=11), cache, repeat)
    parity.assert_close(jnp.concatenate([first, then], axis=1), want, 1e-5, "outputs")
    assert not np.asarray(cache.kept)[[0, 2]].any()


def test_flops():
    """Of all pairs of a query and a key that it sees, both products."""
    length = 40
    per_pair = 2 * SPEC.num_heads * (SPEC.whole_key + SPEC.value_dim)
    assert SPEC.mixing_flops(length) * length == pytest.approx(per_pair * length**2 / 2)


def test_values_wider_than_keys_are_refused():
    (problem,) = dataclasses.replace(SPEC, value_dim=21).problems()
    assert problem.startswith(
        "v_head_dim 21 is more than qk_nope_head_dim 12 and qk_rope_head_dim 8 together"
    )
