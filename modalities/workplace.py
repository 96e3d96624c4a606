"""The folder `<out>.parts` that a packing is done in: who owns it, what it was begun with, when every rank has left it.

The main rank locks it for as long as it works, so that no second command touches it; the other ranks wait for its plan.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modalities import pbin, ranks

PLAN = "plan.json"
JOINED = "joined"
"""Lies in the folder from when the files beside `out`, and then `out`, are put there."""
POLL_SECONDS = 0.2


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if need be; `ValueError` if another process does. An empty folder is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its owner may have removed it since it was opened.
        if not folder.exists() or folder.stat().st_ino != os.fstat(descriptor).st_ino:
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise ValueError(f"another process is packing into {folder}; wait for it, or stop it") from None
    finally:
        with contextlib.suppress(OSError):  # not empty, or gone
            folder.rmdir()
        os.close(descriptor)


def begin(
    folder: Path, plan: dict[str, Any], beside: list[Path], choose: Callable[[], str], say: Callable[[str], None]
) -> str:
    """On the main rank, which holds `folder`: make it ready for `plan`; returns the engine.

    What an interrupted packing with the same plan has done stays, its engine too; of another plan nothing does.
    `beside`: the files that will lie beside the output; existing ones are refused, unless that packing made them.
    """
    old = read(folder)
    if old is None and any(folder.iterdir()):
        raise ValueError(f"{folder} is in the way, and not a folder of parts; move it")
    same = old is not None and old["plan"] == plan
    if was_joined(folder, plan):
        for path in beside:
            path.unlink(missing_ok=True)
    for path in beside:
        pbin.refuse_existing(path)
    if same:
        say(f"continuing what lies in {folder}")
    elif old is not None:
        say(f"{folder} belongs to other inputs or options: starting anew")
    for path in folder.iterdir():
        if not same or path.suffix == ".tmp" or path.name == JOINED:
            path.unlink()
    engine = old["engine"] if same and old is not None else choose()
    content = {"launch": secrets.token_hex(8), "engine": engine, "plan": plan}
    (folder / PLAN).unlink(missing_ok=True)
    with pbin.write_beside(folder / PLAN) as file:
        file.write(json.dumps(content, indent=2).encode())
    return engine


def wait_for_begin(folder: Path, plan: dict[str, Any]) -> str:
    """On another rank: wait until the main rank has made `folder` ready for `plan`; returns the engine."""
    while (found := read(folder)) is None or found["plan"] != plan:
        time.sleep(POLL_SECONDS)
    return found["engine"]


def read(folder: Path) -> dict[str, Any] | None:
    """What lies in `folder` as its plan: "launch", "engine" and "plan"; None if there is none."""
    try:
        found = json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"launch", "engine", "plan"} <= found.keys() else None


def was_joined(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether a packing with this plan had come as far as putting its files in place."""
    found = read(folder)
    return (folder / JOINED).exists() and found is not None and found["plan"] == plan


def wait_for_ranks(folder: Path) -> None:
    """On the main rank: wait until no other rank needs the parts any more."""
    found = read(folder)
    assert found is not None
    while len(list(folder.glob(f"{found['launch']}.*.left"))) < ranks.world_size() - 1:
        time.sleep(POLL_SECONDS)


def leave(folder: Path) -> None:
    """On another rank: tell the main rank that this one is done, and wait until that has joined the parts."""
    told = None
    while folder.exists():
        # The main rank may have started after this one, over parts that were whole already: tell that launch too.
        found = read(folder)
        if found is not None and found["launch"] != told:
            told = found["launch"]
            (folder / f"{told}.{ranks.rank()}.left").touch()
        time.sleep(POLL_SECONDS)


def remove(folder: Path) -> None:
    """Remove `folder`, if it is there: at once, to whoever looks at it."""
    if not folder.exists():
        return
    gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    folder.rename(gone)
    shutil.rmtree(gone)
