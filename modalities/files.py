"""`.pbin` files in hand: read them and their masks in blocks, merge them, split them.

Memory is bounded by a block of tokens, or by the longest document where that is longer, whatever the number of
documents: index and tokens are read in order and in pieces. The mask of `docs.pbin` lies beside it as
`docs.mask.pbin`: the same documents, with 1 for a token that may be a target and 0 for one that may not.
"""

import hashlib
import itertools
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modalities import pbin
from modalities.pbin import Pbin
from modalities.rng import fold

BLOCK = 1 << 22  # tokens in hand at a time
# What Python needs to copy a document, in tokens: a block of very short documents holds fewer tokens.
OVERHEAD = 32


def mask_path(path: Path) -> Path:
    """Where the mask of `path` lies, should it have one: `docs.pbin` → `docs.mask.pbin`."""
    return path.with_name(f"{path.stem}.mask{path.suffix}")


# ------------------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True, eq=False)
class Input:
    tokens: Pbin
    mask: Pbin | None
    num_documents: int


@dataclass(frozen=True, eq=False)
class Block:
    """Some whole documents, one after another."""

    tokens: np.ndarray
    """[N], unsigned."""
    mask: np.ndarray | None
    """[N], uint8; None where the files have no masks."""
    lengths: np.ndarray
    """The tokens of each document, int64 [D]."""

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def take(self, chosen: np.ndarray) -> "Block":
        """The documents that `chosen` names, in its order: their numbers in the block, or bool [D]."""
        starts, lengths = self.starts[chosen], self.lengths[chosen]
        mask = None if self.mask is None else gather(self.mask, starts, lengths)
        return Block(gather(self.tokens, starts, lengths), mask, lengths)


def open_inputs(paths: Sequence[Path]) -> list[Input]:
    """Open files and their masks; `ValueError` where only some have a mask, or one is of other documents."""
    if not paths:
        raise ValueError("no input is given; give at least one .pbin")
    masked = [mask_path(path).is_file() for path in paths]
    if any(masked) and not all(masked):
        raise ValueError(
            f"{paths[masked.index(True)]} has a mask beside it, but {paths[masked.index(False)]} has none; "
            "make it with `python prep.py mask`, or move the other masks away"
        )
    return [open_input(path) for path in paths]


def open_input(path: Path) -> Input:
    """Open a file and, where one lies beside it, its mask; a ValueError if they are not of the same documents."""
    opened, mask = pbin.open_pbin(path), None
    documents, lengths = count_and_hash(opened)
    if mask_path(path).is_file():
        mask = pbin.open_pbin(mask_path(path))
        if mask.tokens.itemsize != 1:
            raise ValueError(f"{mask.path} is no mask: its tokens have {mask.tokens.itemsize} bytes, not 1")
        if count_and_hash(mask) != (documents, lengths):
            raise ValueError(
                f"{mask.path} is not of the same documents as {path}; make it again with `python prep.py mask`"
            )
    return Input(opened, mask, documents)


def count_and_hash(opened: Pbin) -> tuple[int, bytes]:
    """Number of documents, and a hash of their lengths: equal for a file and its mask."""
    documents, digest = 0, hashlib.blake2b()
    for lengths in read_lengths(opened):
        documents += len(lengths)
        digest.update(lengths.astype("<i8").data)
    return documents, digest.digest()


def read_lengths(opened: Pbin) -> Iterator[np.ndarray]:
    """The tokens of each document, in pieces, int64 [N]; `ValueError` where the index is wrong."""
    return (pairs[:, 1] // opened.tokens.itemsize for pairs in opened.index_pieces())


def read_tokens(opened: Pbin, block: int) -> Iterator[np.ndarray]:
    """All the tokens in file order, at most `block` at a time."""
    with progress(opened) as bar:
        for first in range(0, len(opened.tokens), block):
            yield opened.tokens[first : first + block]
            bar.update(block)


def read_blocks(source: Input, block: int) -> Iterator[Block]:
    """All the documents in file order, in blocks of at most `block` tokens or of a single longer document."""
    first = 0
    with progress(source.tokens) as bar:
        for lengths in read_lengths(source.tokens):
            for run in runs(lengths, block):
                span = slice(first, first + int(lengths[run].sum()))
                mask = None if source.mask is None else source.mask.tokens[span]
                yield Block(source.tokens.tokens[span], mask, lengths[run])
                bar.update(span.stop - first)
                first = span.stop


def progress(opened: Pbin) -> Any:
    """A bar over the tokens of a file, on a terminal alone."""
    from tqdm import tqdm

    return tqdm(
        total=len(opened.tokens), desc=opened.path.name, unit=" tokens", unit_scale=True, leave=False, disable=None
    )


def runs(lengths: np.ndarray, block: int) -> Iterator[slice]:
    """Cut consecutive documents into runs of at most `block` tokens, or of a single longer one."""
    ends = np.cumsum(lengths + OVERHEAD)
    first = done = 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, done + block, side="right")))
        yield slice(first, last)
        first, done = last, int(ends[last - 1])


