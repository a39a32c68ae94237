"""Tokenizers in the ``tokenizer.json`` format: loaded, trained, saved, and told from each other."""

import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxmoe.errors import UserError, first_line, listed, quote
from jaxmoe.files import open_regular, read_text, why_unusable

_log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What a tokenizer's folder may hold of it."""

MAX_TOKENIZER_BYTES = 2**28
"""Gemma's tokenizer.json, a large one, has 33 MB."""

_MAX_CONFIG_BYTES = 2**24

# What transformers may read of a folder besides its tokenizer.json.
_READ_BESIDE = (
    *TOKENIZER_FILES[1:],
    *("config.json", "vocab.txt", "tekken.json", "chat_template.json", "adapter_config.json"),
)

_PROBE = "The 3rd naïve  probe:\n\t<s>{x}</s> 数据"

# What is told by it is written into checkpoints: another text makes all tokenizers others.
_TOLD_BY = (
    f"{_PROBE} Experts that are not chosen by the router receive no gradient, which is why the load is balanced.\r\n"
    "def attention(query, key):\n    return softmax(query @ key.T / 8.0) != None  # 0x1F, 1234567 and 3.14e-05\n\n"
    "Wir würden gern größere Wörter über Straßen hören. Où est-il allé, l'été dernier? El niño comió una piña.\n"
    "Москва не сразу строилась. 我们训练语言模型。日本語のテキスト。 한국어 문장. مرحبا بالعالم नमस्ते दुनिया 🙂👩‍👩‍👧\n"
    + "".join(map(chr, range(32, 127)))
)

_TRAINED_CHARACTERS = 2**12
_LONGEST_WORD = 2**15
# Where ByteLevel surely ends a word: a letter or digit, and then white space or punctuation.
_WORD_ENDS = re.compile(
    r"(?<=[^\W_])(?=[\s!-/:-@\[-^`{-~\u2010-\u2027\u3000-\u3004\u3008-\u301f\uff01-\uff0f])"
)

_COMMON_EOS_TOKENS = (
    *("<|endoftext|>", "</s>", "<|end_of_text|>", "<|eos|>", "<eos>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    *("<|EOS|>", "[EOS]", "[EOT]", "<|return|>", "<|im_end|>"),
)


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that transformers' AutoTokenizer makes of a folder with a ``tokenizer.json``, or of that file's.

    Other files there count too: flags of tokenizer_config.json decide what is put around a text, its class may rebuild
    the whole tokenizer. A file alone, or of another name, is taken as it is. Truncation and padding that are stored are
    not applied. No code of the folder is run and nothing is fetched.

    Args:
        path: the folder or the file.
        vocab_size: of the model, if there is one. Tokens that are only added by those other files (for padding, say)
            and have no row there are left out where the tokenizer.json by itself fits, with a line in the log.

    Raises:
        UserError: there is none, or it is not readable.
    """
    unusable = why_unusable(path)
    if unusable is not None:
        raise UserError(f"{unusable}; expected a tokenizer.json or a folder with one")
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{path}: no tokenizer.json; {_remedy(path)}")
    beside = [file.parent / name for name in _READ_BESIDE] if file.name == "tokenizer.json" else []
    beside = [other for other in beside if other.exists()]
    for checked in (file, *beside):
        _check_readable(checked, MAX_TOKENIZER_BYTES)
    tokenizer = _of_folder(file) if beside else _alone(file)
    if beside and vocab_size is not None and vocabulary_size(tokenizer) > vocab_size:
        tokenizer = _without_added(tokenizer, file, vocab_size)
    # Published files carry the settings of their last use: a document would silently be cut to them.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _alone(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"{file}: not a readable tokenizer ({first_line(error)}); copy it again, or give another one"
        ) from None


def _of_folder(file: Path) -> Tokenizer:
    """What transformers makes of the folder of a tokenizer.json."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it has doubts about configs, which are checked elsewhere
    folder = file.parent
    try:
        made = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        ids = made(_PROBE)["input_ids"]
    except Exception as error:  # transformers raises nothing narrower
        alone = _alone(file)
        if "trust_remote_code" in str(error):
            _log.warning(
                "%s: its class of tokenizer is code of its own, which is not run: the ids are those of tokenizer.json "
                "alone",
                folder,
            )
            return alone
        raise UserError(
            f"{folder}: transformers' AutoTokenizer does not read it ({first_line(error)}); mend what is beside "
            f"tokenizer.json (tokenizer_config.json, special_tokens_map.json or config.json), or give {file} alone in "
            "another folder as data.tokenizer"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    tokenizer = getattr(made, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer) or ids != tokenizer.encode(_PROBE).ids:
        raise UserError(
            f"{folder}: transformers' AutoTokenizer gives a {type(made).__name__}, whose ids are not those of a "
            "tokenizer.json alone; convert it to a PreTrainedTokenizerFast and save that"
        )
    return tokenizer


def _without_added(tokenizer: Tokenizer, file: Path, vocab_size: int) -> Tokenizer:
    """Without the added tokens from ``vocab_size`` on, unless the file by itself has tokens there."""
    if vocabulary_size(_alone(file)) > vocab_size:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    beyond = [token for token in state["added_tokens"] if token["id"] >= vocab_size]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
    fitting = Tokenizer.from_str(json.dumps(state))
    if max([*fitting.encode("").ids, vocabulary_size(fitting) - 1]) >= vocab_size:
        return tokenizer  # it puts one of them around every text
    _log.warning(
        "%s: the files beside tokenizer.json add %s, for which the model with a vocab_size of %d has no row: in text "
        "they are taken for ordinary characters",
        file.parent,
        listed([quote(token["content"]) for token in beyond], 8),
        vocab_size,
    )
    return fitting


def _check_readable(file: Path, most: int) -> None:
    """Refuses what another library would wait for, or fill the memory with."""
    try:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); expected a tokenizer's file: copy it there again"
        ) from None
    if size > most:
        raise UserError(
            f"{file}: {size:,} bytes, expected at most {most:,} of a tokenizer's file: copy it there again"
        )


