"""Log-probabilities of targets, summed or one by one, without ever holding all logits."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from jaxmoe.model.batch import IGNORED
from jaxmoe.model.head import Head
from jaxmoe.model.linear import letters_of, linear_gradients, unpacked
from jaxmoe.model.precision import float32_matmuls
from jaxmoe.parallel.sharding import BATCH_AXES, current_mesh, spec_of

_MOST_LOGITS = 2**26
"""Logits that a device holds at once, in elements: 256 MiB in float32."""
_LOGITS_IN_CACHE = 2**22
"""Logits that a CPU goes through fastest: 16 MiB."""
_FEWEST_ROWS = 1024
"""Tokens of a chunk, as far as `_MOST_LOGITS` allows: each reads and writes the sum of the head's gradient once."""


def linear_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head: Head,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Sum of -weight · log softmax(logits)[target], in nats, over all targets that are not `IGNORED`.

    The tokens are cut into chunks and only one chunk's logits exist at a time. When a gradient is asked for,
    it is computed in the same pass (softmax minus one-hot needs nothing from later), so that the logits are
    never computed twice; the idea is that of Liger's fused linear cross-entropy (arXiv 2410.10989). A head that
    is not differentiated costs no gradient.

    On a mesh each device goes through the chunks of its own rows and its own part of the vocabulary. The head
    is gathered along "fsdp" once before the chunks and its gradient, summed locally in float32, is reduced once
    after them. Within a chunk only sums over the vocabulary and hidden's gradient are exchanged, over "tensor".

    Args:
        hidden_BTD: (B, T, D).
        head: its weight (V, D) is multiplied in hidden's dtype; gradients of weight and bias are summed in
            float32 and have their own dtypes. On a mesh, "tensor" divides V and "fsdp" divides D.
        targets_BT: (B, T) int32.
        weights_BT: (B, T) float32, of every target, without a gradient; by default 1.

    Returns:
        () float32.
    """
    with float32_matmuls(hidden_BTD.dtype):
        weights_BT = jnp.ones(targets_BT.shape, jnp.float32) if weights_BT is None else weights_BT
        return _weighted_sum(hidden_BTD, _plain(head, hidden_BTD.dtype), targets_BT, weights_BT)


def target_logprobs(
    hidden_BTD: Float[Array, "B T D"], head: Head, targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """log softmax(logits)[target] of every target, 0 where it is `IGNORED`; differentiable, chunk by chunk.

    As `linear_cross_entropy`, but for losses that weigh each token by what its probability turns out to be: the
    gradient's logits are computed again once that is known.

    Args:
        hidden_BTD: (B, T, D).
        head: as in `linear_cross_entropy`.
        targets_BT: (B, T) int32.

    Returns:
        (B, T) float32, in nats.
    """
    with float32_matmuls(hidden_BTD.dtype):
        return _logprobs(hidden_BTD, _plain(head, hidden_BTD.dtype), targets_BT)


def _plain(head: Head, dtype: Any) -> Head:
    """The head with its weight made of arrays alone; arrays keep the dtype that their gradient is to have."""
    if isinstance(head.weight, jax.Array):
        return head
    return dataclasses.replace(head, weight=unpacked(head.weight, dtype))


@jax.custom_vjp
def _weighted_sum(
    hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    return _on_mesh(_local_loss, hidden_BTD, head, targets_BT, weights_BT)


def _weighted_sum_forward(
    hidden_BTD: CustomVJPPrimal, head: Head, targets_BT: CustomVJPPrimal, weights_BT: CustomVJPPrimal
) -> tuple[jax.Array, tuple[jax.Array, Head]]:
    wanted = _wanted(head)
    operands = _values((hidden_BTD, head, targets_BT, weights_BT))
    loss, dhidden_BTD, dhead = _on_mesh(
        functools.partial(_local_loss_and_gradients, wanted=wanted), *operands, wanted=wanted
    )
    return loss, (dhidden_BTD[: operands[0].shape[0]], dhead)


def _weighted_sum_backward(
    saved: tuple[jax.Array, Head], grad: jax.Array
) -> tuple[jax.Array, Head, None, None]:
    dhidden_BTD, dhead = jax.tree.map(lambda value: (grad * value).astype(value.dtype), saved)
    return dhidden_BTD, dhead, None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward, symbolic_zeros=True)


@jax.custom_vjp
def _logprobs(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array) -> jax.Array:
    return _on_mesh(_local_logprobs, hidden_BTD, head, targets_BT)[: targets_BT.shape[0]]


def _logprobs_forward(
    hidden_BTD: CustomVJPPrimal, head: Head, targets_BT: CustomVJPPrimal
) -> tuple[jax.Array, Any]:
    operands = _values((hidden_BTD, head, targets_BT))
    return _logprobs(*operands), (*operands, _Wanted(tuple(jax.tree.leaves(_wanted(head)))))


def _logprobs_backward(saved: Any, grad_BT: jax.Array) -> tuple[jax.Array, Head, None]:
    hidden_BTD, head, targets_BT, wanted = saved
    wanted = jax.tree.unflatten(jax.tree.structure(head), wanted.leaves)
    _, dhidden_BTD, dhead = _on_mesh(
        functools.partial(_local_loss_and_gradients, wanted=wanted),
        *(hidden_BTD, head, targets_BT, -grad_BT),
        wanted=wanted,
    )
    return dhidden_BTD[: hidden_BTD.shape[0]], dhead, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients of the head's arrays are wanted, from the forward to the backward pass."""

    leaves: tuple[bool, ...]


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, CustomVJPPrimal)


