"""Folders that are whole or not there: files are hashed while they are written, and their list is written last.

A folder without a valid manifest does not exist. What the files hold is not known here.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from modalities.config import printable
from modalities.pbin import fsync

MANIFEST = "manifest.json"
FIRST_KEYS = {"step", "samples", "files"}
"""What a manifest held before it had a hash of its own."""

Files = dict[str, dict[str, Any]]
"""Name in the folder → {"size": bytes, "sha256": hex}."""


BYTES_PER_SYNC = 1 << 25
"""After so many the disk is told to write while the rest is hashed."""


class HashedFile:
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, raw: BinaryIO, syncing: ThreadPoolExecutor) -> None:
        self.raw, self.size, self.sha256 = raw, 0, hashlib.sha256()
        self.error: OSError | None = None
        self.syncing = syncing
        self.synced: list[Future[None]] = []

    def write(self, data: bytes | memoryview) -> int:
        with memoryview(data).cast("B") as view:
            # In blocks, which are still in the processor's cache when they are hashed.
            for start in range(0, len(view), 1 << 18):
                block = view[start : start + (1 << 18)]
                try:
                    self.raw.write(block)
                except OSError as error:
                    self.error = error
                    raise
                self.sha256.update(block)
            self.size += len(view)
            if self.size >= (len(self.synced) + 1) * BYTES_PER_SYNC:
                self.synced.append(self.syncing.submit(os.fsync, self.raw.fileno()))
            return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.raw.flush()

    def close(self) -> None:
        """The block of `hashed` ends it; who is given the file need not."""

    @property
    def facts(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.sha256.hexdigest()}


@contextmanager
def hashed(path: Path) -> Iterator[HashedFile]:
    """A new file, which is on the disk when the block ends."""
    with path.open("wb", buffering=1 << 20) as raw, ThreadPoolExecutor(1) as syncing:
        file = HashedFile(raw, syncing)
        try:
            yield file
        except RuntimeError:
            if file.error is None:
                raise
            raise file.error from None  # torch.save says "unexpected pos" of whatever it was
        raw.flush()
        for synced in file.synced:
            synced.result()  # the disk's error, which the kernel tells only once
        os.fsync(raw.fileno())


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file to the disk; its size and hash."""
    with hashed(path) as file:
        file.write(content)
    return file.facts


def finish(part: Path, path: Path, facts: Mapping[str, Any], files: Files) -> None:
    """Make `part`, all of whose `files` are on the disk, the folder `path`: what is there then survives a power cut."""
    write_manifest(part, facts, files)
    fsync(part)
    part.rename(path)
    fsync(path.parent)


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Files) -> None:
    """`facts` (`step` and `samples` among them), the `files`, and the hash of both."""
    write_file(folder / MANIFEST, as_text({**facts, "files": files}).encode())


def as_text(manifest: Mapping[str, Any]) -> str:
    """JSON, with a hash of the rest as the last entry."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}, indent=2) + "\n"


def read_facts(folder: Path) -> dict[str, Any]:
    """The manifest, with no file of the folder looked at; a ValueError where it is not what was written."""
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        step, _ = int(manifest["step"]), int(manifest["samples"])
        names = [name for name, facts in manifest["files"].items() if (int(facts["size"]), str(facts["sha256"]))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = printable(repr(error))
        raise ValueError(f"{folder} is no checkpoint: its {MANIFEST} is missing or broken ({why})") from None
    # As text, for a number's last digit may change and its value not.
    whole = text == as_text(manifest) if "sha256" in manifest else manifest.keys() == FIRST_KEYS
    # A name with a path in it would lead out of the folder.
    if not whole or any(Path(name).name != name for name in names):
        raise ValueError(f"{folder} is damaged: its {MANIFEST} is not what was saved")
    if re.fullmatch(r"step-\d+", folder.name) and int(folder.name[5:]) != step:
        raise ValueError(f"{folder} is damaged: its {MANIFEST} is of step {step}")
    return manifest


def read_sizes(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files have the sizes that it states, else a ValueError; no file is read."""
    manifest = read_facts(folder)
    for name, facts in manifest["files"].items():
        try:
            whole = (folder / name).is_file() and (folder / name).stat().st_size == facts["size"]
        except OSError as error:
            raise ValueError(f"{folder} is damaged: {name} cannot be looked at ({error.strerror})") from None
        if not whole:
            raise ValueError(f"{folder} is damaged: {name} is missing or not what was saved")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose every file has the size and hash that it states, else a ValueError."""
    manifest = read_sizes(folder)
    try:
        found = hash_files(folder / name for name in manifest["files"])
    except OSError as error:
        raise ValueError(f"{folder} is damaged: {error.filename} cannot be read ({error.strerror})") from None
    for name, facts in manifest["files"].items():
        if found[name] != facts:
            raise ValueError(f"{folder} is damaged: {name} is missing or not what was saved")
    return manifest


def hash_files(paths: Iterable[Path]) -> Files:
    """Sizes and hashes of files of one folder. One rank does it for all, so it takes all the cores of its machine."""
    paths = list(paths)
    with ThreadPoolExecutor(cores()) as pool:
        return {path.name: facts for path, facts in zip(paths, pool.map(hash_file, paths), strict=True)}


def hash_file(path: Path) -> dict[str, Any]:
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def cores(processes: int = 1) -> int:
    """The processor's cores for each of so many processes; files gain little above 8."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, there // processes))


def remove(folder: Path) -> None:
    """Delete a folder: a kill half-way leaves nothing under its name."""
    gone = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    fsync(folder.parent)
    shutil.rmtree(gone)


def sweep(run: Path) -> None:
    """Delete what killed processes left half-written or half-deleted in a run's folder."""
    for path in run.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
