"""Comparison of a transformers model with ours: logits, losses, every gradient."""

import functools
from typing import Any
from unittest import mock

import families
import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.model import decoder
from jaxmoe.model.batch import IGNORED, Batch, next_token_targets
from jaxmoe.model.feed_forward import moe
from jaxmoe.model.feed_forward.router import RouterStats, router_stats
from jaxmoe.params import named
from jaxmoe.training.cross_entropy import linear_cross_entropy

LENGTH = 75


def tokens_of(vocab_size: int) -> np.ndarray:
    """(2, T) token ids. From 3 on: some families never update the row of their padding id."""
    return np.random.default_rng(7).integers(3, vocab_size, (2, LENGTH))


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (2, T) and positions with five left-padding tokens in row 0."""
    segments = np.ones((2, LENGTH), np.int32)
    segments[0, :5] = 0
    return segments, np.maximum(np.cumsum(segments, axis=1) - 1, 0)


def packed() -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (2, T) and positions of three documents in row 0 and two in row 1."""
    segments = np.ones((2, LENGTH), np.int32)
    segments[0, 11:], segments[0, 40:], segments[1, 52:] = 2, 3, 2
    positions = np.concatenate([np.arange(11), np.arange(29), np.arange(35), np.arange(52), np.arange(23)])
    return segments, positions.reshape(2, LENGTH)


Documents = list[tuple[int, slice]]
"""Row and columns of each."""


def documents_of(segments: np.ndarray) -> Documents:
    """The documents of packed rows (2, T) without padding."""
    starts = [np.flatnonzero(np.diff(row, prepend=0)).tolist() for row in segments]
    return [
        (row, slice(start, stop))
        for row, begins in enumerate(starts)
        for start, stop in zip(begins, [*begins[1:], LENGTH], strict=True)
    ]


def apart(documents: Documents | None, x: np.ndarray, fill: int = 0) -> np.ndarray:
    """(2, T) → a row for each document, or unchanged where they are None."""
    if documents is None:
        return x
    rows = np.full((len(documents), LENGTH), fill, x.dtype)
    for out, (row, columns) in zip(rows, documents, strict=True):
        out[: columns.stop - columns.start] = x[row, columns]
    return rows


def together(documents: Documents, rows: np.ndarray) -> np.ndarray:
    """(documents, T, …) → (2, T, …)."""
    x = np.zeros((2, *rows.shape[1:]), rows.dtype)
    for out, (row, columns) in zip(rows, documents, strict=True):
        x[row, columns] = out[: columns.stop - columns.start]
    return x


@functools.partial(jax.jit, static_argnames=("spec", "coefficient"))
def value_and_grad(params: Any, batch: Batch, *, spec: Any, coefficient: float) -> Any:
    """Gradients of the loss, and (logits, language-model loss, balance loss)."""

    def loss(params: Any) -> Any:
        with mock.patch.object(moe, "router_stats", stats_of_highest_logits):
            hidden, stats = decoder.hidden_states(params, spec, batch, dtype=jnp.float32, remat=True)
        targets = next_token_targets(batch.tokens, batch.segment_ids)
        nll = linear_cross_entropy(hidden, decoder.output_head(params, spec), targets)
        language = nll / jnp.sum(targets != IGNORED)
        balance = pooled_load_balancing_loss(stats)
        return language + coefficient * balance, (decoder.logits(params, spec, hidden), language, balance)

    return jax.grad(loss, has_aux=True)(params)


def stats_of_highest_logits(routing: Any, valid: jax.Array | None) -> RouterStats:
    """`router_stats` with the experts of the K highest raw logits for the load, which transformers' loss counts."""
    highest = jax.lax.top_k(routing.logits, routing.experts.shape[1])[1]
    return router_stats(routing._replace(experts=highest), valid)


def pooled_load_balancing_loss(stats: RouterStats) -> jax.Array:
    """The loss that transformers calls ``load_balancing_loss_func``: K when balanced, layers pooled."""
    tokens = jnp.maximum(stats.tokens.sum(), 1.0)
    return stats.load.shape[-1] * jnp.sum(stats.load.sum(0) / tokens * stats.probability.sum(0) / tokens)


