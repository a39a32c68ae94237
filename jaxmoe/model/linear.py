"""Where a dense weight meets an activation: the one place, whatever the weight is made of.

A weight is an array (out, in), or one of the classes here: an array with a low-rank pair beside it, or codes and
scales that stand for an array. Whoever multiplies with it cannot tell. Leading axes, such as L, E or G, are batches
of matrices, in every array that a weight is made of.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.codecs import PACKED, FourBit, Fp8Blocks, Int8Rows, four_bit, unpack
from jaxmoe.model.dropout import Dropout
from jaxmoe.model.embedding import rows_of
from jaxmoe.parallel.sharding import constrain_fitting

Weight = Any
"""A `jax.Array`, a `LowRank`, or what `jaxmoe.codecs` packs: that has no gradient."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "a", "b", "dropout", "magnitude"),
    meta_fields=("scale",),
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """V = base + scale · b · a (Hu et al., arXiv 2106.09685), with a magnitude each row of V set to that length
    (DoRA, Liu et al., arXiv 2402.09353); the sum is never formed in a product.

    Attributes:
        base: (…, out, in), any weight.
        a: (…, r, in); a leading axis may be 1 where matrices share one, as gate and up of experts do.
        b: (…, out, r).
        scale: factor of the pair.
        dropout: of what a is multiplied with, in training; None elsewhere. With a magnitude, of what V is.
        magnitude: (…, out), in float32; None where rows keep their lengths.
    """

    base: Weight
    a: Any
    b: Any
    scale: float = 1.0
    dropout: Dropout | None = None
    magnitude: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(…, out, in), of a base that is an array or such a pair."""
        return self.base.shape


def dense(weight: Weight, dtype: Any) -> jax.Array:
    """The array (…, out, in) that a weight stands for, in `dtype`; multiplied out in float32."""
    if isinstance(weight, LowRank):
        pair = jnp.einsum("...or,...ri->...oi", *(x.astype(jnp.float32) for x in (weight.b, weight.a)))
        total = dense(weight.base, jnp.float32) + weight.scale * pair
        return (total if weight.magnitude is None else _gain(weight)[..., None] * total).astype(dtype)
    if isinstance(weight, PACKED):
        return unpack(jax.lax.stop_gradient(weight), dtype)
    return weight.astype(dtype)


def in_dtype(weight: Weight, dtype: Any) -> Weight:
    """The weight for products in `dtype`: its arrays cast, codes and their scales as they are."""
    if isinstance(weight, LowRank):
        cast = dataclasses.replace(weight, a=weight.a.astype(dtype), b=weight.b.astype(dtype))
        return dataclasses.replace(cast, base=in_dtype(weight.base, dtype))
    return weight if isinstance(weight, PACKED) else weight.astype(dtype)


def part(weight: Weight, index: int) -> Weight:
    """One of the weights along the leading axis."""
    if isinstance(weight, LowRank):
        dropout = None if weight.dropout is None else weight.dropout.fold(index)
        pair = jax.tree.map(lambda x: x[index], dataclasses.replace(weight, base=None, dropout=None))
        return dataclasses.replace(pair, base=part(weight.base, index), dropout=dropout)
    if isinstance(weight, FourBit):  # codes know their tensor's shape
        return four_bit.part(jax.lax.stop_gradient(weight), index)
    return jax.tree.map(lambda x: x[index], weight)


def on_rows(
    weight: Weight, function: Callable[[jax.Array, str], jax.Array], letters: str, dtype: Any
) -> Weight:
    """The weight whose rows are what `function` makes of this one's, such as their copies.

    Args:
        weight: one matrix (out, in).
        function: of an array (out, …) and its letters.
        letters: of the weight, such as "UD".
        dtype: of the array where the weight has to be made one for that.
    """
    if isinstance(weight, LowRank):
        base = on_rows(weight.base, function, letters, dtype)
        lengths = None if weight.magnitude is None else function(weight.magnitude, letters[0])
        return dataclasses.replace(
            weight, base=base, b=function(weight.b, letters[0] + "r"), magnitude=lengths
        )
    return function(dense(weight, dtype), letters)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x (…, out) + bias (out,)."""
    return x + along_last(bias, x)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector (n,) with as many axes as x (…, n)."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def linear(
    x: Float[Array, "*batch in"],
    weight: Weight,
    bias: Float[Array, "out"] | None = None,
    *,
    precision: Any = None,
    out_dtype: Any = None,
) -> Float[Array, "*batch out"]:
    """x (…, in) times weight (out, in), plus bias (out,): (…, out).

    Args:
        x: activations, in the dtype in which is multiplied.
        weight: one matrix; its arrays have x's dtype but for codes and scales.
        bias: or None.
        precision: of the products, as in `jax.lax.dot_general`.
        out_dtype: in which products are summed and given, by default x's.
    """
    product = functools.partial(_product, precision=precision, out_dtype=out_dtype)
    if isinstance(weight, LowRank) and weight.magnitude is not None:
        # A gain is near 1: what training changes of it is less than a step of bfloat16 there.
        base = functools.partial(linear, weight=weight.base, precision=precision, out_dtype=jnp.float32)
        update = _update(x, weight, functools.partial(product, out_dtype=jnp.float32))
        gain, plain = along_last(_gain(weight), x), base(x)
        if weight.dropout is None:
            out = gain * (plain + update)
        else:  # PEFT drops out of what the change of the lengths acts on as well
            out = plain + (gain - 1) * base(weight.dropout(x)) + gain * update
        out = out.astype(x.dtype if out_dtype is None else out_dtype)
    elif isinstance(weight, LowRank):
        plain = linear(x, weight.base, precision=precision, out_dtype=out_dtype)
        out = plain + _update(x, weight, product)
    elif isinstance(weight, PACKED):
        # Multiplied out again in the backward pass, not kept for it.
        out = jax.checkpoint(lambda x, weight: product(x, dense(weight, x.dtype)))(x, weight)
    else:
        out = product(x, dense(weight, x.dtype))
    return out if bias is None else add_bias(out, bias.astype(out.dtype))


