import hashlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from jaxmoe.data import (
    DocumentEncoder,
    end_of_document,
    load_tokenizer,
    save_tokenizer,
    train_byte_bpe,
    vocabulary_size,
)
from jaxmoe.data import tokenizer as tokenizer_module
from jaxmoe.errors import UserError


def word_level(*words, **special):
    """One id per word; ``template`` makes the tokenizer put special tokens around a text by itself."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "template" in special:
        ids = [(word, i) for i, word in enumerate(words) if word.startswith("<")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=special["template"], special_tokens=ids
        )
    return tokenizer


def test_trained_tokenizer_knows_every_byte(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ("expert router", "\x00\r\n\t", "漢字 🙂 ñ", " leading and trailing "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("expert").ids) < len("expert")
    assert tokenizer.encode("a<|endoftext|>").ids[-1] == 0


def test_training_is_deterministic_across_processes(texts, tokenizer):
    script = (
        "import sys, json, hashlib; from jaxmoe.data import train_byte_bpe;"
        "t = train_byte_bpe(json.load(sys.stdin), 300);"
        "print(hashlib.blake2b(t.to_str().encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.blake2b(tokenizer.to_str().encode()).hexdigest()


def test_training_in_pieces_counts_the_words_of_the_whole(monkeypatch):
    rng = random.Random(2)
    words = [
        "Router",
        "naïve",
        "数据。训练",
        "x_1",
        "it's",
        "²³",
        "--",
        "\n\n",
        "  ",
        "\u3000",
        "—“a”",
        "12.5",
        "é\u0301",
    ]
    text = "".join(rng.choice(words) + rng.choice(["", " ", "  "]) for _ in range(9000))
    monkeypatch.setattr(tokenizer_module, "_TRAINED_CHARACTERS", 10**9)
    whole = train_byte_bpe([text], 400).to_str()
    for size in (50, 137):
        monkeypatch.setattr(tokenizer_module, "_TRAINED_CHARACTERS", size)
        assert "".join(tokenizer_module._small(text)) == text
        assert max(map(len, tokenizer_module._small(text))) < 1000
        assert train_byte_bpe([text], 400).to_str() == whole


def test_training_on_one_endless_word():
    """Its time would grow with the square of the length: days."""
    assert train_byte_bpe(["\0" * 2**21], 300).get_vocab_size() > 257


def test_vocabulary_size_counts_the_gaps_between_ids():
    assert vocabulary_size(word_level("a", "b", "c")) == 3
    gap = Tokenizer(models.WordLevel({"a": 0, "b": 7}))
    assert (gap.get_vocab_size(), vocabulary_size(gap)) == (2, 8)
    added = word_level("a", "b")
    added.add_special_tokens(["<s>"])
    assert vocabulary_size(added) == 3
    assert vocabulary_size(Tokenizer(models.BPE())) == 0


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "~no-such-user/x"])
def test_paths_at_which_no_tokenizer_can_be(path):
    with pytest.raises(UserError, match=r"which is no usable path \(.*; expected a tokenizer\.json"):
        load_tokenizer(path)


def test_a_tokenizer_that_cannot_be_written_is_an_error_of_the_system(tmp_path, tokenizer):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            save_tokenizer(tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


def test_saved_bytes_are_those_of_the_library(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path)
    tokenizer.save(str(tmp_path / "theirs.json"))
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()


def test_vocabulary_too_small():
    with pytest.raises(UserError, match=r"vocabulary of 257; expected at least 258"):
        train_byte_bpe(["a"], 257, special_tokens=["<a>", "<b>"])


def test_saved_tokenizer_loads_here_and_in_transformers(tmp_path, tokenizer, texts):
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert [again.encode(text).ids for text in texts] == [tokenizer.encode(text).ids for text in texts]
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    automatic = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert isinstance(automatic, PreTrainedTokenizerFast)
    assert (automatic.eos_token, automatic.eos_token_id) == ("<|endoftext|>", 0)
    assert automatic(texts[7])["input_ids"] == tokenizer.encode(texts[7]).ids
    assert automatic.decode(automatic(texts[7])["input_ids"]) == texts[7]


NEW_TOKEN = {"content": "<new>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def word_pieces(kind):
    """A tokenizer of two published kinds; what it knows is beside the point."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=kind == "metaspace"))
    tokenizer.pre_tokenizer = {
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The 3rd text of a new kind is new text. " * 9], trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "files", "changes"),
    [
        ("bytes", {}, False),
        ("bytes", {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}, False),
        ("bytes", {"tokenizer_config.json": {"added_tokens_decoder": {"400": NEW_TOKEN}}}, True),
        ("bytes", {"tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>"}}, None),
        (
            "bytes",
            {
                "tokenizer_config.json": {
                    "add_bos_token": True,
                    "add_eos_token": True,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                }
            },
            None,
        ),
        ("bytes", {"tokenizer_config.json": {"extra_special_tokens": ["<new>"]}}, True),
        (
            "bytes",
            {
                "tokenizer_config.json": {},
                "special_tokens_map.json": {"additional_special_tokens": ["<new>"]},
            },
            True,
        ),
        ("bytes", {"tokenizer_config.json": {}, "added_tokens.json": {"<new>": 400}}, True),
        (
            "bytes",
            {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
            True,
        ),
        ("bytes", {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}, True),
        ("bytes", {"config.json": {"model_type": "qwen3_moe"}}, True),
        ("bytes", {"config.json": {"model_type": "of our own"}}, False),
        ("metaspace", {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, True),
        (
            "metaspace",
            {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}},
            None,
        ),
        ("metaspace", {"config.json": {"model_type": "mixtral"}}, None),
    ],
)
def test_ids_are_those_of_transformers(tmp_path, kind, files, changes):
    """``changes``: that tokenizer.json alone would give others, None where it does not matter."""
    from transformers import AutoTokenizer

    alone = word_pieces(kind)
    alone.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    texts = ["The new text", " of <new> kinds:  <s>text</s>", "1234 naïve\n\nCafe\u0301 数据", ""]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        ids = [load_tokenizer(path).encode(text).ids for text in texts]
        assert ids == AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"]
    if changes is not None:
        assert (ids != [alone.encode(text).ids for text in texts]) == changes


