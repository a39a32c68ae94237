"""Whether the Mosaic kernels are right on the device at hand: every kernel, against the reference in float32.

What stands as the measure of an error is the error of the naive computation in the same dtype, the portable backend's.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.codecs import four_bit, fp8_blocks, int8_rows
from jaxmoe.kernels.devices import device_at_hand
from jaxmoe.kernels.expert_mlp import reference, xla
from jaxmoe.kernels.expert_mlp.activations import Activation
from jaxmoe.kernels.expert_mlp.contract import Grads, Options
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch, make_dispatch
from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic
from jaxmoe.kernels.expert_mlp.operands import Experts, Lora, unpacked

LIMIT = 2.0
"""Of a result's error over that of the naive computation."""


class WrongResults(ArithmeticError):
    """Kernels that computed something else than the reference, or did not run."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, forward and backward.

    Attributes:
        tokens: R.
        width: D.
        hidden: F.
        held: E, experts held here: numbers 1 to E of E + 1, if `elsewhere`.
        top_k: K.
        used: experts that get any token; those before and after them get none.
        activation: see `Activation`.
        bias: whether both matrices have one.
        rank: of LoRA on both matrices, 0 for none.
        frozen: whether the base gets no gradients.
        packed: how the base is packed: "nf4", "fp4", "int8" or "fp8"; it is frozen then. By default not.
        elsewhere: whether one expert of the layer is not held here.
        dtype: of the operands.
        blocks: at most as many blocks are run, so that each of them works on several tiles.
    """

    tokens: int
    width: int
    hidden: int
    held: int
    top_k: int
    used: int
    activation: Activation = Activation()
    bias: bool = False
    rank: int = 0
    frozen: bool = False
    elsewhere: bool = False
    dtype: str = "bfloat16"
    blocks: int = 5
    packed: str = ""

    def __str__(self) -> str:
        extras = {
            "biases": self.bias,
            f"rank {self.rank}": self.rank,
            "frozen base": self.frozen,
            f"base in {self.packed}": self.packed,
            "one expert elsewhere": self.elsewhere,
        }
        words = [word for word, is_so in extras.items() if is_so]
        sizes = f"R={self.tokens} D={self.width} F={self.hidden} E={self.held} K={self.top_k}"
        return " ".join(
            [sizes, f"({self.used} used)", self.activation.name, self.dtype, f"blocks={self.blocks}", *words]
        )


MANY = 10_000
"""Blocks: as many as the device has multiprocessors."""

CASES = (
    # Groups padded to 64 rows and to 128; plain.
    Case(tokens=177, width=256, hidden=128, held=7, top_k=3, used=5, elsewhere=True),
    Case(tokens=999, width=384, hidden=256, held=5, top_k=2, used=3, elsewhere=True, blocks=7),
    Case(tokens=301, width=256, hidden=384, held=1, top_k=1, used=1, dtype="float16"),
    # Everything at once, in widths that 64 divides and 128 does not; gradients with one and three consumers.
    Case(100, 320, 192, 3, 2, 2, Activation("relu2"), bias=True, rank=5, elsewhere=True),
    Case(150, 192, 64, 4, 2, 3, Activation("gelu_tanh"), bias=True, rank=70, frozen=True),
    # Widths of real models, fewer experts.
    Case(1100, 2048, 768, 8, 4, 7, blocks=MANY),
    Case(700, 2880, 2880, 3, 2, 2, Activation("swiglu_clamped", limit=10.0), bias=True, blocks=MANY),
    Case(600, 2816, 704, 5, 3, 4, Activation("gelu_tanh"), elsewhere=True, blocks=MANY),
    Case(1000, 2048, 768, 8, 4, 7, rank=16, frozen=True, blocks=MANY),
    Case(900, 4096, 1792, 3, 2, 3, blocks=MANY),
    # Bases in few bits.
    Case(177, 256, 128, 7, 3, 5, frozen=True, elsewhere=True, packed="nf4"),
    Case(100, 320, 192, 3, 2, 2, Activation("relu2"), bias=True, rank=5, frozen=True, packed="fp4"),
    Case(
        150, 192, 64, 4, 2, 3, Activation("gelu_tanh"), rank=70, frozen=True, dtype="float16", packed="int8"
    ),
    Case(120, 384, 256, 4, 2, 3, rank=5, frozen=True, packed="fp8"),
    Case(1000, 2048, 768, 8, 4, 7, rank=16, frozen=True, blocks=MANY, packed="nf4"),
)

SMALLEST = (Case(tokens=50, width=128, hidden=64, held=3, top_k=2, used=2, elsewhere=True, blocks=2),)
"""For the interpreter."""


