"""Every Mosaic kernel in the interpreter, against float64; errors are bounded by those of the naive computation.

A kernel is compiled once for each `Matmul` and `Gradient` below, which costs seconds; what differs between the calls
of one kernel (which experts are chosen) is data.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import interpreter

from jaxmoe.codecs import four_bit, fp8_blocks, int8_rows, unpack
from jaxmoe.kernels.expert_mlp import Activation, Experts, Lora, expert_mlp
from jaxmoe.kernels.expert_mlp.dispatch import make_dispatch
from jaxmoe.kernels.expert_mlp.mosaic.epilogues import Activate, ActivationGradient, StoreRows
from jaxmoe.kernels.expert_mlp.mosaic.geometry import Geometry
from jaxmoe.kernels.expert_mlp.mosaic.gradient import Side, weight_gradient
from jaxmoe.kernels.expert_mlp.mosaic.matmul import Segment, grouped_matmul
from jaxmoe.kernels.expert_mlp.mosaic.slots import Slots, make_slots
from jaxmoe.kernels.expert_mlp.mosaic.tiles import GradientTiles, MatmulTiles
from jaxmoe.kernels.expert_mlp.operands import is_packed

R, E, K = 85, 3, 2  # tokens, experts held, choices; one more expert is elsewhere
COLUMNS = 128
RAGGED, ALL_IN_ONE = (0.1, 1.0, 0.25), (0.0, 9.0, 0.0)
INTERPRETED = {"multiprocessors": interpreter.MULTIPROCESSORS, "interpret": interpreter.PARAMETERS}


@pytest.fixture(autouse=True)
def _interpreted():
    with interpreter.interpreted_kernels():
        yield


def choose(likelihood: tuple[float, ...], seed: int = 0, tokens: int = R) -> jax.Array:
    """(R, K) choices of each of the held experts by its likelihood; what is left over goes to one elsewhere."""
    rng = np.random.default_rng(seed)
    elsewhere = len(likelihood)
    likely = rng.uniform(size=(tokens, elsewhere + 1)) < np.asarray([*likelihood, 0])
    chosen = np.argsort(-(likely + rng.uniform(0, 0.5, likely.shape)), axis=1)[:, :K]
    # That both choices may be of the expert elsewhere makes no difference to the kernels.
    chosen = np.where(np.take_along_axis(likely, chosen, axis=1), chosen, elsewhere)
    return jnp.asarray(chosen, jnp.int32)


def layout(chosen: jax.Array, rows: int, experts: int = E) -> Slots:
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.2, 1, chosen.shape), jnp.float32)
    return make_slots(make_dispatch(chosen, experts + 1, 0, experts), weights, rows)


def draw(seed: int, dtype, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def rms(value, truth) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(value).astype(np.float64) - np.asarray(truth)))))


def assert_as_good_as_naive(ours, naive, exact, where=None) -> None:
    """Root mean square errors, where `where` is true along the first axis."""
    for name in exact if isinstance(exact, dict) else range(len(exact)):
        keep = slice(None) if where is None else where
        value, by_naive, truth = (np.asarray(results[name])[keep] for results in (ours, naive, exact))
        assert value.shape == truth.shape, name
        rounding = rms(truth.astype(value.dtype), truth)
        assert rms(value, truth) <= 1.05 * max(rms(by_naive, truth), rounding), name


def float64(function, *arguments):
    """The result in numpy of `function`, all floating point in float64."""
    widen = lambda a: a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda a: jnp.asarray(widen(np.asarray(a))), arguments)
        return jax.tree.map(np.asarray, function(*arguments))


def experts_of(slots: Slots, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each padded slot: its expert, whether it is in a tile in use, and whether it is none of the padding."""
    expert = np.repeat(np.asarray(slots.tile_expert), rows)
    used = np.arange(len(expert)) < int(slots.num_tiles[0]) * rows
    return expert, used, np.asarray(slots.weight) > 0


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A kernel; `gathered` says it of each segment, the first of which is 192 wide and others 64."""

    epilogue: str = "store"
    activation: Activation = Activation()
    save: bool = True
    rows: int = 128
    contract_first: bool = False
    gathered: tuple[bool, ...] = (True,)
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        operands = "+".join("gathered" if gathered else "direct" for gathered in self.gathered)
        epilogue = self.epilogue + (f" {self.activation.name}" if self.epilogue != "store" else "")
        layout = "contract first" if self.contract_first else "contract last"
        return f"{epilogue}, {operands}, {self.rows} rows, {layout}, {self.dtype}"

    @property
    def parts(self) -> int:
        return self.activation.parts if self.epilogue == "activate" else 1

    @property
    def geometry(self) -> Geometry:
        columns = 128 if self.contract_first and self.rows == 64 else 64
        return Geometry(MatmulTiles(self.rows, columns, 4, band=2), self.parts, COLUMNS, self.contract_first)

    def operands(self, padded: int):
        """Segments as pairs of arrays, and the pre-activation."""
        pairs = []
        for number, is_gathered in enumerate(self.gathered):
            width = 64 if number else 192
            rows = draw(2 + number, self.dtype, R if is_gathered else padded, width)
            shape = (E * width, COLUMNS) if self.contract_first else (E * self.parts * COLUMNS, width)
            pairs.append((rows, draw(12 + number, self.dtype, *shape, scale=width**-0.5)))
        return pairs, draw(22, self.dtype, padded, self.activation.parts * COLUMNS)

    def epilogue_for(self, pre, slots):
        if self.epilogue == "store":
            return StoreRows(self.dtype)
        if self.epilogue == "activate":
            return Activate(self.activation, self.dtype, self.save)
        return ActivationGradient(self.activation, self.dtype, pre, slots.weight)

    @property
    def names(self) -> tuple[str, ...]:
        if self.epilogue == "gradient":
            return "dpre", "weighted", "scores"
        return ("value", "pre")[: 1 + (self.epilogue == "activate" and self.save)]

    def naive(self, pairs, pre, slots, expert):
        """By what is in the dtype of the operands, one row after the other."""
        dtype = pairs[0][0].dtype
        product = 0
        for (rows, weights), gathered in zip(pairs, self.gathered, strict=True):
            rows = jnp.asarray(rows)[slots.token] if gathered else rows
            width = rows.shape[1]
            shape = (E, width, COLUMNS) if self.contract_first else (E, self.parts * COLUMNS, width)
            letters = "pc,pcn->pn" if self.contract_first else "pc,pnc->pn"
            product += jnp.einsum(letters, rows, jnp.asarray(weights).reshape(shape)[expert])
        if self.epilogue == "store":
            return {"value": product}
        if self.epilogue == "activate":
            value = self.activation.value(tuple(jnp.split(product, self.parts, axis=1)))
            return {"value": value, "pre": product} if self.save else {"value": value}
        weight = jnp.asarray(slots.weight, dtype)[:, None]
        parts = tuple(jnp.split(jnp.asarray(pre), self.activation.parts, axis=1))
        value, pull_back = jax.vjp(lambda *parts: self.activation.value(parts), *parts)
        dpre = jnp.concatenate(pull_back(weight * product), axis=1)
        return {"dpre": dpre, "weighted": weight * value, "scores": (product * value).sum(axis=1)}


@functools.cache
def compiled(case: Matmul):
    def run(pairs, pre, slots):
        segments = [
            Segment(*pair, gathered=gathered) for pair, gathered in zip(pairs, case.gathered, strict=True)
        ]
        return grouped_matmul(segments, slots, case.epilogue_for(pre, slots), case.geometry, **INTERPRETED)

    return interpreter.jit_and_wait(run)


def check_matmul(case: Matmul, chosen: jax.Array) -> None:
    slots = layout(chosen, case.rows)
    pairs, pre = case.operands(slots.token.shape[0])
    expert, used, is_slot = experts_of(slots, case.rows)
    # Whatever is in rows that no slot has must reach nothing.
    garbage = lambda rows: jnp.where(is_slot[:, None], rows, jnp.nan).astype(rows.dtype)
    given = [
        (rows if gathered else garbage(rows), weights)
        for (rows, weights), gathered in zip(pairs, case.gathered, strict=True)
    ]
    results = compiled(case)(given, garbage(pre), slots)
    ours = dict(zip(case.names, results, strict=True))
    if case.epilogue == "gradient":
        padding = used & ~is_slot
        assert not np.asarray(ours["dpre"])[padding].any()
        assert not np.asarray(ours["weighted"])[padding].any()
        ours["scores"] = ours["scores"].sum(axis=0)
    if is_slot.any():
        exact = float64(lambda *arrays: case.naive(*arrays, expert), pairs, pre, slots)
        naive = case.naive(pairs, pre, slots, expert)
        assert_as_good_as_naive(ours, naive, exact, is_slot)


SILU, GELU, RELU2 = Activation("silu"), Activation("gelu_tanh"), Activation("relu2")
CLAMPED = Activation("swiglu_clamped", limit=0.8)
MATMULS = [
    Matmul(gathered=(False,), dtype="float16"),
    Matmul(rows=64, gathered=(True, False)),
    Matmul(contract_first=True, gathered=(False, True, False)),
    Matmul(rows=64, contract_first=True, gathered=(False,)),
    Matmul("activate", SILU, rows=64, gathered=(True, False, False)),
    Matmul("activate", GELU, save=False),
    Matmul("activate", CLAMPED, rows=64, save=False, dtype="float16"),
    Matmul("activate", RELU2),
    Matmul("gradient", GELU, rows=64, contract_first=True),
    Matmul("gradient", CLAMPED, contract_first=True, gathered=(True, False), dtype="float16"),
    Matmul("gradient", RELU2, contract_first=False),
]


@pytest.mark.parametrize("likelihood", [RAGGED, ALL_IN_ONE], ids=["ragged", "all in one"])
@pytest.mark.parametrize("case", MATMULS, ids=str)
def test_grouped_matmul(case, likelihood):
    check_matmul(case, choose(likelihood))


EMPTY_OR_NOT = list(itertools.product([0.0, 0.6], repeat=E))


@pytest.mark.parametrize("likelihood", EMPTY_OR_NOT, ids=str)
@pytest.mark.parametrize(
    "case",
    [Matmul("activate", SILU), Matmul("gradient", SILU, contract_first=True), Matmul(rows=64)],
    ids=str,
)
def test_every_pattern_of_empty_groups(case, likelihood):
    check_matmul(case, choose(likelihood, seed=3))


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A kernel: (E, out, columns) from sides of which one, or none, or both are gathered."""

    out: int
    columns: int
    gathered: tuple[bool, bool]
    rows: int = 128
    consumers: int = 1
    dtype: str = "bfloat16"
    experts: int = E

    def __str__(self) -> str:
        operands = " x ".join("gathered" if gathered else "direct" for gathered in self.gathered)
        return f"{operands}, {self.rows} rows, {self.consumers} consumers, {self.dtype}"

    def sides(self, tokens: int, padded: int):
        return [
            draw(seed, self.dtype, tokens if gathered else padded, width)
            for seed, (gathered, width) in enumerate(
                zip(self.gathered, (self.out, self.columns), strict=True)
            )
        ]

    def naive(self, sides, slots, member):
        """Σ over slots of outer products; `member` (E, p) says which slots an expert has."""
        out, columns = (
            jnp.asarray(side)[slots.token] if gathered else side
            for side, gathered in zip(sides, self.gathered, strict=True)
        )
        return {"dweights": jnp.einsum("ep,po,pc->eoc", jnp.asarray(member, out.dtype), out, columns)}


