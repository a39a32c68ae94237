"""Check the Mosaic kernels on the GPU at hand and find their fastest tiles there: python -m jaxmoe.kernels.tune

What is found is written as data into the package (`expert_mlp/tuning/measured/`), keyed by device and launch: layers
on such a device use the kernels once they are checked, and these tiles.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxmoe.kernels.devices import device_at_hand
from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic
from jaxmoe.kernels.expert_mlp.specs import LAYERS, ExpertLayer, ExpertShape, layer_of
from jaxmoe.kernels.expert_mlp.tuning.check import CASES, SMALLEST, Case, WrongResults, check
from jaxmoe.kernels.expert_mlp.tuning.measured import FOLDER, Measured, measured_on
from jaxmoe.kernels.expert_mlp.tuning.search import Timer, device_time, launches, tune_launch

TOKENS = (8192, 2048)
"""Of training, where groups are padded to 128 rows, and of small batches, where they are to 64."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is checked and measured, and how.

    Attributes:
        device: its kind.
        backend: the kernels.
        cases: of the check.
        repeats: runs of each case, whose results have to be the same.
        timer: seconds of a call.
    """

    device: str
    backend: Mosaic
    cases: Sequence[Case] = CASES
    repeats: int = 3
    timer: Timer = device_time


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 for wrong kernels, 2 for a machine without such a GPU."""
    arguments = _parse(argv)
    try:
        machine = _rehearsal() if arguments.rehearse else _machine_at_hand()
    except NotImplementedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = arguments.output or (None if arguments.rehearse else FOLDER)
    known = Measured(machine.device) if folder is None else measured_on(machine.device, folder)
    if arguments.tiles and jax.__version__ not in known.checked:
        print(
            f"error: with jax {jax.__version__} the kernels are not checked: leave out --tiles",
            file=sys.stderr,
        )
        return 2
    if not arguments.tiles:
        try:
            known = _check(machine, known, folder)
        except WrongResults as error:
            print(f"error: kernels are wrong on {machine.device}: {error}", file=sys.stderr)
            return 1
    if arguments.check:
        return 0
    layers = [layer_of(name) for name in arguments.model] if arguments.model else LAYERS
    if arguments.rehearse:
        layers, arguments.tokens = [ExpertLayer(ExpertShape("rehearsal", 128, 64, 3, 2))], [20]
    _tune(machine, layers, arguments.tokens, arguments.seconds, known, folder)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--check", action="store_true", help="only check, and note that the kernels are right here"
    )
    only.add_argument(
        "--tiles", action="store_true", help="only search tiles, where the check was made before"
    )
    parser.add_argument(
        "--model",
        action="append",
        choices=[layer.name for layer in LAYERS],
        help="tune for this model's experts; may be given several times (all)",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=TOKENS, help="tokens of a batch (8192 and 2048)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="for the search in one launch (20)")
    parser.add_argument("--output", type=Path, help="folder of the files (that of the package)")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on any machine: one small case in the interpreter, made-up times; writes only to --output",
    )
    return parser.parse_args(argv)


def _check(machine: Machine, known: Measured, folder: Path | None) -> Measured:
    """Check, and note what came of it, also where kernels that were right are so no longer."""
    others = {version: ratio for version, ratio in known.checked.items() if version != jax.__version__}
    try:
        worst = check(machine.backend, machine.cases, repeats=machine.repeats, say=_say)
    except WrongResults:
        _write(dataclasses.replace(known, checked=others), folder)
        raise
    _say(f"all kernels are right on {machine.device}: largest error over the naive one {worst:.2f}")
    known = dataclasses.replace(known, checked={**others, jax.__version__: round(worst, 3)})
    _write(known, folder)
    return known


def _tune(
    machine: Machine,
    layers: Sequence[ExpertLayer],
    tokens: Sequence[int],
    seconds: float,
    known: Measured,
    folder: Path | None,
) -> None:
    """Search launch by launch; what is found is written at once, so that a run that is cut off keeps it."""
    done: set[str] = set()
    for layer in layers:
        for count in tokens:
            _say(f"{layer.name}, {count} tokens")
            for recorded in launches(layer, count):
                key = recorded.launch.key
                if key in done:
                    continue
                done.add(key)
                tiles = tune_launch(recorded, layer, count, machine.backend, machine.timer, seconds)
                if tiles is not None:
                    known = dataclasses.replace(known, tiles={**known.tiles, key: dataclasses.asdict(tiles)})
                    _write(known, folder)


def _machine_at_hand() -> Machine:
    device = device_at_hand()
    if not device.hopper or not device.multiprocessors:
        raise NotImplementedError(
            f"the kernels are for NVIDIA Hopper GPUs (H100, H200) and this is {device.kind}: nothing to check or tune"
        )
    return Machine(device.kind, Mosaic(device.multiprocessors))


def _rehearsal() -> Machine:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    backend = Mosaic(multiprocessors=2, interpret=InterpretGPUParams())
    return Machine("rehearsal", backend, SMALLEST, repeats=1, timer=lambda _: 1.0)


def _write(known: Measured, folder: Path | None) -> None:
    if folder is not None:
        known.write(folder)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
