"""Training runs on conversations, from rows in files to what is exported."""

import gzip
import io
import itertools
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import finish, start, write_config
from tokenizers import Tokenizer

import jaxmoe
from jaxmoe.cli import main as cli
from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.model.sampling import generate
from jaxmoe.run.data import open_data

TIMES = {"seconds", "data_seconds", "tokens_per_second", "mfu"}
MODEL = {
    **{"model_type": "qwen3_moe", "vocab_size": 384, "hidden_size": 24, "intermediate_size": 40},
    **{
        "moe_intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    **{"head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 128},
}
WORDS = [*map(str, range(10, 20)), "apples", "pears", "plums", "cherries"]


def turns(rng, count, longest=6):
    for _ in range(count):
        for role in ("user", "assistant"):
            yield {"role": role, "content": " ".join(rng.choice(WORDS, rng.integers(1, longest)))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of three formats."""
    here, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    chats = [{"messages": list(turns(rng, int(rng.integers(1, 4))))} for _ in range(37)]
    asked = [
        dict(zip(("prompt", "completion"), (m["content"] for m in turns(rng, 1)), strict=True))
        for _ in range(23)
    ]
    told = [
        {
            "conversations": [
                {"from": "gpt" if t["role"] == "assistant" else "human", "value": t["content"]}
                for t in turns(rng, 2)
            ]
        }
        for _ in range(19)
    ]
    for name, rows in (("chats", chats), ("asked", asked), ("told", told)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return here


def config_of(folder, output, **data):
    return {
        "model": {"config": MODEL, "dtype": "float32", "remat": False},
        "data": {
            "sources": [
                {"path": str(folder / "chats.jsonl"), "weight": 5, "eval_fraction": 0.1},
                {"path": str(folder / "asked.jsonl"), "weight": 2, "eval_fraction": 0.2},
                {"path": str(folder / "told.jsonl"), "weight": 3},
            ],
            "sequence_length": 40,
            "chat_template": "chatml",
            "tokenizer": {
                "train_bpe": 380,
                "special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            },
            "cache": str(folder / "cache"),
            "workers": 0,
            **data,
        },
        "optimizer": {"name": "adamw", "learning_rate": 0.003},
        "train": {
            **{"steps": 9, "batch_size": 4, "micro_batch_size": 2, "checkpoint_every": 2, "log_every": 1},
            **{"eval_every": 4, "peak_tflops": 1.0},
        },
        "sample": {"prompts": ["11 12", "plums"], "chat": True, "tokens": 3},
        "output_dir": str(output),
    }


def metrics(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    here = tmp_path_factory.mktemp("finished")
    return here / "run", finish(start(write_config(here, config_of(folder, here / "run"))))


def test_a_run_says_what_it_reads_and_how_well_it_predicts_each_source(finished):
    output, printed = finished
    assert "chats: 33 rows of messages, the chat template 'chatml', " in printed
    assert "asked: 18 rows of prompt_completion, " in printed
    assert "told: 19 rows of conversations, the chat template 'chatml', " in printed
    assert "% trained" in printed
    assert "step 4: plums\n> " in printed
    evaluated = [record for record in metrics(output) if "eval/chats/loss" in record]
    assert [record["step"] for record in evaluated] == [4, 8, 9]
    for record in evaluated:
        assert record["eval/asked/perplexity"] == pytest.approx(np.exp(record["eval/asked/loss"]))
    losses = [record["loss"] for record in metrics(output) if "loss" in record]
    assert losses[-1] < losses[0] - 0.3


def test_an_export_has_the_template_and_what_ends_a_turn(finished):
    export = finished[0] / "export"
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    stops = json.loads((export / "generation_config.json").read_text())["eos_token_id"]
    assert [tokenizer.id_to_token(i) for i in stops] == ["<|im_end|>", "<|endoftext|>"]
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(export))
    text = theirs.apply_chat_template(
        [{"role": "user", "content": "11"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n11<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.once
@pytest.mark.parametrize("prepare", [True, False])
def test_killed_in_the_middle_of_a_pack_and_resumed_is_bit_for_bit_the_same(
    folder, finished, tmp_path, prepare
):
    """Three mixed sources; rows encoded as they are needed come in the same order as prepared ones."""
    output = tmp_path / "run"
    config = write_config(tmp_path, config_of(folder, output, prepare=prepare))
    for checkpoint in (2, 6):
        process = start(config)
        # The save of a step waits for that of the one before.
        while process.poll() is None and not (output / "checkpoints" / str(checkpoint)).exists():
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert len(metrics(output)) < len(metrics(finished[0]))
    assert "resuming after step" in finish(start(config))
    assert metrics(output) == metrics(finished[0])
    for name in ("model.safetensors", "tokenizer.json"):
        assert (output / "export" / name).read_bytes() == (finished[0] / "export" / name).read_bytes()


def opened(folder, tmp_path, **data):
    config = config_of(folder, tmp_path / "run", **data)
    del config["train"]["eval_every"]
    return open_data(RunConfig.from_mapping(config), None, 384)


def test_workers_encode_as_the_run_itself_does(folder, tmp_path):
    mine = opened(folder, tmp_path, cache=str(tmp_path / "a")).prepared
    data = opened(folder, tmp_path, cache=str(tmp_path / "b"), workers=2)
    theirs = data.prepared
    data.close()
    for one, other in zip(mine, theirs, strict=True):
        assert one.about == other.about
        assert one.about.trained == sum(int((e.weights > 0).sum()) for i in range(len(one)) for e in one[i])
        assert one.about.tokens == sum(len(e.ids) for i in range(len(one)) for e in one[i])
        assert all(
            np.array_equal(a.ids, b.ids) and np.array_equal(a.weights, b.weights)
            for i in range(len(one))
            for a, b in zip(one[i], other[i], strict=True)
        )


def test_prepared_data_is_found_again_and_by_nobody_else(folder, tmp_path):
    cache = tmp_path / "cache"
    assert opened(folder, tmp_path, cache=str(cache)).prepared
    before = {path.name for path in (cache / "prepared").iterdir()}
    first = min((cache / "prepared").glob("*/ids.bin"))
    touched = first.stat().st_mtime_ns
    assert opened(folder, tmp_path, cache=str(cache)).prepared
    assert {path.name for path in (cache / "prepared").iterdir()} == before
    assert first.stat().st_mtime_ns == touched
    for changed in (
        {"sequence_length": 41},
        {"long": "drop"},
        {"train_on": {"end_of_turn": "none"}},
        {"chat_template": "zephyr"},
        {"loss": "sequence"},
    ):
        assert opened(folder, tmp_path, cache=str(cache), **changed).prepared
        now = {path.name for path in (cache / "prepared").iterdir()}
        assert now > before, changed
        before = now


def test_a_bad_row_stops_the_run_or_is_counted(folder, tmp_path):
    rows = (folder / "chats.jsonl").read_text().splitlines()
    rows[4] = '{"messages": [{"role": "user", "content": "no answer"}]}'
    rows[7] = '{"messages": 3}'
    (tmp_path / "bad.jsonl").write_text("\n".join(rows) + "\n")
    given = {"sources": [], "path": str(tmp_path / "bad.jsonl"), "cache": str(tmp_path / "cache")}
    tokenizer = opened(folder, tmp_path).tokenizer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given["tokenizer"] = str(tmp_path / "tokenizer.json")
    with pytest.raises(UserError) as prepared:
        _ = opened(folder, tmp_path, **given).prepared
    unprepared = opened(folder, tmp_path, prepare=False, **given)
    with pytest.raises(UserError) as told:
        _ = unprepared.told
    batches = unprepared.training_batches()
    with pytest.raises(UserError) as streamed:
        list(itertools.islice(batches, 30))
    for caught in (prepared, told, streamed):
        assert f"{tmp_path / 'bad.jsonl'} line " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "prepared").glob("*/about.json"))
    data = opened(folder, tmp_path, bad_rows="skip", **given)
    assert data.prepared[0].about.bad == 2
    assert any("2 rows cannot be used and are left out" in line for line in data.told)


def test_loss_per_sequence_weighs_every_conversation_alike(folder, tmp_path):
    cache = str(tmp_path / "cache")
    for prepared in opened(folder, tmp_path, cache=cache, loss="sequence").prepared:
        for i in range(len(prepared)):
            assert all(example.weights.sum() == pytest.approx(1.0) for example in prepared[i])
    for prepared in opened(folder, tmp_path, cache=cache).prepared:
        assert set(
            np.unique(np.concatenate([e.weights for i in range(len(prepared)) for e in prepared[i]]))
        ) == {0, 1}


def test_inspect_shows_what_is_trained(folder, tmp_path, capsys):
    config = write_config(tmp_path, config_of(folder, tmp_path / "run"))
    assert cli(["inspect", "data", str(config), "--rows", "2", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == 6
    data = opened(folder, tmp_path)
    for row in shown:
        assert data.tokenizer.decode(row["ids"], skip_special_tokens=False) == row["text"]
        assert row["trained"] == [weight > 0 for weight in row["weights"]]
        trained = [i for i, flag in zip(row["ids"], row["trained"], strict=True) if flag]
        said = data.tokenizer.decode(trained, skip_special_tokens=False)
        assert "user" not in said
        assert said.endswith(("<|im_end|>", "<|endoftext|>"))
    source = json.loads(
        (folder / "chats.jsonl").read_text().splitlines()[int(shown[0]["where"].split()[-1]) - 1]
    )
    answers = [m["content"] + "<|im_end|>" for m in source["messages"] if m["role"] == "assistant"]
    trained = [i for i, flag in zip(shown[0]["ids"], shown[0]["trained"], strict=True) if flag]
    said = data.tokenizer.decode(trained, skip_special_tokens=False)
    assert said
    assert "".join(answers).startswith(said)  # it may be cut to 40 tokens
    page = tmp_path / "page.html"
    assert cli(["inspect", "data", str(config), "--html", str(page)]) == 0
    written = page.read_text()
    assert "&lt;|im_end|&gt;</b>" in written
    assert "slots filled" in written
    capsys.readouterr()
    assert cli(["inspect", "data", str(config)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "tokens per example",
        "seconds per thousand rows",
        "slots filled",
        "<|im_start|>assistant",
    ):
        assert expected in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "-1"], "--rows: found -1, expected 0 or more"),
        (["--json", "--html", "x.html"], "--json: found it beside --html, expected one of them"),
        (["data.chat_template=nowhere"], "'nowhere' is neither a file nor a known template"),
        (["data.template_date='2026-13-01'"], "expected a date like 2026-01-31"),
        (["data.train_on.end_tokens=[NONE]"], "'NONE' is no token of the tokenizer"),
        (["data.train_on.roles=[critic]"], "no turn to train on among roles assistant, user"),
        (["data.path=x.jsonl"], "found both of `path` and `sources`"),
        (["data.temperature=2"], "found `temperature` 2.0 beside weights"),
        (["data.system=drop"], "found `system` beside `sources`"),
        (
            ["data.sources=[{path: nothing.jsonl, eval_fraction: 0.1}]"],
            "nothing.jsonl: no such file or folder",
        ),
        (["data.chat_template=null"], "has no chat template, which conversations need"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, arguments, told):
    config = write_config(tmp_path, config_of(folder, tmp_path / "run", cache=str(tmp_path / "cache")))
    assert cli(["inspect", "data", str(config), *arguments]) == 2
    found = capsys.readouterr().err
    assert told in found
    assert found.count("\n") == 1


def test_the_column_names_decide(folder, tmp_path):
    for name, format in (("chats", "messages"), ("asked", "prompt_completion"), ("told", "conversations")):
        data = opened(folder, tmp_path, sources=[], path=str(folder / f"{name}.jsonl"))
        assert [source.format for source in data.sources] == [format]


def chat(export, *arguments):
    return cli(["generate", "--chat", str(export), "--dtype", "float32", "--tokens", "6", *arguments])


def test_a_dialogue_reads_what_was_said_before(finished, capsys, monkeypatch):
    """And says what the model says to all of it at once."""
    export = finished[0] / "export"
    monkeypatch.setattr("sys.stdin", io.StringIO("11 plums\n\npears\n"))
    assert chat(export, "--system", "apples", "--temperature", "0") == 0
    answers = capsys.readouterr().out.split("\n")[:2]
    model = jaxmoe.from_pretrained(str(export), dtype="float32")
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    said = [("system", "apples")]
    for asked, answer in zip(("11 plums", "pears"), answers, strict=True):
        said.append(("user", asked))
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
        ids = tokenizer.encode(text + "<|im_start|>assistant\n").ids
        stops = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
        options = {"tokens": 6, "temperature": 0.0, "seed": 0, "dtype": jnp.float32}
        found = generate(model.pure_params(), model.spec, ids, stop=stops, **options)
        assert tokenizer.decode(found) == answer
        said.append(("assistant", answer))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--chat", "--template", "nope", "x"], "--template: 'nope' is neither a file nor a known template"),
        (["--system", "x", "y"], "--system: found it without --chat, expected both"),
        (["--template", "chatml", "y"], "--template: found it without --chat, expected both"),
        ([], "prompt: found none, expected a text to continue, or --chat for a dialogue"),
    ],
)
def test_mistakes_of_a_dialogue_are_one_line(finished, capsys, arguments, told):
    assert cli(["generate", str(finished[0] / "export"), *arguments]) == 2
    found = capsys.readouterr().err
    assert told in found
    assert found.count("\n") == 1


def plain_file(folder):
    file = folder / "plain.jsonl"
    file.write_text("".join(json.dumps({"text": word * 9, "body": word * 7}) + "\n" for word in WORDS))
    return {"sources": [], "path": str(file), "chat_template": None}


def opened_without_samples(folder, tmp_path, **data):
    config = config_of(folder, tmp_path / "run", **data)
    del config["train"]["eval_every"], config["sample"]
    return open_data(RunConfig.from_mapping(config), None, 384)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bad_rows": "skip"}, "data.bad_rows: found it set, and"),
        ({"long": "drop"}, "data.long: found it set, and"),
        ({"chat_template": "chatml"}, "data.chat_template: found it set, and"),
        ({"train_on": {"roles": ["user"]}}, "data.train_on: found it set, and"),
        ({"fields": {"content": "body"}}, "data.fields.content: found it set, and"),
        ({}, "sample.chat: found true, and"),
    ],
)
def test_what_plain_text_has_nothing_of_is_refused(folder, tmp_path, changes, told):
    with pytest.raises(UserError, match=told) as caught:
        opened(folder, tmp_path, **plain_file(tmp_path) | changes)
    assert "is read as plain text" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_text_of_every_kind_of_file_is_read(folder, tmp_path):
    """As documents where their reader takes the files, else as rows."""
    given = plain_file(tmp_path)
    (tmp_path / "packed").mkdir()
    with gzip.open(tmp_path / "packed" / "plain.jsonl.gz", "wt") as file:
        file.write((tmp_path / "plain.jsonl").read_text())
    for path, format, kind in (
        (given["path"], "auto", "TextData"),
        (given["path"], "text", "TextData"),
        (str(tmp_path / "packed" / "plain.jsonl.gz"), "auto", "ConversationData"),
        (str(tmp_path / "packed" / "plain.jsonl.gz"), "text", "ConversationData"),
        (str(tmp_path / "packed"), "text", "ConversationData"),
        (str(tmp_path / "packed" / "*.gz"), "auto", "ConversationData"),
    ):
        data = opened_without_samples(folder, tmp_path, **given | {"path": path, "format": format})
        assert type(data).__name__ == kind, (path, format)
    renamed = opened_without_samples(folder, tmp_path, **given, fields={"text": "body"})
    assert renamed.train[0] == WORDS[0] * 7
    for missing in ("nowhere/plain.jsonl", str(tmp_path / "nothing")):
        with pytest.raises(UserError, match="no such file or folder"):
            opened_without_samples(folder, tmp_path, **given | {"path": missing})


def test_a_cache_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for given in ({}, {"sources": [], "path": "python:docstrings"}):
        with pytest.raises(UserError, match=r"^data.cache: .* cannot write .*choose another folder$"):
            _ = opened(folder, tmp_path, cache=str(tmp_path / "file" / "cache"), **given).prepared


def test_bad_rows_that_are_held_out_are_told(folder, tmp_path, caplog):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((folder / "chats.jsonl").read_text().splitlines()[0] + "\n{}\n")
    given = {"sources": [], "path": str(folder / "chats.jsonl"), "eval_path": str(bad)}
    with pytest.raises(UserError, match="bad.jsonl line 2"):
        _ = opened(folder, tmp_path, **given).evaluations
    assert len(opened(folder, tmp_path, bad_rows="skip", **given).evaluations) == 1
    assert "left out: " in caplog.text
    assert "bad.jsonl line 2" in caplog.text
