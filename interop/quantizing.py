"""Frozen weights in few bits: which of a model's are held so, and how they get there while they are read.

bitsandbytes quantises one tensor at a time. Here such a tensor is one matrix of transformers' model: a linear layer's,
or one expert's, gate and up together. With double quantisation the scales of a tensor depend on one another, so that
what was one tensor is part of what a base is; `Form` says it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from jaxmoe.codecs import Packed, four_bit, fp8_blocks, int8_rows, unpack
from jaxmoe.config import QuantizationConfig
from jaxmoe.errors import UserError, first_line
from jaxmoe.files import read_text
from jaxmoe.interop.loading import Parts, TensorReader, read_at
from jaxmoe.interop.peft.today import Today
from jaxmoe.interop.rules import Binding
from jaxmoe.interop.source import Source
from jaxmoe.model.linear import letters_of
from jaxmoe.params import Param, Tree, named

_MAX_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Form:
    """How one of our parameters is held.

    Attributes:
        declared: the parameter itself.
        kind: "nf4", "fp4", "int8", "mxfp4" or "fp8".
        block: elements that share a scale.
        double: scales are quantised too.
        stack: letters of which each index has a tensor of its own, such as "LE"; the others are of one tensor.
        dtype: that values are rounded to, as `jaxmoe.codecs` has it.
        kept: the checkpoint has it so, and no value is quantised.
    """

    declared: Param
    kind: str
    block: int
    double: bool
    stack: str
    dtype: str | None = None
    kept: bool = False

    @property
    def tensor(self) -> str:
        """Letters of one quantised tensor."""
        return self.declared.dims[len(self.stack) :]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one quantised tensor."""
        return self.declared.shape[len(self.stack) :]

    @property
    def packed(self) -> Packed:
        """Declarations of what it is made of."""
        stack, sizes = self.stack, self.declared.shape[: len(self.stack)]
        like = jax.eval_shape(self.quantize_one, jax.ShapeDtypeStruct(self.shape, jnp.float32))

        def declare(array: jax.ShapeDtypeStruct, own: str) -> Param:
            return Param(
                stack + own, (*sizes, *array.shape), "zeros", self.declared.role, stored=array.dtype.name
            )

        return jax.tree.map(declare, like, letters_of(like, self.tensor))

    def quantize_one(self, values: Any) -> Packed:
        """One quantised tensor, of jax's arrays or numpy's."""
        packed: Packed
        if self.kind == "int8":
            packed = int8_rows.quantize(values)
        elif self.kind == "fp8":
            packed = fp8_blocks.quantize(values, self.block)
        else:
            packed = four_bit.quantize(values, self.kind, self.block, self.double)
        return dataclasses.replace(packed, dtype=self.dtype)

    def quantize(self, weight: jax.Array) -> Packed:
        """A whole parameter, tensor by tensor."""
        quantize = self.quantize_one
        for _ in self.stack:
            quantize = jax.vmap(quantize)
        return quantize(weight)

    def quantizer(self) -> Any:
        """`quantize` of one tensor, jitted for the host: a device may round a scale another way than a replay does."""
        return on_host(self.quantize_one)


