"""``python -m jaxmoe.inspect MODEL``: what a checkpoint or a config.json holds, without loading weights.

``python -m jaxmoe.inspect data CONFIG.yaml`` is `jaxmoe.inspect_data`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoe import inspect_data
from jaxmoe.cli import ArgumentParser, run_command
from jaxmoe.files import path_argument

if TYPE_CHECKING:
    from rich.table import Table

    from jaxmoe.model.spec import ModelSpec


def main(argv: list[str]) -> None:
    """The command."""
    if argv[:1] == ["data"] and len(argv) > 1:
        inspect_data.main(argv[1:])
        return
    parser = ArgumentParser(
        prog="jaxmoe inspect",
        description="Check a checkpoint and say what is in it; a config.json works too. jaxmoe inspect data "
        "CONFIG.yaml shows what a run trains on.",
    )
    parser.add_argument("model", type=path_argument, help="folder, hub id, or config.json file")
    parser.add_argument("--parameters", action="store_true", help="list every parameter and its tensors")
    options = parser.parse_args(argv)
    # Imported only now: a mistake in the options is reported without waiting for it.
    from rich.console import Console
    from rich.table import Table

    from jaxmoe.interop.source import config_source, open_source
    from jaxmoe.params import named

    path = Path(options.model)
    origin = config_source(path) if path.is_file() else open_source(options.model)
    console = Console(highlight=False, markup=False)
    console.print(_summary(origin.family.model_type, origin.spec))
    if options.parameters:
        table = Table("parameter", "dimensions", "shape", "tensors", "first tensor")
        for name, declared in named(origin.spec.declared):
            parts = origin.bindings.of_parameter[name]
            shape = " x ".join(map(str, declared.shape))
            table.add_row(name, declared.dims, shape, str(len(parts)), parts[0].source)
        console.print(table)


def _summary(model_type: str, spec: "ModelSpec") -> "Table":
    from rich.table import Table

    from jaxmoe.model.cost import active_params
    from jaxmoe.params import count

    table = Table(show_header=False)
    table.add_row("family", model_type)
    table.add_row("parameters", f"{count(spec.declared):,}")
    table.add_row("active per token", f"{active_params(spec):,} (output head included)")
    table.add_row(
        "width, vocabulary", f"{spec.width:,}, {spec.vocab_size:,}{', tied' if spec.tie_embeddings else ''}"
    )
    for group in spec.groups:
        table.add_row(f"layers x {group.repeats}", "\n".join(layer.describe() for layer in group.pattern))
    return table


if __name__ == "__main__":
    run_command(main)
