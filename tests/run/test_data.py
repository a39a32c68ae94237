"""The text of a run."""

import json

import numpy as np

from jaxmoe.data import open_documents
from jaxmoe.run.text_data import sample


def test_what_a_new_tokenizer_learns_from(tmp_path):
    texts = [f"text {i} " + "word " * (i % 7) for i in range(400)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = open_documents(file)
    assert sample(documents, documents.total_bytes) is documents
    drawn = sample(documents, 3000)
    assert 2900 < drawn.total_bytes <= 3000
    assert sample(documents, 3000).fingerprint() == drawn.fingerprint()
    places = [texts.index(text) for text in drawn]
    assert places == sorted(places)
    assert 150 < np.mean(places) < 250
    assert len(sample(documents, 1)) == 1
