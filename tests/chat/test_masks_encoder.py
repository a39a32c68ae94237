"""Which tokens are trained: where tokens and what is said begin and end at different places."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from helpers.chat_templates import FAMILIES, ChatFamily, tokenizer
from helpers.chats import chat, said, system, user
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxmoe.chat.encoder import Encoder, Example, Long
from jaxmoe.chat.ends import EndTokens
from jaxmoe.chat.records import Message, Piece, Record, Segments
from jaxmoe.chat.samples import TrainOn
from jaxmoe.chat.templates import ChatTemplate
from jaxmoe.chat.turns import TrainedTurns

pytestmark = pytest.mark.once


def encoded(
    record: Record,
    family: ChatFamily = FAMILIES["marked"],
    given: Tokenizer | None = None,
    length: int = 1000,
    long: Long = "truncate",
) -> list[Example]:
    return Encoder(given or tokenizer(), family.template, family.ends, TrainOn(), length, long=long)(record)


def texts(example: Example, given: Tokenizer | None = None) -> list[str]:
    """Trained tokens, each run of them as one text."""
    found: list[list[int]] = [[]]
    for token_id, weight in zip(example.ids.tolist(), example.weights.tolist(), strict=True):
        if weight:
            found[-1].append(token_id)
        elif found[-1]:
            found.append([])
    return [(given or tokenizer()).decode(run, skip_special_tokens=False) for run in found if run]


# -- tokens that would lie in a prompt and in what follows it


@pytest.mark.parametrize("content", ["\n newline first", "\n\n\n", " space first", "\n", "  two spaces\n"])
def test_a_token_never_spans_a_prompt_and_an_answer(content: str) -> None:
    """The template's line end and the answer's are one token together; what is served is a prompt's ids."""
    conversation = chat(user("?"), said(content), user("\nMore?"), said(content))
    (example,) = encoded(conversation)
    family, ids = FAMILIES["marked"], example.ids.tolist()
    whole = family.template.render(conversation.messages)
    assert tokenizer().encode(whole, add_special_tokens=False).ids != ids or content[0] != "\n"
    prompt = family.template.render(conversation.messages[:1], generation_prompt=True)
    served = tokenizer().encode(prompt, add_special_tokens=False).ids
    answer = tokenizer().encode(content + "<|im_end|>", add_special_tokens=False).ids
    assert ids[: len(served) + len(answer)] == served + answer
    assert texts(example) == [content + "<|im_end|>"] * 2


def test_a_line_end_of_a_thought_is_no_cut() -> None:
    """Where what is trained begins inside of what the model writes, ids are those that it writes."""
    family = FAMILIES["qwen3"]
    conversation = chat(user("?"), said("Yes.", "thinks"))
    left_out = Encoder(tokenizer(), family.template, family.ends, TrainOn(reasoning=False), 100)(conversation)
    (whole,) = encoded(conversation, family)
    assert left_out[0].ids.tolist() == whole.ids.tolist()
    assert texts(left_out[0]) == ["\n</think>\n\nYes.<|im_end|>"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        # White space goes with the word after it: the wrong word is not learnt, nor is the right one lost.
        (
            (Piece("Hello there: ", 1.0), Piece("one", 0.0), Piece(" two", 1.0)),
            ["Hello there:", " two<|im_end|>"],
        ),
        ((Piece("Hello ", 0.0), Piece("there", 1.0)), [" there<|im_end|>"]),
        # A word cut in two is learnt as little as its part that is not.
        ((Piece("Hello th", 0.0), Piece("ere: one", 1.0)), [": one<|im_end|>"]),
        ((Piece("Hello th", 1.0), Piece("ere: one", 0.0)), ["Hello", "<|im_end|>"]),
    ],
)
def test_pieces_that_cut_a_token(pieces: tuple[Piece, ...], expected: list[str]) -> None:
    (example,) = encoded(chat(user("?"), Message("assistant", pieces)))
    assert texts(example) == expected
    whole = FAMILIES["marked"].template.render([user("?"), said("".join(piece.text for piece in pieces))])
    assert example.ids.tolist() == tokenizer().encode(whole.rstrip("\n"), add_special_tokens=False).ids


def test_segments_are_cut_where_a_prompt_ends() -> None:
    record = Segments((Piece("One:\n", 0.0), Piece("\n two", 1.0), Piece("\n", 0.0), Piece("\nthree", 0.5)))
    (example,) = encoded(record)
    assert texts(example) == ["\n two", "\nthree<|im_end|>"]
    assert sorted(set(example.weights.tolist())) == [0.0, 0.5, 1.0]


# -- tokens that begin and end texts


def _with_bos(bos: str) -> Tokenizer:
    made = Tokenizer.from_str(tokenizer().to_str())
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made


