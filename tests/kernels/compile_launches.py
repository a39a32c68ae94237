"""Compile every kernel launch of real layers for an H200 on a machine without one, and hold it against limits.

    make kernels

Needs XLA's CUDA plugin on the PYTHONPATH and ptxas on the PATH; .ci/compile-kernels sees to both. A launch fails whose
registers spill, that has a stack frame, or whose shared memory is more than a multiprocessor has for a block (which
already its lowering refuses). Launches that differ in sizes alone, not in the code, are compiled once.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",  # the GPU is not there
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # what comes from there is not compiled
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import core as mosaic_gpu
from jax.sharding import SingleDeviceSharding

from jaxmoe.codecs import four_bit, fp8_blocks, int8_rows
from jaxmoe.kernels.devices import Device, describe
from jaxmoe.kernels.expert_mlp.contract import Grads, Options
from jaxmoe.kernels.expert_mlp.dispatch import make_dispatch
from jaxmoe.kernels.expert_mlp.mosaic.epilogues import Activate, ActivationGradient, StoreRows
from jaxmoe.kernels.expert_mlp.mosaic.geometry import Geometry
from jaxmoe.kernels.expert_mlp.mosaic.gradient import Side, weight_gradient
from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic
from jaxmoe.kernels.expert_mlp.mosaic.matmul import Epilogue, Segment, grouped_matmul
from jaxmoe.kernels.expert_mlp.mosaic.packed import E4M3, Form, Lookup, PackedMatrices
from jaxmoe.kernels.expert_mlp.mosaic.slots import Slots, sum_choices
from jaxmoe.kernels.expert_mlp.mosaic.tiles import (
    SHARED_MEMORY_BYTES,
    GradientLaunch,
    GradientTiles,
    MatmulLaunch,
    MatmulTiles,
)
from jaxmoe.kernels.expert_mlp.operands import Experts, Lora, is_packed
from jaxmoe.kernels.expert_mlp.specs import LAYERS, ExpertLayer, layer_of

H200 = Device("NVIDIA H200", "gpu", multiprocessors=132, capability=(9, 0), present=False)
DTYPE = jnp.bfloat16
PACKED = {
    "Qwen3-30B-A3B": ((8192, 16, "nf4/64"), (512, 0, "nf4/64"), (8192, 16, "int8")),
    "gpt-oss-20b": ((8192, 16, "mxfp4/32"),),
    "DeepSeek-V3": ((8192, 16, "nf4/128"), (8192, 16, "fp8/128")),
}
"""Tokens, ranks and bases in few bits that models' kernels are compiled for beside those of every model."""
TARGET = Path(__file__).parent / "h200.textproto"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What decides about the machine code."""

    kind: str
    operands: str
    tiles: MatmulTiles | GradientTiles

    @property
    def sizes(self) -> str:
        tiles = self.tiles
        if isinstance(tiles, MatmulTiles):
            return f"{tiles.rows} x {tiles.columns} x {tiles.stages}"
        return f"{tiles.out} x {tiles.columns} x {tiles.stages}"


@dataclasses.dataclass(frozen=True)
class Recorder(Mosaic):
    """Runs no kernel; notes for each the function that would, and the shapes of its arguments."""

    noted: dict[Kernel, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def matmul(
        self, launch: MatmulLaunch, segments: Sequence[Segment], slots: Slots, epilogue: Epilogue
    ) -> list[jax.Array]:
        geometry = Geometry(launch.tiles({}), launch.parts, launch.columns, launch.contract_first)
        gathered = [segment.gathered for segment in segments]

        def run(pairs: Any, slots: Slots, pre: Any) -> Any:
            given = [Segment(*pair, is_so) for pair, is_so in zip(pairs, gathered, strict=True)]
            now = epilogue
            if isinstance(epilogue, ActivationGradient):
                now = ActivationGradient(epilogue.activation, epilogue.dtype, pre, slots.weight)
            return grouped_matmul(given, slots, now, geometry, multiprocessors=H200.multiprocessors)

        operands = " + ".join("gathered" if is_so else "rows" for is_so in gathered)
        packed = [segment.weights.form for segment in segments if isinstance(segment.weights, PackedMatrices)]
        if packed:
            operands += f", {_form(packed[0])}"
        if launch.contract_first:
            operands += ", transposed"
        kernel = Kernel(_name(epilogue), operands, geometry.tiles)
        pre = epilogue.pre if isinstance(epilogue, ActivationGradient) else None
        self._note(kernel, run, ([(segment.rows, segment.weights) for segment in segments], slots, pre))
        outputs = epilogue.outputs(slots.token.shape[0], geometry)
        return [jnp.zeros(output.shape, output.dtype) for output in outputs]

    def gradient(
        self, launch: GradientLaunch, out: Side, columns: Side, slots: Slots, tile_rows: int
    ) -> jax.Array:
        tiles = launch.tiles({})

        def run(out_rows: Any, column_rows: Any, slots: Slots) -> Any:
            sides = Side(out_rows, out.gathered), Side(column_rows, columns.gathered)
            return weight_gradient(
                *sides, slots, tiles, tile_rows=tile_rows, multiprocessors=H200.multiprocessors
            )

        operands = " x ".join("gathered" if side.gathered else "rows" for side in (out, columns))
        kernel = Kernel("weight gradient", operands, tiles)
        self._note(kernel, run, (out.rows, columns.rows, slots))
        return jnp.zeros((slots.first_tile.shape[0], launch.out, launch.columns), out.rows.dtype)

    def _note(self, kernel: Kernel, run: Any, arguments: Any) -> None:
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arguments)
        self.noted.setdefault(kernel, (run, shapes))


def _form(form: Form) -> str:
    if isinstance(form.decoding, Lookup):
        return f"{form.decoding.kind}/{form.block}"
    return f"fp8/{form.block}" if isinstance(form.decoding, E4M3) else "int8"


def _name(epilogue: Epilogue) -> str:
    if isinstance(epilogue, StoreRows):
        return "matmul"
    if isinstance(epilogue, Activate):
        return f"matmul, {epilogue.activation.name}" + (", both kept" if epilogue.save else "")
    assert isinstance(epilogue, ActivationGradient)
    return f"matmul, gradient of {epilogue.activation.name}"


def pack(values: jax.Array, how: str) -> Any:
    """Matrices (E, …, n, c) as `how` says it: "int8", or a kind and a block of `four_bit` or `fp8_blocks`."""
    if how == "int8":
        return int8_rows.quantize(values)
    kind, block = how.split("/")
    if kind == "fp8":
        return fp8_blocks.quantize(values, int(block), rows=int(block))
    return jax.vmap(lambda one: four_bit.quantize(one, kind, int(block)))(values)


def launches(layer: ExpertLayer, tokens: int, rank: int, how: str = "") -> dict[Kernel, tuple[Any, Any]]:
    """Those of forward, with and without what is kept, and backward.

    Beside LoRA (rank not 0) the base is frozen; where `how` says how it is packed, too.

    Raises:
        NotImplementedError: the kernels cannot take the layer.
    """
    shape, parts = layer.shape, layer.activation.parts
    held, width, hidden = shape.experts, shape.d_model, shape.d_hidden
    struct = lambda *sizes, dtype=DTYPE: jax.ShapeDtypeStruct(sizes, dtype)
    lora = Lora()
    if rank:
        lora = Lora(
            struct(held, rank, width),
            struct(held, parts, hidden, rank),
            struct(held, rank, hidden),
            struct(held, width, rank),
        )
    base = lambda *sizes: jax.eval_shape(lambda x: pack(x, how) if how else x, struct(*sizes))
    experts = Experts(
        base(held, parts, hidden, width),
        base(held, width, hidden),
        struct(held, parts, hidden) if layer.bias else None,
        struct(held, width) if layer.bias else None,
        lora,
    )
    trained = jax.tree.map(lambda _: not (rank or how), experts._replace(lora=Lora()), is_leaf=is_packed)
    wanted = Grads(x=True, weights=True, experts=trained._replace(lora=jax.tree.map(lambda _: True, lora)))
    recorder = Recorder(H200.multiprocessors)

    def both_ways(x: jax.Array, experts: Experts, weights: jax.Array, chosen: jax.Array) -> Any:
        options, dispatch = Options(layer.activation, 1.0, H200), make_dispatch(chosen, held)
        alone, _ = recorder.forward(options, x, experts, weights, dispatch, save=False)
        out, saved = recorder.forward(options, x, experts, weights, dispatch, save=True)
        assert saved is not None
        return alone, recorder.backward(options, x, experts, weights, dispatch, saved, out, wanted)

    weights = struct(tokens, shape.top_k, dtype=jnp.float32)
    jax.eval_shape(
        both_ways, struct(tokens, width), experts, weights, struct(tokens, shape.top_k, dtype=jnp.int32)
    )
    return recorder.noted


@contextlib.contextmanager
def output_of_the_process() -> Iterator[Any]:
    """What libraries write to stdout and stderr meanwhile, as a function to call afterwards."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile("w+") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield lambda: (file.seek(0), file.read())[1]
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


