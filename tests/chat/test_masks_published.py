# ruff: noqa: RUF001 the bars of DeepSeek's special tokens are wide ones
"""Published templates: those that TRL ships, what its own marks say, and what axolotl labels where it is right."""

import datetime
import functools
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import pytest
from helpers import chat_oracle
from helpers.chat_templates import tokenizer
from helpers.chats import chat, drawn, refusal, result, said, spelt, system, user
from tokenizers import Tokenizer

from jaxmoe.chat.encoder import Encoder, Example
from jaxmoe.chat.ends import EndTokens
from jaxmoe.chat.records import Conversation, Message, Piece
from jaxmoe.chat.samples import TrainOn
from jaxmoe.chat.templates import DIALECTS, ChatTemplate, find_template
from jaxmoe.chat.turns import TrainedTurns
from jaxmoe.errors import UserError

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent.parent
DAY = datetime.date(2026, 1, 2)

STOPS = {
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|endoftext|>", "<|call|>"),
    "qwen": ("<|im_end|>", "<|endoftext|>"),
    "gemma4": ("<turn|>", "<eos>", "<|tool_response>"),
    "diffusion_gemma": ("<turn|>", "<eos>", "<|tool_response>"),
    "gemma": ("<end_of_turn>", "<eos>"),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "phi": ("<|endoftext|>", "<|end|>"),
    "nemotron": ("<|im_end|>", "</s>"),
    "lfm": ("<|im_end|>",),
    "llama": ("<|eot_id|>", "<|end_of_text|>"),
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "muse": ("<|eot|>",),
}
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_turn>|<[be]os>|<\|\w+>|<\w+\|>")