def test_no_second_token_begins_a_text() -> None:
    given = _with_bos("<s>")
    bos = given.token_to_id("<s>")
    records: Sequence[tuple[Record, ChatFamily]] = [
        (chat(user("Hi there"), said("First answer.")), FAMILIES["mixtral"]),
        (Segments((Piece("<s> [INST] Hi [/INST]", 0.0), Piece(" First", 1.0))), FAMILIES["mixtral"]),
        (Segments((Piece("Hi", 0.0), Piece(" First", 1.0))), FAMILIES["mixtral"]),
    ]
    for record, family in records:
        (example,) = encoded(record, family, given)
        assert example.ids.tolist()[0] == bos
        assert example.ids.tolist().count(bos) == 1
    # A template that writes none means none: so it is served.
    (example,) = encoded(chat(user("Hi there"), said("First answer.")), FAMILIES["marked"], given)
    assert bos not in example.ids.tolist()


def test_no_second_token_ends_a_document() -> None:
    for text in ("First", "First<|im_end|>"):
        (example,) = encoded(Segments((Piece("Hi ", 0.0), Piece(text, 1.0))))
        assert texts(example) == ["First<|im_end|>"]


def test_padding_with_the_token_that_ends_turns() -> None:
    """One token begins texts, ends turns and pads: it is trained by its place and not by its id."""
    family = FAMILIES["olmoe"]
    given = Tokenizer.from_str(tokenizer().to_str())
    given.enable_padding(length=200, pad_id=given.token_to_id("<|endoftext|>"), pad_token="<|endoftext|>")
    (example,) = encoded(chat(user("Hi"), said("One."), user("Hi"), said("Two.")), family, given)
    assert texts(example, given) == ["One.<|endoftext|>", "Two.<|endoftext|>"]
    end = given.token_to_id("<|endoftext|>")
    assert [float(w) for i, w in zip(example.ids, example.weights, strict=True) if i == end][:3] == [0, 1, 1]


def test_truncation_of_the_tokenizer_is_left_aside() -> None:
    given = Tokenizer.from_str(tokenizer().to_str())
    given.enable_truncation(5)
    (example,) = encoded(chat(user("Hi there"), said("First answer.")), given=given)
    assert texts(example) == ["First answer.<|im_end|>"]


@pytest.mark.parametrize("length", range(12, 40))
def test_what_is_cut_off(length: int) -> None:
    conversation = chat(user("Hi there"), said("First answer."), user("More?"), said("Second."))
    (whole,) = encoded(conversation)
    for cut in encoded(conversation, length=length):
        assert cut.ids.tolist() == whole.ids.tolist()[:length]
        assert cut.weights.tolist() == whole.weights.tolist()[:length]
    for long in ("split", "drop"):
        found = encoded(conversation, length=length, long=long)
        if long == "drop":
            assert len(found) == (len(whole.ids) <= length)
        else:
            # Of each part the first token has nothing before it.
            left = [w for n, w in enumerate(whole.weights.tolist()) if n % length]
            assert sum(float(part.weights.sum()) for part in found) == sum(left)


# -- kinds of tokenizers


def _metaspace(
    scheme: str, text: str = "Hello there: one two three. First answer. Second answer."
) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special[:3], initial_alphabet=[*map(chr, range(32, 127)), "▁", "\n"],
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["Hello there: one two three. First answer. Second answer."] * 20, trainer)
    return made


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
def test_tokenizers_of_sentencepiece_s_kind(scheme: str) -> None:
    """Some put a space before every text: a text that is cut would have one more."""
    given = _metaspace(scheme)
    conversation = chat(
        user("Hello there"), said("First answer."), user(" one\n"), said("\nSecond  answer. ")
    )
    family = FAMILIES["mixtral"]
    (example,) = encoded(conversation, family, given)
    whole = family.template.render(conversation.messages)
    if scheme != "never":
        assert example.ids.tolist() == given.encode(whole, add_special_tokens=False).ids
    assert given.decode(example.ids.tolist(), skip_special_tokens=False).split() == whole.split()
    found = [text.strip() for text in texts(example, given)]
    assert found == ["First answer.</s>", "Second  answer. </s>"]


@pytest.mark.parametrize(("prompt", "expected"), [("A: ", [")b</s>"]), ("A:", [":)b</s>"])])
def test_what_cannot_be_cut_off_a_prompt_is_trained(prompt: str, expected: list[str]) -> None:
    """Cut, the answer would begin with one more space than the text has; uncut, all that is said is trained."""
    letters = ["</s>", *"▁HiA:)b", ":)", "▁)"]
    given = Tokenizer(models.BPE(dict(zip(letters, range(20), strict=False)), [(":", ")"), ("▁", ")")]))
    given.add_special_tokens(["</s>"])
    given.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    given.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    source = "{% for m in messages %}{{ m.content if m.role == 'user' else PROMPT + m.content + '</s>' }}{% endfor %}"
    source = (
        source.replace("PROMPT", f"'{prompt}'") + f"{{{{ '{prompt}' if add_generation_prompt else '' }}}}"
    )
    family = ChatFamily(source, ("</s>",))
    (example,) = encoded(chat(user("Hi"), said(")b")), family, given)
    assert given.encode(f"Hi{prompt})b</s>", add_special_tokens=False).ids == example.ids.tolist()
    assert texts(example, given) == expected
    assert example.weights.sum() == 3


