"""Conversations per second from a file to token ids with masks, beside TRL's preparation of the same file; and memory.

    python benchmarks/conversation_data.py
    python benchmarks/conversation_data.py --megabytes 2000 --repeats 1 --contestants 'jaxmoe, by rendering'

Rows are chats of one to four turns made of words. The peer is TRL's SFTTrainer with ``assistant_only_loss``, as many
processes and the same tokenizer and template, which has marks of what is generated (TRL trains on no others); ours is
measured with these marks and without, where turns are found by rendering. Both write what they prepared to disk. Each
contestant is a process of its own; the time is from the file to prepared data, start-up apart. Packing and batches are
counted apart: what a training step would wait for.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common

MB = 10**6
T = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_RANDOM = random.Random(0)
_WORDS = ["".join(_RANDOM.choices("etaoinshrdlu", k=1 + int(_RANDOM.expovariate(0.2)))) for _ in range(5000)]
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(rng: random.Random, longest: int) -> str:
    """Some words."""
    count = 1 + int(rng.expovariate(3 / longest))
    return " ".join(_WORDS[int(rng.expovariate(1 / 400)) % 5000] for _ in range(count))


def write_rows(file: Path, size: int) -> int:
    """A file of about so many bytes; returns how many rows it has."""
    rng, lines = random.Random(1), []
    for _ in range(4000):
        turns = [
            {"role": role, "content": said(rng, longest)}
            for _ in range(rng.randint(1, 4))
            for role, longest in (("user", 100), ("assistant", 300))
        ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    count = 0
    with file.open("w") as out:
        for line in itertools.cycle(lines):
            if out.tell() >= size:
                return count
            out.write(line)
            count += 1
    return count


def write_tokenizer(folder: Path, template: str) -> None:
    """The same for all."""
    from jaxmoe.data import save_tokenizer, train_byte_bpe

    rng = random.Random(2)
    save_tokenizer(train_byte_bpe([said(rng, 300) for _ in range(2000)], 4096, SPECIAL), folder)
    (folder / "chat_template.jinja").write_text(template)


class Memory:
    """The most that this process and its children had at once, in MB, looked at every tenth of a second."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(0.1):
            self.peak = max(self.peak, sum(map(_private, _family(os.getpid()))))


def _family(pid: int) -> list[int]:
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [other for child in children.read_text().split() for other in _family(int(child))]
        except OSError:
            continue
    return found


def _private(pid: int) -> float:
    """Memory that is this process's alone, without pages of files, which the system takes back as it needs."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return int(next((line for line in lines if line.startswith("RssAnon")), "RssAnon: 0").split()[1]) / 1000


def ours(file: Path, tokenizer: Path, cache: Path, workers: int) -> dict[str, Any]:
    """Prepare, and take batches."""
    from jaxmoe.config import RunConfig
    from jaxmoe.data import load_tokenizer
    from jaxmoe.run import conversation_data  # noqa: F401 - the peer is imported before its clock starts, too
    from jaxmoe.run.data import open_data

    load_tokenizer(tokenizer)

    config = RunConfig.from_mapping(
        {
            "model": {"config": {"model_type": "qwen3_moe", "vocab_size": 8192}},
            "data": {
                **{"path": str(file), "sequence_length": T, "tokenizer": str(tokenizer)},
                **{"cache": str(cache), "workers": workers},
            },
            "optimizer": {"learning_rate": 1.0},
            "train": {"steps": 1, "batch_size": 8},
            "output_dir": str(cache / "run"),
        }
    )
    began = time.perf_counter()
    data = open_data(config, None, 8192)
    opened = time.perf_counter()
    about = data.prepared[0].about
    prepared = time.perf_counter()
    batches = data.training_batches()
    next(batches)
    first = time.perf_counter()
    filled = [float((next(batches)["segment_ids"] > 0).mean()) for _ in range(100)]
    return {
        "seconds": prepared - began,
        "scan, s": opened - began,
        "tokens": about.tokens,
        "trained": about.trained,
        "first batch, s": first - prepared,
        "packed tokens/s": 100 * 8 * T / (time.perf_counter() - first),
        "filled": sum(filled) / len(filled),
    }


def peer(file: Path, tokenizer: Path, cache: Path, workers: int) -> dict[str, Any]:
    """TRL, as far as its prepared dataset."""
    import datasets
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **{"vocab_size": 8192, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
            **{"num_attention_heads": 1, "num_key_value_heads": 1},
        )
    )
    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    opened = time.perf_counter()
    options = SFTConfig(
        output_dir=str(cache / "run"),
        max_length=T,
        packing=True,
        assistant_only_loss=True,
        dataset_num_proc=max(workers, 1),
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    found = SFTTrainer(
        model, options, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(tokenizer)
    ).train_dataset
    lengths = [len(ids) for ids in found.with_format("numpy", columns=["input_ids"])["input_ids"]]
    return {
        "seconds": time.perf_counter() - began,
        "scan, s": opened - began,
        "tokens": sum(lengths),
        "filled": sum(lengths) / (T * len(lengths)),
    }


CONTESTANTS = {
    "jaxmoe, by rendering": (ours, PLAIN),
    "jaxmoe, by marks": (ours, MARKED),
    "TRL, by marks": (peer, MARKED),
}


def measure(name: str, folder: Path, workers: int) -> dict[str, Any]:
    """In a fresh process."""
    call = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--measure",
        name,
        "--folder",
        str(folder),
        "--workers",
        str(workers),
    ]
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=list(CONTESTANTS),
        default=list(CONTESTANTS),
        help="TRL's needs trl and datasets, which jaxmoe does not",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are made")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the JSON")
    parser.add_argument("--measure", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        function, template = CONTESTANTS[options.measure]
        with tempfile.TemporaryDirectory(dir=options.folder) as cache, Memory() as memory:
            write_tokenizer(Path(cache) / "tokenizer", template)
            found = function(
                options.folder / "rows.jsonl", Path(cache) / "tokenizer", Path(cache), options.workers
            )
        print(json.dumps(found | {"memory, MB": memory.peak}))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        count = write_rows(folder / "rows.jsonl", int(options.megabytes * MB))
        size = (folder / "rows.jsonl").stat().st_size
        wanted = options.contestants
        found: dict[str, list[dict[str, Any]]] = {c: [] for c in wanted}
        for _, contestant in itertools.product(range(options.repeats), wanted):
            found[contestant].append(measure(contestant, folder, options.workers))
            print(contestant, found[contestant][-1], file=sys.stderr, flush=True)
    rows = []
    for contestant, each in found.items():
        best = min(each, key=lambda one: one["seconds"])
        rows.append(
            {
                "contestant": contestant,
                "rows/s": round(count / best["seconds"]),
                "tokens/s": round(best["tokens"] / best["seconds"]),
                "seconds": round(best["seconds"], 2),
                "of it scan": round(best["scan, s"], 2),
                "first batch, s": best.get("first batch, s") and round(best["first batch, s"], 2),
                "packed tokens/s": best.get("packed tokens/s") and round(best["packed tokens/s"]),
                "slots filled": f"{best['filled']:.2%}",
                "memory, MB": round(max(one["memory, MB"] for one in each)),
            }
        )
    common.print_table(rows)
    suffix = "" if options.megabytes <= 100 else "_large"
    common.write_results(
        f"conversation_data{suffix}",
        rows,
        options.results,
        file={"rows": count, "megabytes": round(size / MB)},
        workers=options.workers,
    )


if __name__ == "__main__":
    main()
