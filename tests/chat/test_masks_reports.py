"""Masks that were wrong elsewhere: what was reported in public, and that it is not so here."""

import dataclasses

import pytest
from helpers.chat_templates import FAMILIES, ChatFamily, tokenizer
from helpers.chats import chat, result, said, samples, spelt, system, trained, user

from jaxmoe.chat.encoder import Encoder, Example
from jaxmoe.chat.records import Message, Piece, Record, Segments
from jaxmoe.chat.samples import TrainOn
from jaxmoe.chat.turns import TrainedTurns
from jaxmoe.errors import UserError

pytestmark = pytest.mark.once


def encoded(record: Record, family: ChatFamily, length: int = 1000) -> list[Example]:
    return Encoder(tokenizer(), family.template, family.ends, TrainOn(), length)(record)


def decoded(example: Example) -> str:
    """What is trained of it."""
    return tokenizer().decode(example.ids[example.weights > 0].tolist(), skip_special_tokens=False)


def test_glm_learns_to_stop() -> None:
    """huggingface/trl#5988: nothing of GLM-4.5's turns was trained that ends them."""
    conversation = chat(
        user("Weather?"), said("", None, "Oslo"), result("7"), said("Seven."), user("Thanks"), tools=True
    )
    (turns,) = trained("glm4_moe", conversation)
    assert [turn[turn.rindex("<|") :] for turn in turns] == ["<|observation|>", "<|user|>"]
    # As the last turn of a text too, where no next one begins.
    assert trained("glm4_moe", chat(user("?"), said("Yes.")))[0][0].endswith("Yes.<|user|>")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_precedes_an_answer_is_the_prompt_with_what_begins_an_answer(name: str) -> None:
    """huggingface/trl#4147, #4201: prompts of pairs of prompt and completion had no generation prompt."""
    family = FAMILIES[name]
    messages = (user("Hi there"), said("Sure.", weight=1.0))
    (sample,) = samples(family, chat(*messages))
    bare = family.template.render(messages[:1])
    assert sample.text.startswith(bare.removesuffix("<|endoftext|>"))
    served = family.template.render(messages[:1], generation_prompt=True)
    assert served.startswith(sample.text[: sample.prompts[0]])
    if "<|im_start|>" in served:
        assert sample.text[: sample.prompts[0]].endswith("<|im_start|>assistant\n") or served.endswith(
            "<think>\n"
        )


@pytest.mark.parametrize(
    "answer",
    [said("Yes.", "hm"), said("<think>\nhm\n</think>\n\nYes."), said("\n\nYes.", "\nhm\n")],
    ids=["apart", "inside", "white space"],
)
def test_qwen3_has_one_thought(answer: Message) -> None:
    """huggingface/trl#6361, #6363: Qwen3's training templates wrote the block of thoughts twice."""
    (turns,) = trained("qwen3", chat(user("?"), answer))
    assert turns == ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]


def test_gpt_oss_turns_each_end_as_when_they_are_generated() -> None:
    """huggingface/trl#5109, unslothai/unsloth#3437: its last turn ends with another token than those before it."""
    conversation = chat(user("?"), said("One.", "hm"), user("?"), said("Two.", "hm"), user("?"))
    final = "<|channel|>final<|message|>"
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert trained("gpt_oss", conversation) == [
        [f"{thought}{final}One.<|return|>"],
        [f"{thought}{final}Two.<|return|>"],
    ]
    # In the text of the second one the first is as it is served then: its thought gone, its end another.
    assert f"{final}One.<|end|>" in samples("gpt_oss", conversation)[1].text


def test_harmony_of_tools() -> None:
    """NVIDIA-NeMo/Megatron-Bridge#5389, #2598, axolotl's tool calls: the call is trained, its result is not."""
    conversation = chat(user("Weather?"), said("", "ask", "Oslo"), result("7"), said("Seven."), tools=True)
    (turns,) = trained("gpt_oss", conversation)
    assert turns[0].startswith(
        "<|channel|>analysis<|message|>ask<|end|><|start|>assistant to=functions.weather"
    )
    assert turns[0].endswith("<|call|>")
    assert "7" not in "".join(turns)


def test_text_of_prompts_begins_once() -> None:
    """huggingface/trl#1400: the template's token that begins a text, and the tokenizer's."""
    example = encoded(chat(user("Hi"), said("Yes.")), FAMILIES["mixtral"])[0]
    assert example.ids.tolist().count(tokenizer().token_to_id("<s>")) == 1


@pytest.mark.parametrize("length", [14, 17, 20])
def test_a_turn_that_is_cut_off_is_trained_as_far_as_it_goes(length: int) -> None:
    """huggingface/transformers#34494, #34531: its mask was all zeros."""
    conversation = chat(user("Hi"), said("Hello there: one two three. Hello there."))
    (whole,) = encoded(conversation, FAMILIES["marked"])
    (cut,) = encoded(conversation, FAMILIES["marked"], length)
    assert len(whole.ids) > length == len(cut.ids)
    assert "Hello there: one two three. Hello there.<|im_end|>".startswith(decoded(cut))
    assert decoded(cut) != ""


