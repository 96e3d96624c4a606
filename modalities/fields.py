"""The value in a document: JSON, field paths like `.a.b[0]`, and any other jq program through the `jq` package.

A document that has none comes back as a `Reject` with its reason. Nothing here knows of files or tokens.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import orjson

Select = Callable[[Any], Any]
BOM = b"\xef\xbb\xbf"  # files that were joined may have one in front of any line
STEP = re.compile(r'\.?\[(-?\d+)\]|\.?\[("(?:[^"\\]|\\.)*")\]|\.([A-Za-z_]\w*)')


class Reject(NamedTuple):
    """Why a document is left out: a reason that others may share, and the detail of this one."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Texts(NamedTuple):
    """The texts of some documents, and by their number those that have none."""

    texts: list[str]
    rejects: list[tuple[int, Reject]]


def make_select(field: str) -> Select:
    """`select(value)`: what `field` leads to in a parsed document, or a `Reject`.

    `.text`, `.a.b`, `.a[0]`, `.["any key"]` are walked here, as jq would; `.` alone is the document itself. Anything
    else is a program for jq, whose first output counts; `ValueError` if it is none.
    """
    keys = parse_field(field)
    if keys is None:
        return _jq(field)
    missing = Reject(f"no field {field}")

    def select(value: Any) -> Any:
        for key in keys:
            if isinstance(key, str):
                if not isinstance(value, dict) or key not in value:
                    return missing
            elif not isinstance(value, list) or not -len(value) <= key < len(value):
                return missing
            value = value[key]
        return value

    return select


def parse_field(field: str) -> tuple[str | int, ...] | None:
    """The keys of a plain field path; None for any other jq program."""
    if not field.strip():
        raise ValueError("--field is empty; write one like .text")
    keys: list[str | int] = []
    position = 0 if field != "." else 1
    while position < len(field):
        match = STEP.match(field, position)
        if match is None or not field.startswith("."):
            return None
        number, quoted, name = match.groups()
        try:
            keys.append(int(number) if number else orjson.loads(quoted) if quoted else name)
        except orjson.JSONDecodeError:  # jq's strings can do more than JSON's
            return None
        position = match.end()
    return tuple(keys)


def _jq(program: str) -> Select:
    try:
        import jq
    except ImportError:
        raise ValueError(
            f"--field {program!r} is no plain path like .text, .a.b or .a[0], and other jq programs need the package "
            "jq (pip install 'modalities[jq]')"
        ) from None
    try:
        compiled = jq.compile(program)
    except ValueError as error:
        raise ValueError(f"--field {program!r} is no jq program: {str(error).splitlines()[0]}") from None

    def select(value: Any) -> Any:
        try:
            return compiled.input_value(value).first()
        except StopIteration:
            return Reject(f"no output of jq {program}")
        except (ValueError, TypeError, RecursionError) as error:  # what is no JSON, or nested too deep
            return Reject(f"jq {program} fails", " ".join(str(error).split()))

    return select


def value_of(item: Any, select: Select) -> Any:
    """What `select` finds in a document, or a `Reject`. Bytes are a line of JSON, anything else is parsed already."""
    if type(item) is bytes:
        item = item.removeprefix(BOM)
        try:
            item = orjson.loads(item)
        except orjson.JSONDecodeError as error:
            return _why_not_json(item, error)
    elif isinstance(item, UnicodeDecodeError):  # what a table holds in place of a text that is none
        return Reject("invalid UTF-8", str(item))
    return select(item)


def texts_of(items: Iterable[Any], select: Select, field: str) -> Texts:
    """The texts in `items`; a null, another type and an empty text are rejected."""
    texts, rejects = [], []
    for i, item in enumerate(items):
        value = value_of(item, select)
        if type(value) is str and value:
            texts.append(value)
        else:
            rejects.append((i, value if isinstance(value, Reject) else _why_not_text(value, field)))
    return Texts(texts, rejects)


def _why_not_text(value: Any, field: str) -> Reject:
    if value == "":
        return Reject("empty text")
    return Reject(f"field {field} is {'null' if value is None else 'not a string'}")


def _why_not_json(raw: bytes, error: Any) -> Reject:
    """Why orjson refused a line."""
    if not raw.strip():
        return Reject("blank line")
    try:
        raw.decode()
    except UnicodeDecodeError as problem:
        return Reject("invalid UTF-8", f"byte 0x{raw[problem.start]:02x} at {problem.start} of the line")
    for words, reason in (("surrogate", "lone surrogate"), ("depth limit", "nested too deep")):
        if words in error.msg:
            return Reject(reason, f"at character {error.pos} of the line")
    return Reject("invalid JSON", f"{error.msg} at character {error.pos} of the line")
