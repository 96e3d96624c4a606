"""The files' bytes, written by hand from their description, against what `pbin` writes and reads."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from modalities import pbin

DOCUMENTS = [[5, 6, 7], [1], [250, 0, 3, 3]]


def by_hand(documents: list[list[int]], size: int, header: int = 12, order: str = "<", base: int = 0) -> bytes:
    """A `.pbin` as the format's description has it."""
    data = b"".join(np.array(d, dtype=f"{order}u{size}").tobytes() for d in documents)
    head = struct.pack(f"{order}Q", len(data)) + (struct.pack(f"{order}I", size) if header == 12 else b"")
    pairs, offset = [], base
    for document in documents:
        pairs.append((offset, size * len(document)))
        offset += size * len(document)
    return head + data + pickle.dumps(pairs, protocol=4)


def with_index(pickled: bytes) -> bytes:
    """Six bytes of tokens, two each, before an index of any content."""
    return struct.pack("<QI", 6, 2) + bytes(6) + pickled


def documents_of(path: Path) -> list[list[int]]:
    opened = pbin.open_pbin(path)
    return [opened.document(i).tolist() for i in range(opened.num_documents)]


@pytest.mark.parametrize(("vocab_size", "size"), [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 4), (2**32, 4)])
def test_token_size_is_the_least_that_holds_the_largest_id(vocab_size: int, size: int) -> None:
    assert pbin.token_size(vocab_size) == size


def test_token_size_of_a_vocabulary_too_large() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pbin.token_size(2**32 + 1)


@pytest.mark.parametrize(("vocab_size", "size"), [(256, 1), (50257, 2), (128000, 4)])
def test_written_bytes_and_reading_them(tmp_path: Path, vocab_size: int, size: int) -> None:
    path = tmp_path / "a.pbin"
    with pbin.write_pbin(path, vocab_size) as append:
        for document in DOCUMENTS:
            append(np.array(document))
        assert not path.exists()
    assert path.read_bytes() == by_hand(DOCUMENTS, size)
    assert os.listdir(tmp_path) == ["a.pbin"]
    opened = pbin.open_pbin(path)
    assert opened.tokens.dtype == np.dtype(f"<u{size}")
    assert opened.tokens.tolist() == sum(DOCUMENTS, [])
    assert opened.index.tolist() == [[0, 3 * size], [3 * size, size], [4 * size, 4 * size]]
    assert documents_of(path) == DOCUMENTS
    with pytest.raises(ValueError, match="read-only"):
        opened.tokens[0] = 1


def test_a_long_index_is_pickled_as_one_list(tmp_path: Path) -> None:
    documents = [[i % 250] * (i % 3 + 1) for i in range(30_000)]  # several pickle frames
    with pbin.write_pbin(tmp_path / "a.pbin", 250) as append:
        for document in documents:
            append(np.array(document))
    assert (tmp_path / "a.pbin").read_bytes() == by_hand(documents, 1)
    pairs = [(3 * i, 2) for i in range(30_000)]
    pbin.write_idx(tmp_path / "a.idx", [np.array(pairs)])
    assert (tmp_path / "a.idx").read_bytes() == pickle.dumps(pairs, protocol=4)


@pytest.mark.parametrize(
    ("size", "header", "order", "base"),
    [(2, 12, "<", 0), (2, 12, "<", 12), (2, 12, ">", 12), (4, 8, "<", 0), (4, 8, ">", 8)],
)
def test_reads_what_modalities_wrote_over_the_years(
    tmp_path: Path, size: int, header: int, order: str, base: int
) -> None:
    (tmp_path / "a.pbin").write_bytes(by_hand(DOCUMENTS, size, header, order, base))
    assert documents_of(tmp_path / "a.pbin") == DOCUMENTS


def test_tokens_that_look_like_an_index_do_not_mislead(tmp_path: Path) -> None:
    # With the older header's 8 bytes an index would begin at the last four bytes of these tokens.
    documents = [[1, 2, 0x80, 0x04, 0x95, 0x00]]
    (tmp_path / "a.pbin").write_bytes(by_hand(documents, 1))
    assert documents_of(tmp_path / "a.pbin") == documents


def test_a_file_without_tokens_is_valid(tmp_path: Path) -> None:
    (tmp_path / "a.pbin").write_bytes(by_hand([], 2))
    assert len(pbin.open_pbin(tmp_path / "a.pbin").tokens) == 0
    assert pbin.open_pbin(tmp_path / "a.pbin").num_documents == 0


