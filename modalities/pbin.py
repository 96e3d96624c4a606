"""The `.idx` and `.pbin` files: write, open, validate.

A `.pbin` is the length of its data segment (8 bytes), the token size (4 bytes), the tokens of one document after
another (unsigned, little-endian), and an index: a pickled list of `(byte offset, byte length)`, one a document, counted
from the start of the data segment. An `.idx` is such a list for the lines of a JSONL file. Modalities reads and writes
the same bytes. Nothing here knows of text, tokenizers or training.
"""

import os
import pickle
import secrets
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modalities.pairs import read_pairs, write_pairs

HEADER = struct.Struct("<QI")
MERGE_SHIFT = 12  # what Modalities' merge takes off the offsets of each further file


def token_size(vocab_size: int) -> int:
    """Bytes a token takes on disk: the least of 1, 2 and 4 that holds `vocab_size - 1`."""
    for size in (1, 2, 4):
        if vocab_size <= 256**size:
            return size
    raise ValueError(f"a vocabulary of {vocab_size:,} does not fit into tokens of 4 bytes")


# ---------------------------------------------------------------------------------------------------------------- write


def refuse_existing(path: Path) -> None:
    """Raise `ValueError` if something lies at `path`: what a user made is never overwritten."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; remove it or give another --out")


@contextmanager
def write_beside(path: Path) -> Iterator[BinaryIO]:
    """A new file that becomes `path` when the block ends and vanishes when it raises; an existing `path` is refused."""
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, so that two processes with the same target cannot write into one file.
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with part.open("xb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(path)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_idx(path: Path, pieces: Iterable[np.ndarray]) -> None:
    """Write the `(byte offset, byte length)` of a JSONL file's lines, given in pieces, int64 [N, 2].

    Nothing is left behind where `pieces` raises.
    """
    with write_beside(path) as file:
        write_pairs(file, pieces)


Append = Callable[..., None]


@contextmanager
def write_pbin(path: Path, vocab_size: int) -> Iterator[Append]:
    """Yield `append(tokens, lengths=None)`; the file appears when the block ends.

    `tokens` are integers [N]: one document, or several one after another with their `lengths` [tokens], which may be 0.
    """
    dtype = np.dtype(f"<u{token_size(vocab_size)}")
    largest = np.iinfo(dtype).max
    num_bytes = 0
    # The lengths wait in a file of their own: a billion documents do not fit into memory.
    with write_beside(path) as file, tempfile.TemporaryFile(dir=path.parent) as waiting:
        file.write(HEADER.pack(0, dtype.itemsize))

        def append(tokens: np.ndarray, lengths: np.ndarray | None = None) -> None:
            nonlocal num_bytes
            if tokens.dtype.itemsize > dtype.itemsize or tokens.dtype.kind != "u":
                low, high = (tokens.min(), tokens.max()) if tokens.size else (0, 0)
                if low < 0 or high > largest:
                    raise ValueError(f"{path}: token ids of {low} to {high} do not fit a vocabulary of {vocab_size:,}")
            num_bytes += file.write(np.ascontiguousarray(tokens, dtype).data)
            lengths = np.array([tokens.size]) if lengths is None else lengths
            assert lengths.sum() == tokens.size
            waiting.write(lengths.astype("<i8").data)

        yield append
        waiting.seek(0)
        finish_pbin(file, num_bytes, dtype.itemsize, read_lengths(waiting))


def finish_pbin(file: BinaryIO, num_bytes: int, itemsize: int, lengths: Iterable[np.ndarray]) -> None:
    """Write the index and the header of a `.pbin` whose `num_bytes` of tokens stand behind the header's room.

    `lengths`: the documents' lengths in tokens, in pieces, int64 [N].
    """
    file.seek(HEADER.size + num_bytes)
    write_pairs(file, _pairs(lengths, itemsize))
    file.seek(0)
    file.write(HEADER.pack(num_bytes, itemsize))


def read_lengths(file: BinaryIO, piece: int = 1 << 16) -> Iterator[np.ndarray]:
    """The 8-byte numbers in `file` from where it stands, in pieces, int64 [N]."""
    while data := file.read(8 * piece):
        yield np.frombuffer(data, "<i8")


def _pairs(lengths: Iterable[np.ndarray], itemsize: int) -> Iterator[np.ndarray]:
    first = 0
    for piece in lengths:
        ends = first + np.cumsum(piece * itemsize)
        yield np.stack((ends - piece * itemsize, piece * itemsize), 1)
        first = int(ends[-1]) if len(ends) else first


# ----------------------------------------------------------------------------------------------------------------- open


@dataclass(frozen=True, eq=False)
class Pbin:
    """An open `.pbin`. The index is read when it is first asked for: continuous training never needs it."""

    path: Path
    tokens: np.ndarray
    """Every token of the file, [num_tokens]: read-only, memory-mapped, unsigned, in the byte order of the file."""
    header_bytes: int
    """Where the data segment begins in the file."""

    @cached_property
    def index(self) -> np.ndarray:
        """Byte offset (from the start of the data segment) and byte length of every document, int64 [N, 2]."""
        index = np.concatenate([np.empty((0, 2), np.int64), *self.index_pieces()])
        index.flags.writeable = False
        return index

    def index_pieces(self) -> Iterator[np.ndarray]:
        """The index in pieces, int64 [N, 2], for one that is larger than memory; `ValueError` where it is wrong.

        Documents must be whole tokens, lie one after another and fill the data segment. Where a file was merged by
        Modalities the offsets fall short by 12 bytes more with each further part; they are mended.
        """
        number = due = behind = 0
        with self.path.open("rb") as file:
            file.seek(self.header_bytes + self.tokens.nbytes)
            num_bytes = os.fstat(file.fileno()).st_size - file.tell()
            base = 0
            for pairs in _readable(read_pairs(file, num_bytes), self.path):
                # Modalities counted from the start of the file until June 2024.
                if number == 0 and len(pairs) and pairs[0, 0] == self.header_bytes:
                    base = self.header_bytes
                pairs[:, 0] -= base
                check_bounds(pairs, self.tokens.nbytes, self.path, number)
                lengths = pairs[:, 1]
                dues = due + np.cumsum(lengths) - lengths
                steps = np.diff(dues - pairs[:, 0], prepend=behind)
                unfit = (steps < 0) | (steps % MERGE_SHIFT != 0) | (lengths % self.tokens.itemsize != 0)
                # Mended offsets may point behind the data.
                wrong = np.flatnonzero(unfit | (lengths > self.tokens.nbytes - dues))
                if wrong.size:
                    offset, length = pairs[wrong[0]]
                    found = f"document {number + wrong[0]} has {length:,} bytes from {offset:,}"
                    raise self._misfit(found, f"byte {dues[wrong[0]]:,} and whole tokens are due")
                if len(pairs):
                    number, behind, due = number + len(pairs), int(dues[-1] - pairs[-1, 0]), int(dues[-1] + lengths[-1])
                    pairs[:, 0] = dues
                yield pairs
        if due != self.tokens.nbytes:
            raise self._misfit(f"the documents end at byte {due:,}", f"{self.tokens.nbytes:,} is due")

    def _misfit(self, found: str, due: str) -> ValueError:
        return ValueError(
            f"{self.path}: the index does not fit the tokens: {found}, where {due}; make it again from its sources"
        )

    @property
    def num_documents(self) -> int:
        return len(self.index)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i`, its end-of-document token included."""
        offset, length = self.index[i] // self.tokens.itemsize
        return self.tokens[offset : offset + length]


