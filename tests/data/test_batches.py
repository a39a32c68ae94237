import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxmoe.data import (
    BatchSpec,
    DocumentEncoder,
    batches,
    byte_baselines,
    check_proportion,
    evaluation,
    evaluation_windows,
    formats,
    open_documents,
    pieces,
    save_tokenizer,
    split_documents,
    train_byte_bpe,
    training_batches,
)
from jaxmoe.data import documents as documents_module
from jaxmoe.errors import UserError

NAMES = ("tokens", "segment_ids", "positions")


@pytest.fixture
def unshuffled_rows(monkeypatch):
    """Rows in the order in which they were packed."""
    monkeypatch.setattr(batches, "_WINDOW_TOKENS", 0)


def take(count, documents, tokenizer, spec, **hosts):
    iterator = training_batches(documents, tokenizer, spec, **hosts)
    taken = list(islice(iterator, count))
    iterator.close()
    return taken


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def segments(batch):
    """The token lists of a batch's segments, in order, after checking the numbering."""
    found = []
    for tokens, ids, positions in zip(*(batch[name] for name in NAMES), strict=True):
        used = np.count_nonzero(ids)
        assert (ids[used:] == 0).all()
        assert (positions[used:] == 0).all()
        assert [*dict.fromkeys(ids[:used].tolist())] == [*range(1, ids.max() + 1)]
        for segment in range(1, ids.max() + 1):
            assert positions[ids == segment].tolist() == [*range(np.count_nonzero(ids == segment))]
            found.append(tokens[ids == segment].tolist())
    return found


