"""``python -m jaxmoe.merge BASE ADAPTER OUT``: write a model with LoRA adapters merged into it, or extract one."""

from pathlib import Path

from jaxmoe.cli import ArgumentParser, run_command
from jaxmoe.errors import UserError, listed
from jaxmoe.files import path_argument

_TOLD = 10


def main(argv: list[str]) -> None:
    """The command."""
    options = _parser().parse_args(argv)
    if options.extract != (options.rank is not None) or (options.rank or 1) < 1:
        raise UserError(f"--rank {options.rank}: expected --extract with a rank of 1 or more, or neither")
    if options.extract:
        given = {
            "--weight": options.weight != 1,
            "--add": options.add,
            "--quantization": options.quantization,
            "--mtp": options.mtp != "declared",
        }
        idle = [name for name, value in given.items() if value]
        if idle:
            raise UserError(
                f"{', '.join(idle)}: --extract writes an adapter and merges nothing: leave it out"
            )
        _extract(options.base, options.adapter, Path(options.folder), options.rank, options.overwrite)
        return
    # Imported only now: a mistake in the arguments is reported without waiting for it.
    from jaxmoe.interop.export_plan import LEFT_OUT
    from jaxmoe.interop.peft.merged import merge_folder

    folder = Path(options.folder)
    changed, left_out = merge_folder(
        options.base,
        options.adapter,
        folder,
        weight=options.weight,
        others=[(path, _number(weight)) for path, weight in options.add],
        overwrite=options.overwrite,
        quantization=options.quantization,
        mtp=options.mtp,
    )
    merged = listed([options.adapter, *(path for path, _ in options.add)], _TOLD)
    print(f"{folder}: {options.base} with {merged} merged in, which changed {changed:,} tensors")
    if left_out:
        print(f"left out ({LEFT_OUT}): {listed(left_out, 20)}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="jaxmoe merge",
        description="Write a model with LoRA adapters in PEFT's format merged into it, laid out as the model is.",
    )
    parser.add_argument("base", type=path_argument, help="folder or hub id of the model that was adapted")
    parser.add_argument("adapter", type=path_argument, help="folder with adapter_config.json")
    parser.add_argument("folder", type=path_argument, help="new folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    parser.add_argument("--weight", type=float, default=1.0, help="factor of what the adapter adds")
    parser.add_argument(
        "--add",
        nargs=2,
        action="append",
        default=[],
        metavar=("ADAPTER", "WEIGHT"),
        help="another adapter of the same base, and its factor; may be given several times",
    )
    parser.add_argument(
        "--quantization",
        action="store_true",
        help="merge into the base as training saw it, in few bits; the adapter's folder says how",
    )
    parser.add_argument(
        "--mtp",
        choices=["declared", "present"],
        default="declared",
        help="layers for multi-token prediction that config.json counts: as in BASE (declared), or none where they "
        "are missing there (present)",
    )
    parser.add_argument(
        "--extract",
        action="store_true",
        help="BASE TUNED OUT: write the adapter that is nearest to what TUNED changed of BASE",
    )
    parser.add_argument("--rank", type=int, help="of the extracted adapter, per expert")
    return parser


def _extract(base: str, tuned: str, folder: Path, rank: int, overwrite: bool) -> None:
    from jaxmoe.interop.peft.combining import told
    from jaxmoe.interop.peft.merged import extract_folder

    errors = extract_folder(base, tuned, folder, rank, overwrite=overwrite)
    print(
        f"{folder}: rank {rank} of {len(errors):,} changed parameters; left out, in parts of the difference:"
    )
    lines = list(told(errors))
    print("\n".join(lines[:_TOLD]))
    if len(lines) > _TOLD:
        print(f"and {len(lines) - _TOLD:,} more, all in {folder / 'errors.txt'}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--add: found {text!r}, expected a folder and a number, its weight") from None


if __name__ == "__main__":
    run_command(main)