def test_the_index_is_read_only_when_asked_for(tmp_path: Path) -> None:
    whole = by_hand(DOCUMENTS, 2)
    (tmp_path / "a.pbin").write_bytes(whole[:-20] + b"\xff" * 19 + b".")
    opened = pbin.open_pbin(tmp_path / "a.pbin")
    assert opened.tokens.tolist() == sum(DOCUMENTS, [])
    with pytest.raises(ValueError, match=r"a\.pbin: the index cannot be read"):
        _ = opened.index


def test_every_truncation_is_one_clear_line(tmp_path: Path) -> None:
    whole = by_hand([[3] * 40, [46] * 40], 2)  # 46 is the pickle's last byte, ".": harder to tell
    path = tmp_path / "a.pbin"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.pbin") as caught:
            _ = pbin.open_pbin(path).index
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"x", "not a .pbin"),
        (b'{"text": "some JSON"}\n' * 20, "not a .pbin"),
        (b"\x00" * 400, "not a .pbin"),
        (b"\xff" * 400, "not a .pbin"),
        (pickle.dumps([(0, 4)], protocol=4), "not a .pbin"),
        (struct.pack("<QI", 1000, 2) + b"\x00" * 500, "is truncated"),
        (by_hand(DOCUMENTS, 2)[:-1], "is truncated"),
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.pbin").write_bytes(content)
    with pytest.raises(ValueError, match=what):
        pbin.open_pbin(tmp_path / "a.pbin")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing; make it with"):
        pbin.open_pbin(tmp_path / "a.pbin")


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    pickled = pickle.dumps([(0, 6), Exploit(tmp_path / "ran")], protocol=4)
    (tmp_path / "a.pbin").write_bytes(with_index(pickled))
    (tmp_path / "a.idx").write_bytes(pickled)
    (tmp_path / "a.jsonl").write_bytes(bytes(6))
    with pytest.raises(ValueError, match="something else than pairs"):
        _ = pbin.open_pbin(tmp_path / "a.pbin").index
    with pytest.raises(ValueError, match="something else than pairs"):
        pbin.read_idx(tmp_path / "a.idx", tmp_path / "a.jsonl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 2), (4, 2)],  # a gap
        [(0, 4), (2, 4)],  # an overlap
        [(0, 2), (2, 2)],  # not all of the data
        [(0, 3), (3, 3)],  # half a token
        [(-2, 2), (0, 6)],
        [(0, 6), (6, 2)],
        [(0, 6), (2**62, 2**62)],
        [(0, 2**64)],
        [(0, -6)],
        [(12, 6), (6, 0)],  # what Modalities' merge makes of a second file
        [(0, 6.0)],
        [("0", "6")],
        [(0, True)],
        [(0, 6, 6)],
        [[0, 6]],
        [(0, (6,))],
        {0: 6},
        (0, 6),
        None,
        [],
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, pairs: object) -> None:
    pickled = pickle.dumps(pairs, protocol=4)
    (tmp_path / "a.pbin").write_bytes(with_index(b"\x80\x04\x95" + pickled[3:]))
    with pytest.raises(ValueError, match=r"a\.pbin") as caught:
        _ = pbin.open_pbin(tmp_path / "a.pbin").index
    assert "\n" not in str(caught.value)


def test_idx_both_ways_and_its_bounds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n[]\n")
    pbin.write_idx(tmp_path / "a.idx", [np.array([(0, 2), (3, 2)])])
    assert (tmp_path / "a.idx").read_bytes() == pickle.dumps([(0, 2), (3, 2)], protocol=4)
    assert pbin.read_idx(tmp_path / "a.idx", tmp_path / "a.jsonl").tolist() == [[0, 2], [3, 2]]
    (tmp_path / "a.jsonl").write_bytes(b"{}\n[")
    with pytest.raises(ValueError, match="entry 1 of the index"):
        pbin.read_idx(tmp_path / "a.idx", tmp_path / "a.jsonl")


def test_an_existing_file_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "a.pbin"
    path.write_bytes(b"a user's own")
    with (
        pytest.raises(ValueError, match="exists already; remove it or give another --out"),
        pbin.write_pbin(path, 100),
    ):
        pytest.fail("the block was entered")
    assert path.read_bytes() == b"a user's own"


def test_a_file_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    with pytest.raises(ValueError, match="exists already"), pbin.write_beside(path) as file:
        file.write(b"ours")
        path.write_bytes(b"another's")
    assert path.read_bytes() == b"another's"
    assert os.listdir(tmp_path) == ["a.idx"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), pbin.write_pbin(tmp_path / "a.pbin", 100) as append:
        append(np.array([1, 2]))
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ids", [[3, 256], [-1, 3]])
def test_an_id_beyond_the_vocabulary_does_not_wrap_around(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"), pbin.write_pbin(tmp_path / "a.pbin", 256) as append:
        append(np.array(ids))
    assert os.listdir(tmp_path) == []