@functools.cache
def compiled_gradient(case: Gradient):
    def run(sides, slots):
        pair = (Side(side, gathered) for side, gathered in zip(sides, case.gathered, strict=True))
        tiles = GradientTiles(64 * case.consumers, 64, 4)
        return weight_gradient(*pair, slots, tiles, tile_rows=case.rows, **INTERPRETED)

    return interpreter.jit_and_wait(run)


def check_gradient(case: Gradient, chosen: jax.Array) -> None:
    slots = layout(chosen, case.rows, case.experts)
    expert, used, is_slot = experts_of(slots, case.rows)
    sides = case.sides(chosen.shape[0], len(expert))
    # One of the sides is zero for padding, as the kernels before leave it; tiles not in use may hold anything.
    clean = lambda side: jnp.where(is_slot[:, None], side, jnp.where(used[:, None], 0, jnp.nan)).astype(
        side.dtype
    )
    given = [side if gathered else clean(side) for side, gathered in zip(sides, case.gathered, strict=True)]
    dweights = compiled_gradient(case)(given, slots)
    sizes = np.bincount(expert[is_slot], minlength=case.experts)
    assert not np.asarray(dweights)[sizes == 0].any(), "the gradient of an expert without tokens is zero"
    if is_slot.any():
        member = (expert == np.arange(case.experts)[:, None]) & is_slot
        exact = float64(lambda *arrays: case.naive(*arrays, member), sides, slots)
        assert_as_good_as_naive({"dweights": dweights}, case.naive(sides, slots, member), exact)


