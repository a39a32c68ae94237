"""Logits, losses and every gradient against transformers' own models on torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxmoe import losses
from jaxmoe.model import decoder
from jaxmoe.params import named

pytestmark = pytest.mark.torch

LENGTH = 75
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, untruncated, mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
    },
}


def tokens_of(vocab_size: int, length: int = LENGTH) -> np.ndarray:
    # Ids from 3 on: some families never update the row of their padding id.
    return np.random.default_rng(7).integers(3, vocab_size, (2, length))


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (2, T) and positions with five left-padding tokens in row 0."""
    segments = np.ones((2, LENGTH), np.int32)
    segments[0, :5] = 0
    return segments, np.maximum(np.cumsum(segments, axis=1) - 1, 0)


@functools.partial(jax.jit, static_argnames=("spec", "coefficient"))
def value_and_grad(params, batch, *, spec, coefficient):
    def loss(params):
        hidden, stats = decoder.hidden_states(params, spec, batch, dtype=jnp.float32, remat=True)
        targets = losses.next_token_targets(batch.tokens, batch.segment_ids)
        nll = losses.linear_cross_entropy(hidden, decoder.output_head(params, spec), targets)
        language = nll / jnp.sum(targets != losses.IGNORED)
        balance = losses.pooled_load_balancing_loss(stats)
        return language + coefficient * balance, (decoder.logits(params, spec, hidden), language, balance)

    return jax.grad(loss, has_aux=True)(params)


def assert_close(ours, theirs, tolerance, what):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.isfinite(theirs).all(), what
    scale = np.abs(theirs).max()
    assert scale > 0, f"{what}: nothing to compare"
    error = np.abs(ours - theirs).max() / scale
    assert error <= tolerance, f"{what}: error {error:.3g} of its scale, allowed {tolerance}"


def compare(model, segments, positions, attention_mask):
    """One forward and backward pass of both; `attention_mask` is None for packed rows."""
    import torch

    from jaxmoe.interop.torch_bridge import from_torch, params_from_tensors, to_numpy

    tokens = tokens_of(model.config.vocab_size)
    targets = np.asarray(losses.next_token_targets(jnp.asarray(tokens), jnp.asarray(segments)))
    labels = np.full_like(tokens, -100)  # transformers predicts labels[t + 1] at t
    labels[:, 1:] = np.where(targets[:, :-1] == losses.IGNORED, -100, targets[:, :-1])
    theirs = model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=None if attention_mask is None else torch.from_numpy(attention_mask),
        position_ids=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        output_router_logits=True,
        use_cache=False,
    )
    model.zero_grad()
    theirs.loss.backward()
    tensors = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.state_dict(keep_vars=True).items()
    }
    their_grads = dict(named(params_from_tensors(model, tensors)))

    mine = from_torch(model)
    batch = decoder.Batch(jnp.asarray(tokens), jnp.asarray(positions, jnp.int32), jnp.asarray(segments))
    coefficient = model.config.router_aux_loss_coef
    grads, (logits, language, balance) = value_and_grad(
        mine.pure_params(), batch, spec=mine.spec, coefficient=coefficient
    )
    valid = segments > 0
    assert_close(np.asarray(logits)[valid], to_numpy(theirs.logits)[valid], 1e-4, "logits")
    their_balance = float(theirs.aux_loss.detach())
    assert_close(balance, their_balance, 1e-5, "load balancing loss")
    assert_close(
        language, float(theirs.loss.detach()) - coefficient * their_balance, 1e-5, "language-model loss"
    )
    for name, grad in named(grads):
        assert_close(grad, their_grads[name], 1e-3, f"gradient of {name}")


VARIANTS = [
    ("mixtral", {}),
    ("mixtral", {"sliding_window": None, "tie_word_embeddings": True, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    (
        "qwen3_moe",
        {"norm_topk_prob": False, "attention_bias": True, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    ("olmoe", {"norm_topk_prob": False}),
    (
        "olmoe",
        {"norm_topk_prob": True, "clip_qkv": None, "attention_bias": True, "tie_word_embeddings": True},
    ),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_left_padded(family, overrides):
    segments, positions = padded()
    compare(
        tiny.torch_model(family, **overrides), segments, positions, attention_mask=segments.astype(np.int64)
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_packed(family):
    """Three documents in one row and two in the other, none of which sees another."""
    model = tiny.torch_model(family)
    segments = np.ones((2, LENGTH), np.int32)
    segments[0, 11:], segments[0, 40:], segments[1, 52:] = 2, 3, 2
    positions = np.asarray(
        decoder.make_batch(jnp.asarray(segments), None, jnp.asarray(segments)).positions, np.int64
    )
    assert positions[0, 10:13].tolist() == [10, 0, 1]
    # transformers tells documents apart by positions that start again, if there is neither a mask nor a cache.
    compare(model, segments, positions, attention_mask=None)


@pytest.mark.parametrize("name", ROPES)
def test_rope(name):
    model = tiny.torch_model(
        "qwen3_moe",
        num_hidden_layers=1,
        decoder_sparse_step=1,
        max_position_embeddings=40,
        rope_parameters=ROPES[name],
    )
    segments = np.ones((2, LENGTH), np.int32)
    compare(model, segments, np.tile(np.arange(LENGTH), (2, 1)), attention_mask=segments.astype(np.int64))


def test_every_weight_matters():
    """A parity test proves nothing of a weight that does not reach the logits: perturb each and look."""
    from jaxmoe.interop.torch_bridge import from_torch

    for family in ("mixtral", "qwen3_moe", "olmoe"):
        mine = from_torch(tiny.torch_model(family))
        tokens = tokens_of(mine.spec.vocab_size)
        before = np.asarray(mine(tokens))
        for name, leaf in named(jax.tree.map(lambda x: x, mine.pure_params())):
            changed = leaf + 0.1 * jnp.std(leaf) * jax.random.normal(jax.random.key(0), leaf.shape)
            paths = name.split(".")
            params = mine.pure_params()
            node = params
            for key in paths[:-1]:
                node = node[int(key) if key.isdigit() else key]
            node[paths[-1]] = changed
            hidden, _ = decoder.hidden_states(
                params, mine.spec, decoder.make_batch(jnp.asarray(tokens)), dtype=jnp.float32
            )
            after = np.asarray(decoder.logits(params, mine.spec, hidden))
            assert np.abs(after - before).max() > 1e-4 * np.abs(before).max(), (
                f"{family}: {name} does not matter"
            )
