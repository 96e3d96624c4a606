"""Tokenizers: a `tokenizer.json` checked and made ready, two engines that encode with it in bulk, and one's training.

An engine turns texts into token ids, each text ended by the end-of-document token. `tokenizers` is the reference;
`fastokens` is tens of times faster, and `disagreement` says whether its ids are the same.
"""

import functools
import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

from modalities import pbin

EOD = "<|endoftext|>"
EngineName = Literal["auto", "tokenizers", "fastokens"]
SpecialTokens = Literal["text", "parse"]


class Ids(NamedTuple):
    """Documents as tokens: `tokens` [N] in the dtype of a file, one document after another; `lengths` int64 [D]."""

    tokens: np.ndarray
    lengths: np.ndarray


Engine = Callable[[Sequence[str]], Ids]


@dataclass(frozen=True)
class Spec:
    """A `tokenizer.json` that leaves nothing out and adds nothing but what its own post-processor does."""

    path: Path
    sha256: str
    """Of the file."""
    json: str
    eod: str
    eod_id: int
    vocab_size: int
    """The largest id + 1: ids may leave gaps."""

    @property
    def dtype(self) -> np.dtype:
        """Of a token in a file."""
        return np.dtype(f"<u{pbin.token_size(self.vocab_size)}")


def read_spec(path: Path, eod: str) -> Spec:
    """Read and check `path`; `ValueError` if it is no tokenizer, or has no token `eod`.

    Its JSON alone is read, for an engine takes longer to load, and complains of the rest when it does.
    """
    content = _read(path)
    try:
        spec = orjson.loads(content) | {"truncation": None, "padding": None}
        added = {token["content"]: token for token in spec.get("added_tokens") or []}
        vocab = _vocabulary(spec["model"]["vocab"], added)
        vocab_size = max(vocab.values()) + 1
        for name, token in added.items():
            # A special token spelled out in a text is text, unless asked for; an end of document above all.
            token |= {"id": vocab[name], "special": token["special"] or name == eod}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a tokenizer.json: {what}") from None
    if eod not in vocab:
        has = f"it has {', '.join(sorted(added)[:8])}" if added else "it has no special tokens"
        raise ValueError(f"{path} has no token {eod!r} to end documents with; choose one with --eod ({has})")
    sha256 = hashlib.sha256(content).hexdigest()
    return Spec(path, sha256, orjson.dumps(spec).decode(), eod, vocab[eod], vocab_size)


def _vocabulary(model: dict[str, int] | list[tuple[str, float]], added: Iterable[str]) -> dict[str, int]:
    """Every token's id, as `tokenizers` gives them: it counts the added ones itself, whatever ids the file states."""
    vocab = dict(model) if isinstance(model, dict) else {piece: i for i, (piece, _) in enumerate(model)}
    count, largest = len(vocab), -1
    for token in added:
        largest = max(largest, vocab.setdefault(token, max(count, largest + 1)))
    return vocab


def token_id(path: Path, token: str) -> int:
    """The id of `token` in the `tokenizer.json` at `path`."""
    found = load(path).token_to_id(token)
    if found is None:
        raise ValueError(f"{path} has no token {token!r}")
    return found


def load(path: Path) -> Any:
    """The `tokenizers.Tokenizer` at `path`; `ValueError` if it is none."""
    return _build(path, _read(path))


def build(spec: Spec) -> Any:
    """The `tokenizers.Tokenizer` of a spec; `ValueError` if it is none."""
    return _build(spec.path, spec.json.encode())


def _build(path: Path, content: bytes) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # what tokenizers raises is a bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"tokenizer {path} {'is a folder' if path.is_dir() else 'is missing'}; give a tokenizer.json")
    return path.read_bytes()


# -------------------------------------------------------------------------------------------------------------- engines


@functools.lru_cache(1)  # loading takes a while, and it is asked for to check and to pack
def tokenizers_engine(spec: Spec, special: SpecialTokens) -> Engine:
    """Hugging Face's `tokenizers`, in the thread that calls it."""
    # Its own threads would compete with the callers'. It reads this when it encodes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = build(spec)
    tokenizer.encode_special_tokens = special == "text"

    def encode(texts: Sequence[str]) -> Ids:
        tokens, bounds = array("I"), [0]
        for encoding in tokenizer.encode_batch_fast(texts):
            tokens.fromlist(encoding.ids)  # it hands out nothing but a list
            bounds.append(len(tokens))
        return _ended(np.frombuffer(tokens, np.uint32), np.array(bounds), spec)

    return encode


@functools.lru_cache(1)
def fastokens_engine(spec: Spec, special: SpecialTokens) -> Engine:
    """`fastokens`, in the thread that calls it; `ValueError` if it is not installed or cannot do this tokenizer."""
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # read when it is loaded
    try:
        import fastokens
    except ImportError:
        raise ValueError("fastokens is not installed (pip install fastokens)") from None
    try:
        tokenizer = fastokens.Tokenizer.from_json_str(spec.json)
    except Exception as error:  # what it raises has no common base
        raise ValueError(f"fastokens cannot do {spec.path}: {error}") from None

    def encode(texts: Sequence[str]) -> Ids:
        tokens, ends = tokenizer.encode_batch_flat(
            list(texts), add_special_tokens=True, split_special_tokens=special == "text"
        )
        return _ended(np.frombuffer(tokens, np.uint32), np.frombuffer(ends, np.int64), spec)

    return encode


def _ended(tokens: np.ndarray, bounds: np.ndarray, spec: Spec) -> Ids:
    """The documents between `bounds`, int64 [D + 1], each with the end-of-document token if it lacks that.

    One that has no token stays empty.
    """
    lengths = np.diff(bounds)
    lacking = lengths > 0
    lacking[lacking] = tokens[bounds[1:][lacking] - 1] != spec.eod_id
    ended = np.insert(tokens.astype(spec.dtype), bounds[1:][lacking], spec.eod_id)
    return Ids(ended, lengths + lacking)


def disagreement(engine: Engine, reference: Engine, texts: Sequence[str]) -> int | None:
    """The number of the first of `texts` that two engines encode differently; None if there is none."""
    ours, theirs = (np.split(ids.tokens, np.cumsum(ids.lengths)) for ids in (engine(texts), reference(texts)))
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not np.array_equal(a, b)), None)


# ------------------------------------------------------------------------------------------------------------- training


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path, special: Sequence[str] = (EOD,)) -> None:
    """Train a byte-level BPE with GPT-2's pre-tokenizer on `texts`, and write its `tokenizer.json` to `out`.

    `special`: tokens that no text is split into, with the first ids; `EOD` among them ends documents.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not 0 < vocab_size < 2**32:
        raise ValueError(f"a vocabulary of {vocab_size:,} cannot be: it must have 1 to {2**32 - 1:,} tokens")
    pbin.refuse_existing(out)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        # All 256 bytes, so that any text can be encoded, whatever the corpus lacked.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found > vocab_size:
        raise ValueError(f"a vocabulary of {vocab_size:,} is too small: the bytes and special tokens are {found:,}")
    if found < vocab_size:
        raise ValueError(f"a vocabulary of {vocab_size:,} needs more text: this makes {found:,}")
    with pbin.write_beside(out) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
