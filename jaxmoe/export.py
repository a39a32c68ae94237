"""``python -m jaxmoe.export RUN FOLDER``: write a checkpoint of a run as a Hugging Face folder."""

import argparse
from pathlib import Path

import jax

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
    import jax.numpy as jnp

    from jaxmoe import params
    from jaxmoe.run_data import tokenizer_files
    from jaxmoe.run_model import open_model
    from jaxmoe.sharding import make_mesh, shardings
    from jaxmoe.spec import model_params

    config = load_config(options.run / "config.yaml", [f"output_dir={options.run}"])
    checkpoints = Checkpoints(options.run / "checkpoints", None)
    step = checkpoints.latest() if options.step is None else options.step
    if step is None:
        raise UserError(f"{options.run}: the run has no checkpoint yet")
    model = open_model(config.model)
    # One device is enough here, whatever mesh the run has.
    mesh = make_mesh(fsdp=jax.device_count()) if jax.device_count() > 1 else make_mesh()
    tree = model_params(model.spec)
    wanted = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params.abstract(tree, jnp.float32),
        shardings(tree, mesh),
    )
    state, _ = checkpoints.restore(step, {"params": wanted, "opt_state": ..., "step": ..., "key": ...})
    left_out = model.export(
        state["params"], options.folder, tokenizer_files(config), overwrite=options.overwrite
    )
    checkpoints.close()
    print(f"{options.folder}: step {step} of {options.run}")
    if left_out:
        print(f"left out, weights from before training in other files: {', '.join(left_out)}")


if __name__ == "__main__":
    run_command(main)
