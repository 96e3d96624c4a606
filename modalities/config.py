"""Frozen dataclasses to JSON and back, with errors that name the field. It knows no particular config."""

import contextlib
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

LONGEST = 200  # characters of a file that an error repeats
# It is slow, and a file may hold a hundred thousand of one class.
hints_of: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as what JSON holds: nested dicts, lists, strings, numbers, booleans and None."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """The inverse of `to_dict`. A field left out takes its default; a wrong one raises a ValueError that names it."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or cls.__name__} should be a JSON object, not {printable(repr(values))}")
    hints = hints_of(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    path = f"{where}." if where else ""
    for name in values:
        if name not in known:
            raise ValueError(f"unknown field {printable(path + name)}; {cls.__name__} has {', '.join(known)}")
    try:
        return cls(**{name: _typed(hints[name], value, f"{path}{name}") for name, value in values.items()})
    except TypeError as error:  # a required field is left out
        raise ValueError(f"{where or cls.__name__}: {error}") from None


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` from JSON as the type that `hint` says, or a ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        # The value's own type comes first, for an int would do for a float too.
        for member in sorted(args, key=lambda member: member is not type(value)):
            with contextlib.suppress(ValueError):
                return _typed(member, value, where)
    if origin is Literal and any(type(value) is type(choice) and value == choice for choice in args):
        return value
    if origin is tuple and isinstance(value, list):
        hints = [args[0]] * len(value) if args[1:] == (...,) else args
        if len(hints) == len(value):
            return tuple(_typed(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(args[1], v, f"{where}.{printable(key)}") for key, v in value.items()}
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    found = printable(repr(value))
    if origin is Literal:
        raise ValueError(f"{where} is {found}, but should be one of {', '.join(map(repr, args))}")
    raise ValueError(f"{where} is {found}, but should be {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    return hint.__name__ if origin is None else str(hint)


def printable(text: str) -> str:
    """What a file says as a part of one line: nothing in it that ends a line or commands a terminal, nor too much."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST])
    return shown + "…" * (len(text) > LONGEST)


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in `a`, value in `b`) of every field in which two dataclasses of one type differ."""
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(x) and type(x) is type(y):
            yield from differences(x, y, f"{where}{f.name}.")
        elif x != y:
            yield f"{where}{f.name}", x, y
