"""Fingerprints: the same wherever a file lies, another wherever it was changed, and read in no time."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from modalities import fingerprints
from modalities.fingerprints import BLOCKS, WHOLE, changed, fingerprint, of_files
from modalities.pbin import HEADER, finish_pbin, write_pbin


def write_large(path: Path, num_bytes: int) -> None:
    """A `.pbin` of 2-byte zeros, of which the disk holds the ends alone."""
    with path.open("wb") as file:
        finish_pbin(file, num_bytes, 2, [np.array([num_bytes // 2])])


def test_a_file_that_was_moved_or_copied_is_the_same(tmp_path: Path) -> None:
    first = tiny.write_tokens(tmp_path / "a.pbin", 1000)
    mark = fingerprint(first)
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copyfile(first, tmp_path / "elsewhere" / "b.pbin")
    first.touch()
    assert fingerprint(copy) == fingerprint(first) == mark
    assert fingerprint(tiny.write_tokens(tmp_path / "c.pbin", 1000, seed=1)) != mark


def test_any_token_of_a_small_file_counts_and_so_does_its_index(tmp_path: Path) -> None:
    path = tiny.write_tokens(tmp_path / "a.pbin", 300)
    whole, marks = path.read_bytes(), {fingerprint(path)}
    for i in range(300):
        path.write_bytes(whole[: 12 + i] + bytes([whole[12 + i] ^ 1]) + whole[13 + i :])
        marks.add(fingerprint(path))
    # The same tokens as other documents.
    tokens = np.frombuffer(whole[12:312], np.uint8)
    for first in (100, 101):
        path.unlink()
        with write_pbin(path, 100) as append:
            append(tokens, np.array([first, 300 - first]))
        marks.add(fingerprint(path))
    assert len(marks) == 303


def test_a_change_of_a_sixtythird_of_a_large_file_is_found_wherever_it_lies(tmp_path: Path) -> None:
    size, rng = 2 * WHOLE, np.random.default_rng(0)
    write_large(path := tmp_path / "a.pbin", size)
    before = fingerprint(path)
    length = size // (BLOCKS - 1)
    for start in [0, size - length, *rng.integers(0, size - length, 20).tolist()]:
        with path.open("r+b") as file:
            file.seek(HEADER.size + start)
            file.write(b"\1" * length)
            file.flush()
            assert fingerprint(path) != before
            file.seek(HEADER.size + start)
            file.write(bytes(length))
    assert fingerprint(path) == before
    with path.open("r+b") as file:  # what the docstring says it misses
        file.seek(HEADER.size + size // (BLOCKS - 1) // 2)
        file.write(b"\1")
    assert fingerprint(path) == before


def test_of_a_hundred_gigabytes_a_few_megabytes_are_read(tmp_path: Path) -> None:
    write_large(path := tmp_path / "a.pbin", 100 << 30)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    fingerprint(path)
    assert bytes_read() - before < 6 << 20


def test_files_that_are_gone_have_none_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tiny.write_tokens(tmp_path / "a.pbin", 100)
    (tmp_path / "tokenizer.json").write_text("{}")
    files = {"data.train[0]": str(path), "data.val.v": str(tmp_path / "none.pbin")}
    marks = of_files(files | {"data.tokenizer": str(tmp_path / "tokenizer.json")})
    assert marks.keys() == {"data.train[0]", "data.tokenizer"}
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.pbin is truncated"):
        fingerprints.of_files(files)


CASES = {
    "the same": ({"data.train[0]": "a"}, {"data.train[0]": "a"}, {"data.train[0]": "1"}, {"data.train[0]": "1"}, None),
    "moved": ({"data.train[0]": "a"}, {"data.train[0]": "b"}, {"data.train[0]": "1"}, {"data.train[0]": "1"}, None),
    "changed": (
        {"data.train[0]": "a"}, {"data.train[0]": "a"}, {"data.train[0]": "1"}, {"data.train[0]": "2"},
        "data.train[0] a, which has changed since",
    ),
    "another": (
        {"data.train[0]": "a"}, {"data.train[0]": "b"}, {"data.train[0]": "1"}, {"data.train[0]": "2"},
        "data.train[0] a, not b, which holds something else",
    ),
    "one more": ({}, {"data.masks[0]": "m"}, {}, {"data.masks[0]": "2"}, "data.masks[0] none, not m"),
    "one less": ({"data.masks[0]": "m"}, {}, {"data.masks[0]": "2"}, {}, "data.masks[0] m, not none"),
    "gone": ({"data.train[0]": "a"}, {"data.train[0]": "a"}, {"data.train[0]": "1"}, {}, None),
    "an older version's": ({"data.train[0]": "a"}, {"data.train[0]": "a"}, {}, {"data.train[0]": "2"}, None),
    "an older version's elsewhere": (
        {"data.train[0]": "a"}, {"data.train[0]": "b"}, {}, {"data.train[0]": "2"}, "data.train[0] a, not b",
    ),
    "tokenizer": (
        {"data.tokenizer": "a"}, {"data.tokenizer": "a"}, {"data.tokenizer": "1"}, {"data.tokenizer": "2"},
        "data.tokenizer a, which has changed since",
    ),
    "tokenizer left out": ({"data.tokenizer": "a"}, {}, {"data.tokenizer": "1"}, {}, None),
    "another set": ({"data.val.v": "v"}, {"data.val.w": "w"}, {"data.val.v": "1"}, {"data.val.w": "2"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("was", "now", "saved", "marks", "found"), CASES.values(), ids=CASES)
def test_what_has_changed_is_named(
    was: dict[str, str], now: dict[str, str], saved: dict[str, str], marks: dict[str, str], found: str | None
) -> None:
    assert [*changed(was, now, saved, marks).values()] == ([] if found is None else [found])
