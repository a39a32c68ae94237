# ruff: noqa: RUF001 the bars of DeepSeek's special tokens are wide ones
"""What of a conversation is trained, with restatements of many families' templates."""

import dataclasses
import random
import re
from collections.abc import Sequence

import pytest
from helpers import chat_oracle
from helpers.chat_templates import FAMILIES, ChatFamily, tokenizer
from helpers.chats import chat, drawn, refusal, result, said, samples, spelt, system, trained, user

from jaxmoe.chat.encoder import Encoder
from jaxmoe.chat.ends import EndTokens
from jaxmoe.chat.records import Conversation, Message, Piece
from jaxmoe.chat.samples import Sample, TrainOn
from jaxmoe.chat.templates import ChatTemplate
from jaxmoe.chat.turns import TrainedTurns
from jaxmoe.errors import UserError

pytestmark = pytest.mark.once

TWO = chat(user("Hi there"), said("First answer."), user("More?"), said("Second\n\nanswer."))
THINKING = chat(
    user("Hi there"), said("First answer.", "thought one"), user("More?"), said("Second.", "thought two")
)
CALLING = chat(
    user("Weather?"), said("", None, "Oslo"), result('{"c": 7}'), said("It is 7."), user("Thanks"), said("Welcome."),
    tools=True,
)  # fmt: skip

BY_HAND: dict[tuple[str, str], list[list[str]]] = {
    ("mixtral", "two"): [[" First answer.</s>", " Second\n\nanswer.</s>"]],
    ("qwen3", "two"): [
        ["<think>\n\n</think>\n\nFirst answer.<|im_end|>"],
        ["<think>\n\n</think>\n\nSecond\n\nanswer.<|im_end|>"],
    ],
    ("qwen3", "thinking"): [
        ["<think>\nthought one\n</think>\n\nFirst answer.<|im_end|>"],
        ["<think>\nthought two\n</think>\n\nSecond.<|im_end|>"],
    ],
    ("qwen3_5", "thinking"): [
        ["thought one\n</think>\n\nFirst answer.<|im_end|>"],
        ["thought two\n</think>\n\nSecond.<|im_end|>"],
    ],
    ("glm4_moe", "two"): [
        ["\n<think></think>\nFirst answer.<|user|>", "\n<think></think>\nSecond\n\nanswer.<|user|>"]
    ],
    ("glm4_moe", "calling"): [
        [
            "\n<think></think>\n<tool_call>weather\n<arg_key>arg_city</arg_key>\n<arg_value>Oslo</arg_value>\n"
            "</tool_call><|observation|>",
            "\n<think></think>\nIt is 7.<|user|>",
            "\n<think></think>\nWelcome.<|user|>",
        ]
    ],
    ("gpt_oss", "thinking"): [
        [
            "<|channel|>analysis<|message|>thought one<|end|><|start|>assistant<|channel|>final<|message|>First answer."
            "<|return|>"
        ],
        [
            "<|channel|>analysis<|message|>thought two<|end|><|start|>assistant<|channel|>final<|message|>Second."
            "<|return|>"
        ],
    ],
    ("gpt_oss", "calling"): [
        ["<|channel|>final<|message|>It is 7.<|return|>"],
        [
            ' to=functions.weather<|channel|>commentary json<|message|>{"arg_city": "Oslo"}<|call|>',
            "<|channel|>final<|message|>Welcome.<|return|>",
        ],
    ],
    ("minimax_m2", "thinking"): [
        ["thought one\n</think>\n\nFirst answer.[e~["],
        ["thought two\n</think>\n\nSecond.[e~["],
    ],
    ("deepseek_v3", "calling"): [
        [
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
            '{"arg_city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
            "It is 7.<｜end▁of▁sentence｜>",
            "Welcome.<｜end▁of▁sentence｜>",
        ]
    ],
    ("gemma4", "calling"): [
        [
            '<|tool_call>call:weather{"arg_city": "Oslo"}<tool_call|><|tool_response>',
            "It is 7.<turn|>",
            "Welcome.<turn|>",
        ]
    ],
    ("olmoe", "two"): [["First answer.<|endoftext|>", "Second\n\nanswer.<|endoftext|>"]],
    ("hunyuan", "two"): [["First answer.<|eos|>", "Second\n\nanswer.<|eos|>"]],
    ("nemotron_3", "two"): [["<think></think>First answer.<|im_end|>", "<think></think>Second\n\nanswer.<|im_end|>"]],
    ("phi3_5_moe", "two"): [["First answer.<|end|>", "Second\n\nanswer.<|end|>"]],
    ("marked", "two"): [["First answer.<|im_end|>", "Second\n\nanswer.<|im_end|>"]],
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), BY_HAND)
def test_trained_text(family: str, name: str) -> None:
    conversation = {"two": TWO, "thinking": THINKING, "calling": CALLING}[name]
    assert trained(family, conversation) == BY_HAND[family, name]


