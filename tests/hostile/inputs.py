"""Bad inputs: each is written into a copy of the workspace and given to a command, which must refuse it in one line.

A case is a name, what it does to the folder, and the command line. Where what is given may also be right, the run is
stopped before it trains, and exit code 0 is as good.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TRAIN = ("train", "run.yaml")


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: for the table.
        damage: what is done to the folder.
        command: arguments.
        codes: exit codes that are right.
        cpu: seconds that it may take; None for the usual.
        trains: it is let train, because only then it shows.
    """

    name: str
    damage: Callable[[Path], Any] | None
    command: tuple[str, ...] = TRAIN
    codes: tuple[int, ...] = (2,)
    cpu: float | None = None
    trains: bool = False


def cases() -> list[Case]:
    """All of them."""
    made = [
        *_special_files(),
        *_yaml(),
        *_keys(),
        *_models(),
        *_data(),
        *_tokenizers(),
        *_arguments(),
        *_trained(),
    ]
    assert len({case.name for case in made}) == len(made)
    return made


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
    "socket": lambda path: _socket(path),
    "folder": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path.name),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "empty": lambda path: path.write_bytes(b""),
}


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its whole path may be too long for a socket
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        make(path)

    return damage


def _special_files() -> Iterator[Case]:
    files = {
        "run.yaml": TRAIN,
        "model/config.json": ("inspect", "model"),
        "model/model.safetensors.index.json": ("inspect", "model"),
        "model/model-00001-of-00002.safetensors": ("inspect", "model"),
        "model/tokenizer.json": TRAIN,
        "text.txt": (*TRAIN, "data.path=text.txt"),
        "text.jsonl": (*TRAIN, "data.path=text.jsonl"),
        "text.parquet": (*TRAIN, "data.path=text.parquet"),
        "heldout.txt": (*TRAIN, "data.eval_path=heldout.txt", "data.eval_fraction=0"),
    }
    for name, command in files.items():
        for kind, make in SPECIAL.items():
            yield Case(f"{name}: {kind}", _instead(name, make), command)
    # Files that need not be there: missing is right, damaged is not.
    for name in ("model/tokenizer_config.json", "model/generation_config.json"):
        for kind in ("pipe", "link to /dev/zero", "link to a pipe", "socket", "empty"):
            yield Case(f"{name}: {kind}", _instead(name, SPECIAL[kind]), codes=(0, 2))


def _text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return _instead(
        name, lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)
    )


def _yaml() -> Iterator[Case]:
    nested = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for name, of in zip("bcdefghij", "abcdefghi", strict=True):
        nested += f"{name}: &{name} [{', '.join([f'*{of}'] * 9)}]\n"
    texts: dict[str, str | bytes] = {
        "not text": bytes(range(256)) * 20,
        "UTF-16": "model: {path: model}".encode("utf-16"),
        "tab": "model:\n\tpath: model\n",
        "a list": "- model\n- data\n",
        "a word": "model",
        "nothing but comments": "# nothing\n",
        "two documents": "model: {}\n---\nmodel: {}\n",
        "key twice": "model: {path: a}\nmodel: {path: b}\n",
        "python object": "model: !!python/object/apply:os.system ['true']\n",
        "unknown tag": "model: !nonsense {path: a}\n",
        "deep": "model: " + "[" * 5000 + "]" * 5000,
        "deep mapping": "model: " + "{a: " * 3000 + "1" + "}" * 3000,
        "nested aliases": nested + "model: {path: model}\ntrain: {steps: *j}\n",
        "list in itself": "model: &a [*a]\n",
        "unclosed": "model: {path: [a\n",
        "many digits": f"train: {{steps: {'9' * 5000}}}\n",
        "50 MB of comments": "# comment\n" * 5_000_000,
        "300 KB of list": f"train: {{steps: [{'1,' * 150_000}1]}}\n",
        "undefined alias": "model: *nothing\n",
        "merge of a list": "model: {<<: [1, 2]}\n",
        "surrogate": 'output_dir: "\\ud800"\n',
        "date": "train: {steps: 2024-99-99}\n",
        "binary": "model: !!binary '***'\n",
        "set": "model: !!set {a, b}\n",
        "NUL in a path": 'model: {path: "a\\0b"}\noutput_dir: "b\\0c"\n',
        "numbers as keys": "1: {2: 3}\n",
        "long key": f"{'k' * 100_000}: 1\n",
    }
    for name, text in texts.items():
        yield Case(f"YAML: {name}", _text("run.yaml", text))


