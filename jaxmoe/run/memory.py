"""Whether a training step fits: asked before it is compiled as far as it can be known, and after that exactly."""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from rich.filesize import decimal

from jaxmoe.codecs import PACKED
from jaxmoe.errors import UserError
from jaxmoe.run.assemble import Assembled

_CGROUP = Path("/sys/fs/cgroup")


def check_before_compiling(assembled: Assembled) -> None:
    """Compare what every step needs, however it is compiled, with what the devices at hand have.

    That is weights and optimiser, gradients, the batch, and what each layer is given, which the backward pass starts
    from; where some weights are frozen, it may end before the lowest layers, and these are not counted.

    Raises:
        UserError: it cannot fit; with the parts, and the key that lowers the largest.
    """
    tokens = assembled.batch.tokens
    rows = math.prod(tokens.sharding.shard_shape(tokens.shape)[1:])
    width, layers = assembled.spec.width, len(assembled.spec.layers)
    state = assembled.state
    needed = {
        "weights and optimiser": device_bytes(state),
        "gradients": device_bytes(state.trainable) * assembled.dtype.itemsize // 4,
        "the batch": device_bytes(assembled.batch),
    }
    if not jax.tree.leaves(state.frozen):
        needed["the layers' inputs"] = layers * rows * width * assembled.dtype.itemsize
    _refuse("at least ", needed, free_bytes(assembled), assembled)


def check_compiled(assembled: Assembled, compiled: Any) -> None:
    """Compare what a compiled step takes with what the devices have left, while they do not hold the state yet.

    Args:
        assembled: the run.
        compiled: its training step, a `jax.stages.Compiled`.

    Raises:
        UserError: it does not fit.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:  # a backend that tells nothing
        return
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    needed = {
        "weights, optimiser and the batch": analysis.argument_size_in_bytes + results,
        "what it computes on the way": analysis.temp_size_in_bytes,
    }
    _refuse("", needed, free_bytes(assembled), assembled)


def free_bytes(assembled: Assembled) -> int | None:
    """What the fullest of this process's devices has left; None where it does not say.

    Devices of a CPU share the machine's memory: what is available of it, or of the cgroup that this process is in.
    """
    devices = [
        device for device in assembled.mesh.devices.flat if device.process_index == jax.process_index()
    ]
    if assembled.device.platform == "cpu":
        found = [*_machine_bytes(), *_cgroup_bytes()]
        return min(found) // len(devices) if found else None
    stats = [device.memory_stats() or {} for device in devices]
    found = [one["bytes_limit"] - one["bytes_in_use"] for one in stats if "bytes_limit" in one]
    return min(found, default=None)


def remedy(assembled: Assembled, *, begun: bool = False) -> str:
    """The keys that make a step smaller, those that cost the least first.

    Args:
        assembled: the run.
        begun: its folder holds steps, which were made with the values of now.
    """
    train, mesh = assembled.config.train, assembled.config.mesh
    steps = []
    if train.rows > mesh.batch_shards:
        same = "" if assembled.config.balance.aux_loss else ", which changes no result"
        steps.append(f"lower train.micro_batch_size (now {train.rows}{same})")
    if not assembled.config.model.remat:
        steps.append("set model.remat=true")
    steps.append(f"lower data.sequence_length (now {assembled.config.data.sequence_length})")
    return " or ".join(steps) + (", in a new output_dir" if begun else "")


def _refuse(bound: str, needed: Mapping[str, int], free: int | None, assembled: Assembled) -> None:
    total = sum(needed.values())
    if free is None or total <= free:
        return
    parts = ", ".join(f"{decimal(size)} for {what}" for what, size in needed.items() if size * 100 > total)
    largest = max(needed, key=lambda what: needed[what])
    less = (
        "train less with trainable or frozen"
        if assembled.adapted is None
        else "lower adapter.rank, or set model.quantization"
    )
    lower = (
        f"shard over more devices with mesh.fsdp or mesh.expert, or {less}"
        if "weights" in largest or largest == "gradients"
        else remedy(assembled)
    )
    raise UserError(
        f"out of memory: a training step needs {bound}{decimal(total)} on each device ({parts}), found {decimal(free)} "
        f"free: {lower}"
    )


def held_bytes(assembled: Assembled) -> dict[str, int]:
    """What a device holds between steps, by its kind; kinds that a run has not are left out."""
    state = assembled.state
    is_packed = lambda leaf: isinstance(leaf, PACKED)
    frozen = jax.tree.leaves(state.frozen, is_leaf=is_packed)
    found = {
        "packed weights": device_bytes([leaf for leaf in frozen if is_packed(leaf)]),
        "frozen weights": device_bytes([leaf for leaf in frozen if not is_packed(leaf)]),
        "trained weights": device_bytes(state.trainable),
        "optimiser": device_bytes(state.opt_state),
    }
    return {kind: size for kind, size in found.items() if size}


def device_bytes(tree: Any) -> int:
    """Of one device's shards of arrays, or of declarations that have a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _machine_bytes() -> list[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return [int(line.split()[1]) * 1024]
    return []


def _cgroup_bytes() -> list[int]:
    """Of a container or a job: limits without what is used, where the pages of files can be given up.

    Version 2 of cgroups; each of those around the process's own has a limit of its own.
    """
    place = Path()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        place = Path(next(line[3:] for line in lines if line.startswith("0::")).lstrip("/"))
    found = []
    for folder in (place, *place.parents):
        with suppress(OSError, ValueError):
            limit = (_CGROUP / folder / "memory.max").read_text(encoding="utf-8").strip()
            used = int((_CGROUP / folder / "memory.current").read_text(encoding="utf-8"))
            rows = (_CGROUP / folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            stat = {name: int(value) for name, value in (row.split() for row in rows)}
            if limit != "max":
                found.append(int(limit) - used + stat.get("inactive_file", 0))
    return found