def _update(x: jax.Array, weight: LowRank, product: Callable[..., jax.Array]) -> jax.Array:
    """What the pair adds, (…, in) → (…, out)."""
    update = product(_low(x, weight, product).astype(x.dtype), weight.b)
    return update * jnp.asarray(weight.scale, update.dtype)


def _low(x: jax.Array, weight: LowRank, product: Callable[..., jax.Array]) -> jax.Array:
    """(…, in) → (…, r)."""
    if weight.dropout is None:
        return product(x, weight.a)
    # The backward pass draws the mask again: x is kept anyway, and what is left of it would be as large.
    return jax.checkpoint(lambda x, a, dropout: product(dropout(x), a))(x, weight.a, weight.dropout)


def row_lengths(weight: LowRank) -> jax.Array:
    """Lengths of the rows of V, (…, out) in float32: what a magnitude begins with.

    |V|² = |base|² + 2 scale · base aᵀ · b + scale² · b a aᵀ · b, row by row, so that V need not be formed.
    """
    base, a, b = (dense(x, jnp.float32) for x in (weight.base, weight.a, weight.b))
    products = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    crossed = products("...oi,...ri->...or", base, a)
    squares = products("...or,...rq->...oq", b, products("...ri,...qi->...rq", a, a))
    total = jnp.sum(base**2, axis=-1)
    total += jnp.sum((2 * weight.scale * crossed + weight.scale**2 * squares) * b, axis=-1)
    return jnp.sqrt(jnp.maximum(total, 0))


def _gain(weight: LowRank) -> jax.Array:
    """What the rows of V are multiplied with, (…, out) in float32. Their lengths are constants to gradients."""
    lengths = jax.lax.stop_gradient(row_lengths(jax.lax.stop_gradient(weight)))
    return weight.magnitude.astype(jnp.float32) / jnp.where(lengths > 0, lengths, 1)


def linear_gradients(
    x: jax.Array, weight: Weight, dout: jax.Array, totals: Weight
) -> tuple[jax.Array, Weight]:
    """Cotangents of x and of the weight in ``linear(x, weight)``, in float32, for passes that are written out.

    Args:
        x: (…, in).
        weight: an array or a `LowRank` of arrays, in x's dtype.
        dout: (…, out), in x's dtype.
        totals: what the weight's cotangent is added to, float32, each matrix of it transposed, (…, in, out): so no
            operand of the product that makes it has to be transposed in memory. None for an array whose cotangent
            nobody wants.
    """
    if isinstance(weight, LowRank):
        low = _product(x, weight.a)
        dlow = _product(dout, weight.b, transpose=True) * jnp.asarray(weight.scale, dout.dtype)
        dx, dbase = linear_gradients(x, weight.base, dout, totals.base)
        dx_low, da = linear_gradients(x, weight.a, dlow, totals.a)
        db = None if totals.b is None else totals.b + weight.scale * _outer(low, dout)
        return dx + dx_low, LowRank(dbase, da, db, weight.scale)
    dx = _product(dout, weight, transpose=True, out_dtype=jnp.float32)
    return dx, None if totals is None else totals + _outer(x, dout)


