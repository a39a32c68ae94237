"""The Mosaic kernels, where the device is of their kind and they were found right on it.

Where a program is only compiled for a device nothing runs that could be wrong: there they are taken as checked.
Pallas is imported when the first such device is met: on a CPU nobody waits for it. Experts in few bits are read as they
are; those that the kernels do not read so are unpacked before.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxmoe.codecs import unpack
from jaxmoe.kernels.devices import Device
from jaxmoe.kernels.expert_mlp.contract import Grads, Options, OtherDevice
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch
from jaxmoe.kernels.expert_mlp.operands import Experts, is_packed, shape_of
from jaxmoe.kernels.expert_mlp.tuning.measured import measured_on
from jaxmoe.kernels.logs import log_once

if TYPE_CHECKING:
    from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic

_logger = logging.getLogger(__name__)


def forward(
    options: Options,
    x_RD: jax.Array,
    experts: Experts,
    weights_RK: jax.Array,
    dispatch: Dispatch,
    *,
    save: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`Mosaic.forward` for the device of the options.

    Raises:
        OtherDevice: it is no Hopper GPU.
        NotImplementedError: the kernels were not found right there yet, or cannot take the operands.
    """
    kernels = kernels_for(options.device)
    if dispatch.dropout is not None:
        raise NotImplementedError(
            "the kernels have no dropout: expected adapter.dropout 0 where experts are adapted"
        )
    return kernels.forward(options, x_RD, readable(experts, x_RD.dtype), weights_RK, dispatch, save=save)


def backward(
    options: Options,
    x_RD: jax.Array,
    experts: Experts,
    weights_RK: jax.Array,
    dispatch: Dispatch,
    pre_pf: jax.Array,
    dout_RD: jax.Array,
    wanted: Grads,
) -> Grads:
    """`Mosaic.backward` for the device of the options."""
    kernels = kernels_for(options.device)
    experts = readable(experts, x_RD.dtype)
    return kernels.backward(options, x_RD, experts, weights_RK, dispatch, pre_pf, dout_RD, wanted)


def readable(experts: Experts, dtype: Any) -> Experts:
    """With matrices unpacked that are packed in a way that the kernels do not read."""
    from jaxmoe.kernels.expert_mlp.mosaic.packed import form_of

    def matrices(weight: Any) -> Any:
        if not is_packed(weight):
            return weight
        try:
            form_of(weight)
            if weight.dtype not in (None, jnp.dtype(dtype).name):
                raise NotImplementedError(f"weights are rounded to {weight.dtype} first")
        except NotImplementedError as error:
            size = math.prod(shape_of(weight)) * jnp.dtype(dtype).itemsize
            log_once(
                _logger,
                logging.WARNING,
                f"expert_mlp: {error}: the kernels do not read them; all experts {shape_of(weight)} are unpacked "
                f"first, into {size / 1e6:,.1f} MB, in the forward and again in the backward pass",
            )
            return unpack(weight, dtype)
        return weight

    return experts._replace(gate_up=matrices(experts.gate_up), down=matrices(experts.down))


def kernels_for(device: Device) -> "Mosaic":
    """The kernels with what was measured on such a device; raises as `forward` does."""
    if not device.hopper:
        raise OtherDevice(f"the kernels are for NVIDIA Hopper GPUs (H100, H200), this is {device.kind}")
    known = measured_on(device.kind)
    if device.present and jax.__version__ not in known.checked:
        raise NotImplementedError(
            f"the kernels have not been checked on {device.kind} with jax {jax.__version__}: run "
            "python -m jaxmoe.kernels.tune --check once (a minute), which notes that they are right there"
        )
    from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic

    return Mosaic(device.multiprocessors, tiles=known.tiles)
