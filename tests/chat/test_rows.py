import json
import os
import pickle
import random
import subprocess
import sys
import threading
import tracemalloc

import pytest

from jaxmoe.chat import row_files
from jaxmoe.chat.rows import open_rows
from jaxmoe.errors import UserError

ROWS = [{"id": i, "text": "é" * i + "\n数据 token", "more": {"list": [i, None]}} for i in range(7)]


@pytest.fixture
def opened(tmp_path):
    """Opens a path with a cache of this test."""
    return lambda path, **options: open_rows(path, cache=tmp_path / "cache", **options)


def refuses(action, *parts):
    """Fails with one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def as_lines(rows, ascii_only=False):
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()


def test_lines_at_their_places(tmp_path, opened):
    file = tmp_path / "a.jsonl"
    lines = as_lines(ROWS).splitlines()
    file.write_bytes(
        b"\xef\xbb\xbf" + lines[0] + b"\r\n\n \t\r\n" + b"\n".join([*lines[1:3], b"  " + lines[3]])
    )
    rows = opened(file)
    assert list(rows) == ROWS[:4]
    assert [rows.where(i) for i in range(4)] == [f"{file} line {n}" for n in (1, 4, 5, 6)]
    assert rows[-1] == ROWS[3]
    assert rows.num_bytes == sum(map(len, lines[:4])) + 2 + 4  # two blanks, line ends
    with pytest.raises(IndexError):
        rows[4]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1000])
def test_lines_across_chunks(tmp_path, opened, monkeypatch, chunk):
    """Whatever a chunk ends within: a line, its end, a mark, white space."""
    monkeypatch.setattr(row_files, "CHUNK_BYTES", max(chunk, 3))
    rng = random.Random(chunk)
    content, expected, number = bytearray(b"\xef\xbb\xbf"), [], 0
    for row in ROWS * 5:
        for _ in range(rng.randint(0, 2)):
            content += rng.choice([b"\n", b"\r\n", b"  \n", b"\t\r\n", b"\v \n"])
            number += 1
        content += rng.choice([b"", b" ", b"\t  "]) + as_lines([row], rng.random() < 0.5)[:-1]
        content += rng.choice([b"\n", b"\r\n", b" \n"])
        number += 1
        expected.append((row, f"line {number}"))
    file = tmp_path / "a.jsonl"
    for ending in (b"", b"\n", b"   ", as_lines(ROWS[:1])[:-1]):
        file.write_bytes(content + ending)
        rows = opened(file)
        wanted = [*expected, (ROWS[0], f"line {number + 1}")] if ending.startswith(b"{") else expected
        assert [(rows[i], rows.where(i).removeprefix(f"{file} ")) for i in range(len(rows))] == wanted


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "\xe9"}', ["line 2", "0xe9 at offset 19", "iconv"]),
        (b'{"text" "b"}', ["line 2", "not JSON", "byte 17", "one object per line"]),
        (b'{"text": "cut of', ["line 2", "not JSON"]),
        (b'{"a": 1} {"a": 2}', ["line 2", "not JSON (Extra data"]),
        (b'["text"]', ["line 2", "a JSON array, expected an object"]),
        (b"null", ["line 2", "a JSON null, expected an object"]),
        (b'{"n": ' + b"9" * 5000 + b"}", ["line 2", "not readable as JSON", "mend or remove the line"]),
        (b'{"n": ' + b"[" * 200_000, ["line 2", "JSON"]),
        (b'{"ok": 1, "text": {"a": ["\\uD83D"]}}', ["line 2: field 'text' holds half a surrogate pair"]),
        (b'{"\\udc00": 1}', ["line 2", "half a surrogate pair", "remove it"]),
    ],
)
def test_a_row_that_is_none_is_an_error_of_that_row(tmp_path, opened, line, parts):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"pair": "\\ud83d\\ude00"}\n')
    rows = opened(file)
    assert rows[0] == {"a": 1}
    refuses(lambda: rows[1], str(file), *parts)
    assert rows[2] == {"pair": "\U0001f600"}


def test_a_line_that_is_too_long_is_not_read(tmp_path, opened):
    file = tmp_path / "a.jsonl"
    with file.open("wb") as lines:
        lines.write(b'{"text": "one"}\r\n')
        lines.truncate(2**42)
    refuses(lambda: opened(file), "a.jsonl line 2: longer than 33,554,432 bytes", "max_record_bytes")
    line = as_lines([{"text": "x" * 1000}])[:-1]
    for content in (line + b"\r\n" + line, line + b"\n" + line + b"\n", b"\n" + line + b"\r\n"):
        file.write_bytes(content)
        assert opened(file, max_record_bytes=len(line))[0] == {"text": "x" * 1000}
        number = 2 if content.startswith(b"\n") else 1
        refuses(
            lambda: opened(file, max_record_bytes=len(line) - 1), f"line {number}: longer than 1,011 bytes"
        )
    file.write_bytes(b"{}\n{}\n" + line)
    refuses(lambda: opened(file, max_record_bytes=len(line) - 1), "line 3: longer than 1,011 bytes")
    refuses(lambda: opened(file, max_record_bytes=0), "max_record_bytes is 0, expected 1 to")
    refuses(lambda: opened(file, max_record_bytes=2**31 + 1), "max_record_bytes is 2,147,483,649")


def test_a_change_after_opening_is_noticed(tmp_path, opened):
    file = tmp_path / "a.jsonl"
    content = as_lines(ROWS)
    file.write_bytes(content)
    rows = opened(file)
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    refuses(lambda: rows[2], "a.jsonl line 3: changed since it was opened; restore it")
    rows = opened(file)
    with file.open("ab") as more:
        more.write(b"{}\n")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    refuses(lambda: rows[2], "a.jsonl line 3: changed")
    file.unlink()
    refuses(lambda: rows[2], "a.jsonl line 3: cannot be read any more (No such file")


def test_fingerprint_follows_content_and_order_only(tmp_path, opened):
    def of(first, second, names=("a.jsonl", "b.jsonl")):
        for file in tmp_path.glob("*.jsonl"):
            file.unlink()
        for name, rows in zip(names, (first, second), strict=True):
            (tmp_path / name).write_bytes(as_lines(rows))
        return opened(tmp_path)

    rows = of(ROWS[:3], ROWS[3:])
    print_ = rows.fingerprint()
    assert len(print_) == 32
    assert of(ROWS[:3], ROWS[3:], ("x.jsonl", "y.jsonl")).fingerprint() == print_
    assert of(ROWS[:3], ROWS[3:], ("y.jsonl", "x.jsonl")).fingerprint() != print_
    assert of(ROWS[:3], [*ROWS[3:6], {**ROWS[6], "id": 8}]).fingerprint() != print_
    rows = of(ROWS[:3], ROWS[3:])
    assert rows.subset(range(7)).fingerprint() == print_
    prints = {tuple(i): rows.subset(i).fingerprint() for i in ([0, 1], [1, 0], [0], [0, 4], [5, 4], [])}
    assert len({*prints.values(), print_}) == 7
    assert of(ROWS[:3], ROWS[3:5]).subset([0, 1]).fingerprint() == prints[0, 1]  # of the files that are used


def test_subsets_and_copies_read_alike(tmp_path, opened):
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_lines(ROWS * 1000))
    rows = opened(file).subset([5, 2, *range(6000)])
    sent = pickle.dumps(rows)
    assert len(sent) < 6002 * 20 + 2000
    copy = pickle.loads(sent)  # noqa: S301 - made above
    assert [copy[i] for i in range(4)] == [ROWS[5], ROWS[2], ROWS[0], ROWS[1]]
    assert (copy.where(1), copy.fingerprint()) == (f"{file} line 3", rows.fingerprint())
    assert copy.subset([0])[0] == ROWS[5]


def test_many_threads_read_at_once(tmp_path, opened):
    (tmp_path / "a.jsonl").write_bytes(as_lines(ROWS * 30))
    rows = opened(tmp_path)
    wrong = []

    def read(seed):
        for i in random.Random(seed).sample(range(len(rows)), len(rows)):
            if rows[i] != ROWS[i % 7]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_does_not_grow_with_the_file(tmp_path, opened):
    line = as_lines([{"text": "x" * 65_000}])
    with (tmp_path / "a.jsonl").open("wb") as file:
        for _ in range(1000):
            file.write(line)
    tracemalloc.start()
    try:
        rows = opened(tmp_path)
        assert len(rows) == 1000
        assert rows[999] == {"text": "x" * 65_000}
        assert tracemalloc.get_traced_memory()[1] < 12 * row_files.CHUNK_BYTES
    finally:
        tracemalloc.stop()


def test_folders_patterns_and_single_files(tmp_path, opened, monkeypatch):
    names = ("b/z.jsonl", "a.jsonl", "b/y.JSONL", "b/c/x.jsonl", ".hidden.jsonl", ".git/w.jsonl", "README.md")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(as_lines([{"name": name}]))

    def read(path, **options):
        return [row["name"] for row in opened(path, **options)]

    everything = ["a.jsonl", "b/c/x.jsonl", "b/y.JSONL", "b/z.jsonl"]
    assert read(tmp_path) == everything
    assert read(tmp_path, include=["b/*"], exclude=["*/c/*"]) == ["b/y.JSONL", "b/z.jsonl"]
    assert read(tmp_path / "a.jsonl") == ["a.jsonl"]
    assert read(str(tmp_path / "**" / "*")) == everything
    assert read(tmp_path / "b" / "[x-z]*") == everything[2:]
    monkeypatch.chdir(tmp_path)
    assert read("b/*.jsonl") == ["b/z.jsonl"]
    (tmp_path / "b[1].jsonl").write_bytes(as_lines([{"name": "brackets"}]))
    assert read("b[1].jsonl") == ["brackets"]  # what is there wins over what it might stand for


def test_snapshots_of_the_hub_consist_of_links(tmp_path, opened, monkeypatch):
    asked = []

    def download(hub_id, *, repo_type, allow_patterns):
        asked.append((hub_id, repo_type))
        assert {"*.jsonl", "*.parquet"} < set(allow_patterns)
        assert not {"*", "*.py"} & set(allow_patterns)
        return str(snapshot)

    repository = tmp_path / "datasets--org--name"
    snapshot = repository / "snapshots" / "0a1b"
    for folder in (snapshot / "data", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "12").write_bytes(as_lines(ROWS))
    (snapshot / "data" / "train.jsonl").symlink_to("../../../blobs/12")
    (tmp_path / "secret").write_bytes(as_lines(ROWS))
    (snapshot / "data" / "more.jsonl").symlink_to("../../../../secret")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert list(opened("org/name")) == ROWS
    assert asked == [("org/name", "dataset")]
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "own.jsonl").write_bytes(as_lines(ROWS[:1]))
    assert list(opened("org/name")) == ROWS[:1]
    assert len(asked) == 1


def test_unusable_paths(tmp_path, opened):
    refuses(lambda: opened(tmp_path / "none.jsonl"), "none.jsonl: no such file or folder", "org/name")
    refuses(lambda: opened("org/no such name"), "no such file or folder")
    refuses(lambda: opened("a\0b"), "no usable path", "set the data path")
    refuses(
        lambda: opened("jaxmoe-tests/nothing"),
        "'jaxmoe-tests/nothing' is no folder here, and could not be downloaded",
    )
    (tmp_path / "a.txt").write_text("x")
    refuses(
        lambda: opened(tmp_path), "no usable file; looked for .jsonl", "found .txt (1)", "convert the rows"
    )
    refuses(
        lambda: opened(tmp_path, include=["*.txt"]), "a.txt: unknown suffix '.txt'; expected one of .jsonl"
    )
    refuses(lambda: opened(tmp_path / "a.txt"), "unknown suffix '.txt'", "convert")
    refuses(lambda: opened(tmp_path / "*.tx?"), "*.tx?: matches no usable file (1 of other kinds)")
    refuses(lambda: opened(tmp_path / "*.tx?", include=["a"]), "this is a pattern; leave them out")
    (tmp_path / "a.jsonl").write_text("\n \n")
    refuses(lambda: opened(tmp_path / "a.jsonl", exclude=["b"]), "this is a file; leave them out")
    refuses(lambda: opened(tmp_path), "no rows, because a.jsonl is empty; expected objects or rows")
    (tmp_path / "b.jsonl").write_text("")
    refuses(lambda: opened(tmp_path), "no rows, because 2 files are empty")
    os.mkfifo(tmp_path / "c.jsonl")
    refuses(lambda: opened(tmp_path), "c.jsonl: no regular file but a pipe")


def test_a_file_that_may_not_be_read(tmp_path, opened, monkeypatch):
    def denied(file):
        raise PermissionError(13, "Permission denied", str(file))

    (tmp_path / "a.jsonl").write_bytes(as_lines(ROWS))
    monkeypatch.setattr(row_files, "open_regular", denied)
    refuses(lambda: opened(tmp_path), "a.jsonl: cannot be read (Permission denied); mend or exclude it")


@pytest.mark.once
def test_workers_do_not_load_jax():
    code = (
        "import sys, jaxmoe.chat.rows, jaxmoe.chat.formats; "
        "print(sorted({'jax', 'grain', 'jaxmoe.data', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