def letters_of(weight: Weight, letters: str) -> Weight:
    """The letters of every array that a weight with `letters` is made of, such as "VD" of a head.

    The last letter is that of blocks of columns as well.
    """
    if isinstance(weight, LowRank):
        base = letters_of(weight.base, letters)
        lengths = None if weight.magnitude is None else letters[:-1]
        a, b = letters[:-2] + "r" + letters[-1], letters[:-1] + "r"
        return LowRank(base, a, b, weight.scale, magnitude=lengths)
    if isinstance(weight, Int8Rows):
        return dataclasses.replace(weight, codes=letters, absmax=letters[:-1])
    if isinstance(weight, Fp8Blocks):
        return dataclasses.replace(weight, codes=letters, scales=letters)
    if isinstance(weight, FourBit):
        stack = letters[: len(weight.stack)]
        blocks = letters if weight.has_whole_rows else stack + "."
        of_arrays: dict[str, Any] = {"codes": blocks + ".", "absmax": blocks}
        if weight.offset is not None:
            of_arrays |= {"nested_absmax": stack + ".", "offset": stack}
        return dataclasses.replace(weight, **of_arrays)
    return letters


def gathered(weight: Weight, letters: str) -> Weight:
    """The weight with the arrays of what is packed whole along model and latent widths, so that devices exchange its
    bytes: left alone XLA multiplies out each device's part, and gathers four times as much.

    Args:
        weight: of a layer that is about to be computed.
        letters: its own.
    """
    if isinstance(weight, LowRank):
        return dataclasses.replace(weight, base=gathered(weight.base, letters))
    if isinstance(weight, PACKED):
        return jax.tree.map(constrain_fitting, weight, letters_of(weight, re.sub("[ACD]", ".", letters)))
    return weight


def with_dropout(weights: Any, dropout: Dropout) -> Any:
    """A tree of weights whose low-rank pairs drop out of their inputs, each with a fold of its own."""
    is_pair = lambda leaf: isinstance(leaf, LowRank)
    leaves, structure = jax.tree.flatten(weights, is_leaf=is_pair)
    return jax.tree.unflatten(
        structure,
        [
            dataclasses.replace(leaf, dropout=dropout.fold(number)) if is_pair(leaf) else leaf
            for number, leaf in enumerate(leaves)
        ],
    )


def unpacked(weight: Weight, dtype: Any) -> Weight:
    """The weight in `dtype`, made of arrays alone: codes, scales and magnitudes multiplied out."""
    if isinstance(weight, LowRank) and weight.magnitude is not None:
        gain = _gain(weight)[..., None]
        base, b = (gain * dense(x, jnp.float32) for x in (weight.base, weight.b))
        weight = dataclasses.replace(weight, base=base, b=b, magnitude=None)
    if isinstance(weight, LowRank):
        weight = in_dtype(weight, dtype)
        return dataclasses.replace(weight, base=unpacked(weight.base, dtype))
    return dense(weight, dtype)


def lookup(weight: Weight, index: jax.Array, dtype: Any) -> jax.Array:
    """Rows `index` (…) of one matrix (out, in): (…, in) in `dtype`."""
    if isinstance(weight, LowRank):
        low = _product(rows_of(weight.b, index).astype(dtype), weight.a.astype(dtype), transpose=True)
        return lookup(weight.base, index, dtype) + low * jnp.asarray(weight.scale, dtype)
    return rows_of(weight, index).astype(dtype)


def _product(
    x: jax.Array,
    weight: jax.Array,
    *,
    transpose: bool = False,
    precision: Any = None,
    out_dtype: Any = None,
) -> jax.Array:
    """(…, in) times (out, in) → (…, out), or with `transpose` (…, out) → (…, in)."""
    contract = (((x.ndim - 1,), (0 if transpose else 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=out_dtype)


def _outer(x: jax.Array, dout: jax.Array) -> jax.Array:
    """(…, in) and (…, out) → (in, out), summed in float32."""
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dout, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
