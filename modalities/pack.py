"""Documents to tokens to `.pbin`, and the training of a tokenizer.

It takes documents from any iterator, each with where it came from, and knows nothing of files of text.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modalities import pbin

EOD = "<|endoftext|>"
# Enough text to keep every thread of the tokenizer busy, little enough to stay far from the memory's end.
BATCH_CHARACTERS = 4_000_000

Document = tuple[object, str]
Reject = Callable[[object, str], None]


class Packed(NamedTuple):
    documents: int
    tokens: int


def pack_documents(
    documents: Iterable[Document],
    tokenizer_path: Path,
    out: Path,
    eod: str,
    reject: Reject,
    batch_characters: int = BATCH_CHARACTERS,
) -> Packed:
    """Tokenize `documents`, each (where it stands, its text), end each with the token `eod`, and write `out`.

    A special token spelled out in a text stays text. A document that gives no token goes to `reject(where, reason)`.
    """
    pbin.refuse_existing(out)
    tokenizer = load_tokenizer(tokenizer_path, eod)
    eod_id = tokenizer.token_to_id(eod)
    # Not the number of entries: ids may leave gaps.
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    num_documents = num_tokens = 0
    with pbin.write_pbin(out, vocab_size) as append:
        for batch in _batches(documents, batch_characters):
            encodings = tokenizer.encode_batch_fast([text for _, text in batch])
            for (where, _), encoding in zip(batch, encodings, strict=True):
                ids = encoding.ids
                if not ids:
                    reject(where, "the tokenizer makes no token of the text")
                    continue
                if ids[-1] != eod_id:
                    ids.append(eod_id)
                append(np.array(ids, dtype=np.uint32))
                num_documents += 1
                num_tokens += len(ids)
        if not num_documents:
            raise ValueError(f"no document to pack: {out} would be empty, and is not written")
    return Packed(num_documents, num_tokens)


def load_tokenizer(path: Path, eod: str) -> Any:
    """The `tokenizers.Tokenizer` of a `tokenizer.json`, set to leave nothing out and to parse nothing in a text."""
    from tokenizers import AddedToken, Tokenizer

    if not path.is_file():
        raise ValueError(f"tokenizer {path} {'is a folder' if path.is_dir() else 'is missing'}; give a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # what tokenizers raises is a bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    if tokenizer.token_to_id(eod) is None:
        has = f"it has {', '.join(sorted(added)[:8])}" if added else "it has no special tokens"
        raise ValueError(f"{path} has no token {eod!r} to end documents with; choose one with --eod ({has})")
    # Special tokens spelled out in a text are encoded as the text that they are; an end of document above all.
    tokenizer.encode_special_tokens = True
    if eod in added and not added[eod].special:
        tokenizer.add_special_tokens([AddedToken(eod, special=True)])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _batches(documents: Iterable[Document], batch_characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document[1])
        if num_characters >= batch_characters:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def train_tokenizer(documents: Iterable[Document], vocab_size: int, out: Path) -> None:
    """Train a byte-level BPE with GPT-2's pre-tokenizer on `documents`, and write its `tokenizer.json` to `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pbin.refuse_existing(out)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        # All 256 bytes, so that any text can be encoded, whatever the corpus lacked.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in documents), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"a vocabulary of {vocab_size:,} needs more text: this makes {tokenizer.get_vocab_size():,}")
    with pbin.write_beside(out) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
