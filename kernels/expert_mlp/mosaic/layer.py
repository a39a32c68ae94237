"""The backend for NVIDIA Hopper: gather, grouped matmul and activation in one kernel, and so on backwards.

Forward: [gather · gate_up · activation], [down], gather-sum. Backward, with the pre-activation kept from there:
[gather · downᵀ · activation's gradient, with the recomputed activation and the gradient of the router's weight],
[gate_upᵀ], gather-sum, and one kernel for each weight's gradient that is wanted. Low-rank updates and biases are
further segments of the same contractions; W + B A is never formed. Weights in few bits are read as they are, in both
directions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels.expert_mlp.contract import Grads, Options
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch
from jaxmoe.kernels.expert_mlp.mosaic.epilogues import Activate, ActivationGradient, StoreRows
from jaxmoe.kernels.expert_mlp.mosaic.geometry import Geometry
from jaxmoe.kernels.expert_mlp.mosaic.gradient import Side, weight_gradient
from jaxmoe.kernels.expert_mlp.mosaic.matmul import Epilogue, Segment, grouped_matmul
from jaxmoe.kernels.expert_mlp.mosaic.packed import PackedMatrices, form_of, packed_matrices
from jaxmoe.kernels.expert_mlp.mosaic.rows import SLAB
from jaxmoe.kernels.expert_mlp.mosaic.slots import Slots, make_slots, sum_choices
from jaxmoe.kernels.expert_mlp.mosaic.tiles import GradientLaunch, MatmulLaunch, Measurements, slot_rows
from jaxmoe.kernels.expert_mlp.operands import Experts, Lora, is_packed, shape_of


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """The kernels, for one kind of device.

    Attributes:
        multiprocessors: of the device.
        interpret: parameters of the interpreter, to run on a CPU; None on the device.
        tiles: measured tiles.
    """

    multiprocessors: int
    interpret: Any = None
    tiles: Measurements = dataclasses.field(default_factory=dict)

    def forward(
        self,
        options: Options,
        x_RD: jax.Array,
        experts: Experts,
        weights_RK: jax.Array,
        dispatch: Dispatch,
        *,
        save: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The layer's output (R, D), and with `save` the pre-activation (p, f) in padded slots."""
        layer = _Layer(self, options, x_RD, experts, weights_RK, dispatch)
        activated_pF, *pre = layer.up(save)
        out_pD = layer.down(activated_pF)
        return sum_choices(out_pD, layer.slots, weights_RK), pre[0] if save else None

    def backward(
        self,
        options: Options,
        x_RD: jax.Array,
        experts: Experts,
        weights_RK: jax.Array,
        dispatch: Dispatch,
        pre_pf: jax.Array,
        dout_RD: jax.Array,
        wanted: Grads,
    ) -> Grads:
        """Gradients of whatever is true in `wanted`; None for the rest."""
        layer = _Layer(self, options, x_RD, experts, weights_RK, dispatch)
        return _Backward(layer, pre_pf, dout_RD.astype(x_RD.dtype)).grads(wanted)

    def matmul(
        self, launch: MatmulLaunch, segments: Sequence[Segment], slots: Slots, epilogue: Epilogue
    ) -> list[jax.Array]:
        """One launch of the grouped matmul."""
        geometry = Geometry(launch.tiles(self.tiles), launch.parts, launch.columns, launch.contract_first)
        return grouped_matmul(
            segments,
            slots,
            epilogue,
            geometry,
            multiprocessors=self.multiprocessors,
            interpret=self.interpret,
        )

    def gradient(
        self, launch: GradientLaunch, out: Side, columns: Side, slots: Slots, tile_rows: int
    ) -> jax.Array:
        """One launch of the weight gradient: (E, n, c)."""
        return weight_gradient(
            out,
            columns,
            slots,
            launch.tiles(self.tiles),
            tile_rows=tile_rows,
            multiprocessors=self.multiprocessors,
            interpret=self.interpret,
        )


class _Layer:
    """One layer's operands, flattened as the kernels take them, and its kernels."""

    def __init__(
        self,
        backend: Mosaic,
        options: Options,
        x_RD: jax.Array,
        experts: Experts,
        weights_RK: jax.Array,
        dispatch: Dispatch,
    ) -> None:
        if x_RD.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"the tensor cores take bfloat16 and float16, x is {x_RD.dtype}")
        self.backend, self.options = backend, options
        self.x, self.experts, self.weights = x_RD, experts, weights_RK
        self.held, self.parts, self.hidden, self.width = shape_of(experts.gate_up)
        for name, size in (("width", self.width), ("hidden width", self.hidden)):
            if size % SLAB:
                raise NotImplementedError(f"{name} {size} is no multiple of {SLAB}")
        self.lora = _padded(experts.lora, options.lora_scale)
        simple = self.width % 128 == 0 and self.hidden % 128 == 0 and experts.lora == Lora()
        packed = max(_packed_bytes(matrix) for matrix in (experts.gate_up, experts.down))
        self.rows = slot_rows(dispatch.order.shape[0], self.held, packed) if simple else 128
        self.slots = make_slots(dispatch, weights_RK, self.rows)

    @property
    def padded(self) -> int:
        """p."""
        return self.slots.token.shape[0]

    def up(self, save: bool) -> list[jax.Array]:
        """The activation (p, F), and with `save` the pre-activation (p, f)."""
        segments = [Segment(self.x, _matrices(self.experts.gate_up), gathered=True)]
        if self.lora.gate_up_b is not None:
            segments.append(Segment(self.up_low(), _flat(self.lora.gate_up_b), gathered=False))
        if self.experts.gate_up_bias is not None:
            segments.append(self._bias(self.experts.gate_up_bias))
        epilogue = Activate(self.options.activation, self.x.dtype, save)
        return self.matmul(segments, epilogue, self.hidden, parts=self.parts)

    def up_low(self) -> jax.Array:
        """x Aᵀ (p, r) of the first matrix."""
        assert self.lora.gate_up_a is not None
        segment = Segment(self.x, _flat(self.lora.gate_up_a), gathered=True)
        return self.rows_of([segment], self.lora.gate_up_a.shape[1])

    def down(self, activated_pF: jax.Array) -> jax.Array:
        """(p, D)."""
        segments = [Segment(activated_pF, _matrices(self.experts.down), gathered=False)]
        if self.lora.down_b is not None:
            segments.append(Segment(self.down_low(activated_pF), _flat(self.lora.down_b), gathered=False))
        if self.experts.down_bias is not None:
            segments.append(self._bias(self.experts.down_bias))
        return self.rows_of(segments, self.width)

    def down_low(self, activated_pF: jax.Array) -> jax.Array:
        """a Aᵀ (p, r) of the second matrix."""
        assert self.lora.down_a is not None
        segment = Segment(activated_pF, _flat(self.lora.down_a), gathered=False)
        return self.rows_of([segment], self.lora.down_a.shape[1])

    def rows_of(self, segments: list[Segment], size: int, *, contract_first: bool = False) -> jax.Array:
        """The product as it is, (p, size)."""
        return self.matmul(segments, StoreRows(self.x.dtype), size, contract_first=contract_first)[0]

    def matmul(
        self,
        segments: list[Segment],
        epilogue: Epilogue,
        size: int,
        *,
        parts: int = 1,
        contract_first: bool = False,
    ) -> list[jax.Array]:
        """The products of the segments, added up and given to the epilogue."""
        launch = MatmulLaunch(
            rows=self.rows,
            columns=size,
            contraction=segments[0].rows.shape[1],
            parts=parts,
            contract_first=contract_first,
            kept_parts=self.parts if isinstance(epilogue, ActivationGradient) else 0,
            packed_bytes=_packed_bytes(segments[0].weights),
        )
        return self.backend.matmul(launch, segments, self.slots, epilogue)

    def gradient(self, out: Side, columns: Side) -> jax.Array:
        """(E, n, c)."""
        launch = GradientLaunch(out.rows.shape[1], columns.rows.shape[1])
        return self.backend.gradient(launch, out, columns, self.slots, self.rows)

    def column(self, values: jax.Array | float) -> jax.Array:
        """(p, 64) with `values` in column 0: what makes a bias one more segment."""
        return (
            jnp.zeros((self.padded, SLAB), self.x.dtype)
            .at[:, 0]
            .set(jnp.asarray(values).astype(self.x.dtype))
        )

    def _bias(self, bias: jax.Array) -> Segment:
        weights = jnp.zeros((bias.size, SLAB), bias.dtype).at[:, 0].set(bias.reshape(-1))
        return Segment(self.column(1.0), weights, gathered=False)


class _Backward:
    """The backward pass of a layer."""

    def __init__(self, layer: _Layer, pre_pf: jax.Array, dout_RD: jax.Array) -> None:
        self.layer, self.pre, self.dout = layer, pre_pf, dout_RD
        lora, experts = layer.lora, layer.experts
        segments = [Segment(dout_RD, _matrices(experts.down), gathered=True)]
        self.dlow_down = None
        if lora.down_a is not None and lora.down_b is not None:
            segment = Segment(dout_RD, _flat(lora.down_b), gathered=True)
            self.dlow_down = layer.rows_of([segment], lora.down_b.shape[2], contract_first=True)
            segments.append(Segment(self.dlow_down, _flat(lora.down_a), gathered=False))
        epilogue = ActivationGradient(layer.options.activation, layer.x.dtype, pre_pf, layer.slots.weight)
        self.dpre, self.weighted, self.scores = layer.matmul(
            segments, epilogue, layer.hidden, contract_first=True
        )
        self.dlow_up = None
        if lora.gate_up_b is not None:
            segment = Segment(self.dpre, lora.gate_up_b.reshape(-1, lora.gate_up_b.shape[-1]), gathered=False)
            self.dlow_up = layer.rows_of([segment], lora.gate_up_b.shape[-1], contract_first=True)

    def grads(self, wanted: Grads) -> Grads:
        """What is wanted, and no kernel for what is not."""
        layer, want = self.layer, wanted.experts
        x, dout = Side(layer.x, gathered=True), Side(self.dout, gathered=True)
        dpre, weighted = Side(self.dpre, gathered=False), Side(self.weighted, gathered=False)
        gate_up = layer.gradient(dpre, x).reshape(layer.experts.gate_up.shape) if want.gate_up else None
        gate_up_bias = down_bias = None
        if want.gate_up_bias:
            ones = Side(layer.column(1.0), gathered=False)
            gate_up_bias = layer.gradient(dpre, ones)[:, :, 0].reshape(layer.experts.gate_up_bias.shape)
        if want.down_bias:
            down_bias = layer.gradient(dout, Side(layer.column(layer.slots.weight), gathered=False))[:, :, 0]
        return Grads(
            x=self._dx() if wanted.x else None,
            weights=self._dweights() if wanted.weights else None,
            experts=Experts(
                gate_up=gate_up,
                down=layer.gradient(dout, weighted) if want.down else None,
                gate_up_bias=gate_up_bias,
                down_bias=down_bias,
                lora=self._lora(want.lora),
            ),
        )

    def _dx(self) -> jax.Array:
        layer = self.layer
        segments = [Segment(self.dpre, _matrices(layer.experts.gate_up), gathered=False)]
        if self.dlow_up is not None and layer.lora.gate_up_a is not None:
            segments.append(Segment(self.dlow_up, _flat(layer.lora.gate_up_a), gathered=False))
        return sum_choices(layer.rows_of(segments, layer.width, contract_first=True), layer.slots)

    def _dweights(self) -> jax.Array:
        layer = self.layer
        score_p = self.scores.sum(axis=0)
        score_RK = score_p.at[layer.slots.inverse].get(mode="fill", fill_value=0)
        if layer.experts.down_bias is not None:
            # out · bias of every expert is a small dense product; each choice takes its own.
            of_expert_RE = jnp.einsum(
                "rd,ed->re", self.dout, layer.experts.down_bias, preferred_element_type=jnp.float32
            )
            expert_RK = layer.slots.tile_expert[
                jnp.minimum(layer.slots.inverse // layer.rows, layer.slots.tile_expert.shape[0] - 1)
            ]
            held_RK = layer.slots.inverse < layer.padded
            score_RK += jnp.where(held_RK, jnp.take_along_axis(of_expert_RE, expert_RK, axis=1), 0)
        return score_RK.astype(layer.weights.dtype)

    def _lora(self, want: Lora) -> Lora:
        layer, ranks = self.layer, self.layer.experts.lora
        x, dout = Side(layer.x, gathered=True), Side(self.dout, gathered=True)
        weighted, dpre = Side(self.weighted, gathered=False), Side(self.dpre, gathered=False)
        scale = jnp.asarray(layer.options.lora_scale, layer.x.dtype)
        grads: dict[str, jax.Array] = {}
        if want.gate_up_a:
            assert ranks.gate_up_a is not None
            grads["gate_up_a"] = layer.gradient(_side(self.dlow_up), x)[:, : ranks.gate_up_a.shape[1]]
        if want.gate_up_b:
            assert ranks.gate_up_b is not None
            grad = layer.gradient(dpre, _side(layer.up_low() * scale))[..., : ranks.gate_up_b.shape[-1]]
            grads["gate_up_b"] = grad.reshape(ranks.gate_up_b.shape)
        if want.down_a:
            assert ranks.down_a is not None
            grads["down_a"] = layer.gradient(_side(self.dlow_down), weighted)[:, : ranks.down_a.shape[1]]
        if want.down_b:
            assert ranks.down_b is not None
            low = layer.down_low(self.weighted) * scale
            grads["down_b"] = layer.gradient(dout, _side(low))[..., : ranks.down_b.shape[-1]]
        return Lora(**grads)


def _side(rows: jax.Array | None) -> Side:
    assert rows is not None
    return Side(rows, gathered=False)


def _flat(weights: jax.Array) -> jax.Array:
    """All but the last axis as one."""
    return weights.reshape(-1, weights.shape[-1])


def _matrices(weights: Any) -> jax.Array | PackedMatrices:
    """Of all experts as one."""
    return packed_matrices(weights) if is_packed(weights) else _flat(weights)


def _packed_bytes(weights: Any) -> int:
    """Of codes and scales of 64 columns of a row."""
    if isinstance(weights, PackedMatrices):
        return weights.form.row_bytes
    return form_of(weights).row_bytes if is_packed(weights) else 0


def _padded(lora: Lora, scale: float) -> Lora:
    """Ranks filled up with zeros to a multiple of 64, and B times the scale."""

    def fill(array: jax.Array | None, axis: int, factor: float = 1.0) -> jax.Array | None:
        if array is None:
            return None
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, -array.shape[axis] % SLAB)
        return jnp.pad(array * jnp.asarray(factor, array.dtype), widths)

    return Lora(
        gate_up_a=fill(lora.gate_up_a, 1),
        gate_up_b=fill(lora.gate_up_b, 3, scale),
        down_a=fill(lora.down_a, 1),
        down_b=fill(lora.down_b, 2, scale),
    )
