"""Layers of every placement, with one of the two blocks or both, against their formulas in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.model.blocks import Mixer
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.model.sampling import Generator
from jaxmoe.model.spec import LayerSpec, ModelSpec, group_layers
from jaxmoe.params import initialize, named, param

D, V, T, EPS = 6, 11, 7, 1e-5


@dataclasses.dataclass(frozen=True)
class Previous(Mixer):
    """mix · (the token before, of the same document)."""

    def params(self, width):
        return {"previous": {"mix": param("XD", {"X": width, "D": width})}}

    def apply(self, params, x_BTD, context):
        before = jnp.pad(x_BTD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return jnp.where(context.starts[..., None], 0.0, before) @ params["previous"]["mix"].T

    def init_cache(self, repeats, batch, length, dtype):
        return jnp.zeros((repeats, batch, length, D), dtype)

    def decode(self, params, x_BTD, context, cache, repeat):
        rows = jnp.arange(x_BTD.shape[0])[:, None]
        cache = cache.at[repeat, rows, context.positions].set(x_BTD, mode="drop")
        before = cache[repeat, rows, context.positions - 1]
        before = jnp.where((context.positions == 0)[..., None], 0.0, before)
        return before @ params["previous"]["mix"].T, cache

    def describe(self):
        return "the token before"


def plain(params, spec, tokens):
    """The whole model on one document, (T, V)."""
    params = jax.tree.map(np.float64, params)

    def norm(x, scale):
        return scale * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)

    def mix(own, x):
        return np.concatenate([np.zeros((1, D)), x[:-1]]) @ own["previous"]["mix"].T

    def feed(own, x):
        return np.maximum(x @ own["mlp"]["gate_up"][0].T, 0) ** 2 @ own["mlp"]["down"].T

    x = params["embed"][tokens]
    for index, layer in enumerate(spec.layers):
        group, place, repeat = spec.locate(index)
        own = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], params["groups"][group][place])
        blocks = [("attention", mix, layer.mixer_scales)] if layer.mixer is not None else []
        blocks += [("ffn", feed, layer.ffn_scales)] if layer.ffn is not None else []
        first = norm(x, own[f"{blocks[0][0]}_norm"]) if layer.placement == "parallel" else None
        for name, f, (stream, scale) in blocks:
            match layer.placement:
                case "pre":
                    x = stream * x + scale * f(own, norm(x, own[f"{name}_norm"]))
                case "post":
                    x = stream * x + scale * norm(f(own, x), own[f"{name}_post_norm"])
                case "sandwich":
                    inner = f(own, norm(x, own[f"{name}_norm"]))
                    x = stream * x + scale * norm(inner, own[f"{name}_post_norm"])
                case "parallel":
                    x = stream * x + scale * f(own, first)
                case "normed":
                    normed = norm(x, own[f"{name}_norm"])
                    x = stream * normed + scale * f(own, normed)
    return norm(x, params["norm"]) @ params["lm_head"].T


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "parallel", "normed"])
def test_placements_with_and_without_either_block(placement):
    layer = LayerSpec(
        Previous(), MLPSpec(5, Activation("relu2")), NormSpec(EPS), placement, (1.3, 0.7), (0.9, 0.6)
    )
    layers = [layer, dataclasses.replace(layer, ffn=None), dataclasses.replace(layer, mixer=None)] * 2
    spec = ModelSpec(D, V, group_layers(layers), NormSpec(EPS), tie_embeddings=False, init_std=0.4)
    assert [group.repeats for group in spec.groups] == [2]
    params = initialize(spec.declared, jax.random.key(1), spec.init_std, jnp.float32)
    params = jax.tree.map(lambda x: x + 0.2 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    tokens = np.random.default_rng(2).integers(0, V, T)

    def logits(params):
        hidden, stats = decoder.hidden_states(params, spec, make_batch(tokens[None]), dtype=jnp.float32)
        assert stats is None
        return decoder.logits(params, spec, hidden)[0]

    want = plain(params, spec, tokens)
    np.testing.assert_allclose(jax.jit(logits)(params), want, rtol=1e-4, atol=1e-5)
    one = Generator(params, spec, dtype=jnp.float32)
    for length in (4, 5):
        np.testing.assert_allclose(one.feed(tokens[:length].tolist()), want[length - 1], rtol=1e-4, atol=1e-5)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(logits(params)))))(params)
    for name, grad in named(grads):
        assert float(jnp.abs(grad).max()) > 1e-6, f"{name} does nothing"


def test_a_layer_of_nothing_is_told():
    empty = LayerSpec(None, None, NormSpec(EPS))
    assert list(empty.problems()) == ["a layer has neither a token mixer nor a feed-forward"]


@pytest.mark.parametrize("kind", ["rms", "rms_float32", "layer"])
def test_a_norm_keeps_its_operands_alone(kind):
    x, scale = jax.random.normal(jax.random.key(0), (5, 7)), jnp.arange(7.0)
    _, pull = jax.vjp(lambda x, scale: apply_norm(NormSpec(1e-6, kind), x, scale), x, scale)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(pull)) == [(5, 7), (7,)]
