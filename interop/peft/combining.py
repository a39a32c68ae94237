"""Several adapters as one, and the adapter that is nearest to the difference of two models."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import einops
import numpy as np
from scipy.sparse.linalg import svds

from jaxmoe.errors import UserError
from jaxmoe.interop.loading import Parts, read_at
from jaxmoe.interop.peft.adapter import Adapter, LowRank
from jaxmoe.interop.peft.anatomy import Module
from jaxmoe.interop.peft.today import Today
from jaxmoe.interop.rules import Binding
from jaxmoe.interop.source import Source


def weighted(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The adapter whose delta is the weighted sum of those of several: their factors side by side.

    Args:
        adapters: at least one, and the weight of each. Parameters that one of them replaces as a whole keep that value,
            whatever its weight.

    Raises:
        UserError: two replace the same parameter, or several are there and one has DoRA's lengths, which do not add up.
    """
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return adapters[0][0]
    pairs: dict[str, list[tuple[LowRank, float]]] = {}
    saved: dict[str, np.ndarray] = {}
    for adapter, weight in adapters:
        for name, pair in adapter.pairs.items():
            if pair.magnitude is not None:
                raise UserError(
                    f"{name} has DoRA's lengths, which cannot be weighted or added: merge it alone"
                )
            pairs.setdefault(name, []).append((pair, weight))
        if twice := sorted(saved.keys() & adapter.saved.keys()):
            raise UserError(f"{twice[0]} is replaced by two adapters: expected one of them without it")
        saved |= adapter.saved
    return Adapter({name: _side_by_side(parts) for name, parts in pairs.items()}, saved)


