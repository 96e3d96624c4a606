"""Where documents come from: JSONL (plain, gzip, zstd), Parquet, Arrow, datasets of the hub.

A source is cut into portions, each of which is packed, or packed again after an interruption, as one; a portion is
read in chunks, each of which one thread takes. Nothing here knows what a document holds.
"""

import functools
import glob
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

PORTION_BYTES = 64 << 20
CHUNK_BYTES = 1 << 19
CHUNK_ROWS = 256
UNKNOWN_BYTES = 256 << 20  # of a shard that does not tell
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
TABLES = (".parquet", ".arrow")
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", *TABLES)
SKIPPED = ".skipped.jsonl"
BOM = b"\xef\xbb\xbf"


class Where(NamedTuple):
    """Where a document stands: a line and its byte in a file, or a row of a table (`offset` None); `number` from 1."""

    source: str
    number: int
    offset: int | None

    def __str__(self) -> str:
        return f"{self.source}, {'row' if self.offset is None else 'line'} {self.number}" + (
            "" if self.offset is None else f" (byte {self.offset})"
        )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some documents of a portion, in order."""

    items: Sequence[Any]
    """Lines as bytes, or values of a table's rows."""
    first: int
    """The number of documents before them in the portion."""
    offset: int | None
    """The byte where the first line stands; None in a table."""

    def where(self, source: str, i: int, before: int = 0) -> Where:
        """Where document `i` of the chunk stands, with `before` documents of the source before the portion."""
        return Where(source, before + self.first + i + 1, None if self.offset is None else self._offsets[i])

    @functools.cached_property
    def _offsets(self) -> list[int]:
        # Kept, for every line of a chunk may be asked for.
        return list(accumulate(map(len, self.items), initial=self.offset))


class Source(Protocol):
    """One file, or one dataset."""

    @property
    def name(self) -> str: ...

    def facts(self) -> dict[str, Any]:
        """What tells this version of the source from another, as JSON."""

    def portions(self, size: int) -> list[tuple[int, int]]:
        """(begin, end) of the parts, of about `size` bytes where the source can be cut."""

    def num_bytes(self, begin: int, end: int) -> int:
        """About how large one part is."""

    def chunks(self, begin: int, end: int) -> Iterator[Chunk]:
        """The documents of one part."""

    def documents_before(self, begin: int) -> int:
        """How many documents stand before a part; it may take as long as reading them."""


