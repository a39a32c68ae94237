"""Rows of files of every kind."""

import datetime
import gzip
import json
import os
import pickle
import random
import threading
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxmoe.chat import arrow_file, converting, row_files
from jaxmoe.chat.formats import RecordReader
from jaxmoe.chat.records import Message, Piece
from jaxmoe.chat.rows import open_rows
from jaxmoe.errors import UserError

ROWS = [
    {"id": i, "text": "é\n" * i + "数据 [}", "more": {"list": [i, None], "a": {"b": "\\"}}} for i in range(9)
]


@pytest.fixture
def opened(tmp_path):
    """Opens a path with a cache of this test."""
    return lambda path, **options: open_rows(path, cache=tmp_path / "cache" / "rows", **options)


def refuses(action, *parts):
    """Fails with one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_array(rows, **layout):
    return json.dumps(rows, ensure_ascii=False, **layout).encode()


def write_packed(file, content):
    with pa.CompressedOutputStream(str(file), {".gz": "gzip", ".zst": "zstd"}[file.suffix]) as out:
        out.write(content)


def write_parquet(file, table, **options):
    pq.write_table(table, file, **{"row_group_size": 4, **options})


def write_stream(file, table, batch=4, **options):
    with pa.ipc.new_stream(str(file), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as out:
        out.write_table(table, max_chunksize=batch)


def write_ipc(file, table, batch=4, **options):
    with pa.ipc.new_file(str(file), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as out:
        out.write_table(table, max_chunksize=batch)


TABLES = {
    "a.parquet": write_parquet,
    "file.arrow": write_ipc,
    "stream.arrow": write_stream,
    "lz4.arrow": lambda file, table: write_ipc(file, table, compression="lz4"),
    "zstd.arrow": lambda file, table: write_stream(file, table, compression="zstd"),
}
PACKED = ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.json.zst"]


def write(folder, name):
    """The rows in a file of a kind."""
    file = folder / name
    if name in TABLES:
        TABLES[name](file, pa.Table.from_pylist(ROWS))
    elif name.endswith((".gz", ".zst")):
        write_packed(file, as_lines(ROWS) if "jsonl" in name else as_array(ROWS))
    else:
        file.write_bytes(as_array(ROWS))
    return file


@pytest.mark.parametrize("name", [*TABLES, *PACKED, "a.json"])
def test_rows_of_every_kind(tmp_path, opened, name):
    file = write(tmp_path, name)
    rows = opened(file)
    order = random.Random(0).sample(range(9), 9)
    assert [rows[i] for i in order] == [ROWS[i] for i in order]
    assert rows[-1] == ROWS[8]
    assert rows.where(5) == f"{file} line 6" if "jsonl" in name else f"{file} row 5"
    assert 9 * 20 < rows.num_bytes < 9000
    copy = pickle.loads(pickle.dumps(rows.subset([7, 0])))  # noqa: S301 - made above
    assert list(copy) == [ROWS[7], ROWS[0]]
    again = opened(file)
    assert (again.fingerprint(), list(again)) == (rows.fingerprint(), ROWS)
    with pytest.raises(IndexError):
        rows[9]


@pytest.mark.parametrize("name", [*TABLES, *PACKED, "a.json"])
def test_fingerprints_change_with_content_and_not_with_names(tmp_path, opened, name):
    file = write(tmp_path, name)
    first = opened(file).fingerprint()
    renamed = file.rename(tmp_path / f"z.{name}")
    assert opened(renamed).fingerprint() == first
    changed = [*ROWS[:8], {**ROWS[8], "id": 9}]
    if name in TABLES:
        TABLES[name](renamed, pa.Table.from_pylist(changed))
    elif name.endswith((".gz", ".zst")):
        write_packed(renamed, as_lines(changed) if "jsonl" in name else as_array(changed))
    else:
        renamed.write_bytes(as_array(changed))
    rows = opened(renamed)
    assert rows[8]["id"] == 9
    assert rows.fingerprint() != first


def test_what_is_rewritten_is_so_once(tmp_path, opened, monkeypatch):
    for name in ("a.parquet", "a.json", "a.jsonl.gz"):
        write(tmp_path, name)
    assert list(opened(tmp_path)) == ROWS * 3
    cache = tmp_path / "cache" / "rows"
    files = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert sorted(name.split("-")[0] for name in files) == [".array", ".lines", ".parquet"]
    assert not [name for name in files if "partial" in name]
    for name in ("array_of_rows", "_write_batches", "sync"):
        monkeypatch.setattr(converting, name, None)
    assert list(opened(tmp_path)) == ROWS * 3
    assert {file.name: file.stat().st_mtime_ns for file in cache.iterdir()} == files


def test_what_another_process_wrote_meanwhile_is_taken(tmp_path, opened, monkeypatch):
    rows = opened(write(tmp_path, "a.json"))
    (written,) = (tmp_path / "cache" / "rows").iterdir()
    content = written.read_bytes()
    written.unlink()
    inodes = []

    def written_meanwhile(file):
        written.write_bytes(content)
        inodes.append(written.stat().st_ino)

    monkeypatch.setattr(converting, "sync", written_meanwhile)
    assert opened(tmp_path / "a.json").fingerprint() == rows.fingerprint()
    (found,) = (tmp_path / "cache" / "rows").iterdir()
    assert [found.stat().st_ino] == inodes  # whoever has it open would take another one for a change


@pytest.mark.parametrize("chunk", [1, 2, 5, 64, 10_000])
@pytest.mark.parametrize(
    "content",
    [
        as_array(ROWS),
        as_array(ROWS, indent=2),
        b"\xef\xbb\xbf \n" + as_array(ROWS) + b"\n ",
        as_array(ROWS).replace(b"}, {", b"}\r\n,\r\n{"),
        as_array({"data": ROWS}),
        as_array(
            {"version": 1.25, "tags": ["x", 12], "rows": ROWS, "empty": [], "license": {"a": [{}]}}, indent=1
        ),
    ],
)
def test_arrays_that_come_in_chunks(tmp_path, opened, monkeypatch, chunk, content):
    monkeypatch.setattr(converting, "CHUNK_BYTES", chunk)
    (tmp_path / "a.json").write_bytes(content)
    assert list(opened(tmp_path / "a.json")) == ROWS


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_json_that_is_json_lines(tmp_path, opened, monkeypatch, chunk):
    monkeypatch.setattr(converting, "CHUNK_BYTES", chunk)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf\n" + as_lines(ROWS))
    rows = opened(tmp_path / "a.json")
    assert list(rows) == ROWS
    assert rows.where(0).endswith("a.json line 2")
    assert not (tmp_path / "cache").exists()
    write_packed(tmp_path / "b.json.gz", as_lines(ROWS))
    rows = opened(tmp_path / "b.json.gz")
    assert list(rows) == ROWS
    assert rows.where(8).endswith("b.json.gz line 9")


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_elements_that_are_no_objects_are_errors_of_their_rows(tmp_path, opened, monkeypatch, chunk):
    monkeypatch.setattr(converting, "CHUNK_BYTES", chunk)
    (tmp_path / "n.json").write_bytes(b"[1234567890, 1234567890]")
    assert len(opened(tmp_path / "n.json")) == 2
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, 12, [\n1], {"a": "\\ud800"}, "x"]')
    rows = opened(tmp_path / "a.json")
    assert rows[0] == {"a": 1}
    refuses(lambda: rows[1], "a.json row 1: a JSON number, expected an object")
    refuses(lambda: rows[2], "a.json row 2: a JSON array, expected an object")
    refuses(lambda: rows[3], "a.json row 3: field 'a' holds half a surrogate pair")
    refuses(lambda: rows[4], "a.json row 4: a JSON string")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            b'[{"a": 1}, {"a" 2}]',
            ["not JSON (Expecting ':' delimiter at character 16, in row 1); mend the file"],
        ),
        (b'[{"a": 1}, {"a": 2}', ["not JSON (Expecting ',' at character 19, in row 2)"]),
        (b'[{"a": 1} {"a": 2}]', ["not JSON (Expecting ',' at character 10, in row 1)"]),
        (b'[{"a": 1}, {"a": "', ["not JSON (Unterminated string"]),
        (b'[{"a": "\xff"}]', ["byte 0xff at offset 8 is not UTF-8", "iconv"]),
        (b"[" + b"[" * 99_999, ["a.json row 0"]),  # which reason depends on Python's version
        (
            b'[{"a": 1}] {"b": 2}',
            ["more than one JSON value, expected one array of objects; write it as .jsonl"],
        ),
        (b'{"a": 1, "b": {"c": [{}]}}', ["an object without an array of objects", "jq -c '.[]'"]),
        (b'{"a": [{}], "b": [{}]}', ["arrays of objects under 'a' and 'b', expected one", "jq -c '.a[]'"]),
        (b'{"a": [{}] "b"}', ["not JSON (Expecting ','"]),
        (b'{"a" [{}]}', ["not JSON (Expecting ':'"]),
        (b'"text"', ["a JSON string, expected an array of objects"]),
        (b"12", ["a JSON number, expected an array"]),
        (b"{", ["not JSON"]),
        (b"rows", ["not JSON (Expecting value at character 0"]),
        (b"", ["no rows, because a.json is empty"]),
        (b"[]", ["no rows, because a.json is empty"]),
        (
            b'[{"a": "' + b"x" * 2000 + b'"}]',
            ["a.json row 0: does not end within 1,000 bytes", "raise the data's max_record"],
        ),
        (
            b'[{"a": 1}, {"a": "' + b"x" * 99_999,
            ["row 1: does not end within 1,000 bytes", "(Unterminated string starting at at character 17)"],
        ),
    ],
)
def test_unusable_json(tmp_path, opened, monkeypatch, content, parts):
    monkeypatch.setattr(converting, "CHUNK_BYTES", 100)
    (tmp_path / "a.json").write_bytes(content)
    refuses(lambda: opened(tmp_path / "a.json", max_record_bytes=1000), str(tmp_path), *parts)
    assert not list((tmp_path / "cache").glob("*/*.partial"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_that_are_broken(tmp_path, opened, suffix):
    file = tmp_path / f"a.jsonl{suffix}"
    write_packed(file, as_lines(ROWS * 100))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refuses(lambda: opened(file), f"a.jsonl{suffix}: not readable (", "copy or write it again")
    file.write_bytes(b"no such stream at all")
    refuses(lambda: opened(file), f"a.jsonl{suffix}: not readable (")
    assert not list((tmp_path / "cache").glob("*/*"))


def test_members_of_a_packed_file_follow_each_other(tmp_path, opened):
    lines = as_lines(ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:50]) + gzip.compress(lines[50:]))
    assert list(opened(tmp_path)) == ROWS


def test_what_decompresses_to_an_endless_line(tmp_path, opened):
    write_packed(tmp_path / "a.jsonl.zst", as_lines(ROWS) + b" " * 2**26)
    write_packed(tmp_path / "b.json.gz", b'[{"a": "' + b" " * 2**26)
    tracemalloc.start()
    try:
        refuses(
            lambda: opened(tmp_path / "a.jsonl.zst", max_record_bytes=10**6), "line 10: longer than 1,000,000"
        )
        refuses(
            lambda: opened(tmp_path / "b.json.gz", max_record_bytes=10**6),
            "row 0: does not end within 1,000,000",
        )
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert not list((tmp_path / "cache").glob("*/*"))


def test_large_files_are_rewritten_little_by_little(tmp_path, opened):
    row = as_array({"text": "x" * 60_000})
    with gzip.open(tmp_path / "a.json.gz", "wb", compresslevel=1) as file:
        file.write(b"[" + row + (b"," + row) * 599 + b"]")
    table = pa.table({"text": [f"{i}" + "x" * 60_000 for i in range(600)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=600, use_dictionary=False)
    write_stream(tmp_path / "a.arrow", table, 600)
    del table
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows = opened(tmp_path)
        assert len(rows) == 1800
        assert [rows[i]["text"][:4] for i in (0, 599, 700, 1799)] == ["0xxx", "599x", "xxxx", "599x"]
        assert tracemalloc.get_traced_memory()[1] < 2**24
        assert pa.total_allocated_bytes() - before < 2**22
    finally:
        tracemalloc.stop()


def test_tables_are_read_batch_by_batch_from_many_threads(tmp_path, opened, monkeypatch):
    rows = [{"id": i, "text": f"row {i}" * 50} for i in range(400)]
    table = pa.Table.from_pylist(rows)
    monkeypatch.setattr(converting, "_BATCH_BYTES", 4000)
    for name, to in TABLES.items():
        to(tmp_path / name, table)
    source = opened(tmp_path)
    source._files[0]._cache._most = 20_000  # a few batches
    wrong = []

    def read(seed):
        for i in random.Random(seed).choices(range(2000), k=300):
            if source[i] != rows[i % 400]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    cache = source._files[0]._cache
    assert 0 < sum(block.nbytes for block in cache._blocks.values()) <= 20_000
    assert pickle.loads(pickle.dumps(source))[399] == rows[399]  # noqa: S301 - made above
    assert len(pickle.dumps(source)) < 2000 * 20 + 8000


def test_nested_columns_have_no_keys_that_are_null(tmp_path, opened):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello", "weight": 0.5},
            ]
        },
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
                {"role": "tool", "content": "2", "name": "f"},
            ],
            "note": "x",
        },
        {
            "messages": [
                {"role": "user", "tool_calls": [{"function": {"name": "g", "arguments": {"b": [None]}}}]}
            ]
        },
    ]
    table = pa.Table.from_pylist(
        rows, schema=pa.Table.from_pylist(rows).schema.append(pa.field("note", pa.string()))
    )
    for name, to in TABLES.items():
        to(tmp_path / name, table)
        found = list(opened(tmp_path / name))
        assert found == [{"note": None, **row} for row in rows]
    assert RecordReader("messages")(found[0], "here").messages == (
        Message("user", (Piece("Hi"),)),
        Message("assistant", (Piece("Hello"),), weight=0.5),
    )


def test_values_that_json_lacks_are_left_as_they_are(tmp_path, opened):
    when = datetime.datetime(2026, 11, 2, 3, 4)
    table = pa.table({"at": [when], "raw": [b"\xff"], "text": ["a"]})
    write_parquet(tmp_path / "a.parquet", table)
    assert list(opened(tmp_path)) == [{"at": when, "raw": b"\xff", "text": "a"}]


def test_categories(tmp_path, opened):
    table = pa.table({"id": range(6), "kind": pa.array(list("abcabc")).dictionary_encode()})
    wanted = [{"id": i, "kind": kind} for i, kind in enumerate("abcabc")]
    for name in ("a.parquet", "file.arrow", "lz4.arrow"):
        TABLES[name](tmp_path / name, table)
        assert list(opened(tmp_path / name)) == wanted
    write_stream(tmp_path / "stream.arrow", table)
    refuses(
        lambda: opened(tmp_path / "stream.arrow"),
        "a stream with columns of categories",
        "write it as .parquet",
    )


@pytest.mark.parametrize("name", list(TABLES))
def test_a_changed_table_is_noticed(tmp_path, opened, name):
    file = write(tmp_path, name)
    rows = opened(file)
    read = rows._files[0].path
    found = read.stat()
    os.utime(read, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    refuses(lambda: rows[2], f"{name} row 2: changed since it was opened")
    read.unlink()
    refuses(lambda: rows[2], f"{name} row 2: cannot be read any more (No such file")


@pytest.mark.parametrize("name", list(TABLES))
def test_unusable_tables(tmp_path, opened, name):
    file = write(tmp_path, name)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refuses(lambda: opened(file), f"{name}: not readable as", "again")
    file.write_bytes(b"PAR1 or ARROW1 neither")
    refuses(lambda: opened(file), f"{name}: not readable as", "again")
    file.write_bytes(b"")
    refuses(lambda: opened(file), f"{name}: not readable as", "again")
    TABLES[name](file, pa.table({"text": pa.array([], pa.string())}))
    refuses(lambda: opened(file), "no rows, because", "is empty; expected objects or rows")
    TABLES[name](file, pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]))
    refuses(lambda: opened(file), "2 columns are named 'text', expected one; rename the others")


def test_texts_of_tables_that_are_not_utf8(tmp_path, opened):
    latin1 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"xy\xe9"]).buffers())
    write_parquet(tmp_path / "a.parquet", pa.table({"text": latin1}))
    rows = opened(tmp_path / "a.parquet")
    assert rows[0] == {"text": "a"}
    refuses(lambda: rows[1], "a.parquet row 1: byte 0xe9 at offset 2 is not UTF-8")


def test_batches_that_are_too_large(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(arrow_file, "_MOST_DECOMPRESSED", 2000)
    monkeypatch.setattr(converting, "_MOST_BATCH_BYTES", 2000)
    table = pa.table({"text": ["x" * 3000]})
    for name in ("lz4.arrow", "zstd.arrow"):
        TABLES[name](tmp_path / name, table)
        refuses(lambda name=name: opened(tmp_path / name), "bytes that is compressed, expected at most 2,000")
    for name in ("file.arrow", "stream.arrow"):  # which are mapped
        TABLES[name](tmp_path / name, table)
        assert len(opened(tmp_path / name)) == 1
    write_parquet(tmp_path / "a.parquet", table)
    refuses(lambda: opened(tmp_path / "a.parquet"), "bytes in 1 rows, expected at most 2,000; split the rows")


def test_folders_that_the_datasets_library_saved(tmp_path, opened):
    for split, rows in (("test", ROWS[:2]), ("train", ROWS[2:])):
        (tmp_path / split).mkdir()
        write_stream(tmp_path / split / "data-00000-of-00001.arrow", pa.Table.from_pylist(rows))
        write_stream(tmp_path / split / "cache-0a1b.arrow", pa.Table.from_pylist(rows))
        for name in ("state.json", "dataset_info.json"):
            (tmp_path / split / name).write_text('{"splits": [{"name": "x"}]}')
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert list(opened(tmp_path)) == ROWS
    assert list(opened(tmp_path / "train")) == ROWS[2:]
    assert list(opened(tmp_path, include=["test/data-*.arrow"])) == ROWS[:2]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    write(tmp_path, "a.json")
    (tmp_path / "file").write_text("")
    refuses(
        lambda: open_rows(tmp_path / "a.json", cache=tmp_path / "file" / "cache"),
        f"{tmp_path}/file/cache: cannot write the rows of {tmp_path}/a.json: Not a directory; choose another folder",
    )
    write(tmp_path, "a.parquet")
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("", (), {"free": 10})
    )
    refuses(
        lambda: open_rows(tmp_path / "a.parquet", cache=tmp_path / "cache"),
        "No space left on device",
        "10 free",
        "free some space or choose another folder",
    )


def test_a_row_of_each_chunk_size(tmp_path, opened, monkeypatch):
    for chunk in (3, 50, 1000):
        monkeypatch.setattr(row_files, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(converting, "CHUNK_BYTES", chunk)
        write_packed(tmp_path / "a.jsonl.gz", as_lines(ROWS[: chunk % 7 + 2]))
        assert list(opened(tmp_path / "a.jsonl.gz")) == ROWS[: chunk % 7 + 2]