def test_added_tokens_for_which_the_model_has_no_row(tmp_path, caplog):
    alone = word_pieces("bytes")
    size = vocabulary_size(alone)
    alone.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert vocabulary_size(load_tokenizer(tmp_path)) == size + 1
    assert vocabulary_size(load_tokenizer(tmp_path, size + 1)) == size + 1
    assert not caplog.records
    fitting = load_tokenizer(tmp_path, size)
    assert vocabulary_size(fitting) == size
    assert "add '<pad>', for which the model" in caplog.text
    for text in ("The <pad> new</s>", tokenizer_module._PROBE, ""):
        assert fitting.encode(text).ids == alone.encode(text).ids
    assert vocabulary_size(load_tokenizer(tmp_path, size - 1)) == size + 1  # does not fit by itself


def test_what_checkpoints_know_a_tokenizer_by():
    """Runs that go on have it noted."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer_module.digest(tokenizer) == "b896cfbd8a87afde314c02f3b8376815"


def test_what_tells_tokenizers_apart(texts, tokenizer):
    told = tokenizer_module.digest(tokenizer)
    padded = Tokenizer.from_str(tokenizer.to_str())
    padded.add_special_tokens(["<|pad|>"])
    assert tokenizer_module.digest(padded) == told
    assert tokenizer_module.digest(train_byte_bpe(texts[1:10], 300)) != told  # of as many tokens
    assert tokenizer_module.digest(word_level("a", "b")) != tokenizer_module.digest(word_level("b", "a"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "ByT5Tokenizer"}, "ByT5Tokenizer, whose ids are not those"),
        ({"added_tokens_decoder": {"x": 1}}, r"AutoTokenizer does not read it \(.*; mend what is beside"),
        (
            [],
            r"does not read it .*tokenizer_config\.json.*, or give .*tokenizer\.json alone in another folder",
        ),
    ],
)
def test_folders_of_which_there_is_no_such_tokenizer(tmp_path, tokenizer, config, message):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_a_broken_file_beside_tokenizer_json(tmp_path, tokenizer, name):
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="AutoTokenizer does not read it .*; mend what is beside") as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_a_class_that_is_code_of_the_folder(tmp_path, tokenizer, texts, caplog):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    loaded = load_tokenizer(tmp_path)
    assert [loaded.encode(text).ids for text in texts] == [tokenizer.encode(text).ids for text in texts]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: its class of tokenizer is code of its own, which is not run: the ids are those of "
        "tokenizer.json alone"
    ]


def test_nothing_is_said_of_the_length_of_a_probe(tmp_path, tokenizer, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 5}))
    load_tokenizer(tmp_path)
    logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"]
)
def test_what_is_no_regular_file_of_a_plausible_size(tmp_path, tokenizer, name):
    """Opened, a pipe would wait for a writer."""
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(
        UserError,
        match=f"{name}: cannot be read .it is a named pipe, expected a regular file.*: copy it there again",
    ):
        load_tokenizer(tmp_path)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name}: cannot be read .it is a character device"):
        load_tokenizer(tmp_path)
    file.unlink()
    with file.open("wb") as sparse:
        sparse.truncate(2**28 + 1)
    with pytest.raises(UserError, match=rf"{name}: 268,435,457 bytes, expected at most 268,435,456 .*: copy"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_end_of_document_reads_regular_files(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: cannot be read .it is a named pipe.*; mend or remove it"):
        end_of_document(word_level("a"), tmp_path)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as sparse:
        sparse.truncate(2**24 + 1)
    with pytest.raises(UserError, match=f"{name}: cannot be read .it has 16,777,217 bytes"):
        end_of_document(word_level("a"), tmp_path)


def test_a_vocabulary_without_tokenizer_json(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(
        UserError, match=r"it has vocab\.json and merges\.txt, .*: convert it with transformers"
    ):
        load_tokenizer(tmp_path)


def test_stored_truncation_and_padding_are_not_applied(tmp_path, tokenizer, texts):
    stored = Tokenizer.from_str(tokenizer.to_str())
    stored.enable_truncation(5)
    stored.enable_padding(length=999)
    stored.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(texts[9]).ids == tokenizer.encode(texts[9]).ids


def test_unusable_tokenizers(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json.*sentencepiece"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"none/x\.json: no tokenizer\.json"):
        load_tokenizer(tmp_path / "none" / "x.json")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"it has tokenizer\.model, a slow tokenizer: convert"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a readable tokenizer .*; copy it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "config", "eos"),
    [
        ("tokenizer_config.json", {"eos_token": "<b>"}, 2),
        ("tokenizer_config.json", {"eos_token": {"content": "<b>", "lstrip": False}}, 2),
        ("tokenizer_config.json", {"eos_token": None}, 1),
        ("generation_config.json", {"eos_token_id": [3, 2]}, 3),
        ("generation_config.json", {"eos_token_id": []}, 1),
        ("config.json", {"eos_token_id": 0}, 0),
        ("config.json", {"text_config": {"eos_token_id": 3}}, 3),
        ("config.json", {}, 1),
    ],
)
def test_end_of_document_is_looked_up(tmp_path, file, config, eos):
    tokenizer = word_level("a", "</s>", "<b>", "c")
    (tmp_path / file).write_text(json.dumps(config))
    assert end_of_document(tokenizer, tmp_path) == eos


def test_end_of_document_prefers_the_tokenizers_own_file(tmp_path):
    tokenizer = word_level("a", "</s>", "<b>", "c")
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert end_of_document(tokenizer, tmp_path) == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<b>"}')
    assert end_of_document(tokenizer, tmp_path) == 2
    assert end_of_document(word_level("a", "b")) is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", '{"eos_token": "<x>"}', "'<x>' is not in the tokenizer's vocabulary"),
        ("config.json", '{"eos_token_id": 9}', "eos_token_id 9 is not an id"),
        ("config.json", '{"eos_token_id": "9"}', "eos_token_id '9' is not an id"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id -1 is not an id"),
        ("generation_config.json", f'{{"eos_token_id": [{10**20}]}}', f"eos_token_id {10**20} is not an id"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id True is not an id"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', r"eos_token '\\ud800' is not in"),
        ("tokenizer_config.json", "[" * 100_000, r"not readable as JSON \(.*; mend or remove it"),
        ("config.json", "{", "not readable as JSON"),
        ("config.json", "[]", "a JSON list, expected an object; mend or remove it"),
    ],
)
def test_unusable_end_of_document(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        end_of_document(word_level("a", "b"), tmp_path)


def test_document_encoder_marks_the_ends():
    plain = word_level("a", "<s>", "</s>", "b")
    encoded = DocumentEncoder(plain, eos=2)("a b a")
    assert encoded.dtype == np.int32
    assert encoded.tolist() == [0, 3, 0, 2]
    assert DocumentEncoder(plain, eos=None)("a b").tolist() == [0, 3]
    assert DocumentEncoder(plain, eos=2)("b </s>").tolist() == [3, 2]
    assert DocumentEncoder(plain, eos=2, context=2)("a").tolist() == [2, 0, 2]
    own_bos = word_level("a", "<s>", "</s>", "b", template="<s> $A")
    assert DocumentEncoder(own_bos, eos=2, context=2)("a").tolist() == [1, 0, 2]
    own_eos = word_level("a", "</s>", template="$A </s>")
    assert DocumentEncoder(own_eos, eos=1, context=1)("a a").tolist() == [1, 0, 0, 1]
    with pytest.raises(UserError, match="cannot encode the text that starts 'a c'"):
        DocumentEncoder(plain, eos=2)("a c")
