import json
import random

import pytest

from jaxmoe.data import open_documents, train_byte_bpe

WORDS = ["expert", "router", "token", "shard", "naïve", "数据", "merge", "weight", "the", "of", "to", "in"]


@pytest.fixture(scope="session")
def texts():
    """19 different texts, from one word to a few hundred."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=1 + i * i)) + f" {i}" for i in range(19)]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_byte_bpe(texts, 300)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(texts, name="data.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        return file

    return write


@pytest.fixture
def documents(write_jsonl, texts):
    return open_documents(write_jsonl(texts))
