"""``python -m jaxmoe.merge BASE ADAPTER OUT``: write a model with a LoRA adapter merged into it."""

from pathlib import Path

from jaxmoe.cli import ArgumentParser, run_command
from jaxmoe.errors import listed
from jaxmoe.files import path_argument


def main(argv: list[str]) -> None:
    """The command."""
    parser = ArgumentParser(
        prog="jaxmoe merge",
        description="Write a model with a LoRA adapter in PEFT's format merged into it, laid out as the model is.",
    )
    parser.add_argument("base", type=path_argument, help="folder or hub id of the model that was adapted")
    parser.add_argument("adapter", type=path_argument, help="folder with adapter_config.json")
    parser.add_argument("folder", type=path_argument, help="new folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    parser.add_argument(
        "--quantization",
        action="store_true",
        help="merge into the base as training saw it, in few bits; the adapter's folder says how",
    )
    options = parser.parse_args(argv)
    # Imported only now: a mistake in the arguments is reported without waiting for it.
    from jaxmoe.interop.export_plan import LEFT_OUT
    from jaxmoe.interop.peft.merged import merge_folder

    folder = Path(options.folder)
    changed, left_out = merge_folder(
        options.base, options.adapter, folder, overwrite=options.overwrite, quantization=options.quantization
    )
    print(f"{folder}: {options.base} with {options.adapter} merged in, which changed {changed:,} tensors")
    if left_out:
        print(f"left out ({LEFT_OUT}): {listed(left_out, 20)}")


if __name__ == "__main__":
    run_command(main)
