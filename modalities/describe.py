"""What a `.pbin` holds: its facts, how long its documents are, and any of its documents."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modalities import files, histogram, pbin
from modalities.masks import count_targets
from modalities.pbin import Pbin
from modalities.tokenizer import load


class Lengths(NamedTuple):
    """The lengths of a file's documents [tokens]."""

    counts: np.ndarray
    """Documents in each bin of the histogram, int64."""
    shortest: int
    longest: int
    documents: int


def describe(
    path: Path,
    tokenizer: Path | None = None,
    document: int | None = None,
    png: Path | None = None,
) -> str:
    """The facts of a `.pbin` or, given its number from 0, a document: as text, without a `tokenizer.json` as ids.

    `png`: where to draw the histogram of the lengths. With a tokenizer the facts say whether it fits.
    """
    if png is not None:
        pbin.refuse_existing(png)
    opened = pbin.open_pbin(path)
    vocabulary = None if tokenizer is None else load(tokenizer)
    if document is not None:
        lines = show_document(opened, document, tokenizer, vocabulary)
    if document is None or png is not None:
        lengths = measure(opened)
    if document is None:
        lines = show_facts(opened, lengths, tokenizer, vocabulary)
    if png is not None:
        with pbin.write_beside(png) as file:
            histogram.draw(lengths.counts, path.name, summary(opened, lengths), file)
        lines.append(f"wrote {png}")
    return "\n".join(lines)


def measure(opened: Pbin) -> Lengths:
    counts, shortest, longest = histogram.length_histogram([]), len(opened.tokens), 0
    for lengths in files.read_lengths(opened):
        counts += histogram.length_histogram([lengths])
        shortest, longest = int(lengths.min(initial=shortest)), int(lengths.max(initial=longest))
    return Lengths(counts, shortest, longest, int(counts.sum()))


def show_facts(opened: Pbin, lengths: Lengths, tokenizer: Path | None, vocabulary: Any) -> list[str]:
    tokens, mask = opened.tokens, files.mask_path(opened.path)
    # A byte has no order: of such tokens the file tells none.
    order = {">": ", big-endian", "|": ""}.get(tokens.dtype.byteorder, ", little-endian")
    age = " (of Modalities before 2024)" if opened.header_bytes == 8 else ""
    largest = max((int(block.max()) for block in files.read_tokens(opened, files.BLOCK)), default=None)
    rows = [
        ("file", f"{opened.path.stat().st_size:,} bytes"),
        ("header", f"{opened.header_bytes} bytes{order}{age}"),
        ("documents", f"{lengths.documents:,}"),
        ("tokens", f"{len(tokens):,}, of {tokens.itemsize} byte{'s' * (tokens.itemsize > 1)} each"),
        ("largest token", "none" if largest is None else f"{largest:,}"),
    ]
    if lengths.documents:
        median = histogram.bin_name(histogram.median_bin(lengths.counts))
        mean = len(tokens) / lengths.documents
        span = f"{lengths.shortest:,} to {lengths.longest:,}"
        rows.append(("tokens a document", f"{span}, mean {mean:,.1f}, median in {median}"))
    if mask.is_file():
        opened_mask = files.open_input(opened.path).mask
        assert opened_mask is not None
        targets = count_targets(opened_mask)
        rows.append(("mask", f"{mask.name}: {targets:,} tokens ({targets / max(1, len(tokens)):.1%}) are targets"))
    if tokenizer is not None:
        fits = largest is None or vocabulary.id_to_token(largest) is not None
        rows.append(("tokenizer", f"{tokenizer} {'knows' if fits else 'does NOT know'} the largest token"))
    lines = [str(opened.path), *(f"  {name:<17}  {value}" for name, value in rows)]
    return [*lines, "", *histogram.table(lengths.counts)] if lengths.documents else lines


def summary(opened: Pbin, lengths: Lengths) -> str:
    mean = len(opened.tokens) / max(1, lengths.documents)
    return (
        f"{lengths.documents:,} documents · {len(opened.tokens):,} tokens · "
        f"mean {mean:,.1f} · longest {lengths.longest:,}"
    )


def find_document(opened: Pbin, number: int) -> np.ndarray:
    """The tokens of a document, [N]; unlike `Pbin.document` it reads the index in pieces. `ValueError` if none."""
    passed = 0
    for pairs in opened.index_pieces():
        if 0 <= number - passed < len(pairs):
            offset, length = pairs[number - passed] // opened.tokens.itemsize
            return opened.tokens[offset : offset + length]
        passed += len(pairs)
    raise ValueError(f"{opened.path} has no document {number}; it has {passed:,}, numbered from 0")


def show_document(opened: Pbin, number: int, path: Path | None, tokenizer: Any) -> list[str]:
    """The document as text or, without a tokenizer, as ids."""
    ids = find_document(opened, number)
    head = f"{opened.path}, document {number}: {len(ids):,} tokens"
    if path is None:
        return [head, " ".join(map(str, ids.tolist()))]
    # Decoding leaves out in silence what the tokenizer does not know.
    unknown = [i for i in np.unique(ids).tolist() if tokenizer.id_to_token(i) is None]
    if unknown:
        raise ValueError(f"{path} does not know token {unknown[0]}; give the tokenizer that packed {opened.path}")
    return [head, tokenizer.decode(ids.tolist(), skip_special_tokens=False)]