def test_offsets_that_leave_white_space_out() -> None:
    """A tokenizer that says so of its tokens: what ends in white space is trained to its end all the same."""
    family = FAMILIES["marked"]
    encoder = Encoder(_trimming(), family.template, family.ends, TrainOn(end_of_turn="none"), 100)
    (example,) = encoder(chat(user("Hi"), said("Hello there \n ")))
    assert texts(example) == ["Hello there \n "]


def test_tokens_of_part_of_a_character() -> None:
    content = "👍🏽 Grüße 中文\n👍"
    (example,) = encoded(chat(user("👍"), said(content)))
    assert len(example.ids) > 20
    assert texts(example) == [content + "<|im_end|>"]


def test_a_special_token_that_takes_white_space_in() -> None:
    """Phi-3's tokens do: the one that ends a turn is trained, and what begins a turn is not lost in the mark before."""
    family = FAMILIES["phi3_5_moe"]
    given = Tokenizer.from_str(tokenizer().to_str())
    given.add_special_tokens(
        [AddedToken(text, rstrip=True) for text in ("<|end|>", "<|assistant|>", "<|user|>")]
    )
    (example,) = encoded(chat(user("Hi"), said("\n First."), user("Hi"), said("Second.")), family, given)
    assert texts(example, given) == ["\n First.<|end|>", "Second.<|end|>"]


# -- https://github.com/huggingface/transformers/issues/47325

_CHAT = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}BEFORE{{ m.content }}AFTER"
_CHAT += "{% endgeneration %}</s>{% else %}<s>{{ m.content }}{% endif %}{% endfor %}"


def _trimming() -> Tokenizer:
    made = Tokenizer.from_str(tokenizer().to_str())
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    assert made.encode("Hello there").offsets[-1] == (6, 11)
    return made


def _byte_by_byte() -> Tokenizer:
    """No merges: white space that is trimmed off the offsets is a token of its own."""
    state = json.loads(tokenizer().to_str())
    state["model"]["merges"] = []
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("make", [_trimming, _byte_by_byte, tokenizer])
@pytest.mark.parametrize("before", ["", " ", "\n"])
@pytest.mark.parametrize("after", ["", " ", " \n "])
def test_marks_that_begin_or_end_in_white_space(
    make: Callable[[], Tokenizer], before: str, after: str
) -> None:
    """Offsets of some tokenizers leave it out; transformers 5.23 then lost all later turns, or trained all of them."""
    source = _CHAT.replace("BEFORE", repr(before)[1:-1].join(("{{ '", "' }}"))).replace(
        "AFTER", repr(after)[1:-1].join(("{{ '", "' }}"))
    )
    family = ChatFamily(source, ("</s>",))
    (example,) = encoded(chat(user("Hi there"), said("there."), user("More?"), said("one.")), family, make())
    assert texts(example, make()) == [f"{before}there.{after}</s>", f"{before}one.{after}</s>"]


def test_a_mark_that_ends_at_the_first_token() -> None:
    """transformers 5.23 then trained the whole text."""
    source = _CHAT.replace("BEFORE", "").replace("AFTER", "").replace("</s>", "")
    template = ChatTemplate(source, "a template")
    turns = TrainedTurns(template, EndTokens(("</s>",), frozenset({"</s>", "<s>"})))
    (sample,) = turns.samples(chat(said("A"), user("user message"), said("B")))
    assert [(span.begin, span.end) for span in sample.spans] == [(0, 4), (16, 17)]
    (example,) = Encoder(tokenizer(), template, EndTokens(("</s>",), frozenset({"</s>"})), TrainOn(), 100)(
        chat(said("A"), user("user message"), said("B"))
    )
    assert texts(example) == ["B"]
    assert example.weights[0] == 0


# -- long conversations


def test_the_number_of_renderings_of_a_turn_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    render = ChatTemplate.render

    def counted(*args: Any, **kwargs: Any) -> str:
        nonlocal count
        count += 1
        return render(*args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    per_turn = []
    for turns in (4, 16):
        for name in ("qwen3", "glm4_moe", "deepseek_r1"):
            count = 0
            messages = [message for n in range(turns) for message in (user(f"{n}?"), said(f"{n}.", "hm"))]
            family = dataclasses.replace(FAMILIES[name])
            TrainedTurns(family.template, family.ends).samples(chat(system("Be terse."), *messages))
            per_turn.append(count / turns)
    assert max(per_turn) <= 4.25
