"""A checkpoint with an adapter merged into it, in the checkpoint's own layout.

Values are those of PEFT's ``merge_and_unload``. A linear layer's delta, in float32, is added in float32 and the sum
rounded once. On a bare parameter and on an embedding the delta is first rounded to the weight's dtype. With DoRA all is
in float32 but the result.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.interop.loading import numpy_dtype
from jaxmoe.interop.peft.adapter import Adapter, LowRank
from jaxmoe.interop.peft.today import grouped, part_of
from jaxmoe.interop.quantizing import Replay
from jaxmoe.interop.rules import Binding
from jaxmoe.interop.source import Source
from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.slices import Box, pieces, positions

PIECE_ELEMENTS = 1 << 20
"""Tensors are merged in pieces of at most so many numbers; with DoRA, in whole matrices."""


class Merge:
    """The tensors of a checkpoint with an adapter merged in.

    Attributes:
        touched: names of the checkpoint's tensors that the adapter changes.
    """

    def __init__(
        self,
        adapter: Adapter,
        source: Source,
        bindings: Mapping[str, Binding],
        replay: Replay | None = None,
    ) -> None:
        """Find the tensors that hold what is adapted.

        Args:
            adapter: on the parameters of today's transformers.
            source: the checkpoint, in any layout.
            bindings: of today's names, as `today` gives them.
            replay: the base as it was when the adapter was trained, where that is not what the files hold.

        Raises:
            UserError: the adapter changes an embedding that the checkpoint ties to the output head, which it leaves.
        """
        if source.spec.tie_embeddings:
            _refuse_tied(adapter, bindings)
        _, self._files = source.opened
        self._adapter, self._replay = adapter, replay
        self._of_tensor = source.bindings.of_tensor
        named = adapter.pairs.keys() | adapter.saved.keys()
        changed = grouped(bindings[name] for name in sorted(named))
        self._changes: dict[str, list[Binding]] = {}
        for name, binding in self._of_tensor.items():
            overlapping = [whole for whole in changed.get(part_of(binding), []) if _overlap(binding, whole)]
            if overlapping or (replay is not None and replay.has(binding.target)):
                self._changes[name] = overlapping

    @property
    def touched(self) -> frozenset[str]:
        """Names of the checkpoint's tensors that the adapter changes."""
        return frozenset(self._changes)

    def fetch(self, info: TensorInfo) -> Iterator[memoryview | bytearray]:
        """The bytes of one tensor, in order; those of the checkpoint where nothing changes.

        Raises:
            UserError: a merged value does not fit the tensor's dtype.
        """
        if info.name not in self._changes:
            yield from self._files.iter_bytes(info.name)
            return
        binding = self._of_tensor[info.name]
        for box in self._boxes(info.name, binding):
            values = self._merged(info, binding, box)
            yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

    def _boxes(self, name: str, binding: Binding) -> Iterator[Box]:
        whole = [slice(0, size) for size in binding.sizes]
        pairs = [self._adapter.pairs.get(change.source) for change in self._changes[name]]
        if not any(pair is not None and pair.magnitude is not None for pair in pairs):
            yield from pieces(whole, PIECE_ELEMENTS)
        elif binding.letters[0] == "E":
            yield from ((slice(i, i + 1), *whole[1:]) for i in range(binding.sizes[0]))
        else:
            yield tuple(whole)

    def _merged(self, info: TensorInfo, binding: Binding, box: Box) -> np.ndarray:
        """The box of a tensor on its letters, merged."""
        held = binding.within(box)
        letters = binding.declared.dims
        values = self._before(info, binding, box, held)
        for whole in self._changes[info.name]:
            region = _common(held, whole.held)
            if region is None:
                continue
            place = tuple(
                slice(region[x].start - held[x].start, region[x].stop - held[x].start) for x in letters
            )
            values[place] = self._changed(whole, region, values[place], info)
        values = _cast(info, values, numpy_dtype(info.dtype))
        free = [x for x in letters if x in binding.letters]
        squeezed = values.reshape([held[x].stop - held[x].start for x in free])
        return squeezed.transpose(_order(free, binding.letters))

    def _before(self, info: TensorInfo, binding: Binding, box: Box, held: Mapping[str, slice]) -> np.ndarray:
        """The box as the adapter was trained on it, its axes the parameter's own."""
        if self._replay is not None and self._replay.has(binding.target):
            values = self._replay.region(binding.target, held)
            # Wide enough for both: what is merged is rounded to the file's dtype.
            return values if values.dtype == numpy_dtype(info.dtype) else values.astype(np.float32)
        before = self._files.read_box(info.name, binding.sizes, box)
        letters = binding.declared.dims
        values = before.transpose(_order(binding.letters, letters)).reshape(
            [held[letter].stop - held[letter].start for letter in letters]
        )
        return np.array(values)

    def _changed(
        self, whole: Binding, region: Mapping[str, slice], values: np.ndarray, info: TensorInfo
    ) -> np.ndarray:
        """A region of a parameter, its axes the parameter's own, in the dtype of the file."""
        dtype = numpy_dtype(info.dtype)
        inside = {
            x: slice(s.start - whole.held[x].start, s.stop - whole.held[x].start) for x, s in region.items()
        }
        saved, pair = self._adapter.saved.get(whole.source), self._adapter.pairs.get(whole.source)
        if saved is not None:
            part = saved.reshape(whole.sizes)[tuple(inside[x] for x in whole.letters)]
            values = _cast(info, _as_parameter(part, whole, region), dtype)
        if pair is None:
            return values
        stored = _as_stored(values, whole, region)
        merged = np.empty(stored.shape, dtype)
        experts = whole.axes[0] == ("E",) and pair.a.ndim == 3
        rows, columns = (_places(whole, inside, group) for group in whole.axes[-2:])
        for index in range(stored.shape[0]):
            one = pair.of_expert(inside["E"].start + index) if experts else pair
            merged[index] = _cast(info, _add(stored[index], one, rows, columns), dtype)
        return _as_parameter(merged, whole, region)