def on_host(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function jitted for a CPU, whatever the devices of the run and the mesh around a call are.

    Raises:
        UserError: jax has no CPU.
    """
    try:
        (host, *_) = jax.local_devices(backend="cpu")
    except RuntimeError:
        raise UserError(
            "model.quantization: weights are quantised on the CPU, which JAX_PLATFORMS leaves out; add cpu at "
            "its end"
        ) from None
    compiled, alone = jax.jit(function), Mesh(np.asarray([host]), ("host",))

    def run(values: Any) -> Any:
        # A mesh that is set is stronger than a default device.
        with jax.set_mesh(alone):
            return compiled(values)

    return run


def forms_of(declared: Tree, model: Today, config: QuantizationConfig) -> dict[str, Form]:
    """What of a model is held in few bits: matrices of layers, but for routers and gates of a number per token.

    Norms, embeddings, the output head and filters of convolutions are none.

    Args:
        declared: its parameters.
        model: the same in transformers, which says what one tensor is.
        config: of the run.
    """
    parts: dict[str, Binding] = {}
    for binding in model.bindings.values():
        parts.setdefault(binding.target, binding)
    forms = {}
    for name, parameter in named(declared):
        if parameter.role == "matrix" and name.startswith("groups.") and "J" not in parameter.dims:
            binding = parts[name]
            batch = {letter for group in binding.axes[:-2] for letter in group} | binding.index.keys()
            stack = "".join(letter for letter in parameter.dims if letter in batch)
            if not parameter.dims.startswith(stack):
                raise ValueError(
                    f"{name} is declared as {parameter.dims}, expected letters of tensors {stack} first"
                )
            forms[name] = Form(parameter, config.kind, config.block_size, config.double_quant, stack)
    return forms


def load_packed(reader: TensorReader, form: Form, parts: Sequence[Binding], placements: Packed) -> Packed:
    """Read one parameter, tensor by tensor: no more of it is ever there in full precision than one quantised tensor.

    Args:
        reader: of the checkpoint.
        form: of the parameter.
        parts: tensors of the checkpoint that together hold it.
        placements: shardings of the packed arrays.
    """
    found = Parts(parts, form.stack)
    return pack(form, lambda index: read_tensor(reader, form, found, index), placements)


def pack(form: Form, read: Callable[[tuple[int, ...]], np.ndarray], placements: Packed) -> Packed:
    """Quantise one parameter, tensor by tensor.

    Args:
        form: of the parameter.
        read: values of the quantised tensor at an index of the letters of `Form.stack`.
        placements: shardings of the packed arrays.
    """
    quantize = form.quantizer()
    return gather(form, lambda index: jax.device_get(quantize(read(index))), placements)


def gather(form: Form, packed_at: Callable[[tuple[int, ...]], Packed], placements: Packed) -> Packed:
    """Bring the quantised tensors of one parameter to its devices.

    Args:
        form: of the parameter.
        packed_at: the quantised tensor at an index of the letters of `Form.stack`, as numpy's arrays.
        placements: shardings of the packed arrays.
    """
    declared = form.packed
    buffers = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.stored), declared)
    for index in _wanted(form, declared, placements):
        packed = packed_at(index)
        for buffer, own in zip(jax.tree.leaves(buffers), jax.tree.leaves(packed), strict=True):
            buffer[index] = own

    def place(buffer: np.ndarray, where: Any) -> jax.Array:
        return jax.make_array_from_callback(buffer.shape, where, lambda at: buffer[at]).block_until_ready()

    return jax.tree.map(place, buffers, placements)


def _wanted(form: Form, declared: Any, placements: Any) -> Iterator[tuple[int, ...]]:
    """Indices of the quantised tensors of which this process's devices hold anything."""
    leaf, where = jax.tree.leaves(declared)[0], jax.tree.leaves(placements)[0]
    axes = len(form.stack)
    seen = np.zeros(leaf.shape[:axes], bool)
    for at in where.addressable_devices_indices_map(leaf.shape).values():
        seen[at[:axes]] = True
    yield from (tuple(map(int, index)) for index in np.argwhere(seen))


def read_tensor(reader: TensorReader, form: Form, parts: Parts, index: tuple[int, ...]) -> np.ndarray:
    """The values of one quantised tensor, in the dtype that the checkpoint has, but of float64 in float32."""
    values = read_at(reader, form.declared, parts.at(index), dict(zip(form.stack, index, strict=True)))
    return values.astype(np.float32) if values.dtype == np.float64 else values


RECORD = "base_quantization.json"
"""File in an adapter's folder that says how the base was held when the adapter was trained."""


class Recorded(BaseModel):
    """What `RECORD` holds.

    Attributes:
        quantization: that of the run's config.
        dtype: that the values are computed with.
        parameters: of transformers' model, those that were held so; each is one tensor, or one for each expert.
        init: how the adapter began, as in `jaxmoe.config.AdapterConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    quantization: QuantizationConfig
    dtype: Literal["bfloat16", "float32", "float16"]
    parameters: tuple[str, ...]
    init: str = "default"

    @field_validator("quantization")
    @classmethod
    def _quantises(cls, given: QuantizationConfig) -> QuantizationConfig:
        if given.kind == "keep":
            raise ValueError("found kind 'keep', which quantises nothing and has no record")
        return given

    @classmethod
    def of(cls, forms: Mapping[str, Form], model: Today, dtype: Any, init: str) -> "Recorded":
        """What there is to record of a run.

        Args:
            forms: of the frozen parameters, at least one.
            model: the same in transformers.
            dtype: that the run computes in.
            init: how the adapter began.
        """
        one = next(iter(forms.values()))
        names = (name for name, binding in model.bindings.items() if binding.target in forms)
        return cls(
            quantization=QuantizationConfig.model_validate(
                {"kind": one.kind, "block_size": one.block, "double_quant": one.double}
            ),
            dtype=np.dtype(dtype).name,
            parameters=tuple(sorted(names)),
            init=init,
        )

    @classmethod
    def find(cls, folder: Path) -> "Recorded | None":
        """That of an adapter's folder, if it has one."""
        return cls.read(folder) if (folder / RECORD).exists() else None

    @property
    def told(self) -> str:
        """In a few words."""
        double = ", scales quantised" if self.quantization.double_quant else ""
        return f"{self.quantization.kind} in blocks of {self.quantization.block_size}{double}"

    @classmethod
    def read(cls, folder: Path) -> "Recorded":
        """That of an adapter's folder.

        Raises:
            UserError: there is none, or it is not what it should be.
        """
        path = folder / RECORD
        try:
            return cls.model_validate_json(read_text(path, _MAX_BYTES), strict=False)
        except FileNotFoundError:
            raise UserError(
                f"{folder}: has no {RECORD}, so no weight of its base was quantised for it: merge it without "
                "--quantization"
            ) from None
        except (ValidationError, OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read: {first_line(error)}; export the adapter again"
            ) from None


Changed = Callable[[str, tuple[int, ...], np.ndarray], np.ndarray]


class Replay:
    """The base of an adapter as its training saw it: what its quantised tensors stand for."""

    def __init__(
        self, source: Source, model: Today, recorded: Recorded, changed: Changed | None = None
    ) -> None:
        """Find what was quantised.

        Args:
            source: the base.
            model: the same in transformers.
            recorded: how it was held.
            changed: of our name of a parameter, the index of one of its quantised tensors and its values: what was
                quantised in their place.

        Raises:
            UserError: the record names parameters that the model has not, or a base that was less than the model.
        """
        if recorded.init in ("pissa", "olora") and changed is None:
            raise UserError(
                f"{RECORD}: adapter.init was {recorded.init!r}, which quantised the weights without a part of them and "
                "cannot be done again: merge it without --quantization"
            )
        if unknown := sorted(set(recorded.parameters) - model.bindings.keys()):
            raise UserError(
                f"{RECORD} names {unknown[0]}, which the model has not: give the adapter's own base"
            )
        targets = {model.bindings[name].target for name in recorded.parameters}
        forms = forms_of(source.spec.declared, model, recorded.quantization)
        self._forms = {name: form for name, form in forms.items() if name in targets}
        if missing := sorted(targets - forms.keys()):
            raise UserError(
                f"{RECORD} names a part of {missing[0]}, which is no matrix that could have been quantised"
            )
        _, self._files = source.opened
        of_parameter = source.bindings.of_parameter
        self._parts = {name: Parts(of_parameter[name], form.stack) for name, form in self._forms.items()}
        self._dtype, self._changed = jnp.dtype(recorded.dtype), changed
        self._last: tuple[tuple[str, tuple[int, ...]], np.ndarray] | None = None

    def has(self, target: str) -> bool:
        """Whether one of our parameters was quantised."""
        return target in self._forms

    def region(self, target: str, held: Mapping[str, slice]) -> np.ndarray:
        """A part of a parameter, its axes the parameter's, one slice of `held` for each letter."""
        form = self._forms[target]
        stack = [range(held[letter].start, held[letter].stop) for letter in form.stack]
        inside = tuple(held[letter] for letter in form.tensor)
        values = np.stack([self._tensor(target, form, index)[inside] for index in itertools.product(*stack)])
        return values.reshape([held[x].stop - held[x].start for x in form.declared.dims])

    def _tensor(self, target: str, form: Form, index: tuple[int, ...]) -> np.ndarray:
        if self._last is None or self._last[0] != (target, index):
            values = read_tensor(self._files, form, self._parts[target], index)
            if self._changed is not None:
                values = self._changed(target, index, values)
            packed = form.quantize_one(values)
            self._last = (target, index), np.asarray(unpack(packed, self._dtype))
        return self._last[1]