class Compiler:
    """For one described device."""

    def __init__(self) -> None:
        (device,) = topologies.get_topology_desc(
            "", "cuda", target_config=TARGET.read_text(), topology="1x1x1"
        ).devices
        if describe(device) != H200:
            raise RuntimeError(f"expected the topology to be of {H200}, found {describe(device)}")
        self.sharding = SingleDeviceSharding(device)
        self.shared_memory = 0
        size_of = mosaic_gpu._smem_tree_size

        def noting_size_of(tree: Any) -> int:
            size = size_of(tree)
            self.shared_memory = max(self.shared_memory, size)  # of all, when it is asked for that
            return size

        mosaic_gpu._smem_tree_size = noting_size_of

    def compile(self, run: Any, shapes: Any) -> dict[str, int]:
        """Registers of a thread; bytes of its stack frame, spilled by it, and of shared memory."""
        place = lambda struct: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=self.sharding)
        self.shared_memory = 0
        with output_of_the_process() as output:
            try:
                jax.jit(run).lower(*jax.tree.map(place, shapes)).compile()
            finally:
                report = output()
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
        )
        registers = re.findall(r"Used (\d+) registers", report)
        if len(frames) != 1 or len(registers) != 1:
            raise RuntimeError(f"expected the report of ptxas about one kernel, found this:\n{report}")
        stack, stored, loaded = map(int, frames[0])
        return {
            "registers": int(registers[0]),
            "stack": stack,
            "spilled": stored + loaded,
            "shared": self.shared_memory,
        }