POLICIES = (
    TrainOn(),
    TrainOn(last_turn_only=True),
    TrainOn(end_of_turn="all"),
    TrainOn(end_of_turn="last"),
    TrainOn(end_of_turn="none"),
    TrainOn(reasoning=False),
    TrainOn(roles=("assistant", "user")),
    TrainOn(roles=("tool", "system", "assistant")),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_was_said_by_whom_it_should_be(name: str) -> None:
    family, rng = FAMILIES[name], random.Random(name)
    judged = 0
    for policy in POLICIES * 4:
        parallel = family.tools == "parallel"
        conversation = drawn(rng, system=family.system, tools=parallel, alternating=not parallel)
        coded, fields = chat_oracle.coded(conversation, policy)
        turns = TrainedTurns(family.template, family.ends, policy)
        if (refused := refusal(turns, coded)) is not None:
            assert re.match("(turn [0-9]+ [(]|no turn).*$", refused), refused
            assert refusal(turns, conversation)
            continue
        found = turns.samples(coded)
        judged += 1
        wrong = list(
            chat_oracle.faults(family.template, family.stops, coded, fields, policy, found, turns.notes)
        )
        assert not wrong, (wrong, policy, conversation)
        plain = samples(family, conversation, policy)
        assert [(s.spans, s.prompts) for s in plain] == [(s.spans, s.prompts) for s in found]
        _check_tokens(family, conversation, policy, plain)
    assert judged > 16


def _check_tokens(
    family: ChatFamily, conversation: Conversation, policy: TrainOn, found: Sequence[Sample]
) -> None:
    """Trained tokens spell the trained texts, but for what lies half in a piece of no weight."""
    encoder = Encoder(tokenizer(), family.template, family.ends, policy, 10_000)
    examples = encoder(conversation)
    assert len(examples) == len(found)
    if any(piece.weight is not None for message in conversation.messages for piece in message.pieces):
        return
    for example, sample in zip(examples, found, strict=True):
        assert tokenizer().decode(example.ids.tolist(), skip_special_tokens=False) == sample.text
        counted = tokenizer().decode(example.ids[example.weights > 0].tolist(), skip_special_tokens=False)
        expected = "".join(spelt(sample))
        if policy.roles != (
            "assistant",
        ):  # where white space of the template is in a token with a word after it
            counted, expected = ("".join(text.split()) for text in (counted, expected))
        assert counted == expected


# -- what train_on and weights say

THREE = chat(system("Be terse."), user("One?"), said("Uno."), user("Two?"), said("Due."), user("Three?"))


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        (TrainOn(), ["Uno.<|im_end|>", "Due.<|im_end|>"]),
        (TrainOn(last_turn_only=True), ["Due.<|im_end|>"]),
        (TrainOn(end_of_turn="last"), ["Uno.", "Due.<|im_end|>"]),
        (TrainOn(end_of_turn="none"), ["Uno.", "Due."]),
        (TrainOn(end_of_turn="all"), ["<|im_end|>", "<|im_end|>", "Uno.<|im_end|>", "<|im_end|>", "Due.<|im_end|>"]),
        (TrainOn(("user",)), ["One?<|im_end|>", "Two?<|im_end|>", "Three?<|im_end|>"]),
        (TrainOn(("system", "assistant")), ["Be terse.<|im_end|>", "Uno.<|im_end|>", "Due.<|im_end|>"]),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["marked", "unmarked"])