_VALUES = {
    "null": "null",
    "list": "[1, [2, {a: 3}]]",
    "mapping": "{a: {b: c}}",
    "empty": '""',
    "NUL": '"a\\0b"',
    "-1": "-1",
    "1e400": "1e400",
    "nan": ".nan",
    "2^63": "9223372036854775808",
    "long": "x" * 20_000,
    "true": "true",
}


def _keys() -> Iterator[Case]:
    from jaxmoe.config import RunConfig
    from jaxmoe.config.errors import _dotted_keys

    for number, key in enumerate(_dotted_keys(RunConfig)):
        for offset, (name, value) in enumerate(_VALUES.items()):
            if (number + offset) % 4 == 0:  # a fourth of all pairs, each key and each value among them
                yield Case(f"{key} = {name}", None, (*TRAIN, f"{key}={value}"), codes=(0, 2))


def _json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        changed = change(content)
        (folder / name).write_text(json.dumps(content if changed is None else changed))

    return damage


def _set(**fields: Any) -> Callable[[Path], None]:
    return _json("model/config.json", lambda raw: raw.update(fields))


def _models() -> Iterator[Case]:
    inspect = ("inspect", "model")
    absurd = [10**6, 10**8, 2**31, 2**63, -1, 0, 1.5, 1e300, "8", None, [], {}, True]
    for field in ("num_experts", "num_hidden_layers", "vocab_size", "num_attention_heads", "hidden_size"):
        for value in absurd:
            yield Case(
                f"{field} = {value!r}", _set(**{field: value}), inspect, (0, 2) if value is None else (2,)
            )
    for field in ("num_labels", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta"):
        for value in (10**8, 2**63, -1, "8", [], {"a": 1}):
            yield Case(f"{field} = {value!r}", _set(**{field: value}), inspect, (0, 2))
    odd = {
        "id2label of a million": {"id2label": {str(i): "x" for i in range(10**6)}},
        "layer_types of a million": {"layer_types": ["full_attention"] * 10**6},
        "a million fields": {f"f{i}": i for i in range(10**6)},
        "field of 10 MB": {"architectures": ["x" * 10**7]},
        "model_type a list": {"model_type": ["qwen3_moe"]},
        "model_type of 10 KB": {"model_type": "q" * 10_000},
        "rope_scaling nonsense": {"rope_scaling": {"rope_type": "nonsense", "factor": -1}},
        "rope factor 1e400": {"rope_scaling": {"rope_type": "linear", "factor": 1e308}},
        "mlp_only_layers words": {"mlp_only_layers": ["a", None]},
        "quantization nonsense": {"quantization_config": {"quant_method": "nonsense"}},
        "quantization a word": {"quantization_config": "fp8"},
        "fp8 without a scale": {
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
        },
    }
    for name, fields in odd.items():
        yield Case(f"config.json: {name}", _set(**fields), inspect)
    yield Case("config.json: 50 MB", _text("model/config.json", '{"a": "' + "x" * 50_000_000 + '"}'), inspect)
    yield Case("config.json: deep", _text("model/config.json", "[" * 100_000), inspect)
    yield Case(
        "config.json: digits", _text("model/config.json", '{"vocab_size": ' + "9" * 5000 + "}"), inspect
    )
    index = "model/model.safetensors.index.json"
    names = {
        "300 letters": "x" * 300 + ".safetensors",
        "parent": "../model/model-00001-of-00002.safetensors",
        "absolute": "/etc/passwd",
        "NUL": "a\0b.safetensors",
        "device": "../../../../dev/zero",
        "number": 7,
        "empty": "",
        "folder": ".",
    }
    for name, file in names.items():

        def redirect(raw: Any, file: Any = file) -> None:
            raw["weight_map"][next(iter(raw["weight_map"]))] = file

        yield Case(f"index: {name}", _json(index, redirect), inspect)
    yield Case("index: no weight_map", _json(index, lambda _: {"metadata": {}}), inspect)
    yield Case("index: a list", _json(index, lambda _: []), inspect)
    yield from _shards(inspect)


def _header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _shards(inspect: tuple[str, ...]) -> Iterator[Case]:
    entry = b'"t%d":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}'
    many = b"{" + b",".join(entry % i for i in range(1_000_000)) + b"}"
    contents = {
        "a million bad entries": _header(many),
        "deep": _header(b"[" * 200_000),
        "a list": _header(b"[]"),
        "length 2^63": _header(b"{}", length=2**63),
        "length past the end": _header(b"{}", length=1000),
        "not UTF-8": _header(b'{"\xff": 1}'),
        "key twice": _header(b'{"a": {}, "a": {}}'),
        "NaN": _header(b'{"a": NaN}'),
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "HTML": b"<!DOCTYPE html><html></html>",
        "seven bytes": b"1234567",
        "huge shape": _header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
        "many axes": _header(
            b'{"a":{"dtype":"F32","shape":[' + b",".join([b"1"] * 5000) + b'],"data_offsets":[0,4]}}', b"1234"
        ),
        "negative offsets": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'),
        "metadata of numbers": _header(b'{"__metadata__":{"a":1}}'),
        "99 MB of spaces": _header(b"{}" + b" " * 99_000_000),
        "long name": _header(
            b'{"' + b"n" * 1_000_000 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"
        ),
    }
    for name, content in contents.items():
        yield Case(f"shard: {name}", _text("model/model-00001-of-00002.safetensors", content), inspect)


def _data() -> Iterator[Case]:
    def given(name: str) -> tuple[str, ...]:
        return (*TRAIN, f"data.path={name}")

    lines: dict[str, str | bytes] = {
        "not JSON": "{text: a}\n",
        "a list": "[1]\n",
        "a number": "7\n",
        "null": '{"text": null}\n',
        "number as text": '{"text": 7}\n',
        "object as text": '{"text": {"a": "b"}}\n',
        "no field": '{"txet": "a"}\n',
        "surrogate": '{"text": "\\ud800"}\n',
        "deep": '{"text": ' + "[" * 100_000 + "\n",
        "digits": '{"text": ' + "9" * 5000 + "}\n",
        "not UTF-8": b'{"text": "\xff"}\n',
        "white space": '{"text": "   "}\n\n\n',
        "UTF-16": '{"text": "a"}\n'.encode("utf-16"),
        "a million blank lines": "\n" * 1_000_000,
        "second line": '{"text": "good words"}\n{"text"\n',
        "NUL bytes": b"\0" * 1000,
    }
    for name, text in lines.items():
        yield Case(f".jsonl: {name}", _text("d.jsonl", text), given("d.jsonl"))
    texts = {"not UTF-8": b"ab\xff\xfe", "only a mark": b"\xef\xbb\xbf", "white space": b" \n\t" * 1000}
    for name, content in texts.items():
        yield Case(f".txt: {name}", _text("d.txt", content), given("d.txt"))
    for suffix in ("txt", "jsonl"):

        def sparse(path: Path) -> None:
            with path.open("wb") as file:
                file.truncate(8 * 10**9)

        yield Case(
            f".{suffix}: 8 GB, sparse",
            _instead(f"d.{suffix}", sparse),
            given(f"d.{suffix}"),
            (0, 2),
            cpu=60.0,
        )
    for name, damage in _parquet().items():
        yield Case(f".parquet: {name}", damage, given("d.parquet"))
    yield Case(".json rows", _text("d.json", '[{"text": "a"}]'), given("d.json"))
    yield Case(".csv", _text("d.csv", "text\na\n"), given("d.csv"))
    yield Case("a folder without text", lambda folder: (folder / "d").mkdir(), given("d"))
    yield Case("two documents, both held out", _text("d.txt", "a b"), given("d.txt"))
    yield Case("no such path", None, given("nowhere"))
    yield Case("pattern that matches nothing", None, (*TRAIN, "data.include=['*.nothing']"))


def _parquet() -> dict[str, Callable[[Path], Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(*columns: tuple[str, pa.Array]) -> Callable[[Path], None]:
        return _instead(
            "d.parquet",
            lambda path: pq.write_table(
                pa.Table.from_arrays([c for _, c in columns], [n for n, _ in columns]), path
            ),
        )

    words = pa.array(["some words", "and more"])
    return {
        "a column twice": table(("text", words), ("text", words)),
        "no column": table(("txet", words)),
        "numbers": table(("text", pa.array([1, 2]))),
        "null": table(("text", pa.array(["a", None]))),
        "no rows": table(("text", pa.array([], pa.string()))),
        "lists": table(("text", pa.array([["a"], ["b"]]))),
        "not parquet": _text("d.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
        "cut": lambda folder: (
            table(("text", words))(folder),
            (folder / "d.parquet").write_bytes((folder / "d.parquet").read_bytes()[:-20]),
        ),
        "not UTF-8": table(("text", pa.array([b"\xff\xfe"]).cast(pa.string(), safe=False))),
    }


def _tokenizers() -> Iterator[Case]:
    texts = {
        "not JSON": "{",
        "a list": "[]",
        "no model": "{}",
        "deep": "[" * 100_000,
        "unknown model": '{"model": {"type": "Nonsense"}}',
        "not UTF-8": b"\xff",
    }
    for name, text in texts.items():
        yield Case(f"tokenizer.json: {name}", _text("model/tokenizer.json", text))
    yield Case("tokenizer.json: missing", lambda folder: (folder / "model/tokenizer.json").unlink())
    for name, text in {"not JSON": "{", "a list": "[]", "eos nowhere": '{"eos_token": "<nowhere>"}'}.items():
        yield Case(f"tokenizer_config.json: {name}", _text("model/tokenizer_config.json", text))
    yield Case("train_bpe: 3", None, (*TRAIN, "data.tokenizer={train_bpe: 3}"))
    yield Case("train_bpe past the vocabulary", None, (*TRAIN, "data.tokenizer={train_bpe: 4000}"))


def _arguments() -> Iterator[Case]:
    lines: list[tuple[str, ...]] = [
        ("nonsense",),
        ("train", "no.yaml"),
        ("train", "a\0b"),
        ("train", "x" * 5000),
        ("train", "."),
        ("train", "--nonsense"),
        ("train", "run.yaml", "no equals"),
        ("train", "run.yaml", "=1"),
        ("train", "run.yaml", "a..b=1"),
        ("train", "run.yaml", "train.steps.more=1"),
        ("train", "run.yaml", "train.steps=["),
        ("train", "run.yaml", "nonsense=1"),
        ("inspect",),
        ("inspect", "a\0b"),
        ("inspect", "x" * 5000),
        ("inspect", "/dev/zero"),
        ("inspect", "run.yaml"),
        ("inspect", "~nobody-of-that-name"),
        ("export",),
        ("export", "a\0b", "c"),
        ("export", "out", "c"),
        ("export", "/dev/zero", "c"),
        ("export", "model", "c"),
        ("generate",),
        ("generate", "a\0b", "hello"),
        ("generate", "nowhere", "hello"),
        ("generate", "/dev/zero", "hello"),
        ("generate", "text", "hello"),
        ("generate", "model", "hello", "--tokens", "-1"),
        ("generate", "model", "hello", "--temperature", "nan"),
    ]
    for line in lines:
        yield Case(f"$ {' '.join(line)[:60]!r}", None, line)


def _trained() -> Iterator[Case]:
    """What shows only in training, or while the step is compiled."""
    changes = {
        "weights that are not finite": "optimizer={learning_rate: 3e38, weight_decay: 100}",
        "tokens past memory": "data.sequence_length=65536",
        "a million tokens": "data.sequence_length=1000000",
        "a million rows": "train.batch_size=1000000",
    }
    for name, change in changes.items():
        yield Case(
            name, None, (*TRAIN, "train.steps=1", "train.eval_every=null", change), cpu=60.0, trains=True
        )