def combine(compiler: Compiler, tokens: int, layer: ExpertLayer) -> str:
    """What XLA makes of the weighted sum of every token's slots, which is left to it: one pass over memory?

    Raises:
        RuntimeError: it scatters, or keeps what it has gathered.
    """
    shape = layer.shape
    padded = tokens * shape.top_k + shape.experts * 127

    def run(y: jax.Array, inverse: jax.Array, weights: jax.Array) -> jax.Array:
        unused = jnp.zeros((0,), jnp.int32)
        return sum_choices(y, Slots(*[unused] * 6, inverse), weights)

    compiled = (
        jax.jit(run)
        .lower(
            *(
                jax.ShapeDtypeStruct(sizes, dtype, sharding=compiler.sharding)
                for sizes, dtype in (
                    ((padded, shape.d_model), DTYPE),
                    ((tokens, shape.top_k), jnp.int32),
                    ((tokens, shape.top_k), jnp.float32),
                )
            )
        )
        .compile()
    )
    text, temporary = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
    readers = re.findall(r"= \S+ fusion\([^)]*%y[.\d]*[,)]", text)
    gathered = tokens * shape.top_k * shape.d_model * jnp.dtype(DTYPE).itemsize
    if "scatter" in text or len(readers) != 1 or temporary * 100 > gathered:
        raise RuntimeError(f"the weighted sum of slots is not one pass without temporaries:\n{text}")
    return f"weighted sum of {layer.name}'s slots: 1 fusion reads them, no scatter, {temporary} bytes of temporaries"


def main() -> int:
    """Print the table; 1 if a launch broke a limit."""
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None or shutil.which("ptxas") is None:
        print("error: no CUDA plugin of XLA on the PYTHONPATH, or no ptxas on the PATH: run make kernels")
        return 2
    start = time.perf_counter()
    users: dict[Kernel, set[str]] = {}
    kernels: dict[Kernel, tuple[Any, Any]] = {}
    for layer in LAYERS:
        # Few tokens are laid out in tiles of 64 rows where that is possible.
        cases = ((8192, 0, ""), (8192, 16, ""), (8192, 128, ""), (512, 0, ""))
        for case in (*cases, *PACKED.get(layer.name, ())):
            for kernel, launch in launches(layer, *case).items():
                users.setdefault(kernel, set()).add(layer.name)
                kernels.setdefault(kernel, launch)
    compiler = Compiler()
    broken = 0
    print(
        f"jax {jax.__version__}; tiles are rows x columns x stages; stack, spills and shared memory in bytes"
    )
    print(
        f"{'kernel':34} {'operands':36} {'tiles':13} {'regs':>4} {'stack':>5} {'spill':>5} {'shared':>7}  models"
    )
    for kernel, launch in kernels.items():
        found = compiler.compile(*launch)
        is_broken = found["stack"] or found["spilled"] or not 0 < found["shared"] <= SHARED_MEMORY_BYTES
        broken += bool(is_broken)
        first, *others = sorted(users[kernel])
        print(
            f"{kernel.kind:34} {kernel.operands:36} {kernel.sizes:13} {found['registers']:4} {found['stack']:5} "
            f"{found['spilled']:5} {found['shared']:7}  {first}{f' + {len(others)}' if others else ''}"
            f"{'  TOO MUCH' if is_broken else ''}",
            flush=True,
        )
    print(combine(compiler, 8192, layer_of("Qwen3-30B-A3B")))
    models = set().union(*users.values())
    print(
        f"{len(kernels)} kernels of {len(models)} models in {time.perf_counter() - start:.0f} s, {broken} too large"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
