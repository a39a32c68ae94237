"""Every family without torch: random weights out and in again, and the same results on a mesh."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity

import jaxmoe
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.source import config_source
from jaxmoe.model.batch import make_batch
from jaxmoe.model.module import MoEModel
from jaxmoe.parallel.sharding import make_mesh, shardings
from jaxmoe.params import named


def random_params(declared, dtype):
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray((p.init == "ones") + 0.2 * noise.standard_normal(p.shape), p.dtype(dtype)),
        declared,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_model_comes_back(name, tmp_path):
    """In bfloat16, but for what is kept in float32."""
    dtype, blueprint = jnp.dtype("bfloat16"), config_source(families.config_json(name))
    params = random_params(blueprint.spec.declared, dtype)
    new = MoEModel(blueprint.spec, params, dtype, source=blueprint)
    jaxmoe.save_pretrained(new, tmp_path / "new")
    again = jaxmoe.from_pretrained(tmp_path / "new", dtype)
    for (leaf_name, ours), (_, theirs) in zip(
        named(new.pure_params()), named(again.pure_params()), strict=True
    ):
        assert ours.dtype == theirs.dtype, leaf_name
        np.testing.assert_array_equal(ours, theirs, err_msg=leaf_name)
    jaxmoe.save_pretrained(again, tmp_path / "again")
    files = [{path.name: path.read_bytes() for path in (tmp_path / f).iterdir()} for f in ("new", "again")]
    assert files[0] == files[1]


# Between them: windows, sinks, biases, values from keys, norms after, several widths of heads, shared experts,
# dense layers, constants, a bias on the head, parts of heads, latent keys and values, keys that an indexer selects for
# several layers, a state that is written to at a rate, decays by the layer and by the channel, groups of heads with a
# state, latent experts, heads that are gated, and more or fewer of them by the layer.
ON_A_MESH = (
    "gpt_oss",
    "gemma4_text",
    "ernie4_5_moe",
    "mimo_v2_flash",
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa",
    "qwen3_next",
    "minimax",
    "nemotron_h",
    "bailing_hybrid",
    "laguna",
)


@pytest.mark.parametrize("name", ON_A_MESH)
def test_a_mesh_changes_nothing(name):
    spec = config_source(families.config_json(name)).spec
    declared = spec.declared
    params = random_params(declared, jnp.float32)
    tokens = np.random.default_rng(1).integers(3, spec.vocab_size, (8, 20))
    segments = np.ones((8, 20), np.int32)
    segments[:, 13:] = 2
    batch = make_batch(jnp.asarray(tokens), None, jnp.asarray(segments))

    def run(params):
        grads, (logits, *_) = parity.value_and_grad(params, batch, spec=spec, coefficient=0.01)
        return {"logits": logits, "gradients": grads}

    alone = run(params)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        together = run(jax.device_put(params, shardings(declared, mesh)))
    for (leaf_name, ours), (_, expected) in zip(named(together), named(alone), strict=True):
        if np.asarray(expected).any():
            parity.assert_close(ours, expected, 2e-5, leaf_name)
        else:
            assert not np.asarray(ours).any(), leaf_name
