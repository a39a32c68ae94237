import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxmoe.block_cache import BlockCache
from jaxmoe.data import documents as documents_module
from jaxmoe.data import formats, open_documents, parquet, split_documents
from jaxmoe.errors import UserError


def refuses(path, *parts, **options):
    """Opening fails with one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        open_documents(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def write_parquet(file, **columns):
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return file


def test_text_file_is_one_document_with_its_line_ends(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("één\r\ntwo\n".encode())
    opened = open_documents(file)
    assert list(opened) == ["één\r\ntwo\n"]
    assert opened.num_bytes(0) == opened.total_bytes == len("één\r\ntwo\n".encode())
    file.write_bytes(b"\xef\xbb\xbfmarked")
    assert list(open_documents(file)) == ["marked"]


def test_jsonl_reads_each_line_at_its_place(tmp_path):
    file = tmp_path / "a.jsonl"
    texts = ["one\ntwo", "  ", "drei\u2028vier", "", "fünf"]
    lines = [json.dumps({"id": i, "body": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())  # no newline at the end
    opened = open_documents(file, field="body")
    assert list(opened) == ["one\ntwo", "drei\u2028vier", "fünf"]
    assert [opened.num_bytes(i) for i in range(3)] == [7, 11, 5]
    assert opened.where(2) == f"{file} line 9"
    assert opened[-1] == "fünf"
    with pytest.raises(IndexError):
        opened[3]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_parquet_reads_rows_of_all_row_groups(tmp_path, kind):
    texts = ["a", "bc", " ", "déf", "a"]
    column = pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts, kind)
    opened = open_documents(write_parquet(tmp_path / "a.parquet", other=pa.array(range(5)), text=column))
    assert [opened[i] for i in (3, 0, 2, 1)] == ["a", "a", "déf", "bc"]
    assert opened.where(2).endswith("a.parquet row 3")


def test_parquet_row_groups_beyond_the_cache_are_read_again(tmp_path, monkeypatch, caplog):
    texts = [f"text {i}" for i in range(9)]
    file = write_parquet(tmp_path / "a.parquet", text=texts)
    monkeypatch.setattr(documents_module, "CACHE_BYTES", 20)
    opened = open_documents(file)
    assert ".jsonl files read faster" in caplog.text
    assert [opened[i] for i in (*range(9), *range(8, -1, -1))] == texts + texts[::-1]


def test_folder_is_read_in_the_order_of_relative_names(tmp_path):
    for name in ("b/z.txt", "a.txt", "c.jsonl", "b/y.TXT", "skipped.md", ".hidden.txt", ".git/x.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    write_parquet(tmp_path / "d.parquet", text=["d.parquet"])
    assert list(open_documents(tmp_path)) == ["a.txt", "b/y.TXT", "b/z.txt", "c.jsonl", "d.parquet"]
    assert list(open_documents(tmp_path, exclude=["b/z*", "*.parquet"])) == ["a.txt", "b/y.TXT", "c.jsonl"]
    assert list(open_documents(tmp_path, include=["*.md", "c*"])) == ["c.jsonl", "skipped.md"]
    assert list(open_documents(tmp_path, include="*.md")) == ["skipped.md"]


def test_symlinks_out_of_the_folder_are_not_followed(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (inside / "link.txt").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside, target_is_directory=True)
    refuses(inside, "1 symlinks lead out of the folder")
    (inside / "own.txt").write_text("own")
    (inside / "alias.txt").symlink_to(inside / "own.txt")
    assert list(open_documents(inside)) == ["own", "own"]


def test_symlinks_that_go_in_circles(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    assert list(open_documents(tmp_path)) == ["a"]
    refuses(tmp_path / "loop.txt", "loop.txt", "Too many levels of symbolic links", "set the data path")


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "~no-such-user/x"])
def test_paths_at_which_nothing_can_be(path):
    with pytest.raises(
        UserError, match="which is no usable path .*; set the data path to a file or folder of text"
    ):
        open_documents(path)


def test_unusable_paths(tmp_path):
    refuses(tmp_path / "none.txt", "none.txt", "no such file or folder")
    refuses(tmp_path, "no usable file", ".jsonl, .parquet, .txt", "found nothing")
    (tmp_path / "a.md").write_text("x")
    refuses(tmp_path, "found .md (1)", "include")
    refuses(tmp_path, "looked for *.py", include=["*.py"])
    refuses(tmp_path / "a.md", "unknown suffix '.md'", ".jsonl, .parquet, .txt")
    (tmp_path / "a.txt").write_text("x")
    refuses(tmp_path / "a.txt", "this is a file", include=["*.txt"])


def test_no_documents(tmp_path):
    for name, content in (
        ("a.txt", b""),
        ("b.txt", b" \n\t"),
        ("c.jsonl", b""),
        ("d.jsonl", b'\n{"text": ""}\n'),
    ):
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, "no documents", name)
    refuses(tmp_path, "4 files are empty")
    refuses(write_parquet(tmp_path / "e.parquet", text=pa.array([], pa.string())), "no documents")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"abc\xffd", ["a.txt", "0xff at offset 3", "iconv"]),
        ("a.txt", b"\xef\xbb\xbfabc\xe9", ["0xe9 at offset 6"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ["line 2", "0xe9 at offset 24", "iconv"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text" "b"}', ["line 3", "not JSON", "byte 23"]),
        ("a.jsonl", b'["text"]', ["line 1", "array", "object"]),
        ("a.jsonl", b'{"test": "a", "id": 1}', ["line 1", "no field 'text'", "did you mean 'test'", "'id'"]),
        ("a.jsonl", b'{"text": 5}', ["line 1", "number", "expected a string"]),
        ("a.jsonl", b'{"text": null}', ["line 1", "null", "expected a string"]),
        ("a.jsonl", b'{"text": "\\ud800"}', ["line 1", "surrogate", "character 0"]),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", ["line 1", "not readable as JSON"]),
        ("a.jsonl", b"[" * 200_000, ["line 1", "JSON"]),
        ("a.parquet", b"PAR1 not really PAR1", ["a.parquet", "not a readable parquet file"]),
        ("a.parquet", b"", ["a.parquet", "not a readable parquet file"]),
    ],
)
def test_unusable_content(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, *parts)


def test_unusable_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    refuses(write_parquet(file, texts=["a"], id=[1]), "no column 'text'", "did you mean 'texts'", "'id'")
    refuses(write_parquet(file, text=[1, 2]), "holds int64, expected strings")
    refuses(write_parquet(file, text=["a", "b", None]), "row 2", "null")
    latin1 = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"b", b"xy\xe9"]).buffers())
    refuses(write_parquet(file, text=latin1), "row 2", "0xe9 at offset 2")
    pq.write_table(pa.table({"text": ["word " * 999]}), file, compression="none", use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    refuses(file, "a.parquet row group 0", "not readable")


def test_unreadable_file(tmp_path, monkeypatch):
    def denied(file):
        raise PermissionError(13, "Permission denied", str(file))

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(formats, "open_regular", denied)
    refuses(tmp_path, "a.txt: cannot be read (Permission denied)")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_what_is_no_regular_file(tmp_path, suffix):
    """Opened, a pipe would wait for a writer and a device would never end."""
    pipe, zero = tmp_path / f"pipe.{suffix}", tmp_path / f"zero.{suffix}"
    os.mkfifo(pipe)
    refuses(tmp_path, str(pipe), "no regular file", "write its text to a file")
    zero.symlink_to("/dev/zero")
    for file in (pipe, zero):
        refuses(file, str(file), "no regular file", include=["*"])
        reader = documents_module._open_reader(file, "text", BlockCache(), 2**20)
        with pytest.raises(OSError, match="expected a regular file"):  # for one that takes a file's place
            next(reader.scan())


def test_a_line_that_is_too_long_is_not_read(tmp_path):
    file = tmp_path / "a.jsonl"
    with file.open("wb") as lines:
        lines.write(b'{"text": "one"}\r\n')
        lines.truncate(2**42)
    refuses(file, "a.jsonl line 2: longer than 33,554,432 bytes", "max_record_bytes")
    line = json.dumps({"text": "x" * 1000}).encode()
    file.write_bytes(line + b"\r\n" + line)
    assert len(open_documents(file, max_record_bytes=len(line))) == 2
    refuses(file, "line 1: longer than 1,011 bytes", max_record_bytes=len(line) - 1)


def test_a_parquet_text_that_is_too_long(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", text=["a", "b" * 1001, "c", "d"])
    refuses(file, "row 1: a text of 1,001 bytes, expected at most 1,000", max_record_bytes=1000)
    refuses(file, "row group 0", "bytes in 2 rows", "at most 100 in each", max_record_bytes=100)


def test_two_parquet_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "text", "other"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    refuses(tmp_path / "a.parquet", "2 columns are named 'text', expected one")
    assert list(open_documents(tmp_path / "a.parquet", field="other")) == ["c"]


def test_parquet_row_groups_are_held_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BLOCK_BYTES", 50)
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 4)
    monkeypatch.setattr(parquet, "_MOST_BATCH_ROWS", 4)
    texts = [f"text {i} " * (1 + i % 3) for i in range(60)]
    texts[20] = "x" * 80  # by itself more than a block
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=40)
    opened = open_documents(tmp_path)
    assert [opened[i] for i in (*range(60), *range(59, -1, -7))] == texts + texts[::-7]
    blocks = opened._readers[0]._cache._blocks.values()
    assert len(blocks) > 8
    assert sorted(sum(map(len, block.to_pylist())) for block in blocks)[-2:] == [49, 80]


def test_short_parquet_texts_are_decoded_many_at_a_time(tmp_path, monkeypatch):
    short, middle, skewed = ["short"] * 3000, ["x" * 2**12] * 3000, ["y"] * 2999 + ["z" * 60_000]
    pq.write_table(
        pa.table({"text": short + middle + skewed}),
        tmp_path / "a.parquet",
        row_group_size=3000,
    )
    opened = open_documents(tmp_path / "a.parquet", max_record_bytes=2**17)
    decoded = []
    batches = parquet.ParquetReader._batches
    monkeypatch.setattr(
        parquet.ParquetReader, "_batches", lambda *args: decoded.append(args[2]) or batches(*args)
    )
    assert opened[0] == "short"
    assert opened[3000] == middle[0]
    assert opened[len(opened) - 1] == skewed[-1]
    assert decoded == [1024, 2**20 // 2**12, 16 * 2**17 // 60_000]


def test_json_is_to_be_converted(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    for path in (tmp_path, tmp_path / "rows.json"):
        with pytest.raises(UserError, match=r"\.json.*convert .*jsonl") as caught:
            open_documents(path)
        assert "plain text" not in str(caught.value)


def large(monkeypatch, whole=40, part=10):
    for module in (documents_module, formats):
        monkeypatch.setattr(module, "WHOLE_BYTES", whole)
        monkeypatch.setattr(module, "PART_BYTES", part)


def test_a_large_document_is_several_elements(tmp_path, monkeypatch, write_jsonl):
    large(monkeypatch)
    text = "".join(chr(0x1F600 + i) + "é" * (i % 4) for i in range(20))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt").write_text("x" * 40)
    (tmp_path / "c.txt").write_text(" " * 55)
    write_jsonl([text, "short"], "d.jsonl")
    write_parquet(tmp_path / "e.parquet", text=["short", text])
    size = len(text.encode())
    opened = open_documents(tmp_path)
    count = size // 10
    assert opened.beginnings().tolist() == (
        [True]
        + [False] * (count - 1)
        + [True]
        + [True]
        + [False] * (count - 1)
        + [True] * 3
        + [False] * (count - 1)
    )
    assert [opened.num_bytes(i) for i in range(count)] == [10] * (count - 1) + [size - 10 * (count - 1)]
    assert opened.total_bytes == 3 * size + 40 + 2 * 5
    assert opened.largest == 40
    assert "".join(opened) == text + "x" * 40 + text + "short" * 2 + text
    assert opened.where(1).endswith("a.txt from byte 10")
    train, heldout = split_documents(opened, 0.3, 1)
    for side in (train, heldout):  # with all of its parts
        assert np.count_nonzero(side.beginnings()) * (count - 1) >= np.count_nonzero(~side.beginnings())
        assert len("".join(side).replace("short", "").replace("x" * 40, "")) % len(text) == 0


@pytest.mark.parametrize("at", [3, 9, 10, 11, 30, 59])
def test_where_a_large_file_is_not_utf8(tmp_path, monkeypatch, at):
    large(monkeypatch)
    content = bytearray("aé" * 20, "utf-8")
    content[at] = 0xFF
    (tmp_path / "a.txt").write_bytes(content)
    begins_here = at % 3 != 2
    refuses(
        tmp_path, f"byte 0x{'ff' if begins_here else 'c3'} at offset {at if begins_here else at - 1} is not"
    )


def test_a_change_after_opening_is_noticed(tmp_path, write_jsonl):
    text, jsonl = tmp_path / "a.txt", write_jsonl(["one", "two"])
    text.write_text("abc")
    opened = open_documents(tmp_path)
    text.write_text("abd")
    with pytest.raises(UserError, match=r"a\.txt: changed"):
        opened[0]
    jsonl.write_text('{"text": "longer than it was"}\n')
    with pytest.raises(UserError, match="line 1: changed"):
        opened[1]
    jsonl.unlink()
    with pytest.raises(UserError, match="line 2: changed"):
        opened[2]


def test_fingerprint_follows_texts_and_order_only(tmp_path, write_jsonl):
    first = open_documents(write_jsonl(["a", "b", "c"])).fingerprint()
    assert open_documents(write_jsonl(["a", " ", "b", "c"], "renamed.jsonl")).fingerprint() == first
    assert open_documents(write_parquet(tmp_path / "a.parquet", text=["a", "b", "c"])).fingerprint() == first
    assert open_documents(write_jsonl(["a", "c", "b"])).fingerprint() != first
    assert open_documents(write_jsonl(["a", "b", "d"])).fingerprint() != first


def test_split_depends_on_texts_and_seed_only(write_jsonl):
    texts = [f"text {i}" for i in range(200)]
    train, heldout = split_documents(open_documents(write_jsonl(texts)), 0.1, 3)
    assert len(heldout) == 20
    assert sorted([*train, *heldout]) == sorted(texts)
    again = split_documents(open_documents(write_jsonl(texts[::-1], "reversed.jsonl")), 0.1, 3)[1]
    assert set(again) == set(heldout)
    assert set(split_documents(open_documents(write_jsonl(texts)), 0.1, 4)[1]) != set(heldout)


def test_split_keeps_equal_texts_together_and_both_sides_filled(write_jsonl):
    train, heldout = split_documents(open_documents(write_jsonl(["a", "b"] * 9)), 0.01, 0)
    assert sorted((len(train), len(heldout))) == [9, 9]
    assert not set(train) & set(heldout)
    assert train.total_bytes == 9
    for texts in (["a"], ["a", "a", "a"]):
        with pytest.raises(UserError, match=r"\(1 different\) cannot be split"):
            split_documents(open_documents(write_jsonl(texts)), 0.5, 0)
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="between 0 and 1"):
            split_documents(open_documents(write_jsonl(["a", "b"])), fraction, 0)


def test_standard_library():
    opened = open_documents("python:stdlib")
    assert len(opened) > 200
    assert opened.total_bytes > 3e6
    names = [opened.where(i) for i in range(len(opened))]
    assert not [name for name in names if "/test/" in name or "site-packages" in name]
    assert any(name.endswith("/argparse.py") for name in names)
    small = open_documents("python:stdlib", include=["a*.py"], exclude=["*/*"])
    assert 0 < len(small) < 30
    assert np.isin(small.digests(), opened.digests()).all()
