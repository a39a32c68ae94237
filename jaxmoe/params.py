"""Parameters, declared once.

A `Param` is declared next to the code that uses it: its dimension letters, sizes, initialiser and role.
Everything else follows from the declaration: the abstract tree, initial values, shardings
(`jaxmoe.parallel.sharding`), what an optimiser may do with it (`jaxmoe.optim`), and the shapes that a conversion
rule must meet (`jaxmoe.interop.rules`).

Dimension letters, used for every tensor of the code base:

    parameters                                   activations
    L  repeats of a layer group (the scan axis)  B  batch
    V  vocabulary                                T  sequence (S where keys differ from queries)
    D  model width                               R  rows, that is tokens: R = B*T
    Q  query width, N*H                          N  query heads
    U  key width, M*H, or that of a head's key   M  key-value heads
       and value side by side times N
    W  value width, M times a value's            K  experts chosen per token
    P  attended width, N times a value's
    H  head width, or an indexer's of all heads
    A  latent width of queries, of gates, or
       of the steps of a recurrence
    C  latent width of keys and values, or with
       the key that all heads share beside it;
       or that of experts; or of a recurrence's
       steps with its keys and queries beside it
    X  channels of a recurrent mixer
    Y  state of one of its channels
    E  experts                                   Z  slots, that is (token, choice) pairs: Z = R*K
    G  gate and up, 2; without a gate 1
    J  1, of a gate that is one number per token,
       or N of one that is that for each of N heads
    F  hidden width of one expert
    I  hidden width of a dense feed-forward

Lower-case letters are of arrays that a single place works with: r the rank of a low-rank pair, c the taps of a
convolution, and those of `jaxmoe.kernels`.

A parameter keeps the orientation of Hugging Face checkpoints, (out, in): the last two axes are one matrix,
every axis before them is a batch of matrices.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

Role = Literal["matrix", "router", "embedding", "convolution", "vector", "decay", "constant"]
Init = Literal["normal", "ones", "zeros"]
Tree = Any
"""Nested dicts and tuples; the leaves are `Param`, arrays or what was derived from them."""


@dataclasses.dataclass(frozen=True)
class Param:
    """The declaration of one parameter.

    Attributes:
        dims: one letter per axis (see the legend above), such as "LEGFD".
        shape: one size per letter.
        init: how random weights begin; "normal" has the model's ``initializer_range`` as its deviation.
        role: "matrix" (the last two axes are a linear map), "router", "embedding" (also the output head),
            "convolution" (a filter per channel: no linear map between its axes), "vector" (norm scales and biases,
            never decayed), "decay" (rates and steps of a recurrence, never decayed) or "constant" (no gradient
            step changes it).
        num_heads: N, where a dimension is made of query heads, each of which stays whole on one device.
        float32: kept in float32 whatever the model computes in.
        chooses: it is only read to make a choice, through which no gradient of the model's loss goes: a loss of its own
            trains it, or nothing does.
        stored: dtype of what is no number of the model but a code or a scale of several; None for all others.
    """

    dims: str
    shape: tuple[int, ...]
    init: Init
    role: Role
    num_heads: int | None = None
    float32: bool = False
    chooses: bool = False
    stored: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def learns(self, choosing: bool) -> bool:
        """Whether a gradient step may change it.

        Args:
            choosing: there is a loss of what `chooses`.
        """
        return self.role != "constant" and (choosing or not self.chooses)

    def dtype(self, others: Any) -> Any:
        """The dtype that it has in a model of dtype `others`."""
        return jnp.dtype(self.stored or ("float32" if self.float32 else others))


def param(
    dims: str, sizes: Mapping[str, int], role: Role = "matrix", init: Init = "normal", **options: Any
) -> Param:
    """Declare a parameter whose letter sizes are looked up in `sizes`."""
    return Param(dims, tuple(sizes[letter] for letter in dims), init, role, **options)


def stacked(tree: Tree, repeats: int) -> Tree:
    """The same parameters with a leading axis L of `repeats` layers."""
    return jax.tree.map(lambda p: dataclasses.replace(p, dims="L" + p.dims, shape=(repeats, *p.shape)), tree)


def dtypes(tree: Tree, dtype: Any) -> Tree:
    """The dtype of every declared parameter in a model of `dtype`; a tree of dtypes stays as it is.

    In such a tree None stands for a parameter that is not wanted.
    """
    if isinstance(dtype, Mapping):
        return dtype
    return jax.tree.map(lambda p: p.dtype(dtype), tree)


def count(tree: Tree) -> int:
    """Total number of elements of a tree of declarations."""
    return sum(p.size for p in jax.tree.leaves(tree))


def roles(tree: Tree, choosing: bool = False) -> Tree:
    """The role of every parameter for an optimiser, as a tree of the same structure.

    Args:
        tree: declarations.
        choosing: there is a loss of what `Param.chooses`; otherwise that is constant.
    """
    return jax.tree.map(lambda p: p.role if p.learns(choosing) else "constant", tree)


def named(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted name, such as ``groups.0.1.experts.down``, in the order of the tree."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def split(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Two trees of the structure of `tree`: the leaves where `mask` is true, and the others; None for those missing.

    `mask` has a boolean where `tree` has a leaf. jax takes None for a subtree without leaves.
    """
    chosen = jax.tree.map(lambda wanted, leaf: leaf if wanted else None, mask, tree)
    others = jax.tree.map(lambda wanted, leaf: None if wanted else leaf, mask, tree)
    return chosen, others