def check(
    backend: Mosaic,
    cases: Sequence[Case] = CASES,
    *,
    repeats: int = 1,
    say: Callable[[str], None] = print,
) -> float:
    """The largest error of any result of any kernel, over that of the naive computation in the same dtype.

    Results are the layer's output, with and without what a backward pass keeps, and every gradient. Gradients of
    experts without tokens have to be exactly zero, and all results the same in every run.

    Args:
        backend: the kernels.
        cases: what to run.
        repeats: runs of each case.
        say: gets a line for each case, before and after.

    Raises:
        WrongResults: an error above `LIMIT`, a case that does not run, or results that differ between runs; raised
            after all cases, and names those that are wrong.
    """
    worst, wrong = 0.0, []
    for number, case in enumerate(cases, 1):
        say(f"case {number} of {len(cases)}: {case}")
        blocks = min(backend.multiprocessors, case.blocks)
        try:
            ratios = _ratios(dataclasses.replace(backend, multiprocessors=blocks), case, repeats)
        except Exception as error:
            say(f"  does not run: {type(error).__name__}: {error}")
            wrong.append(f"case {number} does not run ({type(error).__name__})")
            continue
        name = max(ratios, key=lambda name: ratios[name])
        say(f"  largest error over the naive one: {ratios[name]:.2f} ({name})")
        too_large = [f"{name} {ratio:.3g}" for name, ratio in ratios.items() if not ratio <= LIMIT]
        if too_large:
            say(f"  WRONG: {', '.join(too_large)}")
            wrong.append(f"case {number}: {', '.join(too_large)}")
        worst = max(worst, ratios[name])
    if wrong:
        raise WrongResults(
            f"error over that of the naive computation above {LIMIT:g} (inf: not finite, not zero for an expert "
            f"without tokens, or not the same in every run): {'; '.join(wrong)}"
        )
    return worst


@dataclasses.dataclass(frozen=True)
class _Operands:
    x: jax.Array
    experts: Experts
    weights: jax.Array
    dispatch: Dispatch
    chosen: jax.Array
    dout: jax.Array


def _ratios(backend: Mosaic, case: Case, repeats: int) -> dict[str, float]:
    """Of every result by name: the error over that of the naive computation."""
    operands = _operands(case)
    options = Options(case.activation, lora_scale=0.75, device=device_at_hand())
    ours = jax.jit(functools.partial(_results, backend, options, case, twice=True))
    arrays = (operands.x, operands.experts, operands.weights, operands.dispatch, operands.dout)
    _poison()
    results = _by_name(jax.block_until_ready(ours(*arrays)))
    runs = [_by_name(jax.block_until_ready(ours(*arrays))) for _ in range(repeats - 1)]
    naive = _by_name(jax.jit(functools.partial(_results, xla, options, case))(*arrays))
    right = _by_name(_reference(options, case, operands))
    unused = operands.dispatch.group_sizes == 0
    precision = float(jnp.finfo(case.dtype).eps)
    ratios = {}
    for name, result in results.items():
        ratio = float(_ratio(result, naive[name], right[name], precision))
        not_zero = name.startswith("gradient of experts") and bool(jnp.any(result[unused] != 0))
        if not_zero or any(not jnp.array_equal(result, run[name]) for run in runs):
            ratio = float("inf")
        ratios[name] = ratio
    return ratios


def _operands(case: Case) -> _Operands:
    generator = np.random.default_rng(case.tokens)
    parts = case.activation.parts
    held, width, hidden, rank = case.held, case.width, case.hidden, case.rank

    def normal(*shape: int, size: float) -> jax.Array:
        return jnp.asarray(size * generator.standard_normal(shape, dtype=np.float32), case.dtype)

    lora = Lora()
    if rank:
        lora = Lora(
            normal(held, rank, width, size=width**-0.5),
            normal(held, parts, hidden, rank, size=rank**-0.5),
            normal(held, rank, hidden, size=hidden**-0.5),
            normal(held, width, rank, size=rank**-0.5),
        )
    gate_up_bias = normal(held, parts, hidden, size=0.5) if case.bias else None
    if gate_up_bias is not None and case.activation.name == "swiglu_clamped":
        # Every value far inside of its clamp or far outside: at the clamp rounding decides whether a gradient is zero.
        far = 2 * case.activation.limit * generator.integers(-1, 2, gate_up_bias.shape)
        gate_up_bias += jnp.asarray(far, case.dtype)
    experts = Experts(
        _packed(normal(held, parts, hidden, width, size=width**-0.5), case.packed),
        _packed(normal(held, width, hidden, size=hidden**-0.5), case.packed),
        gate_up_bias,
        normal(held, width, size=0.5) if case.bias else None,
        lora,
    )
    chosen = _chosen(case, generator)
    num_experts, first = held + case.elsewhere, int(case.elsewhere)
    return _Operands(
        x=normal(case.tokens, width, size=1.0),
        experts=experts,
        weights=jnp.asarray(generator.uniform(0.1, 1.0, chosen.shape), jnp.float32),
        dispatch=make_dispatch(chosen, num_experts, first, held),
        chosen=chosen,
        dout=normal(case.tokens, width, size=1.0),
    )


