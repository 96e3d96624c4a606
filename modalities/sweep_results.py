"""What a sweep leaves: `results.jsonl`, a table, `sweep.png`, and the best member as a recipe file `best.py`.

It knows members by their number, what they have other than the base recipe, and how they ended.
"""

import dataclasses
import itertools
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modalities.recipe import Recipe

POINTS = 200
"""Of a curve that is kept."""
LAST = 0.1
"""Share of the steps whose mean is the final training loss."""
Value = Any
"""A field's value as JSON has it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a member ended: a line of `results.jsonl`."""

    member: int
    overrides: Mapping[str, Value]
    """Field → value: what it has other than the base recipe."""
    loss: float | None
    """Training loss, the mean of the last tenth of its steps [nats per token]; None: it diverged."""
    val: Mapping[str, float | None]
    """Loss by name of the validation set."""
    diverged: int | None
    """The step from which on it was not finite."""
    seconds: float
    """Its share of the time that it and those that it trained with took."""
    together: int
    """Members that it trained with, itself included."""
    curve: Sequence[tuple[int, float]]
    """(step, mean loss of the steps since the point before)."""
    stopped: int | None = None
    """The step after which it was not worth going on; its losses are those it had there."""

    @property
    def score(self) -> float:
        """What members are ranked by: the mean over the validation sets, or else the training loss."""
        losses = [self.loss] if not self.val else [*self.val.values()]
        return math.inf if self.diverged or None in losses else sum(x for x in losses if x is not None) / len(losses)

    @property
    def final_score(self) -> float:
        """Infinite for one that has not come to its end."""
        return math.inf if self.stopped else self.score

    @property
    def standing(self) -> tuple[float, int, float, int]:
        """Sorts members, the best first: those that came to their end, then those stopped late, early, diverged."""
        return (self.final_score, -(self.stopped or 0), self.score, self.member)


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A curve as at most POINTS of its points, each with the mean loss since the one before."""
    count = min(len(points), POINTS)
    edges = [i * len(points) // count for i in range(count + 1)] if count else []
    return [(points[b - 1][0], sum(loss for _, loss in points[a:b]) / (b - a)) for a, b in itertools.pairwise(edges)]


def final_loss(curve: Sequence[tuple[int, float]], steps: int) -> float | None:
    """The mean of a curve's points in the last tenth of `steps`."""
    last = [loss for step, loss in curve if step > (1 - LAST) * steps]
    return sum(last) / len(last) if last else None