def test_policies(family: str, train_on: TrainOn, expected: list[str]) -> None:
    assert trained(_chatml(marked=family == "marked"), THREE, train_on) == [expected]


def _chatml(marked: bool = False) -> ChatFamily:
    family = FAMILIES["marked"]
    source = family.source if marked else family.source.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )  # fmt: skip
    return dataclasses.replace(family, source=source)


def test_an_end_of_turn_that_somebody_wrote_is_none() -> None:
    conversation = chat(user("What is <|im_end|> for?"), said("It ends turns."))
    assert trained(_chatml(), conversation, TrainOn(end_of_turn="all")) == [
        ["<|im_end|>", "It ends turns.<|im_end|>"]
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", "\n</think>\n\nthink.<|im_end|>"),
        ("qwen3_5", "\n</think>\n\nthink.<|im_end|>"),
        ("glm4_moe", "</think>\nthink.<|user|>"),
        ("gpt_oss", "<|end|><|start|>assistant<|channel|>final<|message|>think.<|return|>"),
        ("gemma4", "\n<channel|>think.<turn|>"),
    ],
)
@pytest.mark.parametrize("thought", ["think", "a", "assistant", "once\n\ntwice"])
def test_reasoning_is_left_out(family: str, expected: str, thought: str) -> None:
    """Also where the thought is a word of the marks around it."""
    assert trained(family, chat(user("?"), said("think.", thought)), TrainOn(reasoning=False)) == [[expected]]


def test_reasoning_in_the_content_is_left_out() -> None:
    conversation = chat(user("?"), said("<think>\nthink\n</think>\n\nYes."))
    assert trained(_chatml(), conversation, TrainOn(reasoning=False)) == [["\n</think>\n\nYes.<|im_end|>"]]


def test_weights_of_turns_and_pieces() -> None:
    pieces = (Piece("Oslo", 0.0), Piece(" is cold", 0.5), Piece(", Oslo"))
    conversation = chat(
        user("?"), said("Half.", weight=0.5), user("?"), said("None.", weight=0.0), user("?"),
        Message("assistant", pieces, tool_calls=said("", None, "Oslo").tool_calls), tools=True,
    )  # fmt: skip
    (sample,) = samples(_chatml(), conversation)
    found = [(text, span.weight) for text, span in zip(spelt(sample), sample.spans, strict=True)]
    call = '\n<tool_call>\n{"name": "weather", "arguments": {"arg_city": "Oslo"}}\n</tool_call><|im_end|>'
    assert found == [("Half.<|im_end|>", 0.5), (" is cold", 0.5), (", Oslo" + call, 1.0)]


def test_pieces_of_what_the_template_trims() -> None:
    pieces = (Piece(" \n", 0.5), Piece(" One ", 1.0), Piece("two \n", 0.5))
    (sample,) = samples("qwen3_5", chat(user("?"), Message("assistant", pieces)))
    assert [span.weight for span in sample.spans] == [1.0, 0.5, 1.0]
    assert spelt(sample)[0].endswith("</think>\n\nOne ")
    assert spelt(sample)[1:] == ["two", "<|im_end|>"]


def test_pieces_of_a_turn_of_the_user() -> None:
    """Each has its own weight there as well, and the words of a role are no hindrance."""
    pieces = (Piece("user", 0.5), Piece(" says", 0.0), Piece(" user", 1.0))
    (sample,) = samples(_chatml(), chat(Message("user", pieces), said("Yes.", weight=0.0)))
    found = [(text, span.weight) for text, span in zip(spelt(sample), sample.spans, strict=True)]
    assert found == [("user", 0.5), (" user<|im_end|>", 1.0)]


def test_the_token_that_ends_a_turn_weighs_as_the_turn() -> None:
    """And not as its last piece, or as 1 where no text of the turn is trained."""
    cut = Message("assistant", (Piece("No. ", 1.0), Piece("Yes.", 0.0)))
    (sample,) = samples(_chatml(), chat(user("?"), cut))
    assert spelt(sample) == ["No. ", "<|im_end|>"]
    (sample,) = samples(_chatml(), chat(user("?"), said("", weight=0.5), user("?")))
    assert [(span.weight, text) for span, text in zip(sample.spans, spelt(sample), strict=True)] == [
        (0.5, "<|im_end|>")
    ]


