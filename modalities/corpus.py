"""Documents one after another: every one is either yielded or rejected with a reason, and a `Tally` keeps the count.

Also the index of a JSONL file. Nothing here knows of tokens.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import orjson

from modalities import pbin
from modalities.fields import Reject, Select, texts_of, value_of
from modalities.sources import PORTION_BYTES, Chunk, Lines, Source, Where

OnError = Literal["fail", "skip"]


@dataclass
class Tally:
    """How many documents came in, and how many of them were left out, by reason; a context around the work."""

    on_error: OnError = "fail"
    listed: Path | None = None
    """Where the skipped documents are listed, if there are any."""
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    files: ExitStack = field(default_factory=ExitStack)
    file: BinaryIO | None = None

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, *error: Any) -> None:
        self.files.__exit__(*error)

    def reject(self, where: object, reject: Reject) -> None:
        """Count a bad document, or end with it where `on_error` is "fail"."""
        if self.on_error == "fail":
            raise rejected(where, reject)
        self.skipped[reject.reason] += 1
        if self.listed is not None and isinstance(where, Where):
            if self.file is None:
                self.file = self.files.enter_context(pbin.write_beside(self.listed))
            self.file.write(skipped_line(where, reject))

    def report(self, out: Path, kept: int, tokens: int | None = None) -> str:
        """The line that says what was written to `out`, and what was left out."""
        assert self.documents == kept + self.skipped.total(), f"{kept} documents kept of {self}"
        counts = f"{kept:,} documents" if tokens is None else f"{kept:,} documents, {tokens:,} tokens"
        return f"{out}: {counts}, {out.stat().st_size:,} bytes{self.left_out()}"

    def left_out(self) -> str:
        """How many were skipped and why, as the end of a sentence; empty where none was."""
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in self.skipped.most_common())
        return f"; skipped {self.skipped.total():,} of {self.documents:,}: {reasons}" if reasons else ""


def rejected(where: object, reject: Reject) -> ValueError:
    """The error that a bad document ends in."""
    return ValueError(f"{where}: {reject}; mend it, or leave out such documents with --on-error skip")


def skipped_line(where: Where, reject: Reject) -> bytes:
    """A line of `<out>.skipped.jsonl`."""
    place = {"row": where.number} if where.offset is None else {"line": where.number, "byte": where.offset}
    return (
        orjson.dumps(
            {
                "file": os.fsencode(where.source).decode(errors="backslashreplace"),
                **place,
                "reason": reject.reason,
                "detail": reject.detail,
            }
        )
        + b"\n"
    )


def read_texts(sources: Sequence[Source], select: Select, name: str, tally: Tally) -> Iterator[tuple[Where, str]]:
    """The text of every document of `sources`, in order, with where it stands; bad ones go to `tally`."""
    for where, value in read_values(sources, select, tally):
        texts, rejects = texts_of([value], lambda it: it, name)
        for text in texts:
            yield where, text
        for _, reject in rejects:
            tally.reject(where, reject)


def read_values(sources: Sequence[Source], select: Select, tally: Tally) -> Iterator[tuple[Where, Any]]:
    """What `select` finds in every document of `sources`, in order, with where it stands; bad ones go to `tally`."""
    for source in sources:
        before = 0
        for begin, end in source.portions(PORTION_BYTES):
            count = 0
            for chunk in source.chunks(begin, end):
                count += len(chunk.items)
                tally.documents += len(chunk.items)
                for i, item in enumerate(chunk.items):
                    where = chunk.where(source.name, i, before)
                    value = value_of(item, select)
                    if isinstance(value, Reject):
                        tally.reject(where, value)
                    else:
                        yield where, value
            before += count


def write_index(path: Path, out: Path, tally: Tally) -> int:
    """Write to `out` where the lines of `path` that are JSON stand; returns their number."""
    source = Lines(path)
    if source.compression or not path.is_file():
        raise ValueError(f"{path} is {_unfit(path)}; an index tells bytes of a JSONL file that is not compressed")
    pbin.refuse_existing(out)
    import simdjson

    kept, parse = 0, simdjson.Parser().parse

    def pieces() -> Iterator[np.ndarray]:
        nonlocal kept
        for chunk in source.chunks(0, path.stat().st_size):
            lines = _where_lines_lie(chunk)
            if not _all_json(chunk.items, parse):
                lines = lines[_judge(source, chunk, tally)]
            tally.documents += len(chunk.items)
            kept += len(lines)
            yield lines
        if not kept:
            raise ValueError(f"{path} holds no document: nothing to index{tally.left_out()}")

    pbin.write_idx(out, pieces())
    return kept


def _unfit(path: Path) -> str:
    return "missing" if not path.exists() else "a folder" if path.is_dir() else "no such file"


def _where_lines_lie(chunk: Chunk) -> np.ndarray:
    """Byte offset and length, without the newline, of a chunk's lines, int64 [N, 2]."""
    lengths = np.fromiter(map(len, chunk.items), np.int64, len(chunk.items))
    offsets = (chunk.offset or 0) + np.cumsum(lengths) - lengths
    lengths -= 1  # the newline, which a last line may lack
    lengths[-1] += not chunk.items[-1].endswith(b"\n")
    return np.stack((offsets, lengths), 1)


def _all_json(lines: Sequence[bytes], parse: Callable[[bytes], object]) -> bool:
    """Whether simdjson, the fastest to look and not to build, takes every line; it refuses some good ones."""
    try:
        for line in lines:
            parse(line)
    except (ValueError, RuntimeError):
        return False
    return True


def _judge(source: Source, chunk: Chunk, tally: Tally) -> list[int]:
    """The numbers of a chunk's lines that are JSON; the others go to `tally`."""
    good = []
    for i, line in enumerate(chunk.items):
        value = value_of(line, lambda value: None)
        if isinstance(value, Reject):
            tally.reject(chunk.where(source.name, i), value)
        else:
            good.append(i)
    return good
