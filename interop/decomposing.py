"""Low-rank pairs that begin as a part of the weights, and what of the weights is left as their base.

Nothing of it is kept in a run's folder: a run that goes on takes the weights apart anew and has to find the same bits.
So everything is computed on the host, in float64, and factors are rounded to `_BITS` bits before the base is made with
them: what another processor or BLAS sums differently is some 1e-13 of them, and changes a rounded number once in 1e9.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.codecs import unpack
from jaxmoe.interop.adapting import Adapted
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.places import Place, declared_pair
from jaxmoe.interop.quantizing import Form, on_host
from jaxmoe.interop.source import Source
from jaxmoe.params import draw_param, named

_BITS = 12


@dataclasses.dataclass(frozen=True)
class Apart:
    """A parameter taken apart, in host memory, float32.

    Attributes:
        base: of the whole parameter; it is yet to be quantised where it is held in few bits.
        a, b: factors, as in `jaxmoe.model.linear.LowRank`.
    """

    base: np.ndarray
    a: np.ndarray
    b: np.ndarray


def take_apart(init: str, values: np.ndarray, places: Sequence[Place], form: Form | None) -> Apart:
    """A whole parameter.

    Args:
        init: "pissa": the largest singular values (Meng et al., arXiv 2404.02948); "olora": the first columns of the
            orthogonal factor (Büyükakyüz, arXiv 2406.01775); "loftq": of what quantising loses, the largest singular
            values (Li et al., arXiv 2310.08659, with one iteration).
        values: of the parameter, float32.
        places: of its parts, linear layers.
        form: in which it is held, if in few bits.
    """
    base, declared = np.array(values), declared_pair(places[0].binding.declared, places)
    a, b = (np.zeros(factor.shape, np.float32) for factor in (declared.a, declared.b))
    lost = values - _quantised(form, values) if init == "loftq" and form is not None else None
    for place in places:
        binding, scale = place.binding, place.width.scale
        of = binding.to_tensor((values if lost is None else lost)[binding.place]).astype(np.float64)
        own = (triangular if init == "olora" else principal)(of, place.width.rank, scale)
        a, b = place.put((a, b), own)
        if lost is None:
            left = of - scale * (own[1].astype(np.float64) @ own[0].astype(np.float64))
            base[binding.place] = binding.to_parameter(left.reshape(binding.sizes))
    return Apart(base, a, b)


def principal(matrix: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A (r, in) and B (out, r) with scale · B A the best approximation of a matrix (out, in) of that rank.

    Both carry the roots of the singular values. Of each pair of vectors, the left one's largest number is positive.
    """
    flip = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if flip else matrix
    # Of the narrow side's products, whose eigenvectors are enough: in float64 the largest ones lose nothing by it.
    vectors = np.linalg.eigh(wide @ wide.T)[1][:, : -rank - 1 : -1]
    other = vectors.T @ wide
    values = np.linalg.norm(other, axis=1)
    roots = np.sqrt(values / scale)
    other *= (roots / np.where(values > 0, values, 1))[:, None]
    a, b = (vectors.T * roots[:, None], other.T) if flip else (other, vectors * roots)
    largest = np.take_along_axis(b, np.abs(b).argmax(axis=0)[None], axis=0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return _rounded(a * signs[:, None]), _rounded(b * signs)


def triangular(matrix: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A (r, in) and B (out, r): the first rows of R and columns of Q, where Q R is a matrix (out, in)."""
    del scale  # as in PEFT: the factors are Q and R whatever it is
    b, _ = np.linalg.qr(matrix[:, :rank])
    return _rounded(np.triu(b.T @ matrix)), _rounded(b)


def _rounded(values: np.ndarray) -> np.ndarray:
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissas, _BITS)), exponents - _BITS).astype(np.float32)


def _quantised(form: Form, values: np.ndarray) -> np.ndarray:
    """What is left of a parameter in few bits, float32."""
    quantize, dequantise = form.quantizer(), on_host(lambda packed: unpack(packed, jnp.float32))
    found = np.empty_like(values)
    for index in np.ndindex(values.shape[: len(form.stack)]):
        found[index] = dequantise(quantize(values[index]))
    return found


class Decomposed:
    """The adapted parameters of a model, each taken apart when it is asked for.

    Every process does all of it for itself: no one waits for another that fails.

    Args:
        source: the model.
        adapted: what of it has low-rank pairs, with an `init` that takes weights apart.
        seed: of a model of random weights.
    """

    def __init__(self, source: Source, adapted: Adapted, seed: int) -> None:
        self._source, self._adapted, self._seed = source, adapted, seed
        self._factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, in order."""
        return tuple(self._adapted.places)

    def take(self, name: str) -> Apart:
        """One of them, its weights read or drawn."""
        adapted = self._adapted
        apart = take_apart(adapted.init, self._values(name), adapted.places[name], adapted.forms.get(name))
        self._factors[name] = apart.a, apart.b
        return apart

    @property
    def factors(self) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """A and B of all of them as training began with them."""
        for name in self.names:
            if name not in self._factors:
                self.take(name)
        return self._factors

    def left(self, name: str, index: tuple[int, ...], values: np.ndarray) -> np.ndarray:
        """What is left of one matrix of any parameter without the pair that it began with.

        Args:
            name: of the parameter.
            index: of the matrix in it.
            values: of the matrix (out, in).

        Returns:
            The values themselves of one that is not adapted; else (out, in) in float32.
        """
        if name not in self.names:
            return values
        a, b = (factor[index].astype(np.float64) for factor in self.factors[name])
        scale = self._adapted.places[name][0].width.scale
        return (values.astype(np.float64) - scale * (b @ a)).astype(np.float32)

    @property
    def checksum(self) -> int:
        """Of the bits of `factors`."""
        total = 0
        for factors in self.factors.values():
            for factor in factors:
                total = zlib.crc32(factor.tobytes(), total)
        return total

    def _values(self, name: str) -> np.ndarray:
        """A whole parameter in float32."""
        declared = self._source.spec.declared
        if self._source.folder is not None:
            wanted: Any = {one: jnp.float32 if one == name else None for one, _ in named(declared)}
            tree = jax.tree.unflatten(jax.tree.structure(declared), list(wanted.values()))
            return np.asarray(jax.tree.leaves(load_params(self._source, tree))[0])
        index, parameter = next(
            (index, leaf) for index, (one, leaf) in enumerate(named(declared)) if one == name
        )
        key = jax.random.fold_in(jax.random.key(self._seed), index)
        return np.asarray(jax.jit(lambda key: draw_param(key, parameter, self._source.spec.init_std))(key))