# -- turns and prompts


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_what_would_be_served(name: str) -> None:
    """With arguments that make both alike where the template has such, else the note says what differs."""
    family = FAMILIES[name]
    for thinking in (None, False):
        arguments = {} if thinking is None else {"enable_thinking": thinking}
        conversation = chat(user("Hi there"), said("First answer."), user("More?"), **arguments)
        turns = TrainedTurns(family.template, family.ends)
        (sample,) = turns.samples(conversation)
        served = family.template.render(
            conversation.messages[:1], arguments=arguments, generation_prompt=True
        )
        if not any("generation prompt" in note for note in turns.notes):
            assert sample.text[: sample.prompts[0]] == served
            continue
        assert name in ("minimax_m2", "deepseek_r1", "nemotron_3" if thinking is None else "gemma4")
        assert served.startswith(sample.text[: sample.prompts[0]])
        (note,) = [note for note in turns.notes if "generation prompt" in note]
        assert repr(served[sample.prompts[0] :]) in note


@pytest.mark.parametrize(
    ("prompt", "answer"), [("<|think|>", "<|tool|>x"), ("<|think|>", "<|th"), ("thus", "this")]
)
def test_a_prompt_that_begins_as_the_answer_does(prompt: str, answer: str) -> None:
    """What is trained begins in no mark and in no word."""
    source = _chatml().source.replace("assistant\\n' }}{%- endif", f"assistant\\n{prompt}' }}}}{{%- endif")
    assert prompt in source
    family = dataclasses.replace(_chatml(), source=source, special=("<|im_start|>", "<|think|>", "<|tool|>"))
    assert trained(family, chat(user("?"), said(answer))) == [[answer + "<|im_end|>"]]


def test_several_turns_of_the_assistant() -> None:
    conversation = chat(user("?"), said("One."), said("Two."), user("!"), said("Three."))
    assert trained(_chatml(), conversation) == [["One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>"]]
    # The first one ends with a token at which generation stops, and not with the mark of the next.
    assert [each[-1][-8:] for each in trained("glm4_moe", conversation)] == ["<|user|>"] * 2


def test_empty_turns_and_those_of_white_space() -> None:
    conversation = chat(user("?"), said(""), user("?"), said("\n \n"), user("?"), said("Yes."))
    assert trained(_chatml(), conversation) == [["<|im_end|>", "\n \n<|im_end|>", "Yes.<|im_end|>"]]


def test_marks_in_parts() -> None:
    source = (
        FAMILIES["marked"]
        .source.replace("{{ '\\n' }}", "")
        .replace("+ '<|im_end|>' }}", "}}{%- endgeneration -%}{%- generation -%}{{ '<|im_end|>' }}")
    )
    family = dataclasses.replace(FAMILIES["marked"], source=source)
    assert source.count("{%- generation -%}") == 2
    assert trained(family, TWO) == [["First answer.<|im_end|>", "Second\n\nanswer.<|im_end|>"]]


def test_a_closing_mark_is_not_the_end_of_a_turn() -> None:
    """GLM with its marks of tools as special tokens: the turn ends at the token that generation stops at."""
    family = FAMILIES["glm4_moe"]
    family = dataclasses.replace(family, special=(*family.special, "</tool_call>", "</think>"))
    assert trained(family, CALLING)[0][0].endswith("</tool_call><|observation|>")


# -- what is refused


