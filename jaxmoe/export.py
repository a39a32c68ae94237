"""``python -m jaxmoe.export RUN FOLDER``: write a checkpoint of a run as a Hugging Face folder."""

import argparse
import math
from pathlib import Path

import jax
from jax.sharding import AxisType

from jaxmoe.checkpoints import Checkpoints
from jaxmoe.cli import run_command
from jaxmoe.config import load_config
from jaxmoe.errors import UserError


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="jaxmoe export", description="Write a checkpoint of a run as a Hugging Face folder."
    )
    parser.add_argument("run", type=Path, help="folder of the run (its output_dir)")
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument("--step", type=int, help="by default the newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    options = parser.parse_args(argv)
    if not (options.run / "config.yaml").exists():
        raise UserError(f"{options.run}: found no config.yaml, expected the folder of a run")
    # Imported only now: a wrong folder is reported without waiting for it.
    from jaxmoe.optim import build_optimizer
    from jaxmoe.params import roles
    from jaxmoe.run_data import tokenizer_files
    from jaxmoe.run_model import open_model
    from jaxmoe.sharding import MESH_AXES
    from jaxmoe.spec import model_params
    from jaxmoe.train_step import abstract_state

    config = load_config(options.run / "config.yaml").model_copy(update={"output_dir": str(options.run)})
    checkpoints = Checkpoints(options.run / "checkpoints", None)
    step = checkpoints.latest() if options.step is None else options.step
    if step is None:
        raise UserError(f"{options.run}: the run has no checkpoint yet")
    model = open_model(config.model)
    # Whatever mesh the run has: the weights alone, spread over the devices that are here.
    usable = math.gcd(jax.device_count(), model.spec.width)
    mesh = jax.make_mesh(
        (1, usable, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:usable]
    )
    optimizer = build_optimizer(config.optimizer, roles(model_params(model.spec)), config.train.steps)
    state = abstract_state(optimizer, model.spec, mesh)
    unread = jax.tree.map(lambda _: ..., state)
    state, _ = checkpoints.restore(step, unread._replace(params=state.params))
    left_out = model.export(
        state.params, options.folder, tokenizer_files(config), overwrite=options.overwrite
    )
    checkpoints.close()
    print(f"{options.folder}: step {step} of {options.run}")
    if left_out:
        print(f"left out, weights from before training in other files: {', '.join(left_out)}")


if __name__ == "__main__":
    run_command(main)