def append(folder: Path, results: Sequence[Result]) -> None:
    """Add lines to `results.jsonl`, at once; they are on the disk then."""
    path = folder / "results.jsonl"
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")  # a killed process broke off within a line
    lines = "".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in results)
    with path.open("ab") as file:
        file.write(("" if whole else "\n").encode() + lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[int, Result]:
    """The results so far, by the members' numbers."""
    path, found = folder / "results.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = Result(**json.loads(line))
        except (json.JSONDecodeError, TypeError):  # a killed process broke off within it; the member is run again
            continue
        found[result.member] = result
    return found


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside `path`, and put it in its place."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    beside.write_bytes(content)
    beside.replace(path)


# ----------------------------------------------------------------------------------------------------------- the table


def table(results: Sequence[Result], axes: Sequence[str]) -> str:
    """A row for each member, the best first."""
    sets = list(dict.fromkeys(name for result in results for name in result.val))
    rows = [["member", *axes, "loss", *(f"val/{name}" for name in sets), "ended"]]
    for result in sorted(results, key=lambda result: result.standing):
        values = [shown(result.overrides.get(axis)) for axis in axes]
        losses = [number(result.loss), *(number(result.val.get(name)) for name in sets)]
        rows.append([f"{result.member}", *values, *losses, ended(result)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def ended(result: Result) -> str:
    """How, if not after its last step."""
    if result.diverged:
        return f"diverged at step {result.diverged}"
    return f"stopped after step {result.stopped}" if result.stopped else ""


def number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def shown(value: Value) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


# --------------------------------------------------------------------------------------------------------- the picture


def is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_log(values: Sequence[Value]) -> bool:
    """Whether an axis of these numbers should be logarithmic: they are positive and span a factor of 8."""
    return min(values) > 0 and max(values) / min(values) >= 8


def plot(results: Sequence[Result], axes: Sequence[str], title: str, path: Path) -> None:
    """Draw final loss against each swept value, and the members' curves, coloured by the first value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(axes), 3)
    rows = -(-len(axes) // columns)
    figure = pyplot.figure(figsize=(max(8.0, 4.2 * columns), 3.6 * rows + 4.2), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.0] * rows + [1.15])
    for i, axis in enumerate(axes):
        draw_axis(figure.add_subplot(grid[i // columns, i % columns]), results, axis)
    draw_curves(figure.add_subplot(grid[rows, :]), results, axes[0])
    figure.suptitle(title, fontsize=13)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    figure.savefig(beside, dpi=150, format="png")
    pyplot.close(figure)
    beside.replace(path)


def places(results: Sequence[Result], axis: str) -> tuple[list[float], list[str]]:
    """Where each member lies on an axis; the names of the places 0, 1, … where its values are no numbers, else none."""
    values = [result.overrides[axis] for result in results]
    if all(map(is_number, values)) and len(set(map(str, values))) > 1:
        return [float(value) for value in values], []
    names = list(dict.fromkeys(map(shown, values)))
    return [float(names.index(shown(value))) for value in values], names


def draw_axis(panel: Any, results: Sequence[Result], axis: str) -> None:
    """Final loss against one swept value: a point for each member, a line through the best of each value."""
    positions, names = places(results, axis)
    finite = [(x, r.final_score) for x, r in zip(positions, results, strict=True) if math.isfinite(r.final_score)]
    best: dict[float, float] = {}
    for x, y in finite:
        best[x] = min(y, best.get(x, math.inf))
    if finite:
        # Between names there is nothing for a line to pass through.
        style = {"linestyle": "none", "marker": "_", "markersize": 22} if names else {"linestyle": "-"}
        panel.plot(
            *zip(*sorted(best.items()), strict=True),
            **style,
            color="#4477aa",
            linewidth=1.5,
            label="best of each value",
        )
        panel.scatter(*zip(*finite, strict=True), s=26, color="#4477aa", alpha=0.55, linewidths=0, zorder=3)
        x, y = min(finite, key=lambda point: point[1])
        panel.scatter([x], [y], s=150, marker="*", color="#ee8866", zorder=4, label=f"best: {y:.3f}")
    gone = {"diverged": ("x", "#cc3311", 0.95), "stopped early": ("v", "#aaaaaa", 0.88)}
    for label, (marker, color, height) in gone.items():
        those = [x for x, r in zip(positions, results, strict=True) if left(r) == label]
        if those:
            heights, across = [height] * len(those), panel.get_xaxis_transform()
            # Not `scatter`, whose marks would not widen the axis.
            panel.plot(those, heights, marker, transform=across, color=color, label=label)
    if names:
        panel.set_xticks(range(len(names)), names, rotation=20 if max(map(len, names)) > 8 else 0)
        panel.margins(x=0.15)
    else:
        if is_log(positions):
            panel.set_xscale("log")
        if len(set(positions)) <= 6:  # the values themselves
            panel.set_xticks(sorted(set(positions)), [shown(x) for x in sorted(set(positions))])
            panel.minorticks_off()
    measure = "validation loss" if results[0].val else "training loss"
    tidy(panel, axis, f"final {measure} [nats per token]")
    panel.legend(frameon=False, fontsize=8)


def left(result: Result) -> str:
    """What its mark says that a member has in place of a final loss."""
    if math.isfinite(result.final_score):
        return ""
    return "stopped early" if result.stopped else "diverged"


def draw_curves(panel: Any, results: Sequence[Result], axis: str) -> None:
    """The training loss of all members, coloured by where they lie on an axis; the best one thick."""
    from matplotlib import colormaps

    positions, names = places(results, axis)
    scale = [math.log(x) for x in positions] if not names and is_log(positions) else positions
    low, span = min(scale), (max(scale) - min(scale)) or 1.0
    best = min(results, key=lambda result: result.final_score).member
    labelled: set[str] = set()
    for place, result in zip(scale, results, strict=True):
        if not result.curve:
            continue
        label = shown(result.overrides[axis])
        panel.plot(
            *zip(*result.curve, strict=True),
            color=colormaps["viridis"](0.9 * (place - low) / span),
            linewidth=2.2 if result.member == best else 1.0,
            linestyle="--" if result.diverged else "-",
            label=None if label in labelled else label,
            zorder=3 if result.member == best else 2,
        )
        labelled.add(label)
    ends = [loss for result in results for _, loss in result.curve if not result.diverged]
    if ends:  # one that has gone astray must not flatten the others
        panel.set_ylim(min(ends) - 0.05 * (max(ends) - min(ends)), sorted(ends)[int(0.995 * (len(ends) - 1))] * 1.03)
    tidy(panel, "step", "training loss [nats per token]")
    panel.legend(title=axis, frameon=False, fontsize=8, ncols=2 if len(labelled) > 6 else 1)


def tidy(panel: Any, x: str, y: str) -> None:
    panel.set(xlabel=x, ylabel=y)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------------ the best member


def as_python(recipe: Recipe, docstring: str) -> str:
    """A recipe file that spells `recipe` out, as far as it differs from the defaults."""
    classes: set[type] = set()
    text = spelled(recipe, "", classes)
    imports = [
        f"from {module} import {', '.join(sorted(cls.__name__ for cls in classes if cls.__module__ == module))}"
        for module in sorted({cls.__module__ for cls in classes})
    ]
    return f'"""{docstring}"""\n\n' + "\n".join(imports) + f"\n\nrecipe = {text}\n"


def spelled(value: Any, indent: str, classes: set[type]) -> str:
    """`value` in Python; the classes that it takes are added to `classes`."""
    if isinstance(value, tuple):
        items = [spelled(item, indent, classes) for item in value]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    classes.add(type(value))
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if differs(field, value)}
    inner = indent + "    "
    items = [f"{name}={spelled(item, inner, classes)}" for name, item in fields.items()]
    line = f"{type(value).__name__}({', '.join(items)})"
    if len(line) < 90 - len(indent) and "\n" not in line:
        return line
    return f"{type(value).__name__}(\n" + "".join(f"{inner}{item},\n" for item in items) + f"{indent})"


def differs(field: dataclasses.Field, config: Any) -> bool:
    return field.default is dataclasses.MISSING or getattr(config, field.name) != field.default