def joined(chosen: Tree, others: Tree) -> Tree:
    """The tree that `split` took apart."""
    return jax.tree.map(lambda one, other: other if one is None else one, chosen, others, is_leaf=is_none)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "index"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Repeat:
    """Parameters of one repeat of a layer, still among those of all: where a part of them is read, XLA copies no more.

    Attributes:
        params: a tree whose arrays all begin with L.
        index: () int32, which of the L is meant.
    """

    params: Tree
    index: jax.Array

    @property
    def repeats(self) -> int:
        """L."""
        return jax.tree.leaves(self.params)[0].shape[0]

    @property
    def joined(self) -> Tree:
        """The tree with its first two axes, L and such as E, as one."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self.params)


def is_none(leaf: Any) -> bool:
    """For ``is_leaf``, so that jax does not pass over None."""
    return leaf is None


def initialize(tree: Tree, key: jax.Array, std: float, dtype: Any, shardings: Tree | None = None) -> Tree:
    """Random weights of a PRNG key; see `initializer`."""
    return initializer(tree, std, dtype, shardings)(key)


def initializer(tree: Tree, std: float, dtype: Any, shardings: Tree | None = None) -> Any:
    """A jitted function from a PRNG key to random weights as transformers would draw them.

    These are normal(0, std) for every matrix and ones for norms. Each parameter draws from its own fold of the key, so
    adding one changes no other.

    Args:
        tree: declarations.
        std: the model's ``initializer_range``.
        dtype: dtype of the arrays but those kept in float32, or a tree with that of each; values are drawn in
            float32.
        shardings: an optional tree of the same structure; each device then makes only its own shard.
    """

    leaves, structure = jax.tree.flatten(tree)
    kinds = jax.tree.leaves(dtypes(tree, dtype), is_leaf=is_none)
    if shardings is not None:
        shardings = jax.tree.unflatten(
            structure,
            [
                None if kind is None else one
                for kind, one in zip(kinds, jax.tree.leaves(shardings), strict=True)
            ],
        )

    def draw_all(key: jax.Array) -> Tree:
        # All at once: XLA would compile each fold by itself, for a sixth of a second.
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(leaves)))
        drawn = [
            None if kind is None else draw_param(keys[index], leaf, std).astype(kind)
            for index, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True))
        ]
        return jax.tree.unflatten(structure, drawn)

    return jax.jit(draw_all, out_shardings=shardings)


def draw_param(key: jax.Array, declared: Param, std: float) -> jax.Array:
    """Random float32 values of a parameter by its own key, as `initializer` draws them."""
    if declared.init == "normal":
        return std * jax.random.normal(key, declared.shape)
    return jnp.full(declared.shape, 1.0 if declared.init == "ones" else 0.0, jnp.float32)