def contains(whole, part):
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@pytest.mark.usefixtures("unshuffled_rows")
def test_packed_rows_hold_every_document_of_an_epoch_once_without_padding(documents, tokenizer):
    encode = DocumentEncoder(tokenizer, eos=0)
    encoded = {tuple(encode(text).tolist()) for text in documents}
    spec = BatchSpec(sequence_length=24, batch_size=5, eos=0)
    taken = take(200, documents, tokenizer, spec)
    assert all(
        batch[name].shape == (5, 24) and batch[name].dtype == np.int32 for batch in taken for name in NAMES
    )
    assert all((batch["segment_ids"] > 0).all() for batch in taken)
    stream = np.concatenate([batch["tokens"].ravel() for batch in taken]).tolist()
    ends = [-1] + [i for i, token in enumerate(stream) if token == 0]
    whole = [tuple(stream[start + 1 : end + 1]) for start, end in pairwise(ends)]
    epochs = [whole[i : i + 19] for i in range(0, len(whole) - 18, 19)]
    assert len(epochs) > 3
    assert all(set(epoch) == encoded for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("packing", [True, False])
def test_segments_never_cross_documents(documents, tokenizer, packing):
    encode = DocumentEncoder(tokenizer, eos=0)
    encoded = [encode(text).tolist() for text in documents]
    for batch in take(25, documents, tokenizer, BatchSpec(37, 3, packing=packing, eos=0)):
        for segment in segments(batch):
            assert any(contains(document, segment) for document in encoded)


def test_unpacked_rows_hold_one_document_each(documents, tokenizer):
    encode = DocumentEncoder(tokenizer, eos=0)
    taken = take(19, documents, tokenizer, BatchSpec(31, 4, packing=False, eos=0))
    rows = [segments({name: batch[name][[b]] for name in NAMES}) for batch in taken for b in range(4)]
    assert all(len(row) == 1 for row in rows)
    expected = Counter(tuple(encode(text)[:31].tolist()) for text in documents)
    for epoch in range(4):
        assert Counter(tuple(row[0]) for row in rows[19 * epoch : 19 * (epoch + 1)]) == expected
    padded = np.concatenate([batch["tokens"][batch["segment_ids"] == 0] for batch in taken])
    assert padded.size
    assert (padded == 0).all()


def test_row_shuffling_only_reorders(documents, tokenizer, monkeypatch):
    spec = BatchSpec(24, 1, eos=0)
    window = documents.total_bytes // 8 // 24
    assert window > 20
    shuffled = [batch["tokens"].tobytes() for batch in take(2 * window, documents, tokenizer, spec)]
    monkeypatch.setattr(batches, "_WINDOW_TOKENS", 0)
    packed = [batch["tokens"].tobytes() for batch in take(2 * window, documents, tokenizer, spec)]
    assert shuffled != packed
    for start in (0, window):
        assert Counter(shuffled[start : start + window]) == Counter(packed[start : start + window])


def test_context_goes_before_every_document(documents, tokenizer):
    spec = BatchSpec(2048, 3, packing=False, eos=0, context=7)
    for batch in take(4, documents, tokenizer, spec):
        assert (batch["tokens"][:, 0] == 7).all()
        assert (batch["tokens"][:, 1] != 7).all()


@pytest.mark.parametrize("packing", [True, False])
def test_order_follows_the_seed(documents, tokenizer, packing):
    def order(seed, count=12):
        taken = take(count, documents, tokenizer, BatchSpec(24, 3, packing=packing, seed=seed, eos=0))
        return [row.tobytes() for batch in taken for row in batch["tokens"]]

    assert order(0) == order(0)
    assert order(0) != order(1)
    # Neighbouring seeds share no epochs: seed 1 does not start with the second epoch of seed 0.
    if not packing:
        assert order(0, 13)[19:38] != order(1, 7)[:19]


@pytest.mark.parametrize(
    ("hosts", "window", "packing"), [(1, 0, True), (1, 2**18, True), (3, 2**18, True), (3, 0, False)]
)
def test_resuming_anywhere_repeats_the_following_batches(
    write_jsonl, tokenizer, monkeypatch, hosts, window, packing
):
    monkeypatch.setattr(batches, "_WINDOW_TOKENS", window)
    # Each character is a token. Documents that end where a row ends are the case that grain loses after
    # JSON, and documents of several rows make rows start in their middle.
    texts = [chr(33 + i) * n for i, n in enumerate([7, 15, 23, 71, 3, 11, 7, 160, 7, 1, 15, 90])]
    documents = open_documents(write_jsonl(texts))
    spec = BatchSpec(8, 2, packing=packing, seed=5, eos=0)
    shard = {"process_index": hosts - 1, "process_count": hosts}
    iterator = training_batches(documents, tokenizer, spec, **shard)
    states, taken = [], []
    for _ in range(29):  # more than an epoch
        states.append(json.dumps(iterator.get_state()))
        taken.append(next(iterator))
    assert max(map(len, states)) < 1000
    resumed = training_batches(documents, tokenizer, spec, **shard)
    for step, state in enumerate(states[:-2]):
        resumed.set_state(json.loads(state))
        resumed.set_state(json.loads(json.dumps(resumed.get_state())))  # stopped again before any step
        for expected in taken[step : step + 2]:
            assert same(next(resumed), expected), step
    iterator.close()
    resumed.close()


def test_resuming_in_a_fresh_process(write_jsonl, texts, tokenizer, tmp_path):
    file = write_jsonl(texts)
    save_tokenizer(tokenizer, tmp_path)
    spec = BatchSpec(24, 3, eos=0, seed=2)
    iterator = training_batches(open_documents(file), tokenizer, spec)
    for _ in range(17):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    iterator.close()
    script = (
        "import sys, json; from jaxmoe.data import *\n"
        "state = json.load(sys.stdin); folder = sys.argv[1]\n"
        "documents = open_documents(folder + '/data.jsonl')\n"
        "it = training_batches(documents, load_tokenizer(folder), BatchSpec(24, 3, eos=0, seed=2))\n"
        "it.set_state(state)\n"
        "print(json.dumps([{k: v.tolist() for k, v in next(it).items()} for _ in range(4)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)],
        input=json.dumps(state),
        capture_output=True,
        text=True,
        check=True,
    )
    for batch, rows in zip(expected, json.loads(done.stdout), strict=True):
        assert {name: array.tolist() for name, array in batch.items()} == rows
    # Left open at the end of the process, the iterator's threads must not make themselves heard.
    assert done.stderr == ""


def test_hosts_share_each_epoch_out(documents, tokenizer):
    hosts = 3
    encode = DocumentEncoder(tokenizer, eos=0)
    expected = Counter(tuple(encode(text)[:40].tolist()) for text in documents)
    spec = BatchSpec(40, 1, packing=False, eos=0)
    streams = []
    for host in range(hosts):
        taken = take(25, documents, tokenizer, spec, process_index=host, process_count=hosts)
        streams.append([tuple(segments(batch)[0]) for batch in taken])
    for epoch in range(3):
        seen = Counter[tuple[int, ...]]()
        for host, stream in enumerate(streams):
            size = len(range(host, 19, hosts))
            seen.update(stream[size * epoch : size * (epoch + 1)])
        assert seen == expected


def test_batch_mistakes(documents, tokenizer, write_jsonl):
    with pytest.raises(UserError, match="19 documents for 20 processes"):
        training_batches(documents, tokenizer, BatchSpec(8, 2), process_count=20)
    mistakes: list[dict[str, Any]] = [
        {"sequence_length": 1},
        {"batch_size": 0},
        {"seed": -1},
        {"seed": 2**32},
    ]
    for mistake in mistakes:
        with pytest.raises(UserError, match=f"is {next(iter(mistake.values()))}; expected"):
            BatchSpec(**{"sequence_length": 8, "batch_size": 2, **mistake})
    silent = Tokenizer(models.BPE())
    blank = open_documents(write_jsonl(["?"], "blank.jsonl"))
    iterator = training_batches(blank, silent, BatchSpec(8, 2))
    with pytest.raises(UserError, match=r"blank\.jsonl line 1: .*no tokens"):
        next(iterator)


def test_a_state_of_other_batches_is_refused(documents, tokenizer, write_jsonl):
    spec = BatchSpec(24, 3, eos=0)
    state = training_batches(documents, tokenizer, spec).get_state()
    training_batches(documents, tokenizer, BatchSpec(24, 7, eos=0)).set_state(state)
    changes = [
        (documents, BatchSpec(23, 3, eos=0), {}, "sequence_length was 24 and is 23"),
        (documents, BatchSpec(24, 3, eos=0, seed=1), {}, "seed was 0 and is 1"),
        (documents, BatchSpec(24, 3), {}, "eos was 0 and is None"),
        (documents, BatchSpec(24, 3, eos=0, packing=False), {}, "packing was True and is False"),
        (documents, spec, {"process_count": 2}, "process_count was 1 and is 2"),
        (open_documents(write_jsonl(["a", "b"], "other.jsonl")), spec, {}, "documents was"),
    ]
    for data, changed, hosts, message in changes:
        iterator = training_batches(data, tokenizer, changed, **hosts)
        with pytest.raises(UserError, match=message):
            iterator.set_state(state)
    nonsenses: list[Any] = [{}, [], {"identity": {}, "position": {}}]
    for nonsense in nonsenses:
        with pytest.raises(UserError, match="not one of these batches"):
            training_batches(documents, tokenizer, spec).set_state(nonsense)


def test_a_state_of_another_tokenizer(documents, tokenizer, texts, caplog):
    spec = BatchSpec(24, 3, eos=0)
    state = training_batches(documents, tokenizer, spec).get_state()
    padded = Tokenizer.from_str(tokenizer.to_str())
    padded.add_special_tokens(["<|pad|>"])
    training_batches(documents, padded, spec).set_state(state)
    assert not caplog.records
    other = train_byte_bpe(texts[1:10], 300)  # of as many tokens
    with pytest.raises(UserError, match="tokenizer was"):
        training_batches(documents, other, spec).set_state(state)
    # Before, only their number was noted.
    del state["identity"]["tokenizer"]
    state["identity"]["vocab_size"] = 300
    training_batches(documents, padded, spec).set_state(state)
    assert "is not checked" in caplog.text
    state["identity"]["vocab_size"] = 302
    with pytest.raises(UserError, match="tokenizer was 'one of 302 tokens' and is"):
        training_batches(documents, padded, spec).set_state(state)


def digest(batches, count=150):
    found = hashlib.blake2b(digest_size=8)
    for batch in islice(batches, count):
        for name in sorted(batch):
            found.update(np.ascontiguousarray(batch[name]).tobytes())
    return found.hexdigest()


def test_values_are_those_that_runs_have_begun_with(tmp_path):
    """Written down before documents were read in parts: a run that goes on has to find the same batches."""
    words = ["<eos>", "?", *(f"w{i}" for i in range(97))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(f"w{(i * i + 7 * j * j) % 97}" for j in range(1 + (i * 37) % 211)) for i in range(83)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:60]))
    for i, text in enumerate(texts[60:]):
        (tmp_path / f"b{i:02}.txt").write_text(text)
    documents = open_documents(tmp_path)
    train, heldout = split_documents(documents, 0.2, 3)
    assert documents.fingerprint() == "559ba30ee099706975f2cda99f34a93e"
    assert train.fingerprint() == "6fd99716c6c7c0aa7f1e4458ebf280cb"
    assert heldout.fingerprint() == "4b98f589df7aad9ec8e22d214e6b5108"
    expected = {True: "76ff72f69afa5d25", False: "f3dfd787f583cb92"}
    for packing, values in expected.items():
        spec = BatchSpec(29, 3, packing=packing, seed=11, eos=0)
        iterator = training_batches(train, tokenizer, spec, process_index=1, process_count=2)
        assert digest(iterator) == values
        position = iterator.get_state()["position"]
        iterator.close()
        if packing:
            assert (position["window_index"], position["pos_in_window"]) == (7, 51)
            packed = position["parent_window_start_state"]
            assert (packed["parent_state"], packed["remainder_slices"]) == (
                {"next_index": 107},
                {"tokens": (37, 42)},
            )
        else:
            assert position == {"next_index": 450}
    held = evaluation_windows(heldout, tokenizer, BatchSpec(29, 3, eos=0))
    assert digest(held.batches) == "8ac5bcab53cee523"
    assert (held.num_documents, held.num_bytes, held.num_targets) == (17, 6989, 1813)


