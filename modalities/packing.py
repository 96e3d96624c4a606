"""Documents packed into rows of a fixed number of tokens: one after another, or by best fit.

It sees lengths alone, no file and no token. N documents are cut into P pieces of at most `capacity` tokens, which
fill R rows; all of it in bulk, so that ten million documents take seconds.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Packed:
    """Pieces of documents, row after row and in file order within a row: 13 bytes a piece and 8 bytes a row."""

    capacity: int
    """Tokens that a row holds."""
    first_R: np.ndarray
    """Row r holds the pieces `first_R[r] … first_R[r + 1] - 1`, int64 [R + 1]."""
    starts_P: np.ndarray
    """Where each piece begins among the tokens, int64."""
    lengths_P: np.ndarray
    """Its tokens, at least 1, int32."""
    fresh_P: np.ndarray
    """Whether it begins a document and does not continue one, bool."""
    num_documents: int
    num_cut: int
    """Documents that are more than one piece."""

    @property
    def num_rows(self) -> int:
        return len(self.first_R) - 1

    @property
    def padding(self) -> float:
        """The share of the rows that no token fills."""
        return 1 - int(self.lengths_P.sum(dtype=np.int64)) / (self.num_rows * self.capacity) if self.num_rows else 0.0


def pack(starts_N: np.ndarray, lengths_N: np.ndarray, capacity: int, best: bool) -> Packed:
    """Pack documents, given where they begin and their numbers of tokens, into rows: by `best_fit` or `next_fit`."""
    document_P, starts_P, lengths_P = cut(starts_N, lengths_N, capacity)
    fresh_P = np.diff(document_P, prepend=-1) != 0
    row_P = best_fit(lengths_P, capacity) if best else next_fit(lengths_P, capacity)
    order_P = np.argsort(row_P, kind="stable")
    return Packed(
        capacity=capacity,
        first_R=np.concatenate(([0], np.cumsum(np.bincount(row_P)))),
        starts_P=starts_P[order_P],
        lengths_P=lengths_P[order_P],
        fresh_P=fresh_P[order_P],
        num_documents=int(fresh_P.sum()),
        num_cut=len(np.unique(document_P[~fresh_P])),
    )


def cut(starts_N: np.ndarray, lengths_N: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of at most `capacity` tokens that documents fall into, in file order: (document, start, length).

    Two pieces of a document share one token, the last target of the one and the first input of the other: so each
    token of a document but its first is a target once. Documents without tokens have no piece.
    """
    step = capacity - 1
    pieces_N = np.where(lengths_N > 0, np.maximum(1, -(-(lengths_N - 1) // step)), 0)
    document_P = np.repeat(np.arange(len(lengths_N)), pieces_N)
    offset_P = ranges(np.zeros_like(pieces_N), pieces_N) * step
    lengths_P = np.minimum(lengths_N[document_P] - offset_P, capacity).astype(np.int32)
    return document_P, starts_N[document_P] + offset_P, lengths_P


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`start … start + length - 1` of each pair, one after another, int64 [lengths.sum()]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def next_fit(lengths_P: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64 [P], where a piece that does not fit behind the one before it begins a row."""
    ends_P = np.cumsum(lengths_P, dtype=np.int64)
    # The first piece of the next row, should this piece be the first of a row.
    next_P = memoryview(np.searchsorted(ends_P, ends_P - lengths_P + capacity, side="right"))
    begins_P = np.zeros(len(lengths_P), bool)
    piece = 0
    while piece < len(begins_P):
        begins_P[piece] = True
        piece = next_P[piece]
    return np.cumsum(begins_P) - 1


def best_fit(lengths_P: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64 [P], by best-fit-decreasing bin packing; rows are numbered by their first piece.

    The longest piece goes first, each into the row with the least room that still holds it. Rows with the same room
    are interchangeable, and so are pieces of the same length: it places whole arrays of them at once.
    Source: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    # Numbers of 16 bits are sorted in linear time. A stable order makes the packing a function of the lengths alone.
    order_P = np.argsort((capacity - lengths_P).astype(np.min_scalar_type(capacity)), kind="stable")
    row_P = np.empty(len(lengths_P), np.int64)
    with_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # room → rows, in arrays
    rooms = 0  # bit r: some row has room r
    num_rows = placed = 0
    counts = np.bincount(lengths_P)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows = with_room[room].pop()
                rooms ^= (not with_room[room]) << room
            else:
                room = capacity
                rows = np.arange(num_rows, num_rows - (-left // (capacity // length)))
                num_rows += len(rows)
            # A row that takes one is the tightest for the next, until no more fit: so each takes as many as it can.
            fill = room // length
            full, rest = np.split(rows, [left // fill])
            partly = rest[: left - fill * len(full)][:1]
            for some, pieces in ((full, fill), (partly, left - fill * len(full)), (rest[len(partly) :], 0)):
                if not len(some):
                    continue
                row_P[order_P[placed : placed + len(some) * pieces]] = np.repeat(some, pieces)
                placed += len(some) * pieces
                left -= len(some) * pieces
                if room > length * pieces:
                    with_room[room - length * pieces].append(some)
                    rooms |= 1 << (room - length * pieces)
    return number_by_first(row_P, num_rows)


def number_by_first(row_P: np.ndarray, num_rows: int) -> np.ndarray:
    """The same rows, numbered in the order of their first pieces: the first rows have the beginning of a file."""
    first_R = np.empty(num_rows, np.int64)
    first_R[row_P[::-1]] = np.arange(len(row_P))[::-1]  # of a row's pieces the last assigned, so the first, remains
    begins_P = np.zeros(len(row_P), bool)
    begins_P[first_R] = True
    return (np.cumsum(begins_P) - 1)[first_R][row_P]
