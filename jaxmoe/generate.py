"""``python -m jaxmoe.generate FOLDER PROMPT``: continue a text."""

import sys

from pydantic import ValidationError

from jaxmoe.cli import ArgumentParser, run_command
from jaxmoe.config import SampleConfig
from jaxmoe.config.errors import describe
from jaxmoe.errors import UserError
from jaxmoe.files import path_argument


def main(argv: list[str]) -> None:
    """The command."""
    default = SampleConfig.model_fields
    parser = ArgumentParser(prog="jaxmoe generate", description="Continue a text with a checkpoint.")
    parser.add_argument("model", type=path_argument, help="folder or hub id")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=default["tokens"].default)
    parser.add_argument("--temperature", type=float, default=default["temperature"].default)
    parser.add_argument("--seed", type=int, default=default["seed"].default)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(argv)
    sample = _sample(options.prompt, options.tokens, options.temperature, options.seed)
    # Imported only now: a mistake in the options is reported without waiting for it.
    import jax
    import jax.numpy as jnp

    from jaxmoe.data import end_of_document, load_tokenizer, vocabulary_size
    from jaxmoe.interop.loading import load_params
    from jaxmoe.interop.source import compute_dtype, open_source
    from jaxmoe.model.sampling import continue_text

    dtype = compute_dtype(options.dtype)
    if dtype == jnp.float16 and jax.default_backend() == "cpu":
        raise UserError(
            "--dtype: found float16, which jax does not multiply on a CPU, expected bfloat16 or float32"
        )
    source = open_source(options.model)
    folder, _ = source.opened
    tokenizer = load_tokenizer(folder, source.spec.vocab_size)
    if vocabulary_size(tokenizer) > source.spec.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer's largest token id is {vocabulary_size(tokenizer) - 1} but the model's "
            f"vocab_size is {source.spec.vocab_size}: give the folder the tokenizer that belongs to the model"
        )
    text = continue_text(
        load_params(source, dtype),
        source.spec,
        tokenizer,
        sample.prompt,
        stop=end_of_document(tokenizer, folder),
        dtype=dtype,
        **sample.model_dump(include={"tokens", "temperature", "seed"}),
    )
    sys.stdout.write(sample.prompt + text + "\n")


def _sample(prompt: str, tokens: int, temperature: float, seed: int) -> SampleConfig:
    """The options within the bounds that the same keys have in a run's configuration."""
    options = {"prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": seed}
    try:
        return SampleConfig.model_validate(options)
    except ValidationError as error:
        raise UserError(f"jaxmoe generate: {describe(error, SampleConfig, options)}") from None


if __name__ == "__main__":
    run_command(main)