def _refuse_tied(adapter: Adapter, bindings: Mapping[str, Binding]) -> None:
    """PEFT changes the embedding and not the head until it merges, and then both."""
    embed = next(name for name, binding in bindings.items() if binding.target == "embed")
    if embed in adapter.pairs or embed in adapter.saved:
        raise UserError(
            f"the adapter changes {embed}, which config.json ties to the output head: merged, it would change that as "
            "well; untie the base first (tie_word_embeddings false, and a lm_head.weight that repeats it)"
        )


def _add(weight: np.ndarray, pair: LowRank, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A part of a matrix as it is stored, with what the pair does to it."""
    left, right = (pair.a.T, pair.b.T) if pair.transposed else (pair.b, pair.a)
    left, right = left[rows].astype(np.float32), right[:, columns].astype(np.float32)
    delta = left @ right
    delta *= np.float32(pair.scale)
    exact = np.result_type(weight.dtype, np.float32)
    if pair.magnitude is None:
        if pair.wrapped:
            delta = delta.astype(weight.dtype)
        return weight.astype(exact) + delta.astype(exact)
    merged = weight.astype(exact) + delta
    axis = 0 if pair.transposed else 1
    lengths = np.sqrt(np.sum(np.square(merged), axis=axis))
    outputs = columns if pair.transposed else rows
    factor = pair.magnitude.astype(np.float32)[outputs] / lengths
    return np.expand_dims(factor, axis) * merged


def _overlap(binding: Binding, whole: Binding) -> bool:
    return _common(binding.held, whole.held) is not None


def _common(one: Mapping[str, slice], other: Mapping[str, slice]) -> dict[str, slice] | None:
    found = {x: slice(max(one[x].start, other[x].start), min(one[x].stop, other[x].stop)) for x in one}
    return found if all(part.start < part.stop for part in found.values()) else None


def _order(letters: Sequence[str], wanted: Sequence[str]) -> list[int]:
    return [letters.index(letter) for letter in wanted if letter in letters]


def _lengths(letters: Sequence[str], region: Mapping[str, slice]) -> list[int]:
    return [region[letter].stop - region[letter].start for letter in letters]


def _as_stored(values: np.ndarray, whole: Binding, region: Mapping[str, slice]) -> np.ndarray:
    """(axes of the parameter) → (experts or 1, first axis, second axis) of the tensor in memory."""
    free = [x for x in whole.declared.dims if x in whole.letters]
    inner = values.reshape(_lengths(free, region)).transpose(_order(free, whole.letters))
    matrix = [math.prod(_lengths(group, region)) for group in whole.axes[-2:]]
    return inner.reshape(-1, *matrix)


def _as_parameter(values: np.ndarray, whole: Binding, region: Mapping[str, slice]) -> np.ndarray:
    """(a region of the tensor in memory) → (axes of the parameter)."""
    dims = whole.declared.dims
    free = [x for x in dims if x in whole.letters]
    inner = values.reshape(_lengths(whole.letters, region)).transpose(_order(whole.letters, free))
    return inner.reshape(_lengths(dims, region))


def _places(whole: Binding, inside: Mapping[str, slice], group: Sequence[str]) -> np.ndarray:
    """Where a region lies on one axis of the tensor in memory."""
    sizes = dict(zip(whole.letters, whole.sizes, strict=True))
    return positions([sizes[x] for x in group], [inside[x] for x in group], range(len(group)))


def _cast(info: TensorInfo, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    lost = ~np.isfinite(cast)
    if lost.any():
        largest = np.abs(values[lost].astype(np.float64)).max()
        raise UserError(
            f"tensor {info.name}: merged value {largest:.6g} does not fit its dtype {info.dtype}; the adapter is "
            "damaged, or belongs to another model"
        )
    return cast