# ---------------------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class Lines:
    """A file with one JSON document a line."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def compression(self) -> str | None:
        return COMPRESSED.get(self.path.suffix)

    def facts(self) -> dict[str, Any]:
        status = self.path.stat()
        return {"name": self.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}

    def portions(self, size: int) -> list[tuple[int, int]]:
        """Parts that begin at lines; a compressed file is one."""
        num_bytes = self.path.stat().st_size
        if self.compression:
            return [(0, num_bytes)]
        cuts = [0]
        with self.path.open("rb") as file:
            while cuts[-1] + size < num_bytes:
                file.seek(cuts[-1] + size - 1)
                cuts.append(cuts[-1] + size - 1 + _to_next_line(file))
        return [
            (begin, end) for begin, end in zip(cuts, [*cuts[1:], num_bytes], strict=True) if begin < end or not begin
        ]

    def chunks(self, begin: int, end: int) -> Iterator[Chunk]:
        """Chunks of whole lines; a byte order mark before the first is left out."""
        number, offset = 0, begin
        if self.compression and not end:
            raise ValueError(f"{self.path} is empty: no {self.compression} file; copy it again or make it again")
        try:
            with self._open() as file:
                if begin:
                    file.seek(begin)
                elif file.peek(len(BOM)).startswith(BOM):
                    offset += len(file.read(len(BOM)))
                # What is compressed ends where it ends, not at the size of its file.
                while lines := _lines(file, CHUNK_BYTES if self.compression else min(CHUNK_BYTES, end - offset)):
                    yield Chunk(lines, number, offset)
                    number, offset = number + len(lines), offset + sum(map(len, lines))
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error}; copy it again or make it again") from None

    def _open(self) -> io.BufferedReader:
        if self.compression is None:
            return io.BufferedReader(io.FileIO(self.path), CHUNK_BYTES)
        import pyarrow

        # Its stream, unlike others', complains where a file breaks off.
        return io.BufferedReader(pyarrow.input_stream(str(self.path), compression=self.compression), CHUNK_BYTES)

    def num_bytes(self, begin: int, end: int) -> int:
        return end - begin

    def documents_before(self, begin: int) -> int:
        with self.path.open("rb", buffering=0) as file:
            count = 0
            while begin > 0 and (data := file.read(min(begin, CHUNK_BYTES))):
                count, begin = count + data.count(b"\n"), begin - len(data)
        return count


def _lines(file: io.BufferedReader, num_bytes: int) -> list[bytes]:
    """The lines that begin within the next `num_bytes`."""
    # readlines goes on until it has more bytes than it is told, and takes 0 for no bound.
    if num_bytes > 1:
        return file.readlines(num_bytes - 1)
    line = file.readline() if num_bytes == 1 else b""
    return [line] if line else []


def _to_next_line(file: BinaryIO) -> int:
    """Bytes from where `file` stands up to the beginning of the next line, or to the end."""
    passed = 0
    while data := file.readline(CHUNK_BYTES):
        passed += len(data)
        if data.endswith(b"\n"):
            break
    return passed


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """A Parquet or Arrow file, or a dataset of the hub or in a folder, read as a stream through `datasets`."""

    name: str
    split: str = "train"
    column: str | None = None
    """The only column that is read; None: all."""
    builder: str | None = None
    """What reads a single file: parquet or arrow; None for a dataset."""

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": self.name}
        if self.builder:
            status = os.stat(self.name)
            return facts | {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        dataset = _dataset(self)
        return facts | {"split": self.split, "shards": dataset.num_shards, "version": str(dataset.info.version)}

    def portions(self, size: int) -> list[tuple[int, int]]:
        """A part for every shard: of a dataset, about every file."""
        return [(i, i + 1) for i in range(_dataset(self).num_shards)]

    def chunks(self, begin: int, end: int) -> Iterator[Chunk]:
        dataset = _dataset(self)
        rows = dataset.shard(num_shards=dataset.num_shards, index=begin).with_format("arrow")
        number = 0
        try:
            for table in rows.iter(batch_size=CHUNK_ROWS):
                yield Chunk(_rows(table), number, None)
                number += len(table)
        except Exception as error:  # pyarrow and datasets raise almost anything
            raise ValueError(f"{self.name} cannot be read after row {number}: {_one_line(error)}") from None

    def num_bytes(self, begin: int, end: int) -> int:
        dataset = _dataset(self)
        total = os.stat(self.name).st_size if self.builder else dataset.info.dataset_size
        return (total or UNKNOWN_BYTES * dataset.num_shards) * (end - begin) // dataset.num_shards

    def documents_before(self, begin: int) -> int:
        return sum(len(chunk.items) for i in range(begin) for chunk in self.chunks(i, i + 1))


@functools.cache
def _dataset(table: Table) -> Any:
    """The `datasets.IterableDataset` of a table, opened once."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
    try:
        if table.builder:
            # By default it takes the rows of the first row group at a time, and stumbles over none.
            options = {"batch_size": CHUNK_ROWS} if table.builder == "parquet" else {}
            files = [table.name]
            dataset = datasets.load_dataset(table.builder, data_files=files, split="train", streaming=True, **options)
        elif any((Path(table.name) / name).exists() for name in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(table.name)
            if isinstance(dataset, dict):
                if table.split not in dataset:
                    raise ValueError(f"it has {', '.join(dataset)}")
                dataset = dataset[table.split]
            dataset = dataset.to_iterable_dataset(num_shards=max(1, len(dataset.cache_files)))
        else:
            dataset = datasets.load_dataset(table.name, split=table.split, streaming=True)
    except Exception as error:  # what datasets raises has no common base
        what = f"{type(error).__name__}: {_one_line(error)}"
        raise ValueError(f"dataset {table.name}, split {table.split}: {what}") from None
    names = dataset.column_names or []
    if table.column is None or not names:
        return dataset
    if table.column not in names:
        raise ValueError(f"{table.name} has no column {table.column!r}; it has {', '.join(names)}")
    return dataset.select_columns([table.column])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _rows(table: Any) -> list[Any]:
    """The rows of an Arrow table as dicts; one whose text is not UTF-8 as the error that says so."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        rows: list[Any] = []
        for i in range(len(table)):
            try:
                rows += table.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                rows.append(error)
        return rows


# --------------------------------------------------------------------------------------------------------------- inputs


def find_sources(patterns: Sequence[str | Path], column: str | None = None) -> list[Source]:
    """The files that names, globs and folders stand for, in the order given, those of one glob or folder sorted.

    `column`: the only column needed of a table. `ValueError` for the first that does not exist: before any work.
    """
    if not patterns:
        raise ValueError("no input; give at least one file, or --dataset")
    return [_source(path, column) for pattern in patterns for path in _paths(str(pattern))]


def _paths(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        # The lists of what a packing skipped are none of its inputs.
        found = sorted(
            p for p in path.rglob("*") if p.name.endswith(ENDINGS) and not p.name.endswith(SKIPPED) and p.is_file()
        )
    elif path.is_file():
        return [path]
    else:
        found = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
    if not found:
        # A pipe can be read only once, and not from the middle.
        kind = "no regular file" if path.exists() else "missing"
        kind = f"a folder without {', '.join(ENDINGS)}" if path.is_dir() else kind
        raise ValueError(f"{pattern} is {kind}; give a JSONL, Parquet or Arrow file, a folder of them, or a glob")
    return found


def _source(path: Path, column: str | None) -> Source:
    if path.suffix in TABLES:
        return Table(str(path), column=column, builder=path.suffix[1:])
    return Lines(path)
