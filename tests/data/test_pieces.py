"""Tokenizing in pieces gives the ids of tokenizing at once, or refuses."""

import functools
import itertools
import random

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxmoe.data import DocumentEncoder, check_separable, encoder, formats, open_documents, pieces
from jaxmoe.data import documents as documents_module
from jaxmoe.data.pieces import Bytes, InseparableError, Pieces
from jaxmoe.errors import UserError

GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4_THREES = GPT4.replace(r"\p{N}|", r"\p{N}{1,3}|")
THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))"
WORDS = [
    *(
        "expert",
        "router",
        "naïve",
        "数据训练。",
        "the",
        "of",
        "it's",
        "1234567",
        "x=y+1;",
        "\n",
        "\r\n",
        "\t",
        "—",
    ),
    *(
        "Привет",
        "e\u0301\u0323",
        "👩‍👩‍👧",
        "🇩🇪",
        "नमस्ते",
        "  ",
        "      ",
        "ガ",
        "か\u3099",
        "각",
        "a" * 40,
        "{}()[]",
    ),
]


def prose(seed, count):
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=count))


def trained(model, trainer, normalizer=None, pre_tokenizer=None, post_processor=None):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([prose(1, 300), *["a" * 60, " " * 60, "1" * 40] * 9], trainer)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.add_special_tokens(["<|endoftext|>", AddedToken("<pad>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("Expert", single_word=True, normalized=True)])
    return tokenizer


def bpe(*before, ends=None, **options):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    return trained(models.BPE(**options), trainer, *before, post_processor=ends)


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def split(*patterns):
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, byte_level(use_regex=False)])


def template():
    return processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])


UNK = {"unk_token": "<unk>", "fuse_unk": True}
SPACES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS = {
    "gpt2": lambda: bpe(None, byte_level()),
    "gpt4": lambda: bpe(normalizers.NFC(), split(GPT4), ends=template()),
    "deepseek": lambda: bpe(None, split(r"\p{N}{1,3}", r"[一-龥\u3040-\u30ff]+", GPT4_THREES)),
    "prefix space": lambda: bpe(
        None, pre_tokenizers.ByteLevel(add_prefix_space=True), ends=processors.ByteLevel()
    ),
    "llama": lambda: bpe(SPACES, None, ends=template(), **UNK),
    "gemma": lambda: bpe(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), **UNK
    ),
    "metaspace": lambda: bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), **UNK),
    "metaspace always": lambda: bpe(None, pre_tokenizers.Metaspace(prepend_scheme="always"), **UNK),
    "lower": lambda: bpe(
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
        pre_tokenizers.WhitespaceSplit(),
        **UNK,
    ),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        ),
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(),
    ),
    "bert": lambda: trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False),
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    ),
}
OTHERS = [("gpt2", "jsonl"), ("llama", "parquet")]
RUNS = [
    " " * 5003,
    "a" * 3001,
    "1" * 4001,
    "\u0301\u0323" * 700,
    "👩‍" * 300,
    "ab" * 2000,
    "\n" * 1500,
    "字" * 2500,
]


def texts():
    rng = random.Random(3)
    yield "prose", prose(4, 5000)
    yield "no spaces", "".join(rng.choices("abcdefgh", k=20_000))
    yield (
        "any characters",
        "".join(chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(32, 127)])) for _ in range(20_000)),
    )
    marks = ["<|endoftext|>", "<pad>", " <pad>  ", "Expert", "Experts", " ", "<|endo", "ftext|>"]
    yield "added tokens", "".join(rng.choices([*marks, *WORDS], k=5000))
    yield "runs", "".join(prose(seed, 300) + run for seed, run in enumerate(RUNS * 2)) + prose(5, 300)


TEXTS = dict(texts())


@functools.cache
def tokenizer_of(name):
    return TOKENIZERS[name]()


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return tokenizer_of(request.param)


def in_memory(text):
    return Bytes(text.encode(), len(text.encode()))


def joined(tokenizer, text, step):
    """The ids by pieces, and how many there were."""
    source, cutter = in_memory(text), Pieces(tokenizer)
    cuts = [None]
    at = step
    while at < source.size - step:
        try:
            cuts.append(cutter.cut(source, at))
            at = cuts[-1].at + step
        except InseparableError:
            at += step  # such a place is refused where it is met
    ids = [i for ends in itertools.pairwise([*cuts, None]) for i in cutter.ids(source, *ends)]
    return ids, len(cuts)


@pytest.mark.once
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_are_the_whole(kind, text):
    whole = kind.encode(text, add_special_tokens=False).ids
    ids, count = joined(kind, text, 5003)
    assert ids == whole
    if text == TEXTS["prose"]:
        assert count > 5


@pytest.mark.parametrize("eos", [None, 2])
def test_a_long_document_is_encoded_as_a_short_one(kind, eos, monkeypatch):
    text = prose(7, 6000)
    short = DocumentEncoder(kind, eos=eos, context=1)(text)
    monkeypatch.setattr(encoder, "_AT_ONCE", 5000)
    monkeypatch.setattr(encoder, "_AT_ONCE_IF_NEED_BE", 25_000)
    monkeypatch.setattr(encoder, "_PIECE", 10_000)
    calls = []
    at_once = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda *args, **kwargs: calls.append(1) or at_once(*args, **kwargs)
    )
    assert np.array_equal(DocumentEncoder(kind, eos=eos, context=1)(text), short)
    assert not calls


