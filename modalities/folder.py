"""A run's folder: whether a recipe may go on in it, from where, and the files that describe the run.

It belongs to one recipe and to the data that it began with. What is trained there is not known here.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modalities import checkpoint, dist, fingerprints, log, teacher, trained
from modalities.config import differences, printable, to_dict
from modalities.fingerprints import ResumeConfig
from modalities.pbin import write_beside
from modalities.recipe import OF_WEIGHTS, Recipe, check_ranks, from_json

# A run's folder belongs to one recipe. These fields may differ when it is continued: they change nothing that is
# computed but the order of roundings, and the random numbers of dropout.
HARMLESS = (
    "name", "log.", "checkpoint.", "resume.", "watchdog.", "eval.", "noise.", "sample.", "data.names", "data.val",
    "data.tokenizer", "data.eod", "model.attention", "loss.implementation", "loss.chunk_tokens", "parallel.micro_batch",
    "parallel.shard", "parallel.replicate", "parallel.tensor", "parallel.reshard_after_forward",
    "parallel.blocks_per_unit", "parallel.prefetch", "parallel.cpu_offload", "parallel.activation_checkpointing",
    "parallel.checkpoint_every", "parallel.sync_gradients", "parallel.compile", "guard.max_bad_steps",
    "guard.replicas_every",
)  # fmt: skip
LOCK = ".lock"
FILES = ("data.train", "data.masks")
"""These may lie elsewhere, as long as they hold the same."""


@dataclass(frozen=True)
class Place:
    """Where a run begins, or goes on."""

    newest: Path | None
    """Its newest valid checkpoint; None: it begins."""
    fingerprints: Mapping[str, str]
    """Of the files that it reads."""
    changes: tuple[str, ...]
    """What is no longer as it was up to here, by the user's leave."""

    @property
    def step(self) -> int:
        return int(self.newest.name.removeprefix("step-")) if self.newest else 0


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[Callable[[], None]]:
    """`hold()` makes a run's folder this process's own until the block ends; a ValueError if another process has it.

    A folder that is not there yet is left so. Two starts in one folder would write each other's checkpoints.
    """
    has = False
    with contextlib.ExitStack() as held:

        def hold() -> None:
            nonlocal has
            if has or not folder.is_dir():
                return
            file = held.enter_context((folder / LOCK).open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = printable(file.read().strip())
                raise ValueError(
                    f"{folder} is in use by {owner}; wait for it, stop it, or give another --name"
                ) from None
            except OSError as error:  # some file systems have no locks
                print(f"warning: {folder} cannot be locked ({error}); start no second run in it", file=sys.stderr)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            has = True

        yield hold


def find_place(recipe: Recipe, world: dist.World, hold: Callable[[], None]) -> Place:
    """Where the recipe's run goes on; a ValueError if it does not fit the ranks, or the folder is another's."""
    with dist.all_or_none():
        check_ranks(recipe, world.size)
        if world.is_main:
            hold()
        found = check_folder(recipe) if world.is_main else None
    place = dist.broadcast_from_main(found)
    assert place is not None
    return place


def check_folder(recipe: Recipe) -> Place:
    """Where the run in the recipe's folder goes on.

    A ValueError if it was begun with what gives other weights, unless the user said that it may.
    """
    path = recipe.folder / "recipe.json"
    old = from_json(path) if path.exists() else recipe
    fields = [found for found in differences(old, recipe) if not found[0].startswith(HARMLESS + FILES)]
    for field, was, now in fields:
        if field.startswith("model.") and field[6:] in OF_WEIGHTS:
            raise refusal(recipe, [f"{field} {was!r}, not {now!r}"], "which weights cannot follow")
    changes = [f"{field} {was!r}, not {now!r}" for field, was, now in fields]
    if changes and not recipe.resume.allow_changes:  # before a checkpoint is read whole, which may take long
        raise refusal(recipe, changes)

    files, were = (of.data.files | teacher.files(of.distill) for of in (recipe, old))
    newest, marks = checkpoint.newest(recipe.folder), fingerprints.of_files(files)
    saved = json.loads((newest / checkpoint.MANIFEST).read_text()).get("fingerprints", {}) if newest else {}
    differing = fingerprints.changed(were, files, saved, marks)
    for name in [name for name in differing if name.startswith("data.val")]:
        print(f"warning: {differing.pop(name)}; from here on its curve is of other data", file=sys.stderr)
    if differing and not recipe.resume.allow_changes:
        raise refusal(recipe, [*differing.values()])
    # What is not there today is compared with what it was when it is there again.
    return Place(newest, saved | marks, (*changes, *differing.values()))


def refusal(recipe: Recipe, changes: list[str], why: str = "") -> ValueError:
    empty = "" if any(recipe.folder.glob("step-*")) else " (it holds no checkpoint: you may remove it)"
    allow = "" if why else ", or --resume.allow-changes to continue it all the same"
    return ValueError(
        f"{recipe.folder} was begun with {'; '.join(changes)}{', ' + why if why else ''}{empty}; give this run another "
        f"--name, or the same recipe and files to continue that one{allow}"
    )


def describe_folder(recipe: Recipe, source: Path | None, facts: dict[str, Any], place: Place) -> None:
    """Write into the run's folder, unless an earlier start did: recipe, its source, tokenizer, environment.

    After changes the new ones take their places, and `recipe-<step>.json` and so on keep what held up to there.
    """
    files = {"environment.json": as_json(log.environment() | facts), "recipe.json": as_json(kept(recipe))}
    if source is not None and source.suffix == ".py":
        files["recipe.py"] = source.read_bytes()
    if Path(recipe.data.tokenizer).is_file():
        files["tokenizer.json"] = Path(recipe.data.tokenizer).read_bytes()
        beside = (Path(recipe.data.tokenizer).with_name(name) for name in trained.TOKENIZER_FILES)
        files |= {path.name: path.read_bytes() for path in beside if path.is_file()}
    for name, content in files.items():
        path = recipe.folder / name
        if path.exists() and (not place.changes or path.read_bytes() == content):
            continue
        old = path.with_stem(f"{path.stem}-{place.step:08}")
        if path.exists() and not old.exists():
            with write_beside(old) as file:
                file.write(path.read_bytes())
        # Never is there no recipe.json, without which a run would go on as any other.
        part = path.with_name(f"{name}.tmp")
        part.unlink(missing_ok=True)
        with write_beside(part) as file:
            file.write(content)
        part.replace(path)


def kept(recipe: Recipe) -> dict[str, Any]:
    """What is kept of a recipe; leave to change things is given for one start, and is no part of it."""
    return to_dict(replace(recipe, resume=ResumeConfig()))


def as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
