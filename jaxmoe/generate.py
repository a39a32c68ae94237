"""``python -m jaxmoe.generate FOLDER PROMPT``: continue a text, or with ``--chat`` answer in a chat template."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from jaxmoe.cli import ArgumentParser, run_command
from jaxmoe.config import SampleConfig
from jaxmoe.config.errors import describe
from jaxmoe.errors import UserError
from jaxmoe.files import path_argument

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jaxmoe.chat.dialogue import Dialogue
    from jaxmoe.interop.source import Source
    from jaxmoe.model.sampling import Generator


def main(argv: list[str]) -> None:
    """The command."""
    default = SampleConfig.model_fields
    parser = ArgumentParser(prog="jaxmoe generate", description="Continue a text with a checkpoint.")
    parser.add_argument("model", type=path_argument, help="folder or hub id")
    parser.add_argument("prompt", nargs="?", help="with --chat what the user says; without it a dialogue")
    parser.add_argument("--chat", action="store_true", help="answer the prompt in the chat template")
    parser.add_argument("--system", help="with --chat: what is said before the first turn")
    parser.add_argument(
        "--template", help="with --chat: a .jinja file or a name, instead of the tokenizer's own template"
    )
    parser.add_argument(
        "--tokens", type=int, help=f"at most (default: {default['tokens'].default}; --chat: 512)"
    )
    parser.add_argument("--temperature", type=float, default=default["temperature"].default)
    parser.add_argument("--seed", type=int, default=default["seed"].default)
    parser.add_argument("--dtype", help="default: bfloat16, and on a CPU float32")
    options = parser.parse_intermixed_args(argv)  # the prompt may be left out, and may come after options
    for name in ("system", "template"):
        if not options.chat and getattr(options, name) is not None:
            raise UserError(f"--{name}: found it without --chat, expected both")
    if options.prompt is None and not options.chat:
        raise UserError("prompt: found none, expected a text to continue, or --chat for a dialogue")
    tokens = (
        options.tokens if options.tokens is not None else 512 if options.chat else default["tokens"].default
    )
    sample = _sample(options.prompt or "", tokens, options.temperature, options.seed)
    drawn = sample.model_dump(include={"tokens", "temperature", "seed"})
    # Imported only now: a mistake in the options is reported without waiting for it.
    import jax
    import jax.numpy as jnp

    from jaxmoe.data import end_of_document
    from jaxmoe.interop.loading import load_params
    from jaxmoe.interop.source import compute_dtype, open_source
    from jaxmoe.model.sampling import Generator, continue_text

    # On a CPU two to three times as fast: XLA widens 16-bit floats there.
    dtype = compute_dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    if dtype == jnp.float16 and jax.default_backend() == "cpu":
        raise UserError(
            "--dtype: found float16, which jax does not multiply on a CPU, expected bfloat16 or float32"
        )
    source = open_source(options.model)
    folder, _ = source.opened
    tokenizer = _tokenizer(source, folder)
    eos = end_of_document(tokenizer, folder)
    if not options.chat:
        assert sample.prompt is not None
        weights = load_params(source, dtype)
        text = continue_text(weights, source.spec, tokenizer, sample.prompt, stop=eos, dtype=dtype, **drawn)
        sys.stdout.write(sample.prompt + text + "\n")
        return
    dialogue, stops = _dialogue(tokenizer, folder, eos, options.template, options.system)
    generator = Generator(load_params(source, dtype), source.spec, dtype=dtype)
    if options.prompt is not None:
        _answer(generator, dialogue, options.prompt, stop=stops, **drawn)
        return
    for said in _turns():
        _answer(generator, dialogue, said, stop=stops, **drawn)


def _tokenizer(source: "Source", folder: Path) -> "Tokenizer":
    from jaxmoe.data import load_tokenizer, vocabulary_size

    tokenizer = load_tokenizer(folder, source.spec.vocab_size)
    if vocabulary_size(tokenizer) > source.spec.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer's largest token id is {vocabulary_size(tokenizer) - 1} but the model's "
            f"vocab_size is {source.spec.vocab_size}: give the folder the tokenizer that belongs to the model"
        )
    return tokenizer


def _dialogue(
    tokenizer: "Tokenizer", folder: Path, eos: int | None, given: str | None, system: str | None
) -> "tuple[Dialogue, list[int]]":
    """A conversation that nobody has said anything in but for the system, and the tokens that end an answer."""
    from jaxmoe.chat.dialogue import Dialogue, stop_ids
    from jaxmoe.chat.ends import end_tokens
    from jaxmoe.chat.templates import find_template, no_template

    template = find_template(given, folder, key="--template")
    if template is None:
        raise no_template(folder, key="--template")
    ends = end_tokens(tokenizer, folder, eos)
    return Dialogue(template, tokenizer, system), stop_ids(tokenizer, ends, template)


def _turns() -> Iterator[str]:
    """What a user says, line by line, until the input ends."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _answer(generator: "Generator", dialogue: "Dialogue", said: str, **options: Any) -> None:
    for text in dialogue.answer(generator.stream(dialogue.ask(said), **options)):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _sample(prompt: str, tokens: int, temperature: float, seed: int) -> SampleConfig:
    """The options within the bounds that the same keys have in a run's configuration."""
    options = {"prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": seed}
    try:
        return SampleConfig.model_validate(options)
    except ValidationError as error:
        raise UserError(f"jaxmoe generate: {describe(error, SampleConfig, options)}") from None


if __name__ == "__main__":
    run_command(main)
