"""The members of a sweep: recipes that differ from one in some fields, by every combination of values or at random.

It knows the command line's way to write values, and recipes; not how members are trained.
"""

import ast
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modalities.config import from_dict, to_dict
from modalities.recipe import Recipe
from modalities.rng import fold

MANY = 10_000
"""Combinations above this are a mistake."""


@dataclass(frozen=True)
class Axis:
    """A field that is swept: its values, or the range (log or uniform, from, to) that they are drawn from."""

    path: str
    values: tuple[Any, ...] = ()
    range: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class Member:
    number: int
    overrides: Mapping[str, Any]
    """Field → value, as JSON has it."""
    recipe: Recipe


def parse_axis(text: str) -> Axis:
    """The axis that `FIELD=VALUES` means; a ValueError in one line if it means none."""
    path, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not path or not values:
        raise ValueError(f"--grid {text!r} is not FIELD=VALUE,VALUE; write --grid optim.lr=1e-4,3e-4")
    if path == "name" or path.startswith(("log.", "resume.")):
        raise ValueError(f"--grid {path}: this changes nothing that is trained; sweep another field")
    if found := re.fullmatch(r"(log|uniform):([^:]+):([^:]+)", values):
        try:
            low, high = float(found[2]), float(found[3])
        except ValueError:
            raise ValueError(f"--grid {text!r}: a range is log:LOW:HIGH or uniform:LOW:HIGH, both numbers") from None
        if not low < high < math.inf or (found[1] == "log" and low <= 0):
            raise ValueError(f"--grid {text!r}: a range goes from a lower to a higher number, a log range from above 0")
        return Axis(path, range=(found[1], low, high))
    # Commas within brackets belong to a value.
    parsed = tuple(parse_value(part) for part in re.split(r",(?![^(\[]*[)\]])", values))
    if twice := [value for i, value in enumerate(parsed) if value in parsed[:i]]:
        raise ValueError(f"--grid {path} has {twice[0]!r} twice; give each value once")
    return Axis(path, parsed)


def parse_value(text: str) -> Any:
    """A value as JSON has it: numbers, true and false, none, brackets as lists; anything else is a text."""
    words = {"true": True, "false": False, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return json.loads(json.dumps(ast.literal_eval(text.strip())))
    except (ValueError, SyntaxError, TypeError):
        return text.strip()


def vary(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """`recipe` with the fields named by dotted paths replaced; a ValueError names a wrong one, or its value."""
    values = to_dict(recipe)
    for path, value in overrides.items():
        *outer, last = path.split(".")
        inner = values
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"unknown field {path}: {name} has no fields")
        inner[last] = value
    return from_dict(Recipe, values)


def combinations(axes: Sequence[Axis], base: Recipe, samples: int) -> list[dict[str, Any]]:
    """The overrides of each member: every combination, or `samples` of them, drawn by the recipe's seed."""
    generator = np.random.default_rng(fold(base.seed, "sweep"))
    if ranged := [axis.path for axis in axes if axis.range]:
        if not samples:
            raise ValueError(f"--grid {ranged[0]} is a range, of which values are drawn: give --samples N")
        return [{axis.path: draw(axis, base, generator) for axis in axes} for _ in range(samples)]
    sizes = [len(axis.values) for axis in axes]
    total = math.prod(sizes)
    if total > MANY and not samples:
        raise ValueError(f"--grid gives {total:,} combinations; give --samples N to draw some of them")
    chosen = np.arange(total)
    if 0 < samples < total:
        chosen = np.sort(generator.choice(total, samples, replace=False))
    indices = zip(*(index.tolist() for index in np.unravel_index(chosen, sizes)), strict=True)
    return [{axis.path: axis.values[i] for axis, i in zip(axes, each, strict=True)} for each in indices]


def draw(axis: Axis, base: Recipe, generator: Any) -> Any:
    """A random value of an axis; of four digits, which a person can read, and whole where the field is."""
    if axis.range is None:
        return axis.values[generator.integers(len(axis.values))]
    kind, low, high = axis.range
    x = math.exp(generator.uniform(math.log(low), math.log(high))) if kind == "log" else generator.uniform(low, high)
    return as_field(x, axis.path, base)


def as_field(x: float, path: str, base: Recipe) -> int | float:
    return round(x) if type(value_of(base, path)) is int else float(f"{x:.4g}")


def value_of(recipe: Recipe, path: str) -> Any:
    """The value of the field that a dotted path leads to; None if there is no such field."""
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def enlist(base: Recipe, overrides: Sequence[Mapping[str, Any]], folder: Path) -> list[Member]:
    """The members, whose own runs, where they have such, lie in the sweep's folder."""
    log = dataclasses.replace(base.log, dir=str(folder / "runs"))
    members = []
    for i, each in enumerate(overrides):
        recipe = vary(base, each)
        members.append(Member(i, each, dataclasses.replace(recipe, name=f"member-{i:03}", log=log)))
    return members