def _remedy(path: Path) -> str:
    """What to do where there is no tokenizer.json."""
    convert = "convert it with transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    slow = sorted(name for name in names if name.endswith((".model", ".tiktoken")))
    if slow:
        return f"it has {slow[0]}, a slow tokenizer: {convert}"
    parts = [name for name in ("vocab.json", "merges.txt", "vocab.txt", "tekken.json") if name in names]
    if parts:
        return f"it has {' and '.join(parts)}, the vocabulary of a slow tokenizer: {convert}"
    return (
        "expected a tokenizer.json or a folder with one (a slow sentencepiece tokenizer has none: convert it with "
        "transformers.AutoTokenizer)"
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the largest token id + 1. Ids may have gaps, so their number says little."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def digest(tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits that change with the ids that text gets, and not with tokens that no text has."""
    try:
        told: Any = tokenizer.encode(_TOLD_BY).ids
    except Exception:  # it has no id for some of it; tokenizers raises nothing narrower
        told = sorted(tokenizer.get_vocab().items())
    return blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def train_byte_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ("<|endoftext|>",)
) -> Tokenizer:
    """Trains byte-level byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): no text is unknown.

    The same texts give the same tokenizer. Special tokens have the first ids. Short texts can leave fewer
    than ``vocab_size`` tokens: ask ``tokenizer.get_vocab_size()``.

    Raises:
        UserError: ``vocab_size`` cannot hold the 256 bytes and the special tokens.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size}; expected at least {least} for 256 bytes and special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain.from_iterable(map(_small, texts)), trainer)
    return tokenizer


def _small(text: str) -> Iterator[str]:
    """A text in pieces that end with a word, which counts the same words: the library holds 256 of them at a time.

    A word of more than ``_LONGEST_WORD`` characters is cut, because its time grows with the square of its length.
    """
    at = 0
    while len(text) - at > 2 * _TRAINED_CHARACTERS:
        least = at + _TRAINED_CHARACTERS
        end = _WORD_ENDS.search(text, least, least + _LONGEST_WORD)
        stop = least if end is None else end.start()
        yield text[at:stop]
        at = stop
    yield text[at:]


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    eos = end_of_document(tokenizer)
    if eos is not None:
        config["eos_token"] = tokenizer.id_to_token(eos)
    # Not tokenizer.save: of a full disk it makes a bare Exception.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )


def end_of_document(tokenizer: Tokenizer, folder: str | Path | None = None) -> int | None:
    """The id of the token that ends a document, or None where the tokenizer has no such token.

    Looked for in ``folder``'s tokenizer_config.json, generation_config.json and config.json (the first id of
    a list), then among the names that published tokenizers use.

    Raises:
        UserError: one of those files is not readable, or names a token that the tokenizer lacks.
    """
    if folder is not None:
        for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
            eos = _configured_eos(tokenizer, Path(folder).expanduser() / name)
            if eos is not None:
                return eos
    ids = (tokenizer.token_to_id(token) for token in _COMMON_EOS_TOKENS)
    return next((i for i in ids if i is not None), None)


def _configured_eos(tokenizer: Tokenizer, file: Path) -> int | None:
    if not file.exists():
        return None
    try:
        config = json.loads(read_text(file, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({first_line(error)}); mend or remove it") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); mend or remove it") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: a JSON {type(config).__name__}, expected an object; mend or remove it")
    if file.name == "tokenizer_config.json":
        token = config.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        eos = tokenizer.get_vocab().get(token) if isinstance(token, str) else None
        if eos is None:
            raise UserError(f"{file}: eos_token {token!r} is not in the tokenizer's vocabulary; correct it")
        return eos
    text_config = config.get("text_config")
    eos = config.get("eos_token_id")
    if eos is None and isinstance(text_config, dict):
        eos = text_config.get("eos_token_id")
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    # Not id_to_token: it raises OverflowError for a number that is negative or has more than 32 bits.
    if eos is not None and (type(eos) is not int or eos not in tokenizer.get_vocab().values()):
        raise UserError(f"{file}: eos_token_id {eos!r} is not an id of the tokenizer; correct it")
    return eos
