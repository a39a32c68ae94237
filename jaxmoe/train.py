"""``python -m jaxmoe.train [CONFIG.yaml] [key.path=value …]``: train, and go on after an interruption.

Without a config it runs the quickstart that the package carries.
"""

from pathlib import Path

from jaxmoe.cli import ArgumentParser, run_command
from jaxmoe.config import load_config
from jaxmoe.config.reference import reference_yaml
from jaxmoe.files import why_unusable
from jaxmoe.heap import keep_freed_memory


def main(argv: list[str]) -> None:
    """The command."""
    parser = ArgumentParser(
        prog="jaxmoe train",
        description="Train a mixture-of-experts model. The same command goes on with a run that was interrupted.",
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run; by default the quickstart")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="values that replace the file's"
    )
    parser.add_argument(
        "--keys", action="store_true", help="print every key with its default and meaning, as YAML"
    )
    options = parser.parse_intermixed_args(argv)
    if options.keys:
        print(reference_yaml(), end="")
        return
    overrides = list(options.overrides)
    if options.config is not None and "=" in options.config and not _is_there(options.config):
        overrides.insert(0, options.config)
        options.config = None
    config = load_config(None if options.config is None else Path(options.config), overrides)
    keep_freed_memory()
    # Imported only now: a mistake in the config is reported without waiting for jax and the rest.
    if config.train.distributed:
        from jaxmoe.parallel import processes

        processes.join()
    from jaxmoe.run.loop import run

    run(config)


def _is_there(path: str) -> bool:
    return why_unusable(path) is None and Path(path).exists()


if __name__ == "__main__":
    run_command(main)