def _wanted(head: Head) -> Head:
    """Whether each array of the head is differentiated."""
    return jax.tree.map(lambda leaf: leaf.perturbed, head, is_leaf=_is_primal)


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal)


class _Axes(NamedTuple):
    """Mesh axes that split the operands; without a mesh (), over which every collective is the identity."""

    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    width: tuple[str, ...] = ()


def _on_mesh(
    local: Any, hidden_BTD: jax.Array, head: Head, *of_tokens: jax.Array, wanted: Head | None = None
) -> Any:
    """Call `local` on each device's parts; what has a row for each of hidden's has rows added until the mesh divides
    them.

    Args:
        local: gives a loss, or with `wanted` a loss and gradients, or log-probabilities.
        hidden_BTD: (B, T, D).
        head: the output head.
        of_tokens: targets and weights, (B, T).
        wanted: which gradients of the head there are.
    """
    mesh = current_mesh()
    if mesh is None:
        return local(hidden_BTD, head, *of_tokens, axes=_Axes())
    missing = -hidden_BTD.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    hidden_BTD = jnp.pad(hidden_BTD, ((0, missing), (0, 0), (0, 0)))
    targets_BT, *weights = (jnp.pad(x, ((0, missing), (0, 0)), constant_values=0) for x in of_tokens)
    ignored = jnp.arange(targets_BT.shape[0])[:, None] >= of_tokens[0].shape[0]
    targets_BT = jnp.where(ignored, IGNORED, targets_BT)
    rows, none = spec_of("B", mesh.axis_names), spec_of("", mesh.axis_names)
    parts = jax.tree.map(lambda letters: spec_of(letters, mesh.axis_names), _letters(head))
    outs: Any = rows if local is _local_logprobs else none
    if wanted is not None:
        outs = (none, rows, jax.tree.map(lambda is_wanted, spec: spec if is_wanted else None, wanted, parts))
    return jax.shard_map(
        functools.partial(local, axes=_Axes(BATCH_AXES, ("tensor",), ("fsdp",))),
        mesh=mesh,
        in_specs=(rows, parts, *(rows for _ in of_tokens)),
        out_specs=outs,
        check_vma=False,
    )(hidden_BTD, head, targets_BT, *weights)


def _local_loss(
    hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, weights_BT: jax.Array, *, axes: _Axes
) -> jax.Array:
    head = _gathered(head, hidden_BTD.dtype, axes)

    def body(total: jax.Array, piece: Any) -> tuple[jax.Array, None]:
        hidden, targets, weights = piece
        return total + _summed(_chunk(hidden, targets, head, axes), weights), None

    pieces = _chunks(head, hidden_BTD, targets_BT, weights_BT)
    return jax.lax.psum(jax.lax.scan(body, jnp.zeros((), jnp.float32), pieces)[0], axes.rows)


def _local_logprobs(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, *, axes: _Axes) -> jax.Array:
    head = _gathered(head, hidden_BTD.dtype, axes)

    def one(piece: Any) -> jax.Array:
        hidden, targets = piece
        chunk = _chunk(hidden, targets, head, axes)
        return jnp.where(chunk.ignored, 0.0, chunk.target_logit - chunk.lse)

    return _put_together(jax.lax.map(one, _chunks(head, hidden_BTD, targets_BT)), targets_BT.shape)


def _local_loss_and_gradients(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    axes: _Axes,
    wanted: Head,
) -> tuple[jax.Array, jax.Array, Head]:
    own, head = head, _gathered(head, hidden_BTD.dtype, axes)

    def body(carry: tuple[jax.Array, Head], piece: Any) -> tuple[tuple[jax.Array, Head], jax.Array]:
        (total, dhead), (hidden, targets, weights) = carry, piece
        chunk = _chunk(hidden, targets, head, axes)
        softmax = jnp.exp(chunk.logits - chunk.lse[..., None])
        one_hot = chunk.own_targets[:, None] == jnp.arange(chunk.logits.shape[-1])[None]
        dlogits = jnp.where(chunk.ignored[:, None], 0.0, weights[:, None] * (softmax - one_hot))
        dlogits = head.spec.cotangent(chunk.logits, dlogits)
        dbias_V = None if dhead.bias is None else dhead.bias + jnp.sum(dlogits, axis=0)
        # Read by two products, which would each compute it.
        dlogits = jax.lax.optimization_barrier(dlogits.astype(hidden.dtype))
        dhidden, dweight = linear_gradients(hidden, head.weight, dlogits, dhead.weight)
        dhidden = jax.lax.psum(dhidden, axes.vocabulary).astype(hidden.dtype)
        return (total + _summed(chunk, weights), Head(dweight, dbias_V, head.spec)), dhidden

    zeros = jax.tree.map(
        lambda is_wanted, value: _transposed(jnp.zeros(value.shape, jnp.float32)) if is_wanted else None,
        wanted,
        head,
    )
    pieces = _chunks(head, hidden_BTD, targets_BT, weights_BT)
    (total, dhead), dhidden = jax.lax.scan(body, (jnp.zeros((), jnp.float32), zeros), pieces)
    reduced = jax.tree.map(
        lambda letters, like, gradient: _reduced(_transposed(gradient), letters, axes).astype(like.dtype),
        *_of_wanted(wanted, _letters(own), own, dhead),
    )
    dhidden_BTD = _put_together(dhidden, hidden_BTD.shape)
    return jax.lax.psum(total, axes.rows), dhidden_BTD, reduced