def test_refusals_name_the_turn() -> None:
    parallel = chat(
        user("Weather?"),
        said("", None, "Oslo", "Rome"),
        result("7"),
        result("9", 1),
        said("Fine."),
        tools=True,
    )
    both = chat(user("Weather?"), said("I", "hm", "Oslo"), result("7"), said("Fine."), tools=True)
    cases: list[tuple[ChatFamily, Conversation, TrainOn, str]] = [
        (FAMILIES["mixtral"], chat(user("a"), user("b"), said("c")), TrainOn(), "turn 3 (assistant)"),
        (FAMILIES["mixtral"], chat(system("s"), user("b"), said("c")), TrainOn(), "turn 3 (assistant)"),
        # One of two calls is not written, and an answer of one letter beside a call, which the call has as well.
        (FAMILIES["gpt_oss"], parallel, TrainOn(), "turn 2 (assistant): 'weather' of its tool calls"),
        (FAMILIES["gpt_oss"], both, TrainOn(), "turn 2 (assistant): the template leaves its content out"),
        (FAMILIES["olmoe"], CALLING, TrainOn(), "turn 2 (assistant): 'weather' of its tool calls"),
        (FAMILIES["qwen3_5"], chat(user(" "), said("a")), TrainOn(("user",)), "turn 1 (user): its content is empty"),
        (_chatml(), chat(user("a"), said("ends <|im_end|>")), TrainOn(), "turn 2 (assistant): its content"),
        (_chatml(), chat(user("a"), said("b", weight=0.0)), TrainOn(), "no turn to train on"),
        (_without(FAMILIES["gemma4"], "system"), chat(system("Be terse."), user("a"), said("b")), TrainOn(),
         "turn 1 (system): the template leaves its content out before turn 3"),
        # Its words would be the assistant's: the template puts them into whatever turn comes first.
        (_merging(), chat(system("Be terse."), said("b"), user("c"), said("d")), TrainOn(),
         "turn 1 (system): the template leaves its content out before turn 2"),
        (_without(FAMILIES["minimax_m2"], "results"), CALLING, TrainOn(),
         "turn 3 (tool): the template leaves its content out before turn 4"),
        (_without(FAMILIES["deepseek_v3"], "no calls"), CALLING, TrainOn(), "turn 2 (assistant): 'weather'"),
        (dataclasses.replace(_python_calls(), stops=("<|im_end|>",)), CALLING, TrainOn(), "written as Python does"),
    ]  # fmt: skip
    for family, conversation, train_on, expected in cases:
        with pytest.raises(UserError) as caught:
            samples(family, conversation, train_on)
        text = str(caught.value)
        assert expected in text
        assert "\n" not in text


def _without(family: ChatFamily, what: str) -> ChatFamily:
    old, new = {
        "system": ("messages[0].content|trim", "''"),
        "results": ("<response>' + m.content + '", "<response>"),
        "no calls": ("{%- if m.tool_calls -%}", "{%- if false -%}"),
    }[what]
    assert old in family.source
    return dataclasses.replace(family, source=family.source.replace(old, new))


def _merging() -> ChatFamily:
    """Writes what the system says at the beginning of the turn after it."""
    source = """
{%- for m in messages if m.role != 'system' -%}
  {{ '<|im_start|>' + m.role + '\\n' + (messages[0].content if loop.first and messages[0].role == 'system' else '') }}
  {{- m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
    return dataclasses.replace(_chatml(), source=source)


def _python_calls() -> ChatFamily:
    """Writes calls without the filter that makes JSON of them, and takes no text instead."""
    source = _chatml().source.replace("c.function.arguments|tojson", "(c.function.arguments.items()|list|string and "
                                      "c.function.arguments|string)")  # fmt: skip
    return dataclasses.replace(_chatml(), source=source)


def test_arguments_as_text_where_a_mapping_is_written_as_python_does() -> None:
    source = _chatml().source.replace("c.function.arguments|tojson", "c.function.arguments|string")
    (sample,) = samples(dataclasses.replace(_chatml(), source=source), CALLING)
    assert '"arguments": {"arg_city": "Oslo"}' in sample.text


def test_no_token_that_ends_turns() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "a template")
    with pytest.raises(UserError, match=r"turn 2 \(assistant\): no token ends it.*set train_on.end_tokens"):
        TrainedTurns(template, EndTokens((), frozenset())).samples(chat(user("a"), said("b")))


def test_a_token_that_is_no_stop_is_noted() -> None:
    family = _chatml()
    turns = TrainedTurns(family.template, EndTokens(("</s>",), frozenset({"<|im_end|>", "</s>"})))
    (sample,) = turns.samples(chat(user("a"), said("b")))
    assert spelt(sample) == ["b<|im_end|>"]
    assert any("'<|im_end|>', at which generation does not stop" in note for note in turns.notes)