def _side_by_side(parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    first = parts[0][0]
    a = np.concatenate([pair.a.astype(np.float32) for pair, _ in parts], axis=-2)
    b = np.concatenate(
        [pair.b.astype(np.float32) * np.float32(weight * pair.scale) for pair, weight in parts], axis=-1
    )
    return dataclasses.replace(first, a=a, b=b, scale=1.0)


class Extracted(NamedTuple):
    """What `extract` gives.

    Attributes:
        adapter: the nearest one of its rank.
        errors: by the parameter's name, the norm of what it leaves out over that of the difference.
    """

    adapter: Adapter
    errors: Mapping[str, float]


def extract(base: Source, tuned: Source, model: Today, rank: int) -> Extracted:
    """The adapter nearest to what a fine-tune changed: truncated SVDs (Eckart and Young 1936), expert by expert.

    Parameters that are no matrices, such as norms and biases, are replaced as a whole where they changed.

    Args:
        base: the model before.
        tuned: after, with the same config; in any layout.
        model: the base in transformers.
        rank: of every pair, per expert.

    Raises:
        UserError: the two are of different shapes, differ in nothing, or in an embedding that is tied to the head.
    """
    if tuned.spec != base.spec:
        raise UserError(f"{tuned.folder}: its config.json describes another model than that of {base.folder}")
    pairs: dict[str, LowRank] = {}
    saved: dict[str, np.ndarray] = {}
    errors: dict[str, float] = {}
    for module, parameter in model.anatomy.parameters():
        name = module.full(parameter)
        binding = model.bindings[name]
        if not _is_matrix(module, parameter, binding):
            before, after = (_whole(source, binding) for source in (base, tuned))
            if not np.array_equal(before, after):
                saved[name] = after
            continue
        found = _pair(name, binding, module, base, tuned, rank)
        if found is not None:
            pairs[name], errors[name] = found
    if not pairs:
        raise UserError(
            f"{tuned.folder} has the matrices of {base.folder}: expected a model that was trained"
        )
    if base.spec.tie_embeddings and any(model.bindings[name].target == "embed" for name in (*pairs, *saved)):
        raise UserError(
            f"{tuned.folder} differs in its embedding, which is tied to the output head: PEFT has no adapter for both"
        )
    return Extracted(Adapter(pairs, saved, str(base.folder)), errors)


def _is_matrix(module: Module, parameter: str, binding: Binding) -> bool:
    adaptable = module.kind in ("linear", "router") or len(module.parameters[parameter]) == 3
    return (
        adaptable
        and len(module.parameters[parameter]) >= 2
        and binding.declared.role in ("matrix", "router", "embedding")
    )


def _whole(source: Source, binding: Binding) -> np.ndarray:
    _, files = source.opened
    parts = source.bindings.of_parameter[binding.target]
    part = read_at(files, binding.declared, parts, binding.index)
    free = [letter for letter in binding.declared.dims if letter not in binding.index]
    cut = part[tuple(binding.held[letter] for letter in free)]
    return binding.to_tensor(cut)


def _pair(
    name: str, binding: Binding, module: Module, base: Source, tuned: Source, rank: int
) -> tuple[LowRank, float] | None:
    """The pair of one parameter and its relative error; None where nothing changed."""
    batch = [letter for group in binding.axes[:-2] for letter in group]
    sizes = dict(zip(binding.letters, binding.sizes, strict=True))
    factors, lost, total = [], 0.0, 0.0
    letters = "".join([*binding.index, *batch])
    parts = [Parts(source.bindings.of_parameter[binding.target], letters) for source in (tuned, base)]
    for index in itertools.product(*(range(sizes[letter]) for letter in batch)):
        fixed = {**binding.index, **dict(zip(batch, index, strict=True))}
        at = [part.at([fixed[letter] for letter in letters]) for part in parts]
        difference = np.subtract(
            *(_matrix(source, binding, own, fixed) for source, own in zip((tuned, base), at, strict=True))
        )
        a, b, rest = _truncated(difference, rank)
        factors.append((a, b))
        lost, total = lost + rest, total + float(np.sum(np.square(difference, dtype=np.float64)))
    if total == 0.0:
        return None
    stack = [sizes[letter] for letter in batch]
    a, b = (np.stack(arrays).reshape(*stack, *arrays[0].shape) for arrays in zip(*factors, strict=True))
    inputs_first = binding.axes[-1] != (binding.declared.dims[-1],)
    wrapped = module.kind in ("other", "router")
    return LowRank(name, a, b, 1.0, transposed=inputs_first, wrapped=wrapped), math.sqrt(lost / total)


def _matrix(
    source: Source, binding: Binding, parts: Sequence[Binding], fixed: Mapping[str, int]
) -> np.ndarray:
    """(out, in) float32, outputs in the order of the tensor."""
    _, files = source.opened
    values = read_at(files, binding.declared, parts, fixed)
    free = [letter for letter in binding.declared.dims if letter not in fixed]
    inputs = binding.declared.dims[-1]
    first, second = binding.axes[-2:]
    outputs = first if second == (inputs,) else second
    return einops.rearrange(values, f"{' '.join(free)} -> ({' '.join(outputs)}) {inputs}").astype(np.float32)


def _truncated(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A (r, in) and B (out, r) with the largest singular values shared evenly, and the squared norm of the rest."""
    outputs, inputs = difference.shape
    if not difference.any():
        return np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32), 0.0
    if rank < min(difference.shape):
        left, values, right = svds(difference, k=rank, random_state=0)
    else:
        left, values, right = np.linalg.svd(difference, full_matrices=False)
    root = np.sqrt(np.maximum(values, 0))
    a, b = (root[:, None] * right).astype(np.float32), (left * root).astype(np.float32)
    missing = rank - len(root)
    a, b = np.pad(a, ((0, max(missing, 0)), (0, 0))), np.pad(b, ((0, 0), (0, max(missing, 0))))
    rest = difference - b @ a
    return a, b, float(np.sum(np.square(rest, dtype=np.float64)))


def told(errors: Mapping[str, float]) -> Iterator[str]:
    """A line per parameter, the largest error first."""
    for name, error in sorted(errors.items(), key=lambda item: -item[1]):
        yield f"{error:8.2%}  {name}"