def _letters(head: Head) -> Head:
    """The letters of each array of a head."""
    bias = None if head.bias is None else "V"
    return dataclasses.replace(head, weight=letters_of(head.weight, "VD"), bias=bias)


def _of_wanted(wanted: Head, *trees: Head) -> list[Head]:
    """The trees without the leaves that are not wanted."""
    return [jax.tree.map(lambda is_wanted, leaf: leaf if is_wanted else None, wanted, tree) for tree in trees]


def _reduced(gradient: jax.Array, letters: str, axes: _Axes) -> jax.Array:
    """The sum of every device's own gradient: its own columns where the array is split along the width, then those
    columns over the other axes; and over the vocabulary where the array has none."""
    rest = axes.rows
    if letters.endswith("D"):
        gradient = jax.lax.psum_scatter(gradient, axes.width, scatter_dimension=gradient.ndim - 1, tiled=True)
        rest = tuple(axis for axis in rest if axis not in axes.width)
    if "V" not in letters:
        rest = (*rest, *axes.vocabulary)
    return jax.lax.psum(gradient, rest)


def _gathered(head: Head, dtype: Any, axes: _Axes) -> Head:
    """This device's part of the vocabulary in the whole width."""

    def gather(array: jax.Array, letters: str) -> jax.Array:
        array = array.astype(dtype)
        if not letters.endswith("D"):
            return array
        return jax.lax.all_gather(array, axes.width, axis=array.ndim - 1, tiled=True)

    weight = jax.tree.map(gather, head.weight, letters_of(head.weight, "VD"))
    return dataclasses.replace(head, weight=weight)


def _transposed(x: jax.Array) -> jax.Array:
    """A matrix as `linear_gradients` sums up its gradient, and back; vectors as they are."""
    return x.T if x.ndim > 1 else x


def _chunks(head: Head, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """(chunks, rows, …) of arrays (B, T, …), hidden first: tokens one after the other, as even as can be."""
    tokens, vocabulary = math.prod(arrays[0].shape[:2]), head.weight.shape[0]
    wished = max(_FEWEST_ROWS, _LOGITS_IN_CACHE // vocabulary)
    count = -(-tokens // max(1, min(wished, _MOST_LOGITS // vocabulary)))
    rows = -(-tokens // count)
    missing = count * rows - tokens

    def cut(x: jax.Array) -> jax.Array:
        fill = IGNORED if jnp.issubdtype(x.dtype, jnp.integer) else 0
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)
        return x.reshape(count, rows, *x.shape[1:])

    return tuple(cut(x) for x in arrays)


def _put_together(pieces: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(chunks, rows, …) → (B, T, …)."""
    return pieces.reshape(-1, *pieces.shape[2:])[: shape[0] * shape[1]].reshape(shape)


class _Chunk(NamedTuple):
    """One chunk's logits, and what losses and gradients are made of.

    Attributes:
        logits: (rows, V) of this device's part of the vocabulary.
        lse: (rows,), their logsumexp over the whole vocabulary.
        target_logit: (rows,), whichever device has it.
        own_targets: (rows,), counted from the start of this device's part.
        ignored: (rows,) bool.
    """

    logits: jax.Array
    lse: jax.Array
    target_logit: jax.Array
    own_targets: jax.Array
    ignored: jax.Array


def _summed(chunk: _Chunk, weights: jax.Array) -> jax.Array:
    """Weighted sum over a chunk of what is lost on each target."""
    return jnp.sum(jnp.where(chunk.ignored, 0.0, weights * (chunk.lse - chunk.target_logit)))


def _chunk(hidden: jax.Array, targets: jax.Array, head: Head, axes: _Axes) -> _Chunk:
    logits = head.logits(hidden)
    highest = jax.lax.pmax(jnp.max(logits, axis=-1), axes.vocabulary)
    own_sum = jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)
    own_targets = targets - logits.shape[-1] * jax.lax.axis_index(axes.vocabulary)
    is_own = (own_targets >= 0) & (own_targets < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(is_own, own_targets, 0)[..., None], axis=-1)[..., 0]
    whole_sum, target_logit = jax.lax.psum((own_sum, jnp.where(is_own, picked, 0.0)), axes.vocabulary)
    lse = highest + jnp.log(whole_sum)
    return _Chunk(logits, lse, target_logit, own_targets, targets == IGNORED)
