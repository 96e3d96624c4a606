"""Whether the files that a run reads are still those that it began with, wherever they lie now.

A fingerprint is of what a file holds, not of its name or its dates. It knows files, no recipe and no checkpoint.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from modalities.pbin import open_pbin

WHOLE = 1 << 24
"""Bytes of a part (tokens, index) up to which all of it is read."""
BLOCKS, BLOCK_BYTES = 64, 1 << 16
"""What is read of a larger one: its first and its last block, and others evenly between."""

TRAINED_ON = ("data.train", "data.masks")
"""Begin the names of the files that weights come from."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """What may have changed since a run was last trained."""

    allow_changes: bool = False
    """Continue with another recipe, data or tokenizer than the run had so far. It is no longer the run that they alone
    describe; `recipe-<step>.json` keeps the recipe of the steps before."""


def of_files(files: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of each of `files` (a name in the recipe → a path), by that name; what is gone is left out.

    Raises ValueError where a `.pbin` cannot be read.
    """
    there = {name: Path(path) for name, path in files.items() if Path(path).is_file()}
    with ThreadPoolExecutor(8, "fingerprint") as threads:  # of many files on a network, each is a wait
        return dict(zip(there, threads.map(fingerprint, there.values()), strict=True))


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes; of a `.pbin`, of its size and header and of what is read of its tokens and index.

    Both of them whole up to 16 MiB, of larger ones 64 blocks of 64 KiB: so terabytes take no longer than a second. It
    misses a change that leaves the size and falls between these blocks. None falls there that is longer than 1/63 of
    the tokens; a single token in a large file most likely does.
    """
    if path.suffix != ".pbin":
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    pbin = open_pbin(path)
    index_begins = pbin.header_bytes + pbin.tokens.nbytes
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(f"{size} {pbin.header_bytes} {pbin.tokens.dtype.str} {index_begins}".encode())
        for begin, end in ((pbin.header_bytes, index_begins), (index_begins, size)):
            hash_part(digest, file, begin, end)
    return digest.hexdigest()


def hash_part(digest: "hashlib._Hash", file: BinaryIO, begin: int, end: int) -> None:
    """Feed `digest` the bytes from `begin` to `end`, or blocks of them where they are many."""
    starts, length = [begin], end - begin
    if length > WHOLE:
        starts, length = [begin + i * (length - BLOCK_BYTES) // (BLOCKS - 1) for i in range(BLOCKS)], BLOCK_BYTES
    for start in starts:
        file.seek(start)
        digest.update(file.read(length))


def changed(
    was: Mapping[str, str], now: Mapping[str, str], saved: Mapping[str, str], marks: Mapping[str, str]
) -> dict[str, str]:
    """What is no longer the same, by its name in the recipe, in words that may follow "begun with".

    `was`, `now`: the paths by these names. `saved`, `marks`: their fingerprints, those of a checkpoint and now. Where
    an older version saved none, the path tells of training data, and nothing of the rest. What is gone is passed over.
    """
    changes = {}
    for name in {**was, **now}:
        old, new = was.get(name, "none"), now.get(name, "none")
        if name in saved and name in marks:
            if saved[name] != marks[name]:
                found = f"not {new}, which holds something else" if old != new else "which has changed since"
                changes[name] = f"{name} {old}, {found}"
        elif name.startswith(TRAINED_ON) and old != new and (name not in saved or new == "none"):
            changes[name] = f"{name} {old}, not {new}"
    return changes
