"""What mixers with a state have in common: where it begins anew, and what of it a cache keeps."""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.model.blocks import Mixer
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.convolution import causal_convolution, tail_after
from jaxmoe.model.mixers.recurrence import recur
from jaxmoe.model.mixers.selective_scan import selective_scan
from jaxmoe.parallel.sharding import constrain
from jaxmoe.params import Tree


@functools.partial(jax.tree_util.register_dataclass, data_fields=("state", "tail"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class RecurrentCache:
    """What is kept of a text, whatever its length.

    Attributes:
        state: (L, B, N, H, V), or (L, B, X, Y) of channels by themselves, float32; None without one.
        tail: (L, B, c − 1, X), the last inputs of the convolution; None without one.
    """

    state: Any
    tail: Any


@dataclasses.dataclass(frozen=True)
class Passage:
    """The tokens that a recurrence goes over, and what came before.

    Attributes:
        documents: (B, T) int32, another number where another document begins; None where a row is one.
        valid: (B, T) bool, of tokens that count, the first ones of a row; None where all do.
        before: state and tail (B, c − 1, X) before the first token; None where texts begin.
        after: whether state and tail after the last token are asked for.
    """

    documents: jax.Array | None = None
    valid: jax.Array | None = None
    before: RecurrentCache | None = None
    after: bool = False

    def convolved(
        self,
        x_BTX: Float[Array, "B T X"],
        filters_Xc: Float[Array, "X c"],
        bias_X: Float[Array, "X"] | None = None,
        *,
        silu: bool = True,
    ) -> tuple[jax.Array, jax.Array | None]:
        """`causal_convolution` of the passage, and the tail after it."""
        tail = None if self.before is None else self.before.tail
        out_BTX = causal_convolution(x_BTX, filters_Xc, bias_X, self.documents, tail, silu=silu)
        if not self.after:
            return out_BTX, None
        if tail is None:
            tail = jnp.zeros((x_BTX.shape[0], filters_Xc.shape[1] - 1, x_BTX.shape[2]), x_BTX.dtype)
        assert self.valid is not None
        return out_BTX, tail_after(x_BTX, tail, jnp.sum(self.valid, axis=1))

    def recurred(
        self,
        q_BTMH: Float[Array, "B T M H"],
        k_BTMH: Float[Array, "B T M H"],
        v_BTNV: Float[Array, "B T N V"],
        log_decay: Float[Array, "B T N"] | Float[Array, "B T N H"],
        rate_BTN: Float[Array, "B T N"] | None = None,
    ) -> tuple[Float[Array, "B T N V"], jax.Array]:
        """`recur` over the passage. Padding leaves the state as it is."""
        if self.valid is not None:
            v_BTNV, log_decay = self._of_valid(v_BTNV), self._of_valid(log_decay)
            rate_BTN = None if rate_BTN is None else self._of_valid(rate_BTN)
        return recur(
            q_BTMH,
            k_BTMH,
            v_BTNV,
            log_decay,
            rate_BTN=rate_BTN,
            documents_BT=self.documents,
            state_BNHV=None if self.before is None else self.before.state,
        )

    def _of_valid(self, x_BT: jax.Array) -> jax.Array:
        """x (B, T, …), 0 of tokens that do not count."""
        assert self.valid is not None
        return jnp.where(self.valid.reshape(*self.valid.shape, *(1,) * (x_BT.ndim - 2)), x_BT, 0)

    def scanned(
        self,
        x_BTX: Float[Array, "B T X"],
        step_BTX: Float[Array, "B T X"],
        key_BTY: Float[Array, "B T Y"],
        query_BTY: Float[Array, "B T Y"],
        rate_XY: Float[Array, "X Y"],
    ) -> tuple[Float[Array, "B T X"], jax.Array]:
        """`selective_scan` over the passage. Padding leaves the state as it is."""
        if self.valid is not None:
            step_BTX = self._of_valid(step_BTX)
        before = None if self.before is None else self.before.state
        return selective_scan(
            x_BTX, step_BTX, key_BTY, query_BTY, rate_XY, documents_BT=self.documents, state_BXY=before
        )


class RecurrentMixer(Mixer):
    """A mixer that keeps a state of a text, the last inputs of a convolution, or both: frozen dataclasses."""

    rewinds: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def state_shape(self) -> tuple[int, ...] | None:
        """(N, H, V) of a row's state, or (X, Y); None without one."""

    @property
    @abc.abstractmethod
    def tail_shape(self) -> tuple[int, int] | None:
        """(c − 1, X) of the inputs that a convolution looks back at; None without one."""

    @abc.abstractmethod
    def mix(
        self, params: Tree, x_BTD: jax.Array, context: Context, passage: Passage
    ) -> tuple[jax.Array, RecurrentCache]:
        """x (B, T, D) → (B, T, D), and state and tail after the passage, where it asks for them."""

    def apply(self, params: Tree, x_BTD: jax.Array, context: Context) -> jax.Array:
        """x (B, T, D) → (B, T, D), from the start of every document."""
        documents = None
        if context.segment_ids is not None:
            documents = jnp.cumsum(context.starts, axis=1, dtype=jnp.int32)
        return self.mix(params, x_BTD, context, Passage(documents))[0]

    def init_cache(self, repeats: int, batch: int, length: int, dtype: Any) -> RecurrentCache:
        """Zeros, as many for long texts as for short ones."""
        del length
        state = None
        if self.state_shape is not None:
            state = jnp.zeros((repeats, batch, *self.state_shape), jnp.float32)
            state = constrain(state, "..N" + "." * (len(self.state_shape) - 1))
        tail = None if self.tail_shape is None else jnp.zeros((repeats, batch, *self.tail_shape), dtype)
        return RecurrentCache(state, tail)

    def decode(
        self, params: Tree, x_BTD: jax.Array, context: Context, cache: RecurrentCache, repeat: jax.Array
    ) -> tuple[jax.Array, RecurrentCache]:
        """x (B, T, D) → (B, T, D), from the state in the cache on."""
        valid = jnp.full(x_BTD.shape[:2], True) if context.valid is None else context.valid
        before = None if context.fresh else jax.tree.map(lambda x: x[repeat], cache)
        passage = Passage(valid=valid, before=before, after=True)
        out_BTD, after = self.mix(params, x_BTD, context, passage)
        return out_BTD, jax.tree.map(lambda old, new: old.at[repeat].set(new), cache, after)

    def mixing_flops(self, length: int) -> float:
        """4 FLOPs for each number of the state: each token writes to it once and reads it once."""
        del length
        return 0.0 if self.state_shape is None else 4.0 * math.prod(self.state_shape)
