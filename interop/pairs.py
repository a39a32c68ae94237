"""Low-rank pairs in the trees of `jaxmoe.interop.adapting.Adapted`: found, named, taken away."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxmoe.model.linear import LowRank
from jaxmoe.params import Tree


def base_of(tree: Tree) -> Tree:
    """A tree of `Adapted.declared` without its factors: one of `ModelSpec.declared`."""
    return jax.tree.map(
        lambda leaf: leaf.base if is_pair(leaf) else leaf, tree, is_leaf=lambda x: x is None or is_pair(x)
    )


def named_pairs(tree: Tree) -> list[tuple[str, LowRank]]:
    """The low-rank pairs of a tree, by the name of their parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_pair)
    return [(name_of(path), leaf) for path, leaf in leaves if is_pair(leaf)]


def with_magnitudes(tree: Tree, magnitudes: Mapping[str, Any]) -> Tree:
    """A tree of weights whose pairs have these, by the name of their parameter."""

    def with_own(path: Any, leaf: Any) -> Any:
        name = name_of(path)
        return dataclasses.replace(leaf, magnitude=magnitudes[name]) if is_pair(leaf) else leaf

    return jax.tree_util.tree_map_with_path(with_own, tree, is_leaf=is_pair)


def is_pair(leaf: Any) -> bool:
    """Whether a leaf is an adapted parameter."""
    return isinstance(leaf, LowRank)


def name_of(path: Any) -> str:
    """A path in a tree as the name of a parameter."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
