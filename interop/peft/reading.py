"""Reading an adapter's folder."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmoe.errors import UserError, listed
from jaxmoe.interop.peft.adapter import Adapter, LowRank
from jaxmoe.interop.peft.anatomy import Anatomy, Module
from jaxmoe.interop.peft.config import AdapterConfig, read_adapter_config
from jaxmoe.interop.peft.keys import Part, factor_key, parse_key, whole_key
from jaxmoe.interop.peft.legacy import fuse, rename_saved
from jaxmoe.interop.peft.matching import Target, match
from jaxmoe.interop.peft.packing import is_exchanged, unpack
from jaxmoe.interop.storage.problems import raise_problems
from jaxmoe.interop.storage.reader import CheckpointFolder

WEIGHTS_FILE = "adapter_model.safetensors"

_FLOATS = ("BF16", "F16", "F32", "F64")

_Found = dict[str, dict[int, dict[Part, str]]]
"""Module → wrappers around the parameter → which factor → the tensor's name in the file."""


def read_adapter(folder: str | Path, anatomy: Anatomy) -> Adapter:
    """Read an adapter that PEFT wrote, of any version.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        anatomy: of the model that it belongs to.

    Returns:
        The adapter on the parameters of today's transformers, experts' layers of transformers 4 among them.

    Raises:
        UserError: whatever is missing, unknown or of a wrong shape, all listed once; a setting that is not supported.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    with _open(folder) as file:
        return _Reading(folder, config, anatomy, file).run()


def _open(folder: Path) -> CheckpointFolder:
    if not (folder / WEIGHTS_FILE).exists():
        others = sorted(path.name for path in folder.glob("adapter_model*"))
        found = f"found {listed(others, 3)}" if others else "there is none"
        raise UserError(
            f"{folder}: {found}, expected {WEIGHTS_FILE}; a pickled adapter_model.bin is not read: load it with PEFT "
            "and save_pretrained(…, safe_serialization=True)"
        )
    file = CheckpointFolder(folder)
    if [shard.file for shard in file.shards] != [WEIGHTS_FILE]:
        names = listed([shard.file for shard in file.shards], 3)
        file.close()
        raise UserError(
            f"{folder}: holds {names} beside the adapter, expected {WEIGHTS_FILE} alone; move the adapter's files into "
            "a folder of their own"
        )
    return file


class _Reading:
    def __init__(self, folder: Path, config: AdapterConfig, anatomy: Anatomy, file: CheckpointFolder) -> None:
        self.folder, self.config, self.file, self.whole = folder, config, file, anatomy
        self.problems: list[str] = []
        self.keys = {name: parse_key(name) for name in file.tensors}
        self.is_former = any(
            key.module in anatomy.pieces and key.module not in anatomy.by_name for key in self.keys.values()
        )
        self.anatomy = anatomy.in_pieces() if self.is_former else anatomy
        self.matched = match(config, self.anatomy, folder, strict=False)
        self.unknown = set(self.keys)
        """Tensors of the file that nothing has asked for yet."""

    def run(self) -> Adapter:
        """The adapter, or all that is wrong with it."""
        self._check_dtypes()
        saved = dict(self._saved())
        pairs = {pair.name: pair for pair in self._pairs()}
        self.problems += [
            f"tensor {name} belongs to nothing that is adapted" for name in sorted(self.unknown)
        ]
        raise_problems(self.folder, self.problems)
        if self.is_former:
            pairs = fuse(pairs, self.whole, self.folder)
            saved = rename_saved(saved, self.whole, self.folder)
        return Adapter(pairs, saved, self.config.base_model_name_or_path, self.config.lora_dropout)

    def _check_dtypes(self) -> None:
        for name, info in self.file.tensors.items():
            if info.dtype not in _FLOATS:
                self.problems.append(
                    f"tensor {name} has dtype {info.dtype}, expected one of {', '.join(_FLOATS)}"
                )

    def _saved(self) -> Iterator[tuple[str, np.ndarray]]:
        """Parameters stored as a whole: ``modules_to_save``, biases, and embeddings where they are adapted."""
        shapes = {m.full(name): (m, name, m.parameters[name]) for m, name in self.anatomy.parameters()}
        stored = {f"{key.module}.{key.parameter}": name for name, key in self.keys.items() if not key.part}
        wanted = set(self.matched.saved)
        for name in sorted(wanted - stored.keys()):
            module, parameter, _ = shapes[name]
            self.problems.append(f"tensor {whole_key(module.name, parameter)} is missing")
        for name, tensor in stored.items():
            if name not in shapes:
                continue
            module, parameter, shape = shapes[name]
            if name not in wanted and not self._may_be_whole(module, parameter):
                continue
            self.unknown.discard(tensor)
            if self.file.tensors[tensor].shape != shape:
                self._misshapen(tensor, shape)
            else:
                yield name, self.file.read(tensor)

    def _may_be_whole(self, module: Module, parameter: str) -> bool:
        if module.kind == "embedding" or module.name == self.anatomy.head:
            return True  # PEFT stores these where it adapts them, and where it finds that the vocabulary grew
        return parameter == "bias" and self.config.bias != "none"

    def _pairs(self) -> Iterator[LowRank]:
        found: _Found = {}
        for name, key in self.keys.items():
            if key.part:
                found.setdefault(key.module, {}).setdefault(key.depth, {})[key.part] = name
        by_module: dict[str, list[Target]] = {}
        for target in self.matched.targets.values():
            by_module.setdefault(target.module.name, []).append(target)
        for module, targets in by_module.items():
            levels = self._complete(module, targets, found.get(module, {}))
            if levels is not None:
                for target, names in zip(self._arranged(targets, levels), levels, strict=True):
                    pair = self._pair(target, names)
                    if pair is not None:
                        yield pair

    def _complete(
        self, module: str, targets: Sequence[Target], found: Mapping[int, Mapping[Part, str]]
    ) -> list[Mapping[Part, str]] | None:
        """The tensors' names of every wrapper of a module from the innermost out; None where one is missing."""
        levels, whole = [], True
        for depth in reversed(range(len(targets))):
            names = found.get(depth, {})
            parts: tuple[Part, ...] = ("a", "b", "magnitude") if self.config.use_dora else ("a", "b")
            for part in parts:
                if part in names:
                    self.unknown.discard(names[part])
                else:
                    whole = False
                    embedding = targets[0].module.kind == "embedding"
                    key = factor_key(module, depth, part, embedding=embedding)
                    self.problems.append(f"tensor {key} is missing")
            levels.append(names)
        return levels if whole else None

    def _arranged(self, targets: Sequence[Target], levels: Sequence[Mapping[Part, str]]) -> Sequence[Target]:
        """The targets of a module in the order of its wrappers.

        PEFT wraps in the order in which parameters are registered; other writers may not, which shapes then show.
        """
        orders = [
            order
            for order in itertools.permutations(targets)
            if all(self._problem(target, names) is None for target, names in zip(order, levels, strict=True))
        ]
        return orders[0] if orders and (orders[0] == tuple(targets) or len(orders) == 1) else targets

    def _problem(self, target: Target, names: Mapping[Part, str]) -> str | None:
        """What does not fit about the shapes of a pair's factors."""
        a, b = (self.file.tensors[names[part]].shape for part in ("a", "b"))
        shape, rank = target.module.parameters[target.parameter], target.rank
        outputs, inputs = target.module.sizes(target.parameter)
        packed = rank * (shape[0] if len(shape) == 3 else 1)
        told = f"tensors {names['a']} and lora_B of shapes {list(a)} and {list(b)}, expected "
        if len(a) != 2 or len(b) != 2 or a[0] != packed or b[1] != packed:
            return f"{told}{[packed, inputs]} and {[outputs, packed]} for rank {rank} on {target.name} {list(shape)}"
        if len(shape) == 2:
            fits = (a[1], b[0]) == (inputs, outputs)
            return None if fits else f"{told}{[packed, inputs]} and {[outputs, packed]} on {target.name}"
        if (a[1], b[0]) in {(inputs, outputs), (outputs, inputs)}:
            return None
        return f"{told}{[packed, inputs]} and {[outputs, packed]} on {target.name} {list(shape)}"

    def _pair(self, target: Target, names: Mapping[Part, str]) -> LowRank | None:
        problem = self._problem(target, names)
        if problem is not None:
            self.problems.append(problem)
            return None
        module, parameter = target.module, target.parameter
        shape, sizes = module.parameters[parameter], module.sizes(parameter)
        a, b = self.file.read(names["a"]), self.file.read(names["b"])
        if len(shape) == 3:
            try:
                exchanged = is_exchanged(
                    a.shape[1], b.shape[0], sizes, module.transposed, self.config.peft_version
                )
            except ValueError as error:
                self.problems.append(f"{target.name}: {error}")
                return None
            a, b = unpack(a, b, shape[0], exchanged)
        magnitude = self._magnitude(target, names)
        if self.config.use_dora and magnitude is None:
            return None
        wrapped = module.kind == "embedding" or target.alone
        transposed = module.stored_transposed(parameter)
        return LowRank(target.name, a, b, target.scale, magnitude, transposed, wrapped)

    def _magnitude(self, target: Target, names: Mapping[Part, str]) -> np.ndarray | None:
        if "magnitude" not in names or not self.config.use_dora:
            return None
        outputs, _ = target.module.sizes(target.parameter)
        if self.file.tensors[names["magnitude"]].shape != (outputs,):
            self._misshapen(names["magnitude"], (outputs,))
            return None
        return self.file.read(names["magnitude"])

    def _misshapen(self, tensor: str, expected: Sequence[int]) -> None:
        shape = list(self.file.tensors[tensor].shape)
        self.problems.append(f"tensor {tensor} has shape {shape}, expected {list(expected)}")
