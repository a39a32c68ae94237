"""The Mosaic kernels, where the device is of their kind and they were found right on it.

Where a program is only compiled for a device nothing runs that could be wrong: there they are taken as checked.
Pallas is imported when the first such device is met: on a CPU nobody waits for it.
"""

from typing import TYPE_CHECKING

import jax

from jaxmoe.kernels.devices import Device
from jaxmoe.kernels.expert_mlp.contract import Grads, Options, OtherDevice
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch
from jaxmoe.kernels.expert_mlp.operands import Experts, unpacked
from jaxmoe.kernels.expert_mlp.tuning.measured import measured_on

if TYPE_CHECKING:
    from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic


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
    return kernels.forward(options, x_RD, unpacked(experts, x_RD.dtype), weights_RK, dispatch, save=save)


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
    wide = unpacked(experts, x_RD.dtype)
    return kernels.backward(options, x_RD, wide, weights_RK, dispatch, pre_pf, dout_RD, wanted)


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