def test_a_template_without_marks_has_a_mask() -> None:
    """huggingface/transformers#34172 all zeros, NVIDIA-NeMo/Megatron-Bridge#3359 all ones."""
    (example,) = encoded(chat(user("Hi"), said("Yes.")), FAMILIES["qwen3"])
    assert 0 < example.weights.sum() < len(example.ids)
    assert decoded(example) == "<think>\n\n</think>\n\nYes.<|im_end|>"


@pytest.mark.parametrize("document", ["<eos>", "<turn|>"])
def test_gemma_s_end_of_turn(document: str) -> None:
    """axolotl-ai-cloud/axolotl#3754, #3756, #2364: the token that ends turns is not the one that ends documents."""
    family = dataclasses.replace(FAMILIES["gemma4"], stops=(document, "<turn|>", "<|tool_response>"))
    assert trained(family, chat(user("?"), said("One."), user("?"), said("Two."))) == [
        ["One.<turn|>", "Two.<turn|>"]
    ]


@pytest.mark.parametrize("content", ["MASKED", "I", "Hi", "[INST]"])
def test_the_same_words_of_user_and_assistant(content: str) -> None:
    """axolotl-ai-cloud/axolotl#2089: turns were looked for by their text, and the token that ends them was lost."""
    assert trained("mixtral", chat(user(content), said(content), user(content), said(content))) == [
        [f" {content}</s>", f" {content}</s>"]
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_turn_ends(name: str) -> None:
    """axolotl-ai-cloud/axolotl#2287: the end of a text's last turn was not trained."""
    family = FAMILIES[name]
    (example,) = encoded(chat(user("?"), said("Yes.")), family)
    assert tokenizer().id_to_token(int(example.ids[-1])) in family.stops
    assert example.weights[-1] == 1


def test_qwen3_s_thoughts_are_trained_whole() -> None:
    """axolotl-ai-cloud/axolotl#3088, THUDM/slime#330, QwenLM/Qwen3#1522, hiyouga/LlamaFactory#8634, #10773.

    The marks of thoughts were left out, or the thoughts of all turns but the last, or turns were trained after what
    no server would give them.
    """
    messages = (user("?"), said("One.", "hm"), user("?"), said("Two.", "so"))
    found = samples("qwen3", chat(*messages))
    assert [spelt(sample) for sample in found] == [
        ["<think>\nhm\n</think>\n\nOne.<|im_end|>"],
        ["<think>\nso\n</think>\n\nTwo.<|im_end|>"],
    ]
    template = FAMILIES["qwen3"].template
    for sample, turn in zip(found, (1, 3), strict=True):
        served = template.render(messages[:turn], generation_prompt=True)
        assert sample.text[: sample.prompts[0]] == served
    assert "hm" not in found[1].text


def test_thoughts_within_a_chain_of_tools_stay() -> None:
    """hiyouga/LlamaFactory#10773: those after the last user are served, and so they are in the text."""
    conversation = chat(
        user("?"), said("", "first", "Oslo"), result("7"), said("", "second", "Rome"), result("9"),
        said("Done.", "third"), tools=True,
    )  # fmt: skip
    (turns,) = trained("qwen3", conversation)
    assert [turn.split("\n")[1] for turn in turns] == ["first", "second", "third"]


def test_a_row_with_nothing_to_train_is_refused() -> None:
    """unslothai/unsloth#2095, #2900, #2771: all labels -100, found out by a loss of zero if at all."""
    with pytest.raises(
        UserError, match="no turn to train on among roles system, user, expected one of assistant"
    ):
        encoded(chat(system("Be terse."), user("?")), FAMILIES["qwen3"])
    with pytest.raises(UserError, match="none of its tokens is trained"):
        encoded(Segments((Piece("Hi", 0.0),), ends=False), FAMILIES["qwen3"])


def test_words_that_begin_with_the_answer_s_white_space() -> None:
    """unslothai/unsloth#1290, #1262: Mistral's marks were looked for as tokens, which text beside them changes."""
    for content in ("\nYes.", "  Yes.", "\n\n\n", "Yes.\n"):
        for name in ("mixtral", "marked", "olmoe"):
            found = trained(name, chat(user(content), said(content)))
            assert [text.strip(" ")[: len(content.strip(" "))] for text in found[0]] == [content.strip(" ")]
            assert decoded(encoded(chat(user(content), said(content)), FAMILIES[name])[0]) == found[0][0]


def test_results_of_tools_are_not_trained() -> None:
    """Where roles share no opening mark, what follows a call was taken for the answer (GLM, Gemma)."""
    conversation = chat(
        user("?"), said("", None, "Oslo"), result("sunny all day"), said("Fine."), user("Thanks"), tools=True
    )
    for name, family in FAMILIES.items():
        if family.tools != "none":
            assert "sunny" not in str(trained(name, conversation)), name


def test_notes_say_what_is_served_otherwise() -> None:
    """hiyouga/LlamaFactory#9392: a model without thoughts was trained, unsaid, on a template that has their marks."""
    turns = TrainedTurns(FAMILIES["minimax_m2"].template, FAMILIES["minimax_m2"].ends)
    (sample,) = turns.samples(chat(user("?"), said("Yes.")))
    assert spelt(sample) == ["Yes.[e~["]
    assert any(note.startswith("the generation prompt ends with '<think>\\n'") for note in turns.notes)
