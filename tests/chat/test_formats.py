import datetime
import pickle

import pytest

from jaxmoe.chat.formats import RecordReader, detect
from jaxmoe.chat.records import Conversation, Message, Piece, Segments, Tokens
from jaxmoe.errors import UserError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
HI, HELLO = Message("user", (Piece("Hi"),)), Message("assistant", (Piece("Hello"),))
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
NONE_TO_SEE = {"location": None, "depth": {"a": None, "b": [None, {"c": None}]}}
SCHEMA_NAMED = {"name": "weather", "parameters": SCHEMA}
WRAPPED = {"type": "function", "function": SCHEMA_NAMED}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "days": 2}}}


def read(format, row, **options):
    return RecordReader(format, **options)(row, "data.jsonl line 3")


def message(**keys):
    """What is read of one message after a user's."""
    conversation = read("messages", {"messages": [USER, keys]})
    assert conversation.messages[0] == HI
    return conversation.messages[1]


def refuses(action, *parts):
    """Fails with one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize(
    ("row", "fields", "name"),
    [
        ({"messages": [USER]}, {}, "messages"),
        ({"messages": "[]", "prompt": "x", "text": None, "id": 5}, {}, "messages"),
        ({"conversations": [{}], "system": "s"}, {}, "conversations"),
        ({"prompt": "a", "completion": "b"}, {}, "prompt_completion"),
        ({"instruction": "a", "input": None, "output": "b"}, {}, "instruction"),
        ({"segments": []}, {}, "segments"),
        ({"input_ids": [1], "labels": [1]}, {}, "tokens"),
        ({"text": "", "meta": {}}, {}, "text"),
        (
            {"question": "a", "answer": "b"},
            {"prompt": "question", "completion": "answer"},
            "prompt_completion",
        ),
        ({"params": {"input": [[], [USER]]}}, {"messages": "params.input.1"}, "messages"),
        ({"conversations": []}, {"messages": "conversations"}, "messages"),
        ({"text": "x", "messages": []}, {"messages": "elsewhere"}, "text"),
    ],
)
def test_formats_are_told_by_columns(row, fields, name):
    assert detect(row, fields=fields) == name


def test_columns_that_tell_no_format():
    refuses(
        lambda: detect({"question": "a", "answer": "b"}),
        "the first row: has the columns 'question', 'answer', expected one of: messages; conversations; prompt and",
        "instruction and output; segments; input_ids; text; say in the data's fields",
    )
    refuses(lambda: detect({}, where="a.jsonl line 1"), "a.jsonl line 1: has the columns of none")
    refuses(
        lambda: detect({"text": "x", "messages": []}),
        "has the columns 'text', 'messages', which fit messages and text, expected one; set the data's format",
    )
    refuses(lambda: detect({"text": "x"}, fields={"mesages": "x"}), "'mesages'; did you mean 'messages'?")


def test_messages_with_all_that_they_may_have():
    row = {
        "messages": [
            {"role": "system", "content": "Be brief.", "weight": None},
            {**USER, "name": "Ann", "train": False},
            {
                "role": "assistant",
                "content": None,
                "thinking": "Which city?",
                "tool_calls": [{**CALL, "id": "c1"}],
                "weight": 0.5,
            },
            {"role": "tool", "content": "", "tool_call_id": "c1", "extra": {"kept": [1, None], "not": None}},
            {**ANSWER, "train": True},
        ],
        "tools": [WRAPPED],
        "chat_template_kwargs": {"thinking": True, "none": None},
    }
    arguments = {"thinking": False, "date": "2026"}
    assert read("messages", row, template_arguments=arguments) == Conversation(
        (
            Message("system", (Piece("Be brief."),)),
            Message("user", (Piece("Hi"),), weight=0.0, other={"name": "Ann"}),
            Message("assistant", (), "Which city?", ({**CALL, "id": "c1"},), 0.5),
            Message("tool", (), other={"tool_call_id": "c1", "extra": {"kept": [1, None]}}),
            Message("assistant", (Piece("Hello"),), weight=1.0),
        ),
        (WRAPPED,),
        {"thinking": True, "date": "2026"},
    )
    assert arguments == {"thinking": False, "date": "2026"}


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        ("two words", (Piece("two words"),)),
        ("", ()),
        ([], ()),
        (
            [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"text": "b"}],
            (Piece("a"), Piece("b")),
        ),
        (
            [{"content": "a", "train": True}, {"value": "b", "train": False}],
            (Piece("a", 1.0), Piece("b", 0.0)),
        ),
        ([{"text": "a", "weight": 0.25, "type": None, "image": None}], (Piece("a", 0.25),)),
        ([{"type": "output_text", "text": "a", "train": True, "weight": 2}], (Piece("a", 2.0),)),
    ],
)
def test_content(content, pieces):
    assert message(role="assistant", content=content) == Message("assistant", pieces)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning(key):
    thought = Message("assistant", (Piece("Hello"),), "Hm. Yes.")
    assert message(**ANSWER, **{key: "Hm. Yes."}) == thought
    assert message(**ANSWER, **{key: [{"type": "text", "text": "Hm."}, {"text": " Yes."}]}) == thought
    assert message(**ANSWER, **{key: None}) == HELLO
    assert message(**{**ANSWER, "reasoning": "Hm. Yes.", "thinking": "Hm. Yes."}) == thought
    assert message(role="assistant", **{key: "Hm."}) == Message("assistant", (), "Hm.")


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"function": CALL["function"]},
        {"function": {"name": "weather", "arguments": '{"city": "Bern", "days": 2, "unit": null}'}},
        {"name": "weather", "arguments": '{"city": "Bern", "days": 2}', "id": None},
        {"type": "function", "function": '{"name": "weather", "arguments": {"city": "Bern", "days": 2}}'},
        {"function": {"name": "weather", "arguments": {"city": "Bern", "zip": None, "days": 2}}},
    ],
)
def test_tool_calls(call):
    for calls in ([call], [{**call, "id": "c7"}]):
        found = message(role="assistant", tool_calls=calls)
        own = {"id": "c7"} if calls[0].get("id") else {}
        assert found == Message("assistant", tool_calls=({**CALL, **own},))


def test_tool_calls_without_arguments():
    empty = {"type": "function", "function": {"name": "now", "arguments": {}}}
    for function in ({"name": "now"}, {"name": "now", "arguments": None}, {"name": "now", "arguments": "{}"}):
        assert message(role="assistant", tool_calls=[{"function": function}]).tool_calls == (empty,)
    assert message(**ANSWER, tool_calls=[]) == message(**ANSWER, tool_calls=None) == HELLO
    assert message(role="assistant", tool_calls='[{"name": "now"}]').tool_calls == (empty,)


@pytest.mark.parametrize(
    "tools",
    [
        [WRAPPED],
        [SCHEMA_NAMED],
        [{"type": "function", **SCHEMA_NAMED, "description": None}],
        '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]',
        [{"name": "weather", "parameters": '{"type": "object", "properties": {"city": {"type": "string"}}}'}],
        ['{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}'],
        [{"type": "function", "function": {**SCHEMA_NAMED, "parameters": {**SCHEMA, "required": None}}}],
    ],
)
def test_tools(tools):
    assert read("messages", {"messages": [USER], "tools": tools}).tools == (WRAPPED,)


def test_no_tools():
    for tools in (None, [], "[]", "null"):
        assert read("messages", {"messages": [USER], "tools": tools}) == Conversation((HI,))


def test_messages_as_json_and_keys_of_a_table():
    row = {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'}
    assert read("messages", row) == Conversation((HI, HELLO))
    spread = [
        {**USER, "tool_calls": None, "name": None, "train": None},
        {**ANSWER, "tool_calls": None, "more": NONE_TO_SEE},
    ]
    kept = {"more": {"depth": {"b": [None, {}]}}}
    assert read("messages", {"messages": spread}).messages[1] == Message(
        "assistant", (Piece("Hello"),), other=kept
    )


def test_fields_are_names_and_paths():
    turn = {
        "who": "assistant",
        "body": {"parts": ["x", "Hello"]},
        "mind": "Hm.",
        "loss": 0.5,
        "learn": True,
        "by": "A",
    }
    fields = {
        **{"messages": "deep.0.turns", "role": "who", "content": "body.parts.1", "reasoning": "mind"},
        **{
            "weight": "loss",
            "train": "learn",
            "name": "by",
            "tools": "a.b",
            "chat_template_kwargs": "arguments",
        },
    }
    row = {"deep": [{"turns": [turn]}], "a.b": [WRAPPED], "arguments": '{"x": 1}', "tools": "not these"}
    found = read("messages", row, fields=fields)
    assert found.tools == (WRAPPED,)
    assert found.template_arguments == {"x": 1}
    other = {"body": {"parts": ["x", "Hello"]}, "name": "A"}
    assert found.messages == (Message("assistant", (Piece("Hello"),), "Hm.", (), 0.5, other),)


def test_roles():
    turns = [{"role": "customer", "content": "Hi"}, {"role": "critic", "content": "Hello"}]
    found = read("messages", {"messages": turns}, roles={"customer": "user"})
    assert [turn.role for turn in found.messages] == ["user", "critic"]
    names = [
        "system",
        "human",
        "gpt",
        "observation",
        "chatgpt",
        "user",
        "bing",
        "function_response",
        "bard",
        "model",
    ]
    row = {"conversations": [{"from": name, "value": "x"} for name in [*names, "tool", "assistant"]]}
    found = read("conversations", row)
    assert [turn.role for turn in found.messages] == [
        *(
            "system",
            "user",
            "assistant",
            "tool",
            "assistant",
            "user",
            "assistant",
            "tool",
            "assistant",
            "assistant",
        ),
        *("tool", "assistant"),
    ]
    row = {"conversations": [{"from": "function_call", "value": "x"}, {"from": "gpt", "value": "y"}]}
    found = read("conversations", row, roles={"function_call": "assistant", "gpt": "critic"})
    assert [turn.role for turn in found.messages] == ["assistant", "critic"]


def test_system():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    system = Message("system", (Piece("Be brief."),))
    row = {"conversations": turns, "system": "Be brief."}
    assert read("conversations", row) == Conversation((system, HI, HELLO))
    assert read("conversations", row, system="drop") == Conversation((HI, HELLO))
    assert read("conversations", {"conversations": turns, "system": ""}) == Conversation((HI, HELLO))
    own = {"conversations": [{"from": "system", "value": "Mine."}, *turns], "system": "Be brief."}
    assert read("conversations", own).messages[0] == Message("system", (Piece("Mine."),))
    assert read("conversations", own, system="drop") == Conversation((HI, HELLO))
    late = {"messages": [USER, {"role": "system", "content": "Be brief."}, ANSWER], "system": "First."}
    assert read("messages", late).messages[::2] == (Message("system", (Piece("First."),)), system)
    assert read("messages", late, system="drop") == Conversation((HI, HELLO))


def test_prompt_and_completion():
    assert read("prompt_completion", {"prompt": "1 + 1 =", "completion": " 2"}) == Segments(
        (Piece("1 + 1 =", 0.0), Piece(" 2", 1.0))
    )
    assert read("prompt_completion", {"prompt": "", "completion": "2"}) == Segments((Piece("2", 1.0),))
    row = {"prompt": [USER, {**ANSWER, "train": False}, USER], "completion": [ANSWER], "tools": [WRAPPED]}
    asked, answered = (
        Message("user", (Piece("Hi"),), weight=0.0),
        Message("assistant", (Piece("Hello"),), weight=0.0),
    )
    assert read("prompt_completion", row) == Conversation((asked, answered, asked, HELLO), (WRAPPED,))
    parts = [{"text": "Hi", "train": False}]
    row = {
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{**ANSWER, "weight": 2}],
        "system": "S",
    }
    system = Message("system", (Piece("S"),), weight=0.0)
    assert read("prompt_completion", row).messages == (
        *(system, asked),
        Message("assistant", (Piece("Hello"),), weight=2.0),
    )


def test_instruction():
    row = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    answer = Message("assistant", (Piece("a b"),))
    assert read("instruction", row) == Conversation((Message("user", (Piece("Sort.\n\nb a"),)), answer))
    for empty in ("", " \n", None):
        found = read("instruction", {**row, "input": empty, "system": "S"})
        assert found.messages == (
            Message("system", (Piece("S"),)),
            Message("user", (Piece("Sort."),)),
            answer,
        )
    del row["input"]
    assert read("instruction", row).messages[0].content == "Sort."


def test_segments_and_text():
    row = {
        "segments": [
            {"label": False, "text": "<s>Q: "},
            {"label": True, "text": ""},
            {"label": True, "text": "A</s>"},
        ]
    }
    assert read("segments", row) == Segments((Piece("<s>Q: ", 0.0), Piece("A</s>", 1.0)), ends=False)
    named = {"parts": [{"learn": True, "t": {"raw": "A"}}]}
    fields = {"segments": "parts", "label": "learn", "text": "t.raw"}
    assert read("segments", named, fields=fields) == Segments((Piece("A", 1.0),), ends=False)
    assert read("text", {"text": " as it is\n"}) == Segments((Piece(" as it is\n", 1.0),))


@pytest.mark.parametrize(
    ("row", "ids", "weights"),
    [
        ({}, (5, 0, 7, 9), (1, 1, 1, 1)),
        ({"labels": [-100, 0, 7, -100]}, (5, 0, 7, 9), (0, 1, 1, 0)),
        ({"assistant_masks": [0, 1, 1, 0]}, (5, 0, 7, 9), (0, 1, 1, 0)),
        ({"completion_mask": [False, True, True, True]}, (5, 0, 7, 9), (0, 1, 1, 1)),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}, (5, 0, 7, 9), (0, 1, 0, 1)),
        ({"labels": [-100, 0, -100, -100], "attention_mask": [1, 1, 0, 0]}, (5, 0), (0, 1)),
        (
            {"labels": None, "attention_mask": [1, 1, 1, 1], "assistant_masks": None},
            (5, 0, 7, 9),
            (1, 1, 1, 1),
        ),
    ],
)
def test_tokens(row, ids, weights):
    assert read("tokens", {"input_ids": [5, 0, 7, 9], **row}) == Tokens(ids, tuple(map(float, weights)))


def test_a_reader_is_sent_to_workers():
    reader = RecordReader(
        "conversations", fields={"content": "text"}, roles={"bot": "assistant"}, system="drop"
    )
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301 - made above
    row = {"conversations": [{"from": "human", "text": "Hi"}, {"from": "bot", "text": "Hello"}]}
    assert copy(row, "here") == reader(row, "here") == Conversation((HI, HELLO))


def test_values_that_json_lacks_are_left_where_nothing_reads_them():
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    row = {"messages": [{**USER, "at": now}, ANSWER], "created": now, "raw": b"\xff"}
    assert read("messages", row).messages[0].other == {"at": now}


def of(*messages, **columns):
    return {"messages": list(messages), **columns}


def calls(*found):
    return of(USER, {"role": "assistant", "tool_calls": list(found)})


def parts(*found):
    return of(USER, {"role": "assistant", "content": list(found)})


def ids(**columns):
    return {"input_ids": [5, 6, 7], **columns}


DEEP = {"a": 1}
for _ in range(100_000):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("format", "row", "wanted"),
    [
        (
            "messages",
            {"mesages": []},
            ["no 'messages' (or null), expected in the format messages; did you mean 'mesages'"],
        ),
        ("messages", {"messages": None}, ["no 'messages' (or null)", "set the data's format, or its fields"]),
        ("messages", {"messages": []}, ["messages has no messages, expected at least one; remove the row"]),
        (
            "messages",
            {"messages": 5},
            ["messages is the number 5, expected an array of messages; give objects with"],
        ),
        ("messages", {"messages": USER}, ["messages is an object with 'role', 'content', expected an array"]),
        (
            "messages",
            {"messages": "Hi"},
            ["messages is the string 'Hi', which is not JSON (Expecting value)"],
        ),
        ("messages", {"messages": "[" * 99_999}, ["messages is the string '[[[", "which is not JSON"]),
        (
            "messages",
            of(USER, "Hello"),
            ["messages[1] is the string 'Hello', expected an object; give objects"],
        ),
        ("messages", of([USER]), ["messages[0] is an array of 1, expected an object"]),
        (
            "messages",
            of({"content": "x"}),
            ["messages[0] has no 'role' (or null); it has 'content'; set the data's fields"],
        ),
        ("messages", of({"from": "human", "value": "x"}), ["no 'role'", "conversations (from, value)"]),
        (
            "messages",
            of({"role": 7, "content": ""}),
            ["messages[0].role is the number 7, expected a string; give the name"],
        ),
        (
            "messages",
            of({"role": "", "content": ""}),
            ["messages[0].role is the string '', expected the name of a role"],
        ),
        (
            "messages",
            of({"role": "human", "content": "x"}),
            ["role is 'human', which chat templates do not", "conversations"],
        ),
        ("messages", of({"role": "gpt", "content": "x"}), ["role is 'gpt'", "{gpt: assistant}"]),
        (
            "messages",
            of({"role": "user"}),
            ["messages[0] has no 'content' (or null) and its role is 'user'", 'give ""'],
        ),
        ("messages", of({"role": "tool", "content": None}), ["its role is 'tool', expected a text"]),
        ("messages", of({"role": "assistant"}), ["its role is 'assistant', expected a text"]),
        (
            "messages",
            of({"role": "user", "content": 5}),
            ["content is the number 5, expected a string, or an array of parts"],
        ),
        (
            "messages",
            of({"role": "user", "content": {}}),
            ["content is an empty object, expected a string, or an array"],
        ),
        (
            "messages",
            of({"role": "user", "content": "a\ud800"}),
            ["content holds half a surrogate pair at character 1"],
        ),
        (
            "messages",
            of({**USER, "x": {"y": ["\udfff"]}}),
            [": messages[0].x.y[0] holds half a surrogate pair"],
        ),
        ("messages", of({**USER, "x\ud800": 1}), ["messages[0] holds half a surrogate pair"]),
        ("messages", of({**USER, "name": 5}), ["messages[0].name is the number 5, expected a string"]),
        (
            "messages",
            parts("x"),
            ["messages[1].content[0] is the string 'x', expected a part of the form {type: text"],
        ),
        (
            "messages",
            parts({"text": "x"}, {"type": "image_url", "image_url": {}}),
            ["content[1] is a part of type 'image_url'"],
        ),
        (
            "messages",
            parts({"type": "audio"}),
            ["part of type 'audio', expected text, which is all that is trained"],
        ),
        ("messages", parts({"type": "video", "text": "x"}), ["part of type 'video'"]),
        (
            "messages",
            parts({"type": "thinking", "thinking": "x"}),
            ["'thinking'; move it to the message's reasoning_content"],
        ),
        (
            "messages",
            parts({"type": "text"}),
            ["content[0] is an object with 'type', expected its text under one of text,"],
        ),
        (
            "messages",
            parts({"text": "a", "value": "b"}),
            ["content[0] has 'text' and 'value', expected its text under one"],
        ),
        ("messages", parts({"text": 5}), ["content[0].text is the number 5, expected a string"]),
        (
            "messages",
            parts({"text": "a", "train": 1}),
            ["content[0].train is the number 1, expected true or false"],
        ),
        (
            "messages",
            parts({"text": "a", "weight": -1}),
            ["content[0].weight is the number -1, expected a finite number"],
        ),
        (
            "messages",
            of({**ANSWER, "train": "yes"}),
            ["train is the string 'yes', expected true or false; give a number"],
        ),
        (
            "messages",
            of({**ANSWER, "weight": True}),
            ["weight is the boolean True, expected a number of 0 or more"],
        ),
        ("messages", of({**ANSWER, "weight": "1"}), ["weight is the string '1', expected a number"]),
        (
            "messages",
            of({**ANSWER, "weight": -0.5}),
            ["weight is the number -0.5, expected a finite number of 0 or more"],
        ),
        (
            "messages",
            of({**ANSWER, "weight": float("nan")}),
            ["weight is the number nan, expected a finite number"],
        ),
        (
            "messages",
            of({**ANSWER, "weight": float("inf")}),
            ["weight is the number inf, expected a finite number"],
        ),
        (
            "messages",
            of({**ANSWER, "weight": 10**400}),
            ["weight is the number 1000", "expected a finite number"],
        ),
        (
            "messages",
            of({**ANSWER, "weight": 0, "train": True}),
            ["has train true and weight 0, expected them to agree"],
        ),
        (
            "messages",
            of({**ANSWER, "weight": 1, "train": False}),
            ["has train false and weight 1", "remove one"],
        ),
        (
            "messages",
            of({**ANSWER, "reasoning": 5}),
            ["messages[0].reasoning is the number 5, expected a string"],
        ),
        (
            "messages",
            of({**ANSWER, "reasoning": "a", "thinking": "b"}),
            ["different reasoning under 'reasoning', 'thinking'"],
        ),
        (
            "messages",
            of({**ANSWER, "thinking": [{"text": "a", "weight": 0}]}),
            ["thinking has parts with a weight of their"],
        ),
        (
            "messages",
            of({**USER, "tool_calls": [CALL]}),
            ["tool_calls stands in a 'user' message, expected an 'assistant'"],
        ),
        (
            "messages",
            of({**ANSWER, "function_call": {"name": "x"}}),
            ["function_call is the form before tool_calls"],
        ),
        (
            "messages",
            of({**ANSWER, "tool_calls": CALL}),
            ["tool_calls is an object with 'type', 'function', expected an array"],
        ),
        ("messages", calls("weather"), ["tool_calls[0] is the string 'weather', expected an object"]),
        (
            "messages",
            calls({"function": 5}),
            ["function is the number 5, expected an object with name and arguments"],
        ),
        (
            "messages",
            calls({"function": {"arguments": {}}}),
            ["function has no 'name'; it has 'arguments'; mend"],
        ),
        ("messages", calls({"name": 5}), ["tool_calls[0].name is the number 5, expected a string"]),
        (
            "messages",
            calls({"name": "f", "parameters": {}}),
            ["tool_calls[0] has no 'arguments'; did you mean 'parameters'"],
        ),
        (
            "messages",
            calls({"name": "f", "arguments": "{x}"}),
            ["arguments is the string '{x}', which is not JSON"],
        ),
        (
            "messages",
            calls({"name": "f", "arguments": ""}),
            ["arguments is the string '', which is not JSON"],
        ),
        (
            "messages",
            calls({"name": "f", "arguments": "[1]"}),
            ["arguments is an array of 1, expected an object, or a"],
        ),
        (
            "messages",
            calls({"name": "f", "arguments": {"x": b"1"}}),
            ["arguments.x is the bytes b'1', expected a value of JSON"],
        ),
        (
            "messages",
            calls({"name": "f", "arguments": '{"x": ["\\ud800"]}'}),
            ["arguments.x[0] holds half a surrogate"],
        ),
        (
            "messages",
            of(USER, tools=WRAPPED),
            ["tools is an object with 'type', 'function', expected an array of tools"],
        ),
        ("messages", of(USER, tools="weather"), ["tools is the string 'weather', which is not JSON"]),
        (
            "messages",
            of(USER, tools=[5]),
            ["tools[0] is the number 5, expected an object; give objects with function"],
        ),
        (
            "messages",
            of(USER, tools=[{"parameters": SCHEMA}]),
            ["tools[0] has no 'name'; it has 'parameters'"],
        ),
        ("messages", of(USER, tools=[{"function": {"name": 5}}]), ["tools[0].function.name is the number 5"]),
        (
            "messages",
            of(USER, tools=[{"name": "f", "parameters": "x"}]),
            ["tools[0].parameters is the string 'x', which is"],
        ),
        (
            "messages",
            of(USER, tools=[{"name": "f", "parameters": []}]),
            ["parameters is an array of 0, expected a JSON schema"],
        ),
        ("messages", of(USER, system=True), [": system is the boolean True, expected a string"]),
        (
            "messages",
            of(USER, chat_template_kwargs=[1]),
            ["chat_template_kwargs is an array of 1, expected an object"],
        ),
        ("messages", of({**USER, "x": DEEP}), ["objects in objects too deep to be read"]),
        (
            "conversations",
            {"conversations": [{"from": "narrator", "value": "x"}]},
            [
                "conversations[0].from is 'narrator', expected one of",
                "roles, for example {narrator: user}",
            ],
        ),
        (
            "conversations",
            {"conversations": [USER]},
            ["conversations[0] has no 'from' (or null)", "messages (role, content)"],
        ),
        (
            "conversations",
            {"conversations": [{"from": "gpt", "value": ["x"]}]},
            ["value[0] is the string 'x', expected a part"],
        ),
        (
            "conversations",
            {"messages": [USER]},
            ["no 'conversations' (or null), expected in the format conversations"],
        ),
        (
            "prompt_completion",
            {"prompt": "a"},
            ["no 'completion' (or null), expected in the format prompt_completion"],
        ),
        (
            "prompt_completion",
            {"prompt": "a", "completion": [ANSWER]},
            ["completion is an array of 1, expected a string, as"],
        ),
        (
            "prompt_completion",
            {"prompt": [USER], "completion": "b"},
            ["completion is the string 'b', expected an array of"],
        ),
        (
            "prompt_completion",
            {"prompt": 5, "completion": "b"},
            ["prompt is the number 5, expected a string, or an array of"],
        ),
        (
            "prompt_completion",
            {"prompt": "a", "completion": {}},
            ["completion is an empty object, expected a string, or"],
        ),
        (
            "prompt_completion",
            {"prompt": "a", "completion": ""},
            ["completion is the string '', expected a text to learn"],
        ),
        (
            "prompt_completion",
            {"prompt": [], "completion": [ANSWER]},
            [": prompt has no messages, expected at least one"],
        ),
        (
            "prompt_completion",
            {"prompt": [USER, {**ANSWER, "train": True}], "completion": [ANSWER]},
            ["prompt[1] is to be trained and stands in the prompt; move it to the completion"],
        ),
        ("instruction", {"instruction": "a"}, ["no 'output' (or null), expected in the format instruction"]),
        (
            "instruction",
            {"instruction": ["a"], "output": "b"},
            ["instruction is an array of 1, expected a string"],
        ),
        (
            "instruction",
            {"instruction": "a", "output": " "},
            ["output is the string ' ', expected a text; remove the row"],
        ),
        (
            "instruction",
            {"instruction": "a", "input": 5, "output": "b"},
            ["input is the number 5, expected a string"],
        ),
        ("segments", {"segments": "A"}, ["segments is the string 'A', which is not JSON"]),
        (
            "segments",
            {"segments": [{"text": "A"}]},
            ["segments[0].label is null, expected true or false; give objects"],
        ),
        (
            "segments",
            {"segments": [{"text": "A", "label": 1}]},
            ["segments[0].label is the number 1, expected true or"],
        ),
        (
            "segments",
            {"segments": [{"label": True}]},
            ["segments[0].text is null, expected a string; give objects"],
        ),
        (
            "segments",
            {"segments": [{"label": True, "text": ""}]},
            ["segments has no text, expected segments with some"],
        ),
        ("text", {"text": 5}, ["text is the number 5, expected a string; set the data's fields"]),
        ("text", {"text": "\n "}, ["text is the string '\\n ', expected a text; remove the row"]),
        ("text", {"txt": "x"}, ["no 'text' (or null)", "did you mean 'txt'? it has 'txt'"]),
        ("tokens", {"input_ids": "1 2"}, ["input_ids is the string '1 2', expected an array of token ids"]),
        ("tokens", {"input_ids": []}, ["input_ids is empty, expected at least one token id"]),
        (
            "tokens",
            {"input_ids": [1, -2]},
            ["input_ids[1] is the number -2, expected a token id, a whole number of 0 or"],
        ),
        ("tokens", {"input_ids": [1.0]}, ["input_ids[0] is the number 1.0, expected a token id"]),
        ("tokens", {"input_ids": [True]}, ["input_ids[0] is the boolean True, expected a token id"]),
        ("tokens", {"input_ids": [[1]]}, ["input_ids[0] is an array of 1, expected a token id"]),
        ("tokens", {"input_ids": [2**40]}, ["input_ids[0] is the number 1099511627776, expected a token id"]),
        (
            "tokens",
            ids(labels=[5, 6]),
            ["labels has 2 entries, expected 3, one for each id; tokenize the row again"],
        ),
        ("tokens", ids(labels=[5, 6.0, 7]), ["labels[1] is the number 6.0, expected 6"]),
        ("tokens", {"input_ids": [0, 1], "labels": [0, True]}, ["labels[1] is the boolean True, expected 1"]),
        ("tokens", ids(labels=5), ["labels is the number 5, expected an array of 3"]),
        (
            "tokens",
            ids(labels=[6, 7, -100]),
            ["labels[0] is the number 6, expected 5", "or -100; labels are not shifted"],
        ),
        (
            "tokens",
            ids(labels=[5, 6, 7], completion_mask=[0, 1, 1]),
            ["labels and completion_mask both say what is trained"],
        ),
        ("tokens", ids(assistant_masks=[0, 2, 1]), ["assistant_masks[1] is the number 2, expected 0 or 1"]),
        ("tokens", ids(completion_mask=[1]), ["completion_mask has 1 entries, expected 3"]),
        ("tokens", ids(attention_mask=[0, 1, 1]), ["attention_mask[0] is 0 before a 1", "pad on the right"]),
        (
            "tokens",
            ids(attention_mask=[1, 0, 1]),
            ["attention_mask[1] is 0 before a 1, expected zeros at the end alone"],
        ),
        ("tokens", ids(attention_mask=[0, 0, 0]), ["attention_mask has zeros only"]),
        ("tokens", ids(attention_mask=[1, 1, "1"]), ["attention_mask[2] is the string '1', expected 0 or 1"]),
    ],
)
def test_rows_that_are_refused(format, row, wanted):
    refuses(lambda: read(format, row), "data.jsonl line 3: ", *wanted)


def test_only_system_turns():
    row = of({"role": "system", "content": "x"})
    assert read("messages", row) == Conversation((Message("system", (Piece("x"),)),))
    refuses(lambda: read("messages", row, system="drop"), "system turns only, which the data's system drops")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            {"format": "chatml"},
            ["the data's format is the string 'chatml', expected one of messages, conversations"],
        ),
        ({"system": "remove"}, ["the data's system is the string 'remove', expected one of keep, drop"]),
        ({"fields": {"contents": "x"}}, ["the data's fields have 'contents'; did you mean 'content'?"]),
        ({"fields": {"content": ""}}, ["fields.content is the string '', expected the name of a column"]),
        ({"roles": {"bot": None}}, ["the data's roles.bot is null, expected the name of a role"]),
    ],
)
def test_settings_that_are_refused(options, wanted):
    refuses(lambda: RecordReader(**{"format": "messages", **options}), *wanted)