@functools.cache
def _folder() -> Path | str:
    """Where the templates are, or why there are none."""
    finished = subprocess.run(
        [ROOT / ".ci" / "chat-templates", sys.executable], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        return (finished.stderr.strip() or "no reason given").splitlines()[-1]
    return ROOT / finished.stdout.strip()


@pytest.fixture
def folder() -> Path:
    found = _folder()
    if isinstance(found, str):
        pytest.skip(f"TRL's chat templates could not be fetched into .cache: {found}")
    return found


def _read(file: Path) -> tuple[ChatTemplate, EndTokens]:
    stops = next((stops for name, stops in STOPS.items() if name in file.name), ("</s>",))
    found = find_template(str(file), None, DAY)
    assert found is not None
    template = ChatTemplate(found.source, found.origin, {"bos_token": "<s>", "eos_token": stops[0]}, date=DAY)
    return template, EndTokens(stops, frozenset({*_SPECIAL.findall(found.source), *stops, "<s>"}), stops[0])


def test_who_said_what_is_trained(folder: Path) -> None:
    """With every shipped template, marked or not; three are for images and take no text alone."""
    refused, judged = set(), 0
    for file in sorted(folder.glob("*.jinja")):
        template, ends = _read(file)
        rng = random.Random(file.name)
        taken = 0
        for number in range(8):
            conversation = drawn(rng, system=number % 2 == 0, tools=number % 4 == 3, alternating=number < 4)
            coded, fields = chat_oracle.coded(conversation, TrainOn())
            turns = TrainedTurns(template, ends)
            if (reason := refusal(turns, coded)) is not None:
                assert re.match(r"turn \d+ \(|no turn|.* leaves the tool ", reason), reason
                continue
            found = turns.samples(coded)
            taken += 1
            wrong = list(
                chat_oracle.faults(template, ends.stops, coded, fields, TrainOn(), found, turns.notes)
            )
            assert not wrong, (file.name, wrong, conversation)
        judged += taken
        if not taken:
            refused.add(file.stem)
    assert refused <= {f"{name}{kind}" for name in IMAGES for kind in ("", "_training")}
    assert judged > 300


IMAGES = ("idefics3", "llava_next", "smolvlm")
ONE = chat(user("Hi there"), said("First answer."))
TWO = chat(user("Hi there"), said("First answer."), user("More?"), said("Second\n\nanswer."))
THOUGHT = chat(user("Hi there"), said("First answer.", "thought one"))
TOOLS = chat(user("Weather?"), said("", None, "Oslo"), result('{"c": 7}'), said("It is 7."), tools=True)


def _pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    for marked in sorted(folder.glob("*_training.jinja")):
        plain = marked.with_name(marked.name.replace("_training", ""))
        if plain.exists() and not marked.name.startswith(IMAGES):
            yield plain, marked


def test_marks_of_trl_s_training_templates(folder: Path) -> None:
    """What is found without marks is what they mark, but for the end of a prompt that some of them train as well.

    That is the opening mark of thoughts, which the server writes, and the mark of the assistant. The template of one
    family is another in training: gpt-oss ends turns in the middle as none is generated.
    """
    compared = 0
    for plain, marked in _pairs(folder):
        for conversation in (ONE, TWO, THOUGHT, TOOLS):
            if marked.name.startswith("gptoss") and conversation is TWO:
                continue
            if marked.name.startswith("diffusion_gemma") and conversation is TOOLS:
                continue  # begins the answer after a result with a mark, which its prompt has not
            found = []
            for file in (plain, marked):
                template, ends = _read(file)
                try:
                    samples = TrainedTurns(template, ends).samples(conversation)
                except UserError:
                    break
                spans = sorted((span.begin, span.end, each.text) for each in samples for span in each.spans)
                found.append([(text[:begin], text[begin:end]) for begin, end, text in spans])
            if len(found) != 2:
                continue
            assert len(found[0]) == len(found[1]), marked.name
            for (before, mine), (_, other) in zip(*found, strict=True):
                assert other.endswith(mine), (marked.name, mine, other)
                assert before.endswith(other.removesuffix(mine)), (marked.name, mine, other)
                compared += 1
    assert compared > 100


def test_masks_that_transformers_makes_of_marks(folder: Path) -> None:
    """Token by token, up to the token that ends a turn: what TRL marks after it is never generated."""
    from transformers import PreTrainedTokenizerFast

    compared = 0
    for _, marked in _pairs(folder):
        template, ends = _read(marked)
        made = Tokenizer.from_str(tokenizer().to_str())
        made.add_special_tokens(sorted(ends.special))
        fast = PreTrainedTokenizerFast(tokenizer_object=made, **template.special_tokens)
        for conversation in (ONE, TWO, THOUGHT, TOOLS):
            try:
                (example,) = Encoder(made, template, ends, TrainOn(), 10_000)(conversation)
            except UserError:
                continue
            length, matched = len(example.ids), False
            for dialect in DIALECTS:
                try:
                    theirs = fast.apply_chat_template(
                        [dialect.written(message) for message in conversation.messages],
                        tools=conversation.tools and list(conversation.tools),
                        chat_template=template.source,
                        return_assistant_tokens_mask=True,
                        return_dict=True,
                    )
                except (TypeError, jinja2.TemplateError):
                    continue
                if theirs["input_ids"][:length] == example.ids.tolist():
                    matched = True
                    _check_mask(made, example, theirs["assistant_masks"], marked.name)
                    break
            if conversation is TOOLS and marked.name.startswith("deepseek_r1"):
                continue  # wants the content None, which transformers takes out
            assert matched, marked.name
            compared += 1
    assert compared > 60


def _check_mask(made: Tokenizer, example: Example, mask: Sequence[int], name: str) -> None:
    for at, (token, weight, marks) in enumerate(zip(example.ids, example.weights, mask, strict=False)):
        text = made.decode([int(token)], skip_special_tokens=False)
        after_the_end = bool(marks) and not weight and not text.strip()
        assert bool(weight) == bool(marks) or after_the_end, (name, at, text)


# -- axolotl's labels, where they are right. It needs a newer Python and much else, so they are stated by hand: the text
# of a turn and, as train_on_eos says, the tokens that end turns.

LLAMA3_ENDS = EndTokens(
    ("<|eot_id|>", "<|end_of_text|>"),
    frozenset({"<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"}),
)


def _llama3(conversation: Conversation, train_on: TrainOn) -> list[str]:
    found = find_template("llama3", None)
    assert found is not None
    template = ChatTemplate(found.source, found.origin, {"bos_token": "<|begin_of_text|>"})
    (sample,) = TrainedTurns(template, LLAMA3_ENDS, train_on).samples(conversation)
    return spelt(sample)


THREE = chat(system("Be terse."), user("One?"), said("Uno."), user("Two?"), said("Due."))


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        # train_on_eos: turn, last, none and all; roles_to_train.
        (TrainOn(), ["Uno.<|eot_id|>", "Due.<|eot_id|>"]),
        (TrainOn(end_of_turn="last"), ["Uno.", "Due.<|eot_id|>"]),
        (TrainOn(end_of_turn="none"), ["Uno.", "Due."]),
        (TrainOn(end_of_turn="all"), ["<|eot_id|>", "<|eot_id|>", "Uno.<|eot_id|>", "<|eot_id|>", "Due.<|eot_id|>"]),
        (TrainOn(roles=("user",)), ["One?<|eot_id|>", "Two?<|eot_id|>"]),
    ],
    ids=str,
)  # fmt: skip
def test_axolotl_s_labels_of_llama3(train_on: TrainOn, expected: list[str]) -> None:
    """The one row of templates where TRL, axolotl and Unsloth agree."""
    assert _llama3(THREE, train_on) == expected


def test_axolotl_s_labels_of_a_turn_and_of_parts_of_one() -> None:
    """message_field_training, and content in parts of which not all are trained."""
    parts = Message("assistant", (Piece("Uno, "), Piece("perhaps.", 0.0), Piece(" Due.", 1.0)))
    conversation = chat(user("One?"), said("No.", weight=0.0), user("Two?"), parts)
    assert _llama3(conversation, TrainOn()) == ["Uno, ", " Due.<|eot_id|>"]