def _packed(values: jax.Array, kind: str) -> Any:
    if not kind:
        return values
    if kind == "int8":
        return int8_rows.quantize(values)
    if kind == "fp8":
        return fp8_blocks.quantize(values, 128, rows=128)
    return jax.vmap(lambda one: four_bit.quantize(one, kind))(values)


def _chosen(case: Case, generator: np.random.Generator) -> jax.Array:
    """(R, K): of the held experts those in the middle, and the one elsewhere."""
    first = int(case.elsewhere)
    begin = (case.held - case.used + 1) // 2
    used = list(range(first + begin, first + begin + case.used)) + ([0] if case.elsewhere else [])
    keys = generator.random((case.tokens, len(used))) * np.linspace(1.0, 2.0, len(used))
    return jnp.asarray(np.asarray(used)[np.argsort(-keys, axis=1)[:, : case.top_k]], jnp.int32)


def _wanted(case: Case, experts: Experts) -> Grads:
    given = jax.tree.map(lambda leaf: leaf is not None, experts, is_leaf=lambda leaf: leaf is None)
    if case.frozen:
        given = Experts(gate_up=False, down=False, gate_up_bias=False, down_bias=False, lora=given.lora)
    return Grads(x=True, weights=True, experts=given)


def _results(
    backend: Any,
    options: Options,
    case: Case,
    x: jax.Array,
    experts: Experts,
    weights: jax.Array,
    dispatch: Dispatch,
    dout: jax.Array,
    twice: bool = False,
) -> dict[str, Any]:
    """What is compared; the forward pass that keeps nothing is another kernel, and run only if `twice`."""
    out, saved = backend.forward(options, x, experts, weights, dispatch, save=True)
    alone = backend.forward(options, x, experts, weights, dispatch, save=False)[0] if twice else out
    wanted = _wanted(case, experts)
    grads = backend.backward(options, x, experts, weights, dispatch, saved, dout, wanted)
    return {"out": alone, "out, with what is kept": out, "gradient of ": grads._asdict()}


def _reference(options: Options, case: Case, operands: _Operands) -> dict[str, Any]:
    """The same in float32, products in full precision."""
    float32 = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    @jax.jit
    def results(x: jax.Array, experts: Experts, weights: jax.Array, dout: jax.Array) -> Any:
        function = lambda x, experts, weights: reference.expert_mlp(
            x,
            experts,
            operands.chosen,
            weights,
            activation=options.activation,
            lora_scale=options.lora_scale,
            first=int(case.elsewhere),
        )
        out, pull_back = jax.vjp(function, x, experts, weights)
        return out, pull_back(dout)

    with jax.default_matmul_precision("highest"):
        experts = unpacked(operands.experts, case.dtype)
        arrays = float32((operands.x, experts, operands.weights, operands.dout))
        out, (dx, dexperts, dweights) = results(*arrays)
    grads = Grads(x=dx, weights=dweights, experts=dexperts)
    return {"out": out, "out, with what is kept": out, "gradient of ": grads._asdict()}


def _by_name(results: dict[str, Any]) -> dict[str, jax.Array]:
    """Every array, as float32, under a name such as "gradient of experts.lora.down_a"."""
    leaves = jax.tree_util.tree_flatten_with_path(results)[0]
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {
        name.replace("gradient of .", "gradient of "): leaf.astype(jnp.float32)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    }


@jax.jit
def _ratio(result: jax.Array, naive: jax.Array, right: jax.Array, precision: jax.Array | float) -> jax.Array:
    """Of the mean errors or of the largest ones, whichever is larger; inf where something is not finite.

    No error is held against a result that rounding to its dtype alone would explain.
    """

    def over(size: Callable[[jax.Array], jax.Array], rounding: jax.Array | float) -> jax.Array:
        allowed = jnp.maximum(size(naive - right), rounding * size(right))
        return size(result - right) / jnp.maximum(allowed, 1e-30)

    mean = over(lambda values: jnp.sqrt(jnp.mean(jnp.square(values))), precision / 8)
    ratio = jnp.maximum(mean, over(lambda values: jnp.abs(values).max(), precision / 2))
    return jnp.where(jnp.isfinite(result).all(), ratio, jnp.inf)


def _poison() -> None:
    """Leave not-a-numbers in memory that is handed out next, to be found where something is read unwritten."""
    blocks: Iterable[jax.Array] = [jnp.full((1 << 22,), jnp.nan, jnp.float32) for _ in range(8)]
    jax.block_until_ready(blocks)