def assert_close(ours: Any, theirs: Any, tolerance: float, what: str) -> None:
    """The largest error over the largest magnitude."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.isfinite(theirs).all(), what
    scale = np.abs(theirs).max()
    assert scale > 0, f"{what}: nothing to compare"
    error = np.abs(ours - theirs).max() / scale
    assert error <= tolerance, f"{what}: error {error:.3g} of its scale, allowed {tolerance}"


def compare(
    model: Any, case: families.Case, segments: np.ndarray, positions: np.ndarray, masked: bool
) -> None:
    """One forward and backward pass of both.

    Args:
        model: of transformers.
        case: of its family.
        segments: (2, T).
        positions: (2, T).
        masked: transformers gets an attention mask. Without one, and without a cache, it tells documents apart by
            positions that start again, or gets one per row.
    """
    import torch

    from jaxmoe.interop.torch_bridge import from_torch, params_from_tensors, to_numpy

    mine = from_torch(model)
    tokens = tokens_of(mine.spec.vocab_size)
    targets = np.asarray(next_token_targets(jnp.asarray(tokens), jnp.asarray(segments)))
    labels = np.full_like(tokens, -100)  # transformers predicts labels[t + 1] at t
    labels[:, 1:] = np.where(targets[:, :-1] == IGNORED, -100, targets[:, :-1])
    valid = segments > 0
    documents = None if masked or case.packs else documents_of(segments)
    mask = apart(documents, valid) if masked or documents is not None else None
    arguments = {
        "input_ids": torch.from_numpy(apart(documents, tokens)),
        "attention_mask": None if mask is None else torch.from_numpy(mask.astype(np.int64)),
        "position_ids": torch.from_numpy(apart(documents, positions).astype(np.int64)),
        "labels": torch.from_numpy(apart(documents, labels, fill=-100)),
        "use_cache": False,
    }
    if case.balance:
        arguments["output_router_logits"] = True
    model.zero_grad()
    theirs = case.text(model)(**case.inputs(arguments))
    theirs.loss.backward()
    tensors = model.state_dict(keep_vars=True)
    their_grads = dict(
        named(
            params_from_tensors(
                model, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in tensors.items()}
            )
        )
    )
    coefficient = model.config.get_text_config().router_aux_loss_coef if case.balance else 0.0
    batch = Batch(jnp.asarray(tokens), jnp.asarray(positions, jnp.int32), jnp.asarray(segments))
    grads, (logits, language, balance) = value_and_grad(
        mine.pure_params(), batch, spec=mine.spec, coefficient=coefficient
    )
    their_logits = to_numpy(theirs.logits)
    if documents is not None:
        their_logits = together(documents, their_logits)
    assert_close(np.asarray(logits)[valid], their_logits[valid], 1e-4, "logits")
    their_language = float(theirs.loss.detach())
    if case.balance:
        their_balance = float(theirs.aux_loss.detach())
        assert_close(balance, their_balance, 1e-5, "load balancing loss")
        their_language -= coefficient * their_balance
    assert_close(language, their_language, 1e-5, "language-model loss")
    largest = max(float(np.abs(grad).max()) for grad in their_grads.values())
    for name, grad in named(grads):
        if any(part in name for part in _CONSTANTS):
            assert not np.asarray(grad).any(), f"{name} has a gradient"
        elif any(part in name for part in case.weightless):  # what rounding leaves of zero
            noise = max(float(np.abs(grad).max()), float(np.abs(their_grads[name]).max()))
            assert noise < 1e-6 * largest, f"{name} has a gradient of {noise}, others up to {largest}"
        else:
            assert_close(grad, their_grads[name], 1e-3, f"gradient of {name}")


_CONSTANTS = ("router.correction", "output_scale", "indexer.")
"""Buffers, or frozen, in transformers, or read without gradients."""
