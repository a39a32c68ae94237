"""The launches of a layer one by one, and the search for the tiles that are fastest in each."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxmoe.kernels.devices import device_at_hand
from jaxmoe.kernels.expert_mlp.contract import Grads, Options
from jaxmoe.kernels.expert_mlp.dispatch import make_dispatch
from jaxmoe.kernels.expert_mlp.mosaic.epilogues import ActivationGradient
from jaxmoe.kernels.expert_mlp.mosaic.geometry import Geometry
from jaxmoe.kernels.expert_mlp.mosaic.gradient import Side
from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic
from jaxmoe.kernels.expert_mlp.mosaic.matmul import Epilogue, Segment
from jaxmoe.kernels.expert_mlp.mosaic.slots import Slots, make_slots
from jaxmoe.kernels.expert_mlp.mosaic.tiles import GradientLaunch, GradientTiles, MatmulLaunch, MatmulTiles
from jaxmoe.kernels.expert_mlp.operands import Experts
from jaxmoe.kernels.expert_mlp.specs import ExpertLayer, choose_experts

Launch = MatmulLaunch | GradientLaunch
Tiles = MatmulTiles | GradientTiles
Timer = Callable[[Callable[[], Any]], float]
AnyTiles = TypeVar("AnyTiles", bound=Any)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A launch of a layer, and the shapes that it is called with.

    Attributes:
        launch: what its tiles depend on.
        rows: padding of groups.
        arrays: shapes of the operands, in order.
        rebuild: the call, given a backend, slots and arrays of those shapes; returns what the kernel does.
    """

    launch: Launch
    rows: int
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    rebuild: Callable[[Mosaic, Slots, Sequence[jax.Array]], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Recorder(Mosaic):
    """Runs no kernel, but notes which a layer would have run."""

    noted: dict[str, Recorded] = dataclasses.field(default_factory=dict)

    def matmul(
        self, launch: MatmulLaunch, segments: Sequence[Segment], slots: Slots, epilogue: Epilogue
    ) -> list[jax.Array]:
        arrays = []
        for segment in segments:
            assert isinstance(segment.weights, jax.Array)  # layers here are in full precision
            arrays += [segment.rows, segment.weights]
        gathered = [segment.gathered for segment in segments]
        kept, again = _without_arrays(epilogue)

        def rebuild(backend: Mosaic, slots: Slots, arrays: Sequence[jax.Array]) -> list[jax.Array]:
            pairs = [Segment(arrays[2 * i], arrays[2 * i + 1], is_so) for i, is_so in enumerate(gathered)]
            return backend.matmul(launch, pairs, slots, again(arrays[-1], slots.weight))

        self._note(launch, launch.rows, [*arrays, *kept], rebuild)
        geometry = Geometry(launch.tiles({}), launch.parts, launch.columns, launch.contract_first)
        outputs = epilogue.outputs(slots.token.shape[0], geometry)
        return [jnp.zeros(output.shape, output.dtype) for output in outputs]

    def gradient(
        self, launch: GradientLaunch, out: Side, columns: Side, slots: Slots, tile_rows: int
    ) -> jax.Array:
        def rebuild(backend: Mosaic, slots: Slots, arrays: Sequence[jax.Array]) -> list[jax.Array]:
            sides = Side(arrays[0], out.gathered), Side(arrays[1], columns.gathered)
            return [backend.gradient(launch, *sides, slots, tile_rows)]

        self._note(launch, tile_rows, [out.rows, columns.rows], rebuild)
        return jnp.zeros((slots.first_tile.shape[0], launch.out, launch.columns), out.rows.dtype)

    def _note(self, launch: Launch, rows: int, arrays: Sequence[jax.Array], rebuild: Any) -> None:
        shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
        self.noted.setdefault(launch.key, Recorded(launch, rows, shapes, rebuild))


def _without_arrays(
    epilogue: Epilogue,
) -> tuple[list[jax.Array], Callable[[jax.Array, jax.Array], Epilogue]]:
    """The pre-activation that an epilogue reads, if it does, and the same epilogue with another and other weights."""
    if not isinstance(epilogue, ActivationGradient):
        return [], lambda *_: epilogue
    activation, dtype = epilogue.activation, epilogue.dtype
    return [epilogue.pre], lambda pre, weight: ActivationGradient(activation, dtype, pre, weight)


def launches(layer: ExpertLayer, tokens: int) -> list[Recorded]:
    """All that a forward and backward pass of a layer runs, each once; biases are left out."""
    shape, parts = layer.shape, layer.activation.parts
    struct = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    experts = Experts(
        struct(shape.experts, parts, shape.d_hidden, shape.d_model),
        struct(shape.experts, shape.d_model, shape.d_hidden),
    )
    weights = jax.ShapeDtypeStruct((tokens, shape.top_k), jnp.float32)
    chosen = jax.ShapeDtypeStruct(weights.shape, jnp.int32)
    recorder = _Recorder(multiprocessors=1)
    wanted = Grads(x=True, weights=True, experts=Experts(True, True))

    def both_ways(x: jax.Array, experts: Experts, weights: jax.Array, chosen: jax.Array) -> Any:
        options, dispatch = (
            Options(layer.activation, 1.0, device_at_hand()),
            make_dispatch(chosen, shape.experts),
        )
        out, saved = recorder.forward(options, x, experts, weights, dispatch, save=True)
        assert saved is not None
        return recorder.backward(options, x, experts, weights, dispatch, saved, out, wanted)

    jax.eval_shape(both_ways, struct(tokens, shape.d_model), experts, weights, chosen)
    return list(recorder.noted.values())


def device_time(call: Callable[[], Any]) -> float:
    """Seconds of one call: the median of runs of several calls at once, so that the host's share is hidden."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    many = max(2, min(20, int(0.02 / (time.perf_counter() - start))))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(many):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - start) / many)
    return statistics.median(times)


def search(
    candidates: Sequence[AnyTiles],
    seconds_of: Callable[[AnyTiles], float | None],
    deadline: Callable[[], bool],
) -> dict[AnyTiles, float]:
    """Times of the candidates tried, by candidate: all shapes of tiles, then depths and bands of the best.

    Args:
        candidates: tile sizes, the heuristic's choice first.
        seconds_of: time of one; None where it does not run.
        deadline: whether time is up. The heuristic's choice is tried anyway.
    """
    times: dict[AnyTiles, float] = {}
    tried: set[AnyTiles] = set()

    def attempt(some: Iterable[AnyTiles]) -> None:
        for candidate in some:
            if candidate in tried or (tried and deadline()):
                continue
            tried.add(candidate)
            seconds = seconds_of(candidate)
            if seconds is not None:
                times[candidate] = seconds

    def apart_from(tiles: AnyTiles, *names: str) -> dict[str, int]:
        return {name: value for name, value in dataclasses.asdict(tiles).items() if name not in names}

    def alike(names: tuple[str, ...]) -> Iterable[AnyTiles]:
        """Candidates that differ from the best in the fields `names` alone."""
        best = min(times, key=lambda tiles: times[tiles])
        return (tiles for tiles in candidates if apart_from(tiles, *names) == apart_from(best, *names))

    first_of_shape: dict[tuple, AnyTiles] = {}
    for tiles in candidates:
        first_of_shape.setdefault(tuple(apart_from(tiles, "stages", "band").items()), tiles)
    attempt(first_of_shape.values())
    for names in (("stages",), ("band",)):
        if times:
            attempt(alike(names))
    return times


def tune_launch(
    recorded: Recorded, layer: ExpertLayer, tokens: int, backend: Mosaic, timer: Timer, seconds: float
) -> Tiles | None:
    """The fastest tiles of a launch; None where not even the heuristic's run. Prints a line."""
    shape = layer.shape
    chosen = jnp.asarray(choose_experts("balanced", tokens, shape.experts, shape.top_k))
    weights = jnp.full(chosen.shape, 1 / shape.top_k, jnp.float32)
    slots = make_slots(make_dispatch(chosen, shape.experts), weights, recorded.rows)
    keys = jax.random.split(jax.random.key(0), len(recorded.arrays))
    arrays = [
        0.3 * jax.random.normal(key, array.shape, array.dtype)
        for key, array in zip(keys, recorded.arrays, strict=True)
    ]
    expected: list[list[jax.Array]] = []
    end = time.monotonic() + seconds

    def seconds_of(tiles: Tiles) -> float | None:
        fixed = dataclasses.replace(backend, tiles={recorded.launch.key: dataclasses.asdict(tiles)})
        try:
            jitted = jax.jit(lambda slots, arrays: recorded.rebuild(fixed, slots, arrays))
            run = jitted.lower(slots, arrays).compile()
            outputs = jax.block_until_ready(run(slots, arrays))
            expected[:] = expected or [outputs]
            if not _agree(expected[0], outputs, slots, recorded.rows):
                print(f"  {tiles}: other results than {candidates[0]}, not used", flush=True)
                return None
            del outputs
            return timer(lambda: run(slots, arrays))
        except Exception as error:
            print(f"  {tiles}: does not run: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return None

    candidates: list[Tiles] = list(recorded.launch.candidates())
    times = search(candidates, seconds_of, lambda: time.monotonic() > end)
    if candidates[0] not in times:
        print(f"{recorded.launch.key}: the heuristic's tiles do not run", flush=True)
        return None
    best = min(times, key=lambda tiles: times[tiles])
    print(
        f"{recorded.launch.key}: {1e3 * times[best]:.3f} ms with {best}; heuristic {1e3 * times[candidates[0]]:.3f} ms "
        f"({len(times)} of {len(candidates)} tried)",
        flush=True,
    )
    return best


def _agree(expected: list[jax.Array], outputs: list[jax.Array], slots: Slots, rows: int) -> bool:
    """Whether two results of a launch are the same up to the order of sums. What padding holds at the end is not."""
    padded = slots.token.shape[0]
    in_use = jnp.arange(padded) < slots.num_tiles * rows

    @jax.jit
    def difference(one: jax.Array, other: jax.Array) -> jax.Array:
        if one.ndim == 2 and one.shape[0] == padded:
            one, other = (jnp.where(in_use[:, None], array, 0) for array in (one, other))
        elif one.ndim == 2:  # one value for each column block and slot: blocks are as wide as tiles
            one, other = (jnp.where(in_use, array.sum(axis=0), 0) for array in (one, other))
        apart = jnp.abs(one.astype(jnp.float32) - other.astype(jnp.float32)).max()
        return apart / jnp.maximum(jnp.abs(one).max().astype(jnp.float32), 1e-30)

    pairs = zip(expected, outputs, strict=True)
    return all(float(difference(one, other)) < 2**-6 for one, other in pairs)