GRADIENTS = [
    Gradient(64, 128, (False, True), dtype="float16"),
    Gradient(256, 64, (True, False), rows=64, consumers=2),
    Gradient(192, 64, (False, True), consumers=3),
    Gradient(192, 128, (False, False), rows=64, consumers=3),
]


@pytest.mark.parametrize("likelihood", [RAGGED, ALL_IN_ONE], ids=["ragged", "all in one"])
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_weight_gradient(case, likelihood):
    check_gradient(case, choose(likelihood))


@pytest.mark.parametrize("likelihood", EMPTY_OR_NOT, ids=str)
def test_weight_gradient_for_every_pattern_of_empty_groups(likelihood):
    check_gradient(Gradient(128, 64, (True, False), rows=64, consumers=2), choose(likelihood, seed=3))


@pytest.mark.parametrize("experts", [1, 2, 5, 33, 256])
def test_numbers_of_experts(experts):
    """Some are chosen by one token, most of the 256 by none."""
    likelihood = tuple(np.linspace(1, 0.05, experts) if experts < 256 else np.arange(256) % 7 == 3)
    chosen = choose(likelihood, seed=experts, tokens=45 + experts // 8)
    check_gradient(Gradient(64, 64, (False, True), rows=64, experts=experts), chosen)
    slots = layout(chosen, 64, experts)
    x = draw(1, jnp.bfloat16, chosen.shape[0], 64)
    weights = draw(2, jnp.bfloat16, experts * 64, 64)
    geometry = Geometry(MatmulTiles(64, 64, 4, band=4), 1, 64, contract_first=False)
    segment = lambda x, weights: Segment(x, weights, gathered=True)
    run = lambda x, weights, slots: grouped_matmul(
        [segment(x, weights)], slots, StoreRows(jnp.bfloat16), geometry, **INTERPRETED
    )
    (ours,) = interpreter.jit_and_wait(run)(x, weights, slots)
    expert, _, is_slot = experts_of(slots, 64)
    token = np.asarray(slots.token)
    naive = lambda x, weights: jnp.einsum("pc,pnc->pn", x[token], weights.reshape(experts, 64, 64)[expert])
    assert_as_good_as_naive([ours], [naive(x, weights)], [float64(naive, x, weights)], is_slot)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A whole layer through the public function; experts 1, …, E of E + 2 are held, one of them nobody chooses."""

    activation: Activation
    width: int
    hidden: int
    rank: int = 0
    biases: bool = False
    frozen: bool = False
    packed: tuple[str, int] | None = None  # the kind of the matrices, and its block

    def packed_or_not(self, values):
        """A matrix (E, …, n, c), packed with scales that differ a lot, or as it is."""
        if self.packed is None:
            return values
        kind, block = self.packed
        factors = 2.0 ** np.random.default_rng(31).integers(
            -4, 4, (*values.shape[:-1], values.shape[-1] // 32)
        )
        values = (values * np.repeat(factors, 32, -1) / 2).astype(values.dtype)
        if kind == "int8":
            return int8_rows.quantize(values)
        if kind == "fp8":
            return fp8_blocks.quantize(values, block, rows=16)
        return jax.vmap(lambda one: four_bit.quantize(one, kind, block, nested=block == 128))(values)

    def operands(self, dtype):
        parts, width, hidden, rank = self.activation.parts, self.width, self.hidden, self.rank
        seeds = itertools.count(30)
        new = lambda *shape, scale: draw(next(seeds), dtype, *shape, scale=scale)
        lora = Lora()
        if rank:
            lora = Lora(
                new(E, rank, width, scale=width**-0.5),
                new(E, parts, hidden, rank, scale=rank**-0.5),
                new(E, rank, hidden, scale=hidden**-0.5),
                new(E, width, rank, scale=rank**-0.5),
            )
        base = (
            self.packed_or_not(new(E, parts, hidden, width, scale=width**-0.5)),
            self.packed_or_not(new(E, width, hidden, scale=hidden**-0.5)),
            new(E, parts, hidden, scale=0.3) if self.biases else None,
            new(E, width, scale=0.3) if self.biases else None,
        )
        rng = np.random.default_rng(29)
        chosen = np.stack([rng.permutation([0, 1, 3, 4])[:K] for _ in range(R)])
        weights = rng.uniform(0.2, 1, (R, K))
        x, dout = new(R, width, scale=1), new(R, width, scale=1)
        return base, lora, x, jnp.asarray(weights, dtype), jnp.asarray(chosen, jnp.int32), dout

    def run(self, backend, base, lora, x, weights, chosen, dout):
        """The output and its gradients by name."""

        def layer(trained):
            experts = Experts(*trained.get("base", base), trained["lora"])
            return expert_mlp(
                trained["x"],
                experts,
                chosen,
                trained["weights"],
                activation=self.activation,
                lora_scale=0.75,
                num_experts=E + 2,
                first=1,
                backend=backend,
            )

        trained = {"x": x, "weights": weights, "lora": lora} | ({} if self.frozen else {"base": base})
        out, pull_back = jax.vjp(layer, trained)
        leaves = jax.tree_util.tree_flatten_with_path({"out": out, "d": pull_back(dout)[0]})[0]
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


LAYERS = [
    Layer(SILU, width=128, hidden=256),
    Layer(CLAMPED, width=192, hidden=64, rank=8, biases=True),
    Layer(RELU2, width=128, hidden=192, rank=128, frozen=True),
    Layer(SILU, width=128, hidden=256, frozen=True, packed=("nf4", 64)),
    Layer(CLAMPED, width=192, hidden=64, rank=8, biases=True, frozen=True, packed=("fp4", 64)),
    Layer(RELU2, width=128, hidden=192, rank=8, frozen=True, packed=("int8", 0)),
    Layer(GELU, width=256, hidden=64, frozen=True, packed=("mxfp4", 32)),
    Layer(SILU, width=128, hidden=384, rank=8, frozen=True, packed=("nf4", 128)),
    Layer(SILU, width=192, hidden=256, rank=8, frozen=True, packed=("fp8", 128)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_whole_layer(layer):
    operands = layer.operands(jnp.bfloat16)
    # Rounded to bfloat16 as the kernels do it, before the products are exact.
    wide = jax.tree.map(
        lambda leaf: unpack(leaf, jnp.bfloat16) if is_packed(leaf) else leaf, operands, is_leaf=is_packed
    )
    ours = interpreter.jit_and_wait(lambda *operands: layer.run("mosaic", *operands))(*operands)
    naive = jax.jit(lambda *operands: layer.run("reference", *operands))(*wide)
    exact = float64(lambda *operands: layer.run("reference", *operands), *wide)
    trained = 4 * (layer.rank > 0) + (0 if layer.frozen else 2 + 2 * layer.biases)
    assert len(ours) == 3 + trained
    for name in ours:
        if "base" in name or "lora" in name:
            assert not np.asarray(ours[name][1]).any(), "nobody chose expert 2"
    assert_as_good_as_naive(ours, naive, exact)


def test_too_few_stages_are_refused():
    """They would be a deadlock on a device."""
    tiles = dataclasses.replace(Matmul().geometry, tiles=MatmulTiles(128, 64, 3))
    slots = layout(choose(RAGGED), 128)
    (pair,), _ = Matmul().operands(slots.token.shape[0])
    with pytest.raises(NotImplementedError, match="3 stages; expected 4"):
        grouped_matmul([Segment(*pair, gathered=True)], slots, StoreRows(jnp.bfloat16), tiles, **INTERPRETED)
