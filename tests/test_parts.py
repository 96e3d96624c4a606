"""Parts are joined in the order of the input; what lies in order stays where it is, and nothing that a journal tells of
is lost before the whole is there."""

import os
from pathlib import Path

import numpy as np
import pytest

from modalities import pbin
from modalities.parts import Counts, Writer, finished, join, path_of, read_journal


def write(folder: Path, portions: dict[str, list[int]]) -> None:
    """The portions that each process has packed, in its order: portion i is two documents of i + 1 tokens, all i."""
    for name, numbers in portions.items():
        with Writer(folder / f"{name}.fastokens") as writer:
            for i in numbers:
                tokens, lengths = np.full(2 * (i + 1), i, np.uint16), np.full(2, i + 1)
                writer.add(tokens, lengths, b"", Counts(documents=2, packed=2, tokens=len(tokens)))
                writer.finish(i)


@pytest.mark.parametrize(
    ("portions", "moved"),
    [
        ({"0": [0, 1, 2, 3]}, True),
        ({"0": [0, 1], "1": [2, 3]}, True),
        ({"0": [0, 1], "1": [2], "2": [3]}, True),
        ({"1": [0, 1, 2], "0": [3]}, True),
        ({"0": [0, 2], "1": [1, 3]}, False),  # 2 must stay readable until the end
        ({"0": [2, 3], "1": [0, 1, 3]}, False),
        ({"0": [1, 0], "1": [2, 3]}, False),
    ],
)
def test_in_the_order_of_the_input(tmp_path: Path, portions: dict[str, list[int]], moved: bool) -> None:
    write(tmp_path, portions)
    found = finished(tmp_path, "fastokens", with_skips=True)
    done = [found[i] for i in range(4)]
    before = {name: path_of(tmp_path / f"{name}.fastokens", "tokens").read_bytes() for name in portions}
    join(done, tmp_path / "joined.tmp", tmp_path / "out.pbin", 2)
    opened = pbin.open_pbin(tmp_path / "out.pbin")
    assert [opened.document(i).tolist() for i in range(opened.num_documents)] == [
        [i] * (i + 1) for i in range(4) for _ in range(2)
    ]
    first = done[0].stem.name.split(".")[0]
    for name, content in before.items():
        path = path_of(tmp_path / f"{name}.fastokens", "tokens")
        assert not path.exists() if moved and name == first else path.read_bytes() == content


def test_a_portion_is_entered_once_it_is_on_the_disk(tmp_path: Path) -> None:
    write(tmp_path, {"0": [0, 1, 2]})
    stem = tmp_path / "0.fastokens"
    assert [entry.portion for entry in read_journal(stem)] == [0, 1, 2]
    with path_of(stem, "tokens").open("r+b") as file:
        file.truncate(read_journal(stem)[-1].end["tokens"] - 1)
    assert [entry.portion for entry in read_journal(stem)] == [0, 1]


def test_what_the_disk_refuses_ends_the_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), Writer(tmp_path / "0.fastokens") as writer:
        writer.add(np.zeros(1, np.uint16), np.ones(1, np.int64), b"", Counts(documents=1, packed=1, tokens=1))
        unwritable = os.open(path_of(writer.stem, "journal"), os.O_RDONLY)
        os.dup2(unwritable, writer.files["journal"].fileno())
        os.close(unwritable)
        writer.finish(0)  # whose thread finds out
    assert read_journal(tmp_path / "0.fastokens") == []
