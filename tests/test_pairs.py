"""The bytes of `pairs` against Python's own pickle, both ways, and pickles that are something else."""

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.pairs import FRAME_BYTES, PIECE_BYTES, read_pairs, write_pairs

Pairs = list[tuple[int, int]]
# The widths that a pickled number may have, and their borders.
NUMBERS = st.integers(0, 63).flatmap(lambda bits: st.integers(max(0, 2**bits - 3), min(2**63 - 1, 2**bits + 3)))


def written(pairs: Pairs, piece: int = 1000) -> bytes:
    array = np.array(pairs, np.int64).reshape(-1, 2)
    out = io.BytesIO()
    write_pairs(out, (array[i : i + piece] for i in range(0, len(array), piece)))
    return out.getvalue()


def read(pickled: bytes, behind: bytes = b"") -> Pairs:
    pieces = list(read_pairs(io.BytesIO(pickled + behind), len(pickled)))
    return [(int(a), int(b)) for piece in pieces for a, b in piece]


def documents(count: int, seed: int = 0) -> Pairs:
    lengths = np.random.default_rng(seed).integers(1, 100_000, count)
    return list(zip((np.cumsum(lengths) - lengths).tolist(), lengths.tolist(), strict=True))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=30), st.integers(1, 7))
def test_few_pairs_both_ways(pairs: Pairs, piece: int) -> None:
    pickled = pickle.dumps(pairs, protocol=4)
    assert written(pairs, piece) == pickled
    assert read(pickled) == pairs
    assert read(pickle.dumps(pairs, protocol=5)) == pairs


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 1999, 2000, 2001, 7001, 50_000])
@pytest.mark.parametrize("piece", [999, 4096])
def test_batches_and_frames_are_the_picklers(count: int, piece: int) -> None:
    pairs = documents(count)
    pickled = pickle.dumps(pairs, protocol=4)
    assert written(pairs, piece) == pickled
    assert read(pickled) == pairs


@pytest.mark.parametrize("first", range(FRAME_BYTES // 9 - 12, FRAME_BYTES // 9 + 4))
def test_a_frame_that_is_full_at_any_place_of_a_pair(first: int) -> None:
    pairs = [(70_000, 3)] * first + [(2**40, 2**33), (5, 300)] * 20
    pairs = [(a + 0, b + 0) for a, b in pairs]  # tuples of their own: the pickler would only point at an equal one
    assert written(pairs) == pickle.dumps(pairs, protocol=4)
    assert read(written(pairs)) == pairs


@pytest.mark.parametrize("pair", [(0x94869486, 0x8694), (0x86948694, 0x65289486), (0x86, 0x94), (0x2865, 0x94862865)])
def test_numbers_that_look_like_opcodes(pair: tuple[int, int]) -> None:
    pairs = [(pair[0], pair[1] + i % 2) for i in range(5000)]
    assert read(pickle.dumps(pairs, protocol=4)) == pairs


def test_more_than_one_piece_and_something_behind() -> None:
    pairs = documents(2 * PIECE_BYTES // 12)
    pickled = pickle.dumps(pairs, protocol=4)
    assert len(pickled) > 2 * PIECE_BYTES
    assert read(pickled, behind=b"more") == pairs


def test_every_truncation_is_an_error() -> None:
    for pairs in ([], [(1, 2)], documents(40), documents(6000)):
        pickled = pickle.dumps(pairs, protocol=4)
        for length in {*range(min(200, len(pickled))), *range(0, len(pickled), 997), len(pickled) - 1}:
            with pytest.raises(ValueError, match="breaks off|not a list|not a pickle|something else"):
                read(pickled[:length])


class Exploit:
    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.args


@pytest.mark.parametrize(
    "value",
    [
        None, {}, (), "text", [1, 2], [[1, 2]], [(1,)], [(1, 2, 3)], [(1, 2.0)], [(1, "2")], [(1, None)], [(1, True)],
        [(1, (2, 3))], [(1, 2), None], [(2**64, 1)], [(10**30, 1)], Exploit(print, "code ran"),
        [Exploit(print, "code ran")], [(1, Exploit(print, "code ran"))], [(1, 2), (3, 4), Exploit(print, "code ran")],
    ],
)  # fmt: skip
def test_whatever_is_no_list_of_pairs_is_refused(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        read(pickle.dumps(value, protocol=4))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x04",
        b"\x80\x02]q\x00K\x01K\x02\x86q\x01a.",  # protocol 2
        b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"]\x94.",  # a frame beyond the file
        b"\x80\x04]\x94r\xff\xff\xff\x7f.",  # a place in the memo that would take gigabytes
        b"\x80\x04]\x94(K\x01K\x02\x86\x94e.x",
        b"\x80\x04]\x94K\x01K\x02\x86\x94K\x01K\x02\x86\x94a.",
        b"\x80\x04]\x94(" + b"\x86\x94" * 10_000 + b"e.",
        b"\x80\x04]\x94(" + b"\x8a\xff" * 10_000 + b"e.",
        b"\x80\x04]\x94(" + b"K\x86\x94" * 400_000 + b"e.",
    ],
)
def test_hostile_pickles_are_refused(pickled: bytes) -> None:
    with pytest.raises(ValueError):
        read(pickled)