def gather(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The documents of `lengths` that begin at `starts`, one after another, in the dtype of `tokens`."""
    # Copying a document at once beats an index for each of its tokens; a view is quicker to slice than an array.
    view = tokens.data
    ends = (starts + lengths).tolist()
    return np.frombuffer(b"".join([view[a:b] for a, b in zip(starts.tolist(), ends, strict=True)]), tokens.dtype)


# ------------------------------------------------------------------------------------------------------------ write


@contextmanager
def all_or_none(outs: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Yield the path to write instead of each of `outs`; when the block ends, what was written gets its name.

    Where the block raises, nothing remains. `ValueError` if one of `outs` exists or stands there twice.
    """
    for i, out in enumerate(outs):
        pbin.refuse_existing(out)
        if out in outs[:i]:
            raise ValueError(f"{out} is to be written twice; give each output a name of its own")
    parts = {out: out.with_name(f"{out.name}.{secrets.token_hex(4)}.part") for out in outs}
    named: list[Path] = []
    try:
        yield parts
        for out, part in parts.items():
            if part.exists():
                pbin.refuse_existing(out)
                named.append(part.rename(out))
    except BaseException:
        for path in (*parts.values(), *named):
            path.unlink(missing_ok=True)
        raise
    for folder in {out.parent for out in named}:
        pbin.fsync(folder)


def with_masks(outs: Iterable[Path]) -> list[Path]:
    """`outs`, and where their masks will lie: nothing else may, or it would be taken for one."""
    return [path for out in outs for path in (out, mask_path(out))]


def write_stream(path: Path, itemsize: int, blocks: Iterable[np.ndarray], lengths: Iterable[np.ndarray]) -> None:
    """Write a `.pbin` of tokens and of documents' lengths [tokens] that are each given in pieces of any size."""
    with pbin.write_beside(path) as file:
        file.write(pbin.HEADER.pack(0, itemsize))
        num_bytes = sum(file.write(np.ascontiguousarray(block, f"<u{itemsize}").data) for block in blocks)
        pbin.finish_pbin(file, num_bytes, itemsize, lengths)


class Output:
    """`out` and, where `masked`, its mask, written by `append`; they are complete when `stack` is left."""

    def __init__(self, stack: ExitStack, parts: dict[Path, Path], out: Path, itemsize: int, masked: bool) -> None:
        """`parts`: what to write instead, as from `all_or_none`."""
        self.out, self.num_documents, self.num_tokens = out, 0, 0
        self.tokens = stack.enter_context(pbin.write_pbin(parts[out], 256**itemsize))
        self.mask = stack.enter_context(pbin.write_pbin(parts[mask_path(out)], 256)) if masked else None

    def append(self, block: Block) -> None:
        self.tokens(block.tokens, block.lengths)
        if self.mask is not None:
            self.mask(block.mask, block.lengths)
        self.num_documents += len(block.lengths)
        self.num_tokens += len(block.tokens)

    def facts(self) -> str:
        return facts(self.out, self.num_documents, self.num_tokens, self.mask is not None)


def facts(path: Path, documents: int, tokens: int, masked: bool) -> str:
    """A written file in one line."""
    return f"{path}: {documents:,} documents, {tokens:,} tokens{', and its mask beside it' if masked else ''}"


# -------------------------------------------------------------------------------------------------- merge and split


def merge(paths: Sequence[Path], out: Path, block: int = BLOCK) -> str:
    """Write the documents of `paths`, file after file, to `out`, and their masks, if they have them, beside it.

    A token takes as many bytes as in the widest of the files. Returns a line for each file written.
    """
    with all_or_none(with_masks([out])) as parts:
        inputs = open_inputs(paths)
        masks = [source.mask for source in inputs if source.mask is not None]
        for path, files in ((out, [source.tokens for source in inputs]), (mask_path(out), masks)):
            if files:
                tokens = itertools.chain.from_iterable(read_tokens(file, block) for file in files)
                lengths = itertools.chain.from_iterable(read_lengths(file) for file in files)
                write_stream(parts[path], widest(files), tokens, lengths)
    documents = sum(source.num_documents for source in inputs)
    return facts(out, documents, sum(len(source.tokens.tokens) for source in inputs), bool(masks))


def widest(files: Iterable[Pbin]) -> int:
    """The largest of the files' token sizes [bytes]."""
    return max(file.tokens.itemsize for file in files)


def split(path: Path, fraction: float, train_out: Path, val_out: Path, seed: int = 0, block: int = BLOCK) -> str:
    """Write about `fraction` of the documents of `path` to `val_out` and the others to `train_out`, in file order.

    A document's side is a hash of its tokens and the seed: equal documents go to the same side, whatever file they
    stand in, and what a smaller fraction puts into validation a larger one does too. Masks go along. `ValueError`,
    with nothing written, where a side would be empty. Returns a line for each file written.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, but must lie between 0 and 1: the share of validation documents")
    with all_or_none(with_masks([train_out, val_out])) as parts:
        source = open_input(path)
        with ExitStack() as stack:
            masked, itemsize = source.mask is not None, source.tokens.tokens.itemsize
            train, val = (Output(stack, parts, out, itemsize, masked) for out in (train_out, val_out))
            for documents in read_blocks(source, block):
                chosen = hash_documents(documents, fold(seed, "split")) < np.uint64(fraction * 2**64)
                train.append(documents.take(~chosen))
                val.append(documents.take(chosen))
        for name, side in (("training", train), ("validation", val)):
            if not side.num_documents:
                raise ValueError(
                    f"{path}: none of its {source.num_documents:,} documents would be {name} with a fraction of "
                    f"{fraction} and seed {seed}; give another fraction or seed, or more documents"
                )
    return f"{train.facts()}\n{val.facts()}"


def hash_documents(documents: Block, seed: int) -> np.ndarray:
    """A hash of the content of each document, uint64 [D]: the same on every machine and for every token size."""
    view = np.ascontiguousarray(documents.tokens, "<u4").data
    ends = (documents.starts + documents.lengths).tolist()
    key = seed.to_bytes(8, "little")
    hashes = (
        hashlib.blake2b(view[a:b], digest_size=8, key=key).digest()
        for a, b in zip(documents.starts.tolist(), ends, strict=True)
    )
    return np.frombuffer(b"".join(hashes), "<u8")