def open_pbin(path: Path) -> Pbin:
    """Open a `.pbin` of ours or of any Modalities; `ValueError` if it is missing, broken or something else."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; make it with `python prep.py pack` (data/demo: `python prep.py demo`)")
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        head = file.read(12)
        if not head:
            raise ValueError(f"{path} is empty; make it again with `python prep.py pack`")
        fitting = (layout for layout in _layouts(head) if _index_begins(file, layout[0] + layout[2], num_bytes))
        layout = next(fitting, None)
        if layout is None:
            raise ValueError(_why_not_pbin(path, head, num_bytes))
        file.seek(-1, os.SEEK_END)
        if file.read(1) != pickle.STOP:
            raise ValueError(f"{path} is truncated: its index breaks off; copy it again or make it again")
    header_bytes, dtype, length = layout
    # A memory map cannot be empty; a file without tokens is valid all the same.
    shape = (length // dtype.itemsize,)
    tokens = np.memmap(path, dtype, "r", header_bytes, shape) if length else np.empty(shape, dtype)
    return Pbin(path=path, tokens=tokens, header_bytes=header_bytes)


def _layouts(head: bytes) -> Iterator[tuple[int, np.dtype, int]]:
    """The ways to read the first bytes of a file: (header bytes, dtype of the tokens, bytes of the data segment).

    Modalities wrote big-endian until April 2024, and no token size (4 bytes each) until January 2024.
    """
    for order in "<>":
        if len(head) == 12:
            length, size = struct.unpack(f"{order}QI", head)
            if size in (1, 2, 4) and length % size == 0:
                yield 12, np.dtype(f"{order}u{size}"), length
        if len(head) >= 8:
            (length,) = struct.unpack(f"{order}Q", head[:8])
            if length % 4 == 0:
                yield 8, np.dtype(f"{order}u4"), length


def _index_begins(file: BinaryIO, position: int, num_bytes: int) -> bool:
    """Whether a pickled list begins at `position`: cheap, and enough to tell the headers apart."""
    if position > num_bytes - 5:
        return False
    file.seek(position)
    start = file.read(3)
    return start[:2] in (b"\x80\x04", b"\x80\x05") and start[2:] in (pickle.FRAME, pickle.EMPTY_LIST)


def _why_not_pbin(path: Path, head: bytes, num_bytes: int) -> str:
    for header_bytes, _, length in _layouts(head):
        if header_bytes == 12 and num_bytes < header_bytes + length + 5:
            return (
                f"{path} is truncated: it has {num_bytes:,} bytes, and its header tells of {length:,} bytes of tokens "
                "and an index after them; copy it again or make it again"
            )
    return f"{path} is not a .pbin file; make one with `python prep.py pack`"


def read_idx(path: Path, jsonl: Path) -> np.ndarray:
    """Byte offset and byte length of every line of `jsonl` that the `.idx` at `path` lists, int64 [N, 2]."""
    with path.open("rb") as file:
        pieces = [*_readable(read_pairs(file, os.fstat(file.fileno()).st_size), path)]
    pairs = np.concatenate([np.empty((0, 2), np.int64), *pieces])
    check_bounds(pairs, jsonl.stat().st_size, path)
    return pairs


def check_bounds(pairs: np.ndarray, num_bytes: int, path: Path, first: int = 0) -> None:
    """Raise `ValueError` for the first of `pairs` [N, 2] that does not lie within `num_bytes`."""
    offsets, lengths = pairs.T
    # Compared without a sum: the sum of two hostile numbers may wrap around.
    wrong = np.flatnonzero((offsets < 0) | (lengths < 0) | (offsets > num_bytes) | (lengths > num_bytes - offsets))
    if wrong.size:
        offset, length = pairs[wrong[0]]
        raise ValueError(
            f"{path}: entry {first + wrong[0]} of the index, {length:,} bytes from byte {offset:,}, does not lie in "
            f"its {num_bytes:,} bytes of data; make it again"
        )


def _readable(pieces: Iterator[np.ndarray], path: Path) -> Iterator[np.ndarray]:
    """`pieces`, with a complaint that names the file."""
    try:
        yield from pieces
    except ValueError as error:
        raise ValueError(f"{path}: the index cannot be read ({error}); make it again") from None
