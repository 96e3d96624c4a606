"""Tokenizers: a `tokenizer.json` checked and made ready, two engines that encode with it in bulk, and one's training.

An engine turns texts into token ids, each text ended by the end-of-document token. `tokenizers` is the reference;
`fastokens` is some fifty times faster, and `disagreement` says whether its ids are the same.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from modalities import pbin

EOD = "<|endoftext|>"
EngineName = Literal["auto", "tokenizers", "fastokens"]
SpecialTokens = Literal["text", "parse"]


class Ids(NamedTuple):
    """Documents as tokens: `tokens` uint32 [N], one document after another, and their `lengths` int64 [D]."""

    tokens: np.ndarray
    lengths: np.ndarray


Engine = Callable[[Sequence[str]], Ids]


@dataclass(frozen=True)
class Spec:
    """A `tokenizer.json` that ends every text with the end-of-document token, and leaves nothing out."""

    path: Path
    sha256: str
    """Of the file."""
    json: str
    eod: str
    eod_id: int
    vocab_size: int
    """The largest id + 1: ids may leave gaps."""


def read_spec(path: Path, eod: str) -> Spec:
    """Read and check `path`; `ValueError` if it is no tokenizer, or has no token `eod`."""
    if not path.is_file():
        raise ValueError(f"tokenizer {path} {'is a folder' if path.is_dir() else 'is missing'}; give a tokenizer.json")
    content = path.read_bytes()
    tokenizer = _load(content, path)
    eod_id = tokenizer.token_to_id(eod)
    if eod_id is None:
        added = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
        has = f"it has {', '.join(added[:8])}" if added else "it has no special tokens"
        raise ValueError(f"{path} has no token {eod!r} to end documents with; choose one with --eod ({has})")
    spec = json.loads(content) | {"truncation": None, "padding": None}
    for token in spec.get("added_tokens", []):
        # A special token spelled out in a text is text, unless asked for; an end of document above all.
        token["special"] = token["special"] or token["content"] == eod
    spec["post_processor"] = _ending(spec.get("post_processor"), eod, eod_id)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return Spec(path, hashlib.sha256(content).hexdigest(), json.dumps(spec), eod, eod_id, vocab_size)


def token_id(path: Path, token: str) -> int:
    """The id of `token` in the `tokenizer.json` at `path`."""
    if not path.is_file():
        raise ValueError(f"tokenizer {path} is missing; give a tokenizer.json")
    found = _load(path.read_bytes(), path).token_to_id(token)
    if found is None:
        raise ValueError(f"{path} has no token {token!r}")
    return found


def _load(content: bytes, path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # what tokenizers raises is a bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None


def _ending(before: dict[str, Any] | None, eod: str, eod_id: int) -> dict[str, Any]:
    """The post-processor that puts `eod` after what the one `before` makes of a text."""
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": eod, "type_id": 0}}
    ending: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}, end],
        "special_tokens": {eod: {"id": eod, "ids": [eod_id], "tokens": [eod]}},
    }
    steps = (before["processors"] if before["type"] == "Sequence" else [before]) if before else []
    steps = [step for step in steps if step["type"] != "ByteLevel"]  # that one only trims offsets
    if steps and steps[-1]["type"] == "TemplateProcessing":
        # Both in one: `tokenizers` takes what a template joins for texts of their own, and panics at the third.
        *steps, template = steps
        pieces = template["single"]
        if pieces and pieces[-1].get("SpecialToken", {}).get("id") == eod:
            pieces = pieces[:-1]
        ending |= {"single": [*pieces, end], "special_tokens": template["special_tokens"] | ending["special_tokens"]}
    return {"type": "Sequence", "processors": [*steps, ending]} if steps else ending


# -------------------------------------------------------------------------------------------------------------- engines


def tokenizers_engine(spec: Spec, special: SpecialTokens) -> Engine:
    """Hugging Face's `tokenizers`, in the thread that calls it."""
    # Its own threads would compete with the callers'. It reads this when it encodes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _load(spec.json.encode(), spec.path)
    tokenizer.encode_special_tokens = special == "text"

    def encode(texts: Sequence[str]) -> Ids:
        # It hands out no array: each document is a list for as long as it takes to copy it.
        ids = [np.array(encoding.ids, np.uint32) for encoding in tokenizer.encode_batch_fast(texts)]
        tokens = np.concatenate([np.empty(0, np.uint32), *ids])
        return _ended_once(tokens, np.array([len(document) for document in ids], np.int64), spec.eod_id)

    return encode


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
        lengths = np.diff(np.frombuffer(ends, np.uint64).astype(np.int64))
        return _ended_once(np.frombuffer(tokens, np.uint32), lengths, spec.eod_id)

    return encode


def _ended_once(tokens: np.ndarray, lengths: np.ndarray, eod_id: int) -> Ids:
    """The same documents without a second end-of-document token; one that has no other token becomes empty."""
    last = np.cumsum(lengths) - 1
    extra = (lengths == 1) | (tokens[np.maximum(last - 1, 0)] == eod_id)
    return Ids(np.delete(tokens, last[extra]), lengths - extra) if extra.any() else Ids(tokens, lengths)


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
