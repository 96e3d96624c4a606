"""Documents packed into rows: every piece once, no row over its capacity, and as tight as the plain algorithm."""

import numpy as np
import pytest

from modalities.packing import best_fit, cut, next_fit, pack, ranges


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The room left in each row, sorted, by the plain algorithm: one piece at a time into the tightest row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def one_after_another(lengths: list[int], capacity: int) -> list[int]:
    """The row of each piece, where one that does not fit begins the next row."""
    rows, row, room = [], 0, capacity
    for length in lengths:
        if length > room:
            row, room = row + 1, capacity
        rows.append(row)
        room -= length
    return rows


def random_lengths(seed: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(2, 40))
    # Many of few lengths, or few of many: rows are opened and filled in arrays of all sizes.
    longest = int(rng.integers(1, capacity + 1))
    return rng.integers(1, longest + 1, rng.integers(0, 80)).astype(np.int32), capacity


def test_best_fit_is_the_plain_algorithm_in_bulk() -> None:
    for seed in range(500):
        lengths, capacity = random_lengths(seed)
        rows = best_fit(lengths, capacity)
        rooms = capacity - np.bincount(rows, lengths).astype(int)
        assert sorted(rooms.tolist()) == best_fit_decreasing(lengths.tolist(), capacity), seed
        _, first = np.unique(rows, return_index=True)
        assert (np.diff(first) > 0).all(), "rows are numbered by their first piece"
        assert np.array_equal(rows, best_fit(lengths, capacity))


def test_next_fit_is_the_plain_algorithm() -> None:
    for seed in range(500):
        lengths, capacity = random_lengths(seed)
        assert next_fit(lengths, capacity).tolist() == one_after_another(lengths.tolist(), capacity), seed


@pytest.mark.parametrize("best", [False, True])
def test_every_token_has_its_place(best: bool) -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        capacity = int(rng.integers(2, 20))
        lengths = rng.integers(0, 50, rng.integers(1, 40))
        lengths[0] += 1
        packed = pack(np.cumsum(lengths) - lengths, lengths, capacity, best)
        fill = np.add.reduceat(packed.lengths_P, packed.first_R[:-1])
        assert ((fill >= 1) & (fill <= capacity)).all() and (np.diff(packed.first_R) > 0).all()
        # Of each document all tokens but the first are targets once, and the first is the first of a fresh piece.
        targets = np.sort(ranges(packed.starts_P + 1, packed.lengths_P - 1))
        begins = np.sort(packed.starts_P[packed.fresh_P])
        kept = lengths > 0
        assert np.array_equal(begins, (np.cumsum(lengths) - lengths)[kept])
        assert np.array_equal(np.union1d(begins, targets), np.arange(lengths.sum()))
        assert len(targets) + len(begins) == lengths.sum()
        assert packed.num_documents == kept.sum() and packed.num_cut == (lengths > capacity).sum()
        assert packed.padding == pytest.approx(1 - fill.sum() / (packed.num_rows * capacity))


def test_a_long_document_is_cut_into_pieces_that_share_a_token() -> None:
    document, start, length = cut(np.array([0, 3, 3]), np.array([3, 0, 12]), capacity=5)
    assert document.tolist() == [0, 2, 2, 2] and start.tolist() == [0, 3, 7, 11] and length.tolist() == [3, 5, 5, 4]
    # A document whose last token would be a piece of its own has one target less.
    assert cut(np.array([0]), np.array([9]), capacity=5)[2].tolist() == [5, 5]
    assert cut(np.array([0]), np.array([5]), capacity=5)[2].tolist() == [5]
    assert cut(np.array([0]), np.array([1]), capacity=5)[2].tolist() == [1]


def test_best_fit_leaves_hardly_any_padding_where_next_fit_leaves_much() -> None:
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(5.5, 1.2, 100_000)).astype(np.int64)
    padding = [pack(np.cumsum(lengths) - lengths, lengths, 1025, best).padding for best in (False, True)]
    assert padding[0] > 0.15 and padding[1] < 0.001


def test_no_documents_make_no_rows() -> None:
    for best in (False, True):
        packed = pack(np.zeros(2, np.int64), np.zeros(2, np.int64), 5, best)
        assert (packed.num_rows, packed.padding, packed.num_documents, packed.num_cut) == (0, 0.0, 0, 0)


def test_ranges() -> None:
    assert ranges(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert ranges(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []
