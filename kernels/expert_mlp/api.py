"""The experts of a layer: checks, choice of the backend, gradients.

A backend has the functions `forward` and `backward` that `xla` has. `forward` raises
NotImplementedError for operands or a device that it cannot take, and the next one is asked.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from jaxmoe.kernels.devices import Device, device_at_hand
from jaxmoe.kernels.expert_mlp import reference, xla
from jaxmoe.kernels.expert_mlp.activations import Activation
from jaxmoe.kernels.expert_mlp.contract import Decided, Grads, Options, OtherDevice
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch, make_dispatch
from jaxmoe.kernels.expert_mlp.dropout import SlotDropout
from jaxmoe.kernels.expert_mlp.mosaic import backend as mosaic
from jaxmoe.kernels.expert_mlp.operands import Experts, is_packed, shape_of, unpacked
from jaxmoe.kernels.logs import log_once

_logger = logging.getLogger(__name__)

# In the order in which they are asked. The last one takes everything.
_BACKENDS: dict[str, Any] = {"mosaic": mosaic, "xla": xla}


def expert_mlp(
    x: Float[Array, "R D"],
    experts: Experts,
    chosen: Int[Array, "R K"],
    weights: Float[Array, "R K"],
    *,
    activation: Activation = Activation(),
    lora_scale: float = 1.0,
    num_experts: int | None = None,
    first: jax.Array | int = 0,
    dropout: SlotDropout | None = None,
    backend: str | None = None,
    device: Device | None = None,
) -> Float[Array, "R D"]:
    """out[r] = Σ_k weights[r, k] · down_e · activation(gate_up_e · x[r]) with e = chosen[r, k].

    Differentiable in x, weights and every array of `experts`, in reverse mode only; what is not differentiated
    (a frozen base under LoRA) costs no gradient. Kept for the backward pass are x, the routing and the
    pre-activation. The gradient of an expert that no token chose is exactly zero. Sums over a token's experts
    are taken in the order of its choices: results do not depend on timing.

    Args:
        x: (R, D) tokens.
        experts: parameters of the E experts held here, in x's dtype.
        chosen: (R, K) int32, the experts of each token, all different. Those held elsewhere add nothing here.
        weights: (R, K), what each expert's output is multiplied with.
        activation: see `Activation`.
        lora_scale: factor of the low-rank updates.
        num_experts: experts of the whole layer; by default those held here are all.
        first: number of the first expert held here.
        dropout: of the inputs of low-rank updates; only "xla" and "reference" have it.
        backend: "mosaic" (NVIDIA Hopper), "xla", or "reference" (slow, for tests); by default the first one of
            these that takes the call.
        device: what the result is to run on, which decides about the backend and its tiles; by default the first
            device at hand. One that is not present takes a kernel as right that was not checked on its kind.

    Returns:
        (R, D) in x's dtype; products are accumulated in float32.

    Raises:
        ValueError: shapes that do not fit each other, half of a LoRA pair, or an unknown backend.
        TypeError: dtypes that differ.
        NotImplementedError: the backend asked for by name cannot take the call.
    """
    _check_operands(x, experts, chosen, weights, activation)
    if backend == "reference":
        return reference.expert_mlp(
            x,
            unpacked(experts, x.dtype),
            chosen,
            weights,
            activation=activation,
            lora_scale=lora_scale,
            first=first,
            dropout=dropout,
        )
    if backend is not None and backend not in _BACKENDS:
        known = ", ".join(sorted([*_BACKENDS, "reference"]))
        raise ValueError(f"backend is {backend!r}; expected one of {known}, or None to choose one")
    held = shape_of(experts.down)[0]
    dispatch = make_dispatch(chosen, held if num_experts is None else num_experts, first, held)
    dispatch = dispatch._replace(dropout=dropout)
    candidates = tuple(_BACKENDS) if backend is None else (backend,)
    options = Options(activation, lora_scale, device or device_at_hand())
    return _expert_mlp(options, candidates, x, experts, weights, dispatch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_mlp(
    options: Options,
    candidates: tuple[str, ...],
    x: jax.Array,
    experts: Experts,
    weights: jax.Array,
    dispatch: Dispatch,
) -> jax.Array:
    return _first_forward(options, candidates, x, experts, weights, dispatch, save=False)[1][0]


def _forward(
    options: Options,
    candidates: tuple[str, ...],
    x: CustomVJPPrimal,
    experts: Any,
    weights: CustomVJPPrimal,
    dispatch: Any,
) -> tuple[jax.Array, Any]:
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)
    marked = Grads(x, weights, experts)
    wanted = jax.tree.map(
        lambda leaf: False if is_packed(leaf) else leaf.perturbed,
        marked,
        is_leaf=lambda leaf: is_primal(leaf) or is_packed(leaf),
    )
    operands, dispatch = jax.tree.map(lambda leaf: leaf.value, (marked, dispatch), is_leaf=is_primal)
    kept = (operands.x, operands.experts, operands.weights, dispatch)
    name, (out, saved) = _first_forward(options, candidates, *kept, save=True)
    return out, (Decided(name, wanted), *kept, saved)


def _backward(options: Options, candidates: tuple[str, ...], residuals: Any, dout: jax.Array) -> Any:
    del candidates
    decided, x, experts, weights, dispatch, saved = residuals
    backend = _BACKENDS[decided.backend]
    grads = backend.backward(options, x, experts, weights, dispatch, saved, dout, decided.wanted)
    return grads.x, grads.experts, grads.weights, None


_expert_mlp.defvjp(_forward, _backward, symbolic_zeros=True)


def _first_forward(
    options: Options,
    candidates: tuple[str, ...],
    x: jax.Array,
    experts: Experts,
    weights: jax.Array,
    dispatch: Dispatch,
    *,
    save: bool,
) -> tuple[str, tuple[jax.Array, Any]]:
    """Name and results of the first backend that takes the call; logs why others pass it on."""
    *others, last = candidates
    for name in others:
        try:
            return name, _BACKENDS[name].forward(options, x, experts, weights, dispatch, save=save)
        except NotImplementedError as error:
            level = logging.INFO if isinstance(error, OtherDevice) else logging.WARNING
            log_once(_logger, level, f"expert_mlp: backend {name} is not used: {error}")
    return last, _BACKENDS[last].forward(options, x, experts, weights, dispatch, save=save)


def _check_operands(
    x: jax.Array, experts: Experts, chosen: jax.Array, weights: jax.Array, activation: Activation
) -> None:
    gate_up, down = shape_of(experts.gate_up), shape_of(experts.down)
    if x.ndim != 2 or len(gate_up) != 4 or len(down) != 3:
        raise ValueError(
            f"x is {x.shape}, gate_up {gate_up}, down {down}; expected (tokens, width), "
            "(experts, parts, hidden, width) and (experts, width, hidden)"
        )
    (_, width), (held, parts, hidden, _) = x.shape, gate_up
    if parts != activation.parts:
        raise ValueError(
            f"gate_up {gate_up} has {parts} parts; expected {activation.parts} for {activation.name}"
        )
    if chosen.ndim != 2 or chosen.shape != weights.shape or chosen.shape[0] != x.shape[0]:
        raise ValueError(
            f"chosen is {chosen.shape} and weights are {weights.shape} for x {x.shape}; expected (tokens, K) twice"
        )
    ranks = {
        "gate_up": experts.lora.gate_up_a.shape[1] if experts.lora.gate_up_a is not None else 0,
        "down": experts.lora.down_a.shape[1] if experts.lora.down_a is not None else 0,
    }
    for pair, rank in ranks.items():
        if (getattr(experts.lora, f"{pair}_a") is None) != (getattr(experts.lora, f"{pair}_b") is None):
            raise ValueError(f"lora has one of {pair}_a and {pair}_b; expected both or neither (rank {rank})")
    expected = {
        "gate_up": (held, parts, hidden, width),
        "down": (held, width, hidden),
        "gate_up_bias": (held, parts, hidden),
        "down_bias": (held, width),
        "gate_up_a": (held, ranks["gate_up"], width),
        "gate_up_b": (held, parts, hidden, ranks["gate_up"]),
        "down_a": (held, ranks["down"], hidden),
        "down_b": (held, width, ranks["down"]),
    }
    arrays = experts._asdict() | experts.lora._asdict()
    for name, shape in expected.items():
        array = arrays[name]
        if array is None:
            continue
        if (found := shape_of(array)) != shape:
            raise ValueError(f"{name} is {found}; expected {shape} beside x {x.shape}")
        if not is_packed(array) and array.dtype != x.dtype:
            raise TypeError(
                f"{name} is {array.dtype} and x is {x.dtype}; expected the same: cast one with astype"
            )
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise TypeError(f"chosen is {chosen.dtype}; expected int32")
