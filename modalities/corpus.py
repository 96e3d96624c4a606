"""Documents in: the lines of JSONL files, the text at a field of each, the JSONL index, and the demo corpus.

Every line is either yielded or rejected with a reason; a `Tally` keeps the count. Nothing here knows of tokens.
"""

import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from modalities import pbin

OnError = Literal["fail", "skip"]
Field = tuple[str | int, ...]


class Line(NamedTuple):
    """Where a document stands; `number` counts from 1, `num_bytes` leaves out the newline."""

    path: Path
    number: int
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.number} (byte {self.offset})"


@dataclass
class Tally:
    """How many documents came in, and how many of them were left out, by reason."""

    on_error: OnError = "fail"
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def reject(self, where: object, reason: str, detail: str = "") -> None:
        """Count a bad document, or end with it where `on_error` is "fail"."""
        if self.on_error == "fail":
            why = f"{reason}: {detail}" if detail else reason
            raise ValueError(f"{where}: {why}; mend it, or leave out such documents with --on-error skip")
        self.skipped[reason] += 1

    def report(self, out: Path, kept: int, tokens: int | None = None) -> str:
        """The line that says what was written to `out`, and what was left out."""
        from tqdm import tqdm

        assert self.documents == kept + self.skipped.total(), f"{kept} documents kept of {self}"
        counts = f"{kept:,} documents" if tokens is None else f"{kept:,} documents, {tokens:,} tokens"
        return f"{out}: {counts}, {tqdm.format_sizeof(out.stat().st_size)}B{self.left_out()}"

    def left_out(self) -> str:
        """How many were skipped and why, as the end of a sentence; empty where none was."""
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in self.skipped.most_common())
        return f"; skipped {self.skipped.total():,} of {self.documents:,}: {reasons}" if reasons else ""


# ---------------------------------------------------------------------------------------------------------------- JSONL


def parse_field(path: str) -> Field:
    """`.text`, `.a.b`, `.a[0]`, `.["any key"]`, as in jq; `.` alone is the document itself."""
    step = re.compile(r'\.?\[(-?\d+)\]|\.?\["([^"]+)"\]|\.([A-Za-z_]\w*)')
    keys: list[str | int] = []
    position = 0 if path != "." else 1
    while position < len(path):
        match = step.match(path, position)
        if match is None or not path.startswith("."):
            raise ValueError(f'--field {path!r} is no field path; write one like .text, .a.b, .a[0] or .["any key"]')
        number, quoted, name = match.groups()
        keys.append(int(number) if number is not None else quoted or name)
        position = match.end()
    if not path:
        raise ValueError("--field is empty; write one like .text")
    return tuple(keys)


def output_for(docs: Sequence[Path], out: Path | None, ending: str) -> Path:
    """`out`, or where it is None the path of the only input with another `ending`."""
    if not docs:
        raise ValueError("no input; give at least one JSONL file")
    if out is None and len(docs) > 1:
        raise ValueError(f"{len(docs)} inputs make one {ending} file; name it with --out")
    return out or docs[0].with_suffix(ending)


def _require_files(paths: Iterable[Path]) -> None:
    """Raise `ValueError` for the first of `paths` that is not a file: before any work, not after an hour of it."""
    for path in paths:
        # A pipe will do: a file is read once, from its beginning to its end.
        if not path.exists() or path.is_dir():
            raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; give a JSONL file")


def read_documents(paths: Sequence[Path], field_path: str, tally: Tally) -> Iterator[tuple[Line, str]]:
    """The text at `field_path` of every line of `paths`, in order, with where it stands; bad lines go to `tally`.

    The arguments are checked here and now, the files read as the iterator is.
    """
    keys = parse_field(field_path)
    _require_files(paths)
    return _read_texts(paths, keys, field_path, tally)


def _read_texts(paths: Sequence[Path], keys: Field, field_path: str, tally: Tally) -> Iterator[tuple[Line, str]]:
    for path in paths:
        for line, value in _read_json(path, tally):
            text, reason = _text_at(value, keys, field_path)
            if reason:
                tally.reject(line, reason)
            else:
                yield line, text


def write_index(path: Path, out: Path, tally: Tally) -> int:
    """Write to `out` where the lines of `path` that are JSON stand; returns their number."""
    _require_files([path])
    pbin.refuse_existing(out)
    lines = [(line.offset, line.num_bytes) for line, _ in _read_json(path, tally)]
    if not lines:
        raise ValueError(f"{path} holds no document: nothing to index{tally.left_out()}")
    pbin.write_idx(out, lines)
    return len(lines)


def _read_json(path: Path, tally: Tally) -> Iterator[tuple[Line, Any]]:
    """Every line of `path` that is JSON, parsed."""
    import orjson
    from tqdm import tqdm

    num_bytes = path.stat().st_size
    bar = tqdm(total=num_bytes or None, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
    offset = 0
    with path.open("rb", buffering=1 << 20) as file, bar:
        for number, raw in enumerate(file, 1):
            line = Line(path, number, offset, len(raw) - raw.endswith(b"\n"))
            offset += len(raw)
            bar.update(len(raw))
            tally.documents += 1
            try:
                value = orjson.loads(raw)
            except orjson.JSONDecodeError as error:
                tally.reject(line, *_why_not_json(raw, error))
                continue
            yield line, value


def _why_not_json(raw: bytes, error: Any) -> tuple[str, str]:
    """Reason and detail of a line that orjson refused."""
    if not raw.strip():
        return "blank line", ""
    try:
        raw.decode()
    except UnicodeDecodeError as problem:
        return "invalid UTF-8", f"byte 0x{raw[problem.start]:02x} at {problem.start} of the line"
    return "invalid JSON", f"{error.msg} at character {error.pos} of the line"


def _text_at(value: Any, keys: Field, field_path: str) -> tuple[str, str]:
    """The text that `keys` lead to and "", or "" and the reason why there is none."""
    for key in keys:
        match key, value:
            case str(), dict() if key in value:
                value = value[key]
            case int(), list() if -len(value) <= key < len(value):
                value = value[key]
            case _:
                return "", f"no field {field_path}"
    if value is None:
        return "", f"field {field_path} is null"
    if not isinstance(value, str):
        return "", f"field {field_path} is not a string"
    return value, "" if value else "empty text"


# ----------------------------------------------------------------------------------------------------------------- demo

# Other people's packages, the tests (larger than the rest), and what a program wrote: character tables, manual pages.
NOT_DEMO = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
VALIDATION_SHARE = 0.05
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def write_demo(out: Path, validation: bool, library: Path = LIBRARY) -> None:
    """Write the running Python's own library as JSONL: the training part, or the part held out for validation.

    A document is a source file, `text` and `path`; they are sorted by path.
    """
    import orjson

    with pbin.write_beside(out) as file:
        for path in _library_sources(library):
            name = path.relative_to(library).as_posix()
            if _is_validation(name) == validation:
                text = _decoded(path)
                if text:
                    file.write(orjson.dumps({"text": text, "path": name}) + b"\n")


def _library_sources(library: Path) -> list[Path]:
    found = (path.relative_to(library) for path in library.rglob("*.py"))
    names = sorted(name.as_posix() for name in found if not NOT_DEMO & set(name.parts))
    if not names:
        raise ValueError(f"this Python has no source files in {library}; run one that brings its library's sources")
    return [library / name for name in names]


def _decoded(path: Path) -> str:
    """The text of a source file; empty where it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return ""


def _is_validation(name: str) -> bool:
    """About one name in twenty, the same ones on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < VALIDATION_SHARE * 2**64
