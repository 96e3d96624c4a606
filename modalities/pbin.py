"""The `.idx` and `.pbin` files: write, open, validate.

A `.pbin` is the length of its data segment (8 bytes), the token size (4 bytes), the tokens of one document after
another (unsigned, little-endian), and an index: a pickled list of `(byte offset, byte length)`, one a document, counted
from the start of the data segment. An `.idx` is such a list for the lines of a JSONL file. Modalities reads and writes
the same bytes. Nothing here knows of text, tokenizers or training.
"""

import io
import itertools
import os
import pickle
import secrets
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Python 3.14 would write protocol 5; Modalities' files, and so ours, have 4 on every Python.
PICKLE_PROTOCOL = 4


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


def write_idx(path: Path, lines: Iterable[tuple[int, int]]) -> None:
    """Write the `(byte offset, byte length)` of a JSONL file's lines; nothing is left behind where `lines` raises."""
    with write_beside(path) as file:
        pickle.dump(list(lines), file, protocol=PICKLE_PROTOCOL)


@contextmanager
def write_pbin(path: Path, vocab_size: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield `append(tokens)`, which adds one document (integers, [N]); the file appears when the block ends."""
    dtype = np.dtype(f"<u{token_size(vocab_size)}")
    largest = np.iinfo(dtype).max
    lengths = array("q")
    with write_beside(path) as file:
        file.write(struct.pack("<QI", 0, dtype.itemsize))

        def append(tokens: np.ndarray) -> None:
            if tokens.size and not 0 <= tokens.min() <= tokens.max() <= largest:
                span = f"{tokens.min()} to {tokens.max()}"
                raise ValueError(f"{path}: token ids of {span} do not fit a vocabulary of {vocab_size:,}")
            lengths.append(file.write(tokens.astype(dtype).data))

        yield append
        ends = list(itertools.accumulate(lengths, initial=0))
        pickle.dump(list(zip(ends, lengths, strict=False)), file, protocol=PICKLE_PROTOCOL)
        file.seek(0)
        file.write(struct.pack("<Q", ends[-1]))


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
        with self.path.open("rb") as file:
            file.seek(self.header_bytes + self.tokens.nbytes)
            index = _load_pairs(file.read(), self.path)
        # Modalities counted from the start of the file until June 2024.
        if len(index) and index[0, 0] == self.header_bytes:
            index[:, 0] -= self.header_bytes
        _check_documents(index, self)
        index.flags.writeable = False
        return index

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


def _check_documents(index: np.ndarray, pbin: Pbin) -> None:
    """Documents must be whole tokens, lie one after another and fill the data segment."""
    num_bytes, itemsize = pbin.tokens.nbytes, pbin.tokens.itemsize
    _check_bounds(index, num_bytes, pbin.path)
    offsets, lengths = index.T
    due = np.concatenate(([0], offsets + lengths))
    wrong = np.flatnonzero((due != np.append(offsets, num_bytes)) | (due % itemsize != 0))
    if wrong.size:
        i = int(wrong[0])
        found = f"document {i} begins at byte {offsets[i]:,}" if i < len(offsets) else f"they end at {num_bytes:,}"
        raise ValueError(
            f"{pbin.path}: the index does not fit the tokens: {found}, where {due[i]:,} is due (Modalities' merge "
            "writes such files); make it again from its sources"
        )


def read_idx(path: Path, jsonl: Path) -> np.ndarray:
    """Byte offset and byte length of every line of `jsonl` that the `.idx` at `path` lists, int64 [N, 2]."""
    pairs = _load_pairs(path.read_bytes(), path)
    _check_bounds(pairs, jsonl.stat().st_size, path)
    return pairs


def _check_bounds(pairs: np.ndarray, num_bytes: int, path: Path) -> None:
    offsets, lengths = pairs.T
    # Compared without a sum: the sum of two hostile numbers may wrap around.
    wrong = np.flatnonzero((offsets < 0) | (lengths < 0) | (offsets > num_bytes) | (lengths > num_bytes - offsets))
    if wrong.size:
        offset, length = pairs[wrong[0]]
        raise ValueError(
            f"{path}: entry {wrong[0]} of the index, {length:,} bytes from byte {offset:,}, does not lie in its "
            f"{num_bytes:,} bytes of data; make it again"
        )


class _PairsUnpickler(pickle.Unpickler):
    """Unpickles numbers and containers alone: an index needs no name, and a name is how a pickle runs code."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")

    def persistent_load(self, pid: object) -> None:
        raise pickle.UnpicklingError("it asks for an object of another file, which no index needs")


def _load_pairs(pickled: bytes, path: Path) -> np.ndarray:
    """The pickled list of pairs of integers as int64 [N, 2]; whatever else it holds is a `ValueError`."""
    try:
        pairs = _PairsUnpickler(io.BytesIO(pickled)).load()
    except Exception as error:  # a broken pickle raises almost anything
        raise ValueError(f"{path}: the index cannot be read ({error}); make it again") from None
    # Types are checked one by one: numpy would turn "1", 1.5 or a nested list into some number or other.
    if type(pairs) is list and all(type(pair) is tuple and len(pair) == 2 for pair in pairs):
        numbers = list(itertools.chain.from_iterable(pairs))
        if all(type(number) is int and -(2**63) <= number < 2**63 for number in numbers):
            return np.array(numbers, dtype=np.int64).reshape(-1, 2)
    raise ValueError(f"{path}: the index is not a list of (offset, length) pairs; make it again")
