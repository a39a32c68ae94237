"""The generate command: what it says, and what a user gets wrong."""

import json
from types import SimpleNamespace

import jax
import pytest
from helpers import tiny

from jaxmoe.cli import main as cli
from jaxmoe.errors import UserError
from jaxmoe.model import sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "model"
    tiny.write_checkpoint(folder, "qwen3_moe", dtype="bfloat16", initializer_range=0.02)
    return folder


def refusal(capsys, *argv):
    assert cli(["generate", *map(str, argv)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    return told.err.removeprefix("error: ").rstrip("\n")


def test_the_prompt_goes_on_in_words_of_the_tokenizer(model, capsys):
    assert (
        cli(["generate", str(model), "w5 w6", "--tokens", "4", "--dtype", "float32", "--seed", "4294967295"])
        == 0
    )
    told = capsys.readouterr().out
    assert told.startswith("w5 w6")
    assert len(told.split()) <= 6


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (["--tokens", "0"], "tokens: found 0, expected at least 1"),
        (["--tokens", "1" + "0" * 13], "tokens: found 10000000000000, expected at most 1048576"),
        (["--tokens", "x"], "argument --tokens: invalid int value: 'x'; jaxmoe generate --help"),
        (["--tokens", "9" * 5000], "argument --tokens: invalid int value: '999"),
        (["--temperature", "nan"], "temperature: found nan, expected a finite number"),
        (["--temperature", "inf"], "temperature: found inf, expected a finite number"),
        (["--temperature=-0.5"], "temperature: found -0.5, expected at least 0"),
        (["--seed", "1" + "0" * 23], "seed: found 100000000000000000000000, expected at most 4294967295"),
        (["--seed=-1"], "seed: found -1, expected at least 0"),
        (
            ["--dtype", "float16"],
            "--dtype: found float16, which jax does not multiply on a CPU, expected bfloat16",
        ),
        (["--dtype", "int8"], "dtype 'int8' is not supported"),
    ],
)
def test_options_are_checked_before_the_model_is_looked_for(capsys, options, want):
    assert want in refusal(capsys, "/no/such/model", "w5", *options)


def test_a_prompt_that_is_no_text(capsys):
    told = refusal(capsys, "/no/such/model", "a\udcffb")
    assert "prompt: found 'a\\udcffb', whose character 1 is half a surrogate pair" in told


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path, capsys):
    tiny.write_checkpoint(tmp_path, "qwen3_moe")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    rows = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    # As many tokens as rows, with a gap: the number of tokens alone would say that it fits.
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = rows
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = refusal(capsys, tmp_path, "w5", "--dtype", "float32")
    assert told.startswith(
        f"{tmp_path}: the tokenizer's largest token id is {rows} but the model's vocab_size is {rows}: "
    )


def test_a_padding_token_for_which_the_model_has_no_row(tmp_path, capsys, caplog):
    tiny.write_checkpoint(tmp_path, "qwen3_moe")
    options = ["w5 w6", "--dtype", "float32", "--temperature", "0", "--tokens", "4"]
    assert cli(["generate", str(tmp_path), *options]) == 0
    alone = capsys.readouterr().out
    rows = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    assert max(tokenizer["model"]["vocab"].values()) == rows - 1
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**config, "pad_token": "<a pad>"}))
    assert cli(["generate", str(tmp_path), *options]) == 0
    assert capsys.readouterr().out == alone
    assert "add '<a pad>', for which the model" in caplog.text


def test_a_text_that_the_device_has_no_memory_for(monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 52777619552856 bytes.")

    monkeypatch.setattr(sampling, "_extend", exhausted)
    options = {"tokens": 10, "temperature": 0.0, "seed": 0, "dtype": None}
    with pytest.raises(UserError, match=r"no memory for a text of 12 tokens, 2 so far and 10 more"):
        sampling.generate({}, SimpleNamespace(rotations=frozenset(), layers=()), [1, 2], **options)
