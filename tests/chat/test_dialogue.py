"""What a model is asked, turn after turn, and where its answers end."""

import datetime

import pytest

from jaxmoe.chat.dialogue import Dialogue, asked, stop_ids, with_usual_end
from jaxmoe.chat.ends import end_tokens
from jaxmoe.chat.records import Conversation, Message, Piece
from jaxmoe.chat.templates import ChatTemplate, built_in, find_template
from jaxmoe.chat.turns import TrainedTurns
from jaxmoe.config import DataConfig
from jaxmoe.data import train_byte_bpe
from jaxmoe.errors import UserError

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>"),
)
ENDS = {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "zephyr": "</s>",
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["What is it? It is nothing at all."] * 9, 300, SPECIAL)


def turn(role, text):
    return Message(role, (Piece(text),))


def test_an_answer_becomes_a_turn(tokenizer):
    dialogue = Dialogue(find_template("chatml", None), tokenizer, "Be good")
    first = dialogue.ask("What is it?")
    text = "<|im_start|>system\nBe good<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first, skip_special_tokens=False) == text
    assert "".join(dialogue.answer(tokenizer.encode("It is \u00e9.").ids)) == "It is \u00e9."
    second = tokenizer.decode(dialogue.ask("So?"), skip_special_tokens=False)
    assert (
        second == f"{text}It is \u00e9.<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", built_in())
def test_templates_that_come_along_train_every_answer_in_one_sequence(tokenizer, name):
    template = find_template(name, None)
    ends = with_usual_end(end_tokens(tokenizer, None, None), template)
    assert ends.stops[0] == ENDS[name]
    system = [turn("system", "Be good")]
    messages = (
        *system,
        turn("user", "a b"),
        turn("assistant", "c d"),
        turn("user", "e"),
        turn("assistant", "f g"),
    )
    finder = TrainedTurns(template, ends)
    (sample,) = finder.samples(Conversation(messages))
    trained = [sample.text[span.begin : span.end].lstrip(" ") for span in sample.spans]
    assert trained == [f"c d{ENDS[name]}", f"f g{ENDS[name]}"]
    assert not finder.notes
    assert set(ENDS) == set(built_in())
    assert name in DataConfig.model_fields["chat_template"].description


def test_what_ends_a_turn_ends_an_answer(tokenizer):
    template = find_template("chatml", None)
    ends = end_tokens(tokenizer, None, tokenizer.token_to_id("<|endoftext|>"))
    assert [tokenizer.id_to_token(i) for i in stop_ids(tokenizer, ends, template)] == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert [tokenizer.id_to_token(i) for i in stop_ids(tokenizer, ends, None)] == ["<|endoftext|>"]


def test_a_template_that_refuses_is_told_in_one_line(tokenizer):
    with pytest.raises(UserError, match="does not take the conversation .*use another template$"):
        asked(find_template("mistral", None), tokenizer, [turn("critic", "no")])


def test_the_date_of_a_template_is_pinned(tmp_path):
    file = tmp_path / "dated.jinja"
    file.write_text("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    template = find_template(str(file), None, datetime.date(2024, 2, 3))
    assert template.render([turn("user", "!")]) == "03 Feb 2024!"
    assert find_template(str(file), None).date == datetime.date.today()
    assert isinstance(find_template("chatml", None), ChatTemplate)
    assert find_template("chatml", None).date is None
    file.write_text("{% set f = '%Y' %}{{ strftime_now(f) }}")
    with pytest.raises(UserError, match="a format that it computes, expected a literal one"):
        find_template(str(file), None)