def test_evaluation_joins_the_parts_of_a_document(tmp_path, tokenizer, monkeypatch):
    for module in (documents_module, formats):
        monkeypatch.setattr(module, "PART_BYTES", 10_000)
    for module in (documents_module, formats):
        monkeypatch.setattr(module, "WHOLE_BYTES", 20_000)
    monkeypatch.setattr(pieces, "_REACH", 9000)
    text = " ".join(random.Random(0).choices(["expert", "router", "naïve", "token", "数据"], k=9000))
    (tmp_path / "a.txt").write_text(text)
    documents, spec = open_documents(tmp_path), BatchSpec(64, 3, eos=0)
    assert len(documents) > 4
    parts, whole = (evaluation_windows(d, tokenizer, spec) for d in (documents, [text]))
    assert predictions([parts]) == predictions([whole])
    assert (parts.num_bytes, parts.num_targets) == (whole.num_bytes, whole.num_targets)
    assert byte_baselines(documents, documents) == pytest.approx(naive_bits([text], [text]), rel=1e-3)
    # Training has every token of them once an epoch, and unpacked rows have only the beginning.
    one = take(1, documents, tokenizer, BatchSpec(64, 1, packing=False, eos=0))[0]
    assert one["tokens"].tolist() == [tokenizer.encode(text).ids[:64]]
    monkeypatch.setattr(batches, "_WINDOW_TOKENS", 0)
    rows = take(whole.num_targets // 64, documents, tokenizer, BatchSpec(64, 1, eos=0))
    tokens = np.concatenate([row["tokens"].ravel() for row in rows]).tolist()
    assert not Counter(tokens) - Counter([*tokenizer.encode(text).ids, 0])


def test_too_much_to_evaluate(documents, tokenizer, texts, monkeypatch):
    spec = BatchSpec(24, 2, eos=0)
    monkeypatch.setattr(evaluation, "MAX_EVAL_TOKENS", 300)
    with pytest.raises(
        UserError, match=r"held-out documents have .* tokens, expected at most 300; .*eval_tokens"
    ):
        evaluation_windows(documents, tokenizer, spec)
    assert evaluation_windows(documents, tokenizer, spec, max_tokens=100).num_targets >= 100
    monkeypatch.setattr(evaluation, "_MAX_EVAL_BYTES", 300)
    with pytest.raises(UserError, match="bytes of held-out text, expected at most 300"):
        evaluation_windows(documents, tokenizer, spec)


def test_a_batch_out_of_proportion_to_the_data(documents, tokenizer):
    for packing, batch_size in ((True, 2**14), (False, 2**14)):
        spec = BatchSpec(2**14, batch_size, packing=packing, eos=0)
        with pytest.raises(
            UserError, match="would repeat the 19 documents .* times, expected at most 16: lower"
        ):
            training_batches(documents, tokenizer, spec)


def test_messages_count_documents_and_not_their_parts(write_jsonl, tokenizer, monkeypatch):
    for module in (documents_module, formats):
        monkeypatch.setattr(module, "WHOLE_BYTES", 4000)
        monkeypatch.setattr(module, "PART_BYTES", 1000)
    monkeypatch.setattr(pieces, "_REACH", 900)
    documents = open_documents(write_jsonl(["expert router token " * 300, "the merge " * 50]))
    assert (len(documents), documents.num_documents) == (7, 2)
    assert documents.subset([3, 4, 6]).num_documents == 1
    with pytest.raises(UserError, match="repeat the 2 documents"):
        check_proportion(documents, BatchSpec(2048, 600))
    with pytest.raises(UserError, match="repeat the 2 documents .* 300 times"):
        check_proportion(documents, BatchSpec(2048, 600, packing=False))
    monkeypatch.setattr(evaluation, "MAX_EVAL_TOKENS", 500)
    with pytest.raises(UserError, match="the first 1 held-out documents have"):
        evaluation_windows(documents, tokenizer, BatchSpec(24, 3, eos=0), max_tokens=10**6)


def test_first_fit_against_the_definition():
    rng = random.Random(1)
    lengths = [rng.randrange(1, 30) for _ in range(700)] + [29] * 50
    rows: list[int] = []
    expected = []
    for length in lengths:
        row = next((r for r, free in enumerate(rows) if free >= length), len(rows))
        if row == len(rows):
            rows.append(29)
        rows[row] -= length
        expected.append(row)
    assert evaluation.first_fit(lengths, 29).tolist() == expected


def numbered_words(lengths):
    """Documents of words that occur once, and a tokenizer with id = 2 + word; <s> is 0, </s> is 1."""
    starts = np.cumsum([0, *lengths])
    texts = [" ".join(f"w{i}" for i in range(a, b)) for a, b in pairwise(starts)]
    words = ["<s>", "</s>", *(f"w{i}" for i in range(starts[-1]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return texts, tokenizer


def predictions(evaluations):
    """Counter of (input, target) over the batches of all hosts, after checking the rows."""
    pairs = Counter[tuple[int, int]]()
    for part in evaluations:
        for batch in part.batches:
            segments(batch)
            predicted = batch["targets"] >= 0
            assert (predicted == (batch["segment_ids"] > 0)).all()
            assert (batch["targets"][~predicted] == -1).all()
            inner = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
            inner &= predicted[:, 1:]
            assert (batch["tokens"][:, 1:][inner] == batch["targets"][:, :-1][inner]).all()
            pairs.update(
                zip(batch["tokens"][predicted].tolist(), batch["targets"][predicted].tolist(), strict=True)
            )
    return pairs


LENGTHS = [5, 1, 7, 8, 30, 2, 16, 3, 40, 6, 9]


@pytest.mark.parametrize("hosts", [1, 2, 5])
@pytest.mark.parametrize(
    ("eos", "context", "own_bos"), [(1, None, 0), (1, 0, 0), (1, None, 1), (None, None, 0)]
)
def test_every_token_is_predicted_once(hosts, eos, context, own_bos):
    texts, tokenizer = numbered_words(LENGTHS)
    if own_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    spec = BatchSpec(8, 3, eos=eos, context=context)
    evaluations = [
        evaluation_windows(texts, tokenizer, spec, process_index=host, process_count=hosts)
        for host in range(hosts)
    ]
    before = [0] if own_bos or context == 0 else [] if eos is None else [1]
    expected = Counter[tuple[int, int]]()
    for text in texts:
        ids = before + tokenizer.encode(text, add_special_tokens=False).ids + ([] if eos is None else [1])
        expected.update(pairwise(ids))
    assert predictions(evaluations) == expected
    assert {evaluation.num_targets for evaluation in evaluations} == {expected.total()}
    assert {evaluation.num_bytes for evaluation in evaluations} == {sum(map(len, texts))}
    assert len({len(evaluation.batches) for evaluation in evaluations}) == 1
    assert all(batch["tokens"].shape == (3, 8) for e in evaluations for batch in e.batches)


def test_evaluation_fills_rows_and_can_be_repeated():
    texts, tokenizer = numbered_words([3] * 10)  # 4 targets each: two documents fill a row of 8
    evaluation = evaluation_windows(texts, tokenizer, BatchSpec(8, 2, eos=1))
    assert len(evaluation.batches) == 3
    first, second = list(evaluation.batches), list(evaluation.batches)
    assert all(map(same, first, second))
    assert first[0]["segment_ids"].tolist() == [[1] * 4 + [2] * 4] * 2
    assert (first[2]["segment_ids"][1] == 0).all()


def test_evaluation_of_some_documents(documents, tokenizer):
    texts, words = numbered_words(LENGTHS)
    part = evaluation_windows(texts, words, BatchSpec(8, 2, eos=1), max_tokens=9)
    assert (part.num_documents, part.num_targets, part.num_bytes) == (3, 6 + 2 + 8, sum(map(len, texts[:3])))
    assert evaluation_windows(texts, words, BatchSpec(8, 2, eos=1), max_tokens=1).num_documents == 1
    whole = evaluation_windows(documents, tokenizer, BatchSpec(8, 2, eos=0), max_tokens=10**9)
    assert (whole.num_documents, whole.num_bytes) == (19, documents.total_bytes)
    with pytest.raises(UserError, match="max_tokens is 0"):
        evaluation_windows(texts, words, BatchSpec(8, 2, eos=1), max_tokens=0)
    with pytest.raises(UserError, match="no token to predict"):
        evaluation_windows(["w0"], words, BatchSpec(8, 2))


def naive_bits(train, heldout):
    unigram, bigram = Counter[int](), Counter[tuple[int, int]]()
    for text in train:
        content = text.encode()
        unigram.update(content)
        bigram.update(pairwise(b"\0" + content))
    context = Counter[int]()
    for (before, _), count in bigram.items():
        context[before] += count
    bits, size = [0.0, 0.0], 0
    for text in heldout:
        for before, byte in pairwise(b"\0" + text.encode()):
            bits[0] -= np.log2((unigram[byte] + 1) / (unigram.total() + 256))
            bits[1] -= np.log2((bigram[before, byte] + 1) / (context[before] + 256))
            size += 1
    return {"unigram": bits[0] / size, "bigram": bits[1] / size}


def test_byte_baselines(texts, documents, monkeypatch):
    train, heldout = texts[:-3], ["a router", "", *texts[-3:], "\0é"]
    expected = pytest.approx(naive_bits(train, heldout), rel=1e-12)
    assert byte_baselines(train, heldout) == expected
    assert expected.expected["bigram"] < expected.expected["unigram"] < 8
    monkeypatch.setattr("jaxmoe.data.evaluation._CHUNK_BYTES", 50)
    assert byte_baselines(iter(train), heldout) == expected
    assert byte_baselines(documents, documents) == pytest.approx(naive_bits(texts, texts), rel=1e-12)
    limited = [train[0], train[1], train[2][:4]]
    size = len("".join(limited).encode())
    assert byte_baselines(train, heldout, max_train_bytes=size) == pytest.approx(naive_bits(limited, heldout))
    with pytest.raises(UserError, match="no text to count bytes in"):
        byte_baselines([""], ["a"])
