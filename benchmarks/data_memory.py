"""Peak host memory and seconds from files to the first batch, against the size of what is read.

    python benchmarks/data_memory.py                 # 10 MB to 4 GB; needs 6 GB of disk
    python benchmarks/data_memory.py --megabytes 10 100

Each measurement is a process of its own, which opens the files, trains a tokenizer on them or takes a given one, finds
where it separates, makes training batches, held-out windows of a million tokens and the byte baselines. What it holds
when it has imported everything is counted apart. The aim is 500 MB beyond that for whatever is read. What is refused is
read as far as its error.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

MB = 10**6
SIZES = (10, 100, 1000, 4000)
TRAINED_MB = 100  # where a tokenizer is trained as well
EVAL_TOKENS = 10**6
# Words of a language's lengths and frequencies, 2 MB of them: what they say plays no part.
_RANDOM = random.Random(0)
_WORDS = ["".join(_RANDOM.choices("etaoinshrdlu", k=1 + int(_RANDOM.expovariate(0.2)))) for _ in range(5000)]
PROSE = " ".join(_WORDS[int(_RANDOM.expovariate(1 / 400)) % 5000] for _ in range(400_000))


def text(size: int) -> Iterator[str]:
    """Some ``size`` characters of prose."""
    while size > 0:
        yield PROSE[:size] + "\n"
        size -= len(PROSE)


def one_text(folder: Path, size: int) -> None:
    """One document."""
    with (folder / "a.txt").open("w") as file:
        file.writelines(text(size))


def sparse_text(folder: Path, size: int) -> None:
    """One document of zero bytes that take no disk."""
    with (folder / "a.txt").open("wb") as file:
        file.truncate(size)


def many_lines(folder: Path, size: int) -> None:
    """Documents of 1 kB."""
    lines = [json.dumps({"text": PROSE[at : at + 1000]}) + "\n" for at in range(0, len(PROSE) - 1000, 1000)]
    with (folder / "a.jsonl").open("w") as file:
        file.writelines(itertools.islice(itertools.cycle(lines), size // 1000))


def large_lines(folder: Path, size: int) -> None:
    """Documents of 10 MB, each one element."""
    with (folder / "a.jsonl").open("w") as file:
        for _ in range(max(1, size // (10 * MB))):
            file.write(json.dumps({"text": "".join(text(10 * MB))}) + "\n")


def one_line(folder: Path, size: int) -> None:
    """One line of zero bytes."""
    with (folder / "a.jsonl").open("wb") as file:
        file.truncate(size)


def one_row_group(folder: Path, size: int) -> None:
    """Rows of 100 kB in one row group that compress to little."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string())])
    rows = pa.table({"text": [PROSE[:100_000]] * 100}, schema)
    with pq.ParquetWriter(folder / "a.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(max(1, size // (10 * MB))):
            writer.write_batch(rows.to_batches()[0], row_group_size=1 << 30)


def one_repeated_row(folder: Path, size: int) -> None:
    """Rows of 1 MB, all the same entry of a dictionary: the file has a few kB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    indices = pa.array([0] * max(1, size // MB), pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, [PROSE[:MB]])
    pq.write_table(pa.table({"text": column}), folder / "a.parquet", compression="zstd")


INPUTS = {
    "one .txt": one_text,
    "one .txt, sparse": sparse_text,
    ".jsonl, 1 kB lines": many_lines,
    ".jsonl, 10 MB lines": large_lines,
    ".jsonl, one line, sparse": one_line,
    ".parquet, 100 kB rows": one_row_group,
    ".parquet, 1 MB rows, one dictionary entry": one_repeated_row,
}


def status(name: str) -> float:
    """A figure of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1000


def measure(folder: str, train_tokenizer: bool) -> dict[str, Any]:
    """Runs in a process of its own."""
    from jaxmoe import data
    from jaxmoe.errors import UserError
    from jaxmoe.run.text_data import BASELINE_BYTES, sample
    from jaxmoe.run.tokenizers import TOKENIZER_BYTES

    spec = data.BatchSpec(2048, 16, eos=0)
    tokenizer = data.train_byte_bpe([PROSE[:50_000]], 1000)
    PROSE.encode()
    idle, began = status("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    found: dict[str, Any] = {}
    try:
        documents = data.open_documents(folder)
        found["scan s"] = time.perf_counter() - began
        if train_tokenizer:
            tokenizer = data.train_byte_bpe(sample(documents, TOKENIZER_BYTES), 1000)
        data.check_separable(documents, tokenizer)
        batches = data.training_batches(documents, tokenizer, spec)
        next(batches)
        found["first batch s"] = time.perf_counter() - began
        next(batches)
        batches.close()
        data.evaluation_windows(documents, tokenizer, spec, max_tokens=EVAL_TOKENS)
        data.byte_baselines(documents, [documents[0]], max_train_bytes=BASELINE_BYTES)
    except UserError as error:
        found["refused"] = str(error)
    return {"elements": len(documents) if "scan s" in found else 0, **found} | {
        "all s": time.perf_counter() - began,
        "idle MB": idle,
        "peak beyond MB": status("VmHWM") - idle,
    }


def in_process(folder: Path, train_tokenizer: bool) -> dict[str, Any]:
    """`measure` in a fresh process."""
    call = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--measure",
        str(folder),
        *(["--train"] * train_tokenizer),
    ]
    return json.loads(
        subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), choices=list(INPUTS))
    parser.add_argument("--folder", type=Path, help="where the files are made, one input at a time")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.train)))
        return
    rows = []
    whole = options.megabytes == SIZES and options.inputs == list(INPUTS)
    for size, name in itertools.product(options.megabytes, options.inputs):
        for train in (False, True) if size == TRAINED_MB else (False,):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                INPUTS[name](Path(folder), size * MB)
                found = in_process(Path(folder), train)
            rows.append(
                {
                    "input": name,
                    "MB": size,
                    "tokenizer": "trained" if train else "given",
                    "elements": found["elements"],
                    "scan, s": found.get("scan s"),
                    "first batch, s": found.get("first batch s"),
                    "all, s": found["all s"],
                    "peak beyond idle, MB": round(found["peak beyond MB"]),
                    "idle, MB": round(found["idle MB"]),
                    "outcome": "refused" if "refused" in found else "trains",
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
            if whole:  # as far as it has come
                common.write_results("data_memory", rows)
    common.print_table(rows)


if __name__ == "__main__":
    main()