@pytest.mark.parametrize(("name", "suffix"), [*((name, "txt") for name in TOKENIZERS), *OTHERS])
def test_the_parts_of_a_large_document_in_a_row_are_the_whole(
    name, suffix, tmp_path, write_jsonl, monkeypatch
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(pieces, "_REACH", 9000)
    monkeypatch.setattr(encoder, "_PIECE", 4000)
    for module in (formats, documents_module):
        monkeypatch.setattr(module, "PART_BYTES", 10_001)
    for module in (formats, documents_module):
        monkeypatch.setattr(module, "WHOLE_BYTES", 15_000)
    kind = tokenizer_of(name)
    text, file = prose(8, 6000), tmp_path / f"a.{suffix}"
    if suffix == "txt":
        file.write_text(text, "utf-8", newline="")
    elif suffix == "jsonl":
        write_jsonl([text], file.name)
    else:
        pq.write_table(pa.table({"text": [text]}), file)
    documents = open_documents(file)
    assert len(documents) == len(text.encode()) // 10_001 > 4
    assert "".join(documents) == text
    assert documents.total_bytes == len(text.encode())
    assert documents.where(1).endswith("from byte 10001")
    check_separable(documents, kind)
    encode = DocumentEncoder(kind, eos=2, context=1)
    parts = [encode.element(documents, i) for i in range(len(documents))]
    assert all(part.size for part in parts)
    assert np.array_equal(np.concatenate(parts), encode(text))
    if suffix == "txt":
        changed = bytearray(file.read_bytes())
        changed[25_000] ^= 1
        file.write_bytes(changed)
        assert np.array_equal(encode.element(documents, 0), parts[0])
        with pytest.raises(UserError, match="from byte 20002: changed since it was opened"):
            encode.element(documents, 2)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError("gone"), UserError, "changed since it was opened"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "odd"), UserError, "changed since it was opened"),
        (ValueError("a mistake in the code"), ValueError, "a mistake in the code"),
    ],
)
def test_what_is_told_as_a_change(tmp_path, monkeypatch, error, expected, message):
    for module in (formats, documents_module):
        monkeypatch.setattr(module, "PART_BYTES", 10_001)
        monkeypatch.setattr(module, "WHOLE_BYTES", 15_000)
    (tmp_path / "a.txt").write_text(prose(8, 6000), "utf-8")
    documents = open_documents(tmp_path)

    def fails(*_):
        raise error

    monkeypatch.setattr(Pieces, "ids", fails)
    with pytest.raises(expected, match=message):
        DocumentEncoder(tokenizer_of("gpt2"), eos=2).element(documents, 1)


def refusal(tokenizer, text):
    with pytest.raises(InseparableError) as caught:
        Pieces(tokenizer).cut(in_memory(text), 6000)
    return str(caught.value)


def test_what_is_refused(monkeypatch, write_jsonl):
    plain = prose(9, 4000)
    # The same characters for as far as one may look: how they group depends on where they begin, or end.
    for name, run in (("gpt2", " "), ("llama", " "), ("gpt4", "a"), ("deepseek", "1"), ("bert", "x")):
        assert "none where they surely do" in refusal(tokenizer_of(name), run * 550_000)
    assert "none where they surely do" in refusal(bpe(None, split(THREES, GPT4_THREES)), "1" * 550_000)
    assert "none where they surely do" in refusal(
        trained(
            models.Unigram(),
            trainers.UnigramTrainer(
                vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
            ),
        ),
        plain,
    )
    assert "may look at all text after" in refusal(bpe(None, split(r"a(?=.*b)|\w+", GPT4)), plain)
    assert "FixedLength may depend" in refusal(bpe(None, pre_tokenizers.FixedLength(7)), plain)
    assert "at random" in refusal(bpe(None, byte_level(), dropout=0.1), plain)
    monkeypatch.setattr(encoder, "_AT_ONCE", 5000)
    fixed = bpe(None, pre_tokenizers.FixedLength(7))
    monkeypatch.setattr(encoder, "_PIECE", 5000)
    assert DocumentEncoder(fixed, eos=None)(plain).tolist() == fixed.encode(plain).ids  # still small enough
    monkeypatch.setattr(encoder, "_AT_ONCE_IF_NEED_BE", 5000)
    with pytest.raises(UserError, match=r"has [\d,]+ bytes: too large .*FixedLength.*; split the document"):
        DocumentEncoder(fixed, eos=None)(plain)
    for module in (formats, documents_module):
        monkeypatch.setattr(module, "PART_BYTES", 10_001)
        monkeypatch.setattr(module, "WHOLE_BYTES", 15_000)
    documents = open_documents(write_jsonl(["short", plain]))
    check_separable(documents, tokenizer_of("gpt2"))
    with pytest.raises(
        UserError, match=r"jsonl line 2 from byte 10001: too large .*FixedLength.*; split the document"
    ):
        check_separable(documents, fixed)


def test_white_space_that_a_far_token_takes_is_not_cut():
    tokenizer = tokenizer_of("gpt2")
    text = prose(10, 2000) + "\n" * 3000 + "<pad>" + "\n" * 3000 + prose(11, 6000)
    whole = tokenizer.encode(text).ids
    start = len(prose(10, 2000).encode())
    for step in (start + 1000, start + 4000):
        ids, count = joined(tokenizer, text, step)
        assert ids == whole
        assert count > 1


def test_no_document_in_one_element_is_refused_while_it_is_read(write_jsonl):
    """That would be in the middle of a run, and each time that it is resumed."""
    text = "ab" * (2**22 + 100)
    fixed = bpe(None, pre_tokenizers.FixedLength(7))
    documents = open_documents(write_jsonl([text]))
    assert len(documents) == 1
    check_separable(documents, fixed)
    ids = DocumentEncoder(fixed, eos=None).element(documents, 0)
    assert fixed.decode(ids.tolist()).replace(" ", "") == text
