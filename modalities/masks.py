"""Loss masks for `.pbin` files: which tokens are targets, from two tokens that enclose what is to be learned."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modalities import files, pbin
from modalities.pbin import Pbin


def mask_between(
    path: Path, out: Path, begin: int, end: int, include_end: bool = False, block: int = files.BLOCK
) -> str:
    """Write the mask of `path` to `out`: 1 for a token between a token `begin` and the next `end` of its document.

    Those two are 0 themselves, as in Modalities; `include_end` makes the `end` 1, so that the model learns to stop.
    `ValueError`, with nothing written, where the two do not alternate in a document, or nothing lies between them.
    Returns a line on the file written.
    """
    if begin == end:
        raise ValueError(f"begin and end are both token {begin}, but must be two different ones")
    with files.all_or_none([out]) as parts:
        opened = pbin.open_pbin(path)
        spans = find_spans(opened, begin, end, include_end, block)
        files.write_stream(parts[out], 1, spans, files.read_lengths(opened))
        targets = count_targets(pbin.open_pbin(parts[out]))
        if not targets:
            raise ValueError(f"{path}: nothing lies between tokens {begin} and {end}; give the tokens that it uses")
    return f"{out}: {targets:,} of {len(opened.tokens):,} tokens ({targets / len(opened.tokens):.1%}) are targets"


def count_targets(mask: Pbin, block: int = files.BLOCK) -> int:
    """How many tokens a mask makes targets; `ValueError` if it is no mask."""
    targets = 0
    for values in files.read_tokens(mask, block):
        if values.max() > 1:
            raise ValueError(f"{mask.path} holds {values.max()}, but a mask has 1 for a target and 0 for others")
        targets += int(np.count_nonzero(values))
    return targets


def find_spans(opened: Pbin, begin: int, end: int, include_end: bool, block: int) -> Iterator[np.ndarray]:
    """The mask of all the tokens, in pieces, uint8 [N]; `ValueError` where `begin` and `end` do not alternate."""
    number = first = depth = 0
    for pairs in opened.index_pieces():
        ends_D = pairs.sum(1) // opened.tokens.itemsize
        last = int(ends_D.max(initial=first))
        for start in range(first, last, block):
            tokens_N = opened.tokens[start : min(start + block, last)]
            begins_N, closes_N = tokens_N == begin, tokens_N == end
            # Of a file in order this is 1 between the two tokens and 0 elsewhere.
            depth_N = depth + np.cumsum(begins_N.view(np.int8) - closes_N.view(np.int8), dtype=np.int8)
            check_spans(opened.path, depth_N, start, ends_D, number, (begin, end))
            depth = int(depth_N[-1])
            yield (depth_N == 1) & ~begins_N | (closes_N & include_end)
        number, first = number + len(pairs), last


def check_spans(
    path: Path, depth_N: np.ndarray, start: int, ends_D: np.ndarray, number: int, tokens: tuple[int, int]
) -> None:
    """Raise `ValueError` for the first document that goes wrong among the N tokens from `start` on.

    `depth_N`: tokens `begin` less tokens `end` up to and including each. `ends_D`: where documents `number`,
    `number + 1`, … end.
    """
    begin, end = tokens
    first, last = np.searchsorted(ends_D, (start, start + len(depth_N)), side="right")
    final = ends_D[first:last] - 1 - start
    wrong = np.concatenate((np.flatnonzero((depth_N < 0) | (depth_N > 1)), final[depth_N[final] > 0]))
    if not wrong.size:
        return
    at = wrong.min()
    what = f"token {begin} with no token {end} after it"
    if depth_N[at] < 0:
        what = f"token {end} with no token {begin} before it"
    elif depth_N[at] > 1:
        what = f"token {begin} twice with no token {end} between"
    document = number + int(np.searchsorted(ends_D, start + at, side="right"))
    raise ValueError(f"{path}: document {document} has {what}; mend or leave out that document and pack again")
