"""``python -m jaxmoe.export RUN FOLDER``: write a checkpoint of a run as a Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoe.cli import ArgumentParser, run_command
from jaxmoe.config import RunConfig, recorded_config
from jaxmoe.errors import UserError, listed
from jaxmoe.files import path_argument

if TYPE_CHECKING:
    from jaxmoe.run.assemble import Assembled
    from jaxmoe.run.checkpoints import Checkpoints
    from jaxmoe.run.exporting import Export
    from jaxmoe.run.folder import RunLayout
    from jaxmoe.training.state import TrainState


def main(argv: list[str]) -> None:
    """The command."""
    options = _parser().parse_args(argv)
    run, folder = Path(options.run), Path(options.folder)
    # Imported only now, and the rest below: a mistake is reported without waiting for what it does not need.
    from jaxmoe.run.folder import RunLayout

    layout = RunLayout(run)
    if not layout.config.exists():
        raise UserError(f"{run}: found no {layout.config.name}, expected the folder of a run")
    from jaxmoe.interop.export_plan import LEFT_OUT
    from jaxmoe.run.checkpoints import Checkpoints
    from jaxmoe.run.exporting import export as write_export

    config = recorded_config(layout.config).model_copy(update={"output_dir": str(run)})
    what = _what(config, options.merged, options.quantization)
    if options.mtp is not None:
        if what == "adapter":
            raise UserError("--mtp: an adapter has no config.json of its own: leave it out, or add --merged")
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"export_mtp": options.mtp})}
        )
    checkpoints = Checkpoints(layout.checkpoints, None)
    step = checkpoints.latest() if options.step is None else options.step
    if step is None:
        raise UserError(f"{run}: the run has no checkpoint yet")
    try:
        _check_tokenizer(config, layout)
        assembled = _assembled(config)
    except UserError as error:
        raise UserError(f"{error}{_hint(layout, config)}") from None
    left_out = write_export(
        assembled,
        _state(assembled, checkpoints, step),
        what,
        folder,
        overwrite=options.overwrite,
        quantization=options.quantization,
    )
    checkpoints.close()
    print(f"{folder}: step {step} of {run}")
    if left_out:
        print(f"left out ({LEFT_OUT}): {listed(left_out, 20)}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="jaxmoe export", description="Write a checkpoint of a run as a Hugging Face folder."
    )
    parser.add_argument("run", type=path_argument, help="folder of the run (its output_dir)")
    parser.add_argument("folder", type=path_argument, help="new folder to write")
    parser.add_argument("--step", type=int, help="by default the newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    parser.add_argument(
        "--quantization",
        choices=["none", "source"],
        help="write what the model's folder has quantised in bfloat16 (none), or as it has it (source); by default "
        "as the run's train.export_quantization says",
    )
    parser.add_argument(
        "--mtp",
        choices=["declared", "present"],
        help="layers for multi-token prediction that config.json counts: as in the model's folder (declared), or none "
        "where they are missing there (present); by default as the run's train.export_mtp says",
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="of a run with an adapter: write the model with it merged in, and not the adapter",
    )
    return parser


def _assembled(config: RunConfig) -> "Assembled":
    """The run on whatever devices are here: the weights alone, spread over them."""
    import jax

    from jaxmoe.parallel.sharding import fitting_mesh
    from jaxmoe.run.assemble import assemble
    from jaxmoe.run.model import open_model

    source = open_model(config.model)
    return assemble(config, fitting_mesh(source.spec.declared, jax.devices()), source=source)


def _state(assembled: "Assembled", checkpoints: "Checkpoints", step: int) -> "TrainState":
    """That of a checkpoint, without the optimiser's."""
    import jax

    from jaxmoe.training.state import Saved

    unread = jax.tree.map(lambda _: ..., assembled.state.saved)
    saved, extra = checkpoints.restore(step, unread._replace(params=assembled.state.trainable))
    assembled.check_adapter(extra.get("adapter"))
    state = assembled.state._replace(frozen=assembled.frozen_weights())
    assembled.check_frozen(state.frozen, extra.get("frozen"))
    return state.restored(Saved(*saved))


def _what(config: RunConfig, merged: bool, quantization: str | None) -> "Export":
    """What to export of a run.

    Raises:
        UserError: an option that does not go with it.
    """
    if config.adapter is None:
        if merged:
            raise UserError("--merged: the run has no adapter, expected a run with one: leave it out")
        return "model"
    if quantization == "source":
        raise UserError(
            "--quantization source: the run has an adapter, whose delta a narrow format would lose: leave it out"
        )
    return "merged" if merged or config.train.export == "merged" else "adapter"


def _check_tokenizer(config: RunConfig, layout: "RunLayout") -> None:
    """Without this the export would have none."""
    given = config.data.tokenizer
    path = Path(given) if isinstance(given, str) else layout.tokenizer
    if given is not None and not path.exists():
        raise UserError(f"data.tokenizer: found no {path}, which the run used, expected it where it was")


def _hint(layout: "RunLayout", config: RunConfig) -> str:
    given = {
        "model.path": config.model.path,
        "model.config": config.model.config,
        "data.tokenizer": config.data.tokenizer,
        "adapter.path": None if config.adapter is None else config.adapter.path,
    }
    relative = [
        f"{key} {path!r}" for key, path in given.items() if isinstance(path, str) and _leads_nowhere(path)
    ]
    if not relative:
        return ""
    return (
        f" ({layout.config} has {' and '.join(relative)}, relative to the folder where the run was started: "
        "start this command there as well)"
    )


def _leads_nowhere(path: str) -> bool:
    return not Path(path).is_absolute() and not Path(path).exists()


if __name__ == "__main__":
    run_command(main)
