"""The parts of a `.pbin` in the making: portions of it, finished one by one, that outlast an interruption.

Each process appends to files of its own in `<out>.parts/`, and enters a portion into its journal once the portion is
on the disk. What a journal tells of is done, whoever did it; `join` puts the portions in order. It knows no tokenizer.
"""

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from modalities import pbin
from modalities.pbin import HEADER

FILES = ("tokens", "lengths", "skipped", "journal")
COPY_BYTES = 1 << 20


@dataclass
class Counts:
    """What became of some documents."""

    documents: int = 0
    packed: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """How many packed documents have 2^(k-1) … 2^k - 1 tokens, by k."""

    def add(self, other: "Counts") -> None:
        self.documents += other.documents
        self.packed += other.packed
        self.tokens += other.tokens
        self.skipped.update(other.skipped)
        self.lengths.update(other.lengths)


@dataclass(frozen=True)
class Done:
    """A finished portion: its counts, and where it lies in the files that begin with `stem`."""

    portion: int
    stem: Path
    begin: dict[str, int]
    """Of its bytes in each file."""
    end: dict[str, int]
    counts: Counts

    @contextlib.contextmanager
    def open(self, kind: str) -> Iterator[BinaryIO]:
        with path_of(self.stem, kind).open("rb") as file:
            file.seek(self.begin[kind])
            yield file

    def num_bytes(self, kind: str) -> int:
        return self.end[kind] - self.begin[kind]


def path_of(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}")


def finished(folder: Path, engine: str, with_skips: bool) -> dict[int, Done]:
    """The portions that `engine` has finished in `folder`; those that skipped documents only where `with_skips`."""
    done = {}
    for journal in sorted(folder.glob(f"*.{engine}.journal")):
        for entry in read_journal(journal.with_suffix("")):
            if with_skips or not entry.counts.skipped:
                done[entry.portion] = entry
    return done


def read_journal(stem: Path) -> list[Done]:
    """The entries of a journal whose portions are on the disk; what a crash tore off at its end is left out."""
    entries: list[Done] = []
    with contextlib.suppress(FileNotFoundError):
        sizes = {kind: path_of(stem, kind).stat().st_size for kind in FILES}
        for line in path_of(stem, "journal").read_bytes().splitlines():
            try:
                entry = json.loads(line)
                counts = Counts(**{**entry["counts"], "skipped": Counter(entry["counts"]["skipped"])})
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            counts.lengths = Counter({int(k): n for k, n in counts.lengths.items()})
            done = Done(entry["portion"], stem, entry["begin"], entry["end"], counts)
            if any(size < done.end.get(kind, 0) for kind, size in sizes.items()):
                break
            entries.append(done)
    return entries


class Writer:
    """Appends portions to the files of one process; a context around its work.

    A thread of its own waits for the disk, so that whoever appends need not.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.counts = Counts()
        self.syncing: Future[None] | None = None
        with contextlib.ExitStack() as stack:
            for kind in FILES:
                path_of(stem, kind).touch()
            self.files = {kind: stack.enter_context(path_of(stem, kind).open("r+b")) for kind in FILES}
            try:
                fcntl.flock(self.files["journal"], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is packing into {stem.parent}; wait for it, or stop it") from None
            entries = read_journal(stem)
            # Room for the header, so that tokens which lie in order need not be copied.
            start = entries[-1].end if entries else {"tokens": HEADER.size, "lengths": 0, "skipped": 0}
            self.begin = dict(start)
            # Whatever follows the last whole entry is what a crash left.
            for _ in entries:
                self.files["journal"].readline()
            for kind, file in self.files.items():
                file.truncate(file.seek(start.get(kind, file.tell())))
            self.syncer = stack.enter_context(ThreadPoolExecutor(1, "sync"))
            self.stack = stack.pop_all()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        with self.stack:
            if self.syncing is not None:
                self.syncing.result()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, skipped: bytes, counts: Counts) -> None:
        """Append documents, flat `tokens` [N] in the dtype of the file and `lengths` int64 [D], and skipped ones."""
        self.files["tokens"].write(tokens.data)
        self.files["lengths"].write(lengths.astype("<i8").data)
        self.files["skipped"].write(skipped)
        self.counts.add(counts)

    def finish(self, portion: int) -> None:
        """Enter what was added since the last call as `portion`, as soon as it is on the disk.

        `OSError` if that of the call before could not be written; leaving the context raises that of the last.
        """
        end = {kind: self.files[kind].tell() for kind in self.begin}
        entry = {"portion": portion, "begin": self.begin, "end": end, "counts": vars(self.counts)}
        for kind in self.begin:
            self.files[kind].flush()
        if self.syncing is not None:
            self.syncing.result()
        self.syncing = self.syncer.submit(self._enter, json.dumps(entry).encode() + b"\n")
        self.begin, self.counts = end, Counts()

    def _enter(self, entry: bytes) -> None:
        for kind in self.begin:
            os.fsync(self.files[kind].fileno())
        journal = self.files["journal"]
        journal.write(entry)
        journal.flush()
        os.fsync(journal.fileno())


def join(done: Sequence[Done], part: Path, out: Path, itemsize: int) -> None:
    """Make the portions `done`, in this order, the `.pbin` at `out`; `part`: where to write it, on the same disk."""
    num_bytes = sum(entry.num_bytes("tokens") for entry in done)
    there = _in_place(done)
    if there:
        part = path_of(done[0].stem, "tokens")
    else:
        part.touch()
    with part.open("r+b", buffering=COPY_BYTES) as file:
        file.truncate(file.seek(done[there - 1].end["tokens"] if there else HEADER.size))
        for entry in done[there:]:
            with entry.open("tokens") as source:
                copy(source, file, entry.num_bytes("tokens"))
        pbin.finish_pbin(file, num_bytes, itemsize, _lengths(done))
        file.flush()
        os.fsync(file.fileno())
    pbin.refuse_existing(out)
    part.rename(out)
    pbin.fsync(out.parent)


def _in_place(done: Sequence[Done]) -> int:
    """How many portions lie in order at the beginning of a file that holds no others, and so need not be copied."""
    stem, end, count = done[0].stem, HEADER.size, 0
    for entry in done:
        if entry.stem != stem or entry.begin["tokens"] != end:
            break
        end, count = entry.end["tokens"], count + 1
    # What its journal tells of must stay until the end, for a crash may come first.
    return count if read_journal(stem)[-1].end["tokens"] == end else 0


def copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    """Copy `num_bytes` from where `source` stands."""
    while num_bytes:
        data = source.read(min(num_bytes, COPY_BYTES))
        assert data, "a part is shorter than its journal tells"
        num_bytes -= target.write(data)


def _lengths(done: Sequence[Done]) -> Iterator[np.ndarray]:
    for entry in done:
        left = entry.num_bytes("lengths")
        with entry.open("lengths") as file:
            while left:
                data = file.read(min(left, COPY_BYTES))
                left -= len(data)
                yield np.frombuffer(data, "<i8")
