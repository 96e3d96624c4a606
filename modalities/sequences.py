"""A `.pbin` as numbered sequences of T inputs and T targets: which tokens make a row, and which targets count.

Shapes: N sequences, T positions, W = T + 1 tokens of a row. It knows no order, no ranks and no device.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from modalities.loss import IGNORED, Batch
from modalities.packing import Packed, pack, ranges
from modalities.pbin import Pbin, open_pbin

Sampling = Literal["continuous", "documents", "best_fit"]
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


class Stream:
    """Rows cut from the stream of documents wherever they fall: row `i` is W tokens from `i * stride` on."""

    def __init__(self, num_tokens: int, width: int, stride: int, document_starts: np.ndarray) -> None:
        """`document_starts`: where documents begin, ascending; it may be empty where nobody asks for breaks."""
        self.width, self.stride, self.document_starts = width, stride, document_starts
        self.num_rows = max(0, (num_tokens - width) // stride + 1)

    def gather(self, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """What `values`, one for each token, are in the rows called `numbers`, [N, W]."""
        return sliding_window_view(values, self.width)[numbers * self.stride]

    def breaks(self, numbers: np.ndarray) -> Triple:
        """Where documents begin in these rows behind the first column: (row, column, True: it begins there)."""
        starts = numbers * self.stride
        first, end = (np.searchsorted(self.document_starts, starts + i) for i in (1, self.width))
        row = np.repeat(np.arange(len(numbers)), end - first)
        return row, self.document_starts[ranges(first, end - first)] - starts[row], np.ones(len(row), bool)

    def filled(self, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), self.width)


class PackedRows:
    """Rows of whole pieces of documents; what no token fills is 0."""

    def __init__(self, packed: Packed) -> None:
        self.packed, self.width, self.num_rows = packed, packed.capacity, packed.num_rows

    def gather(self, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """What `values`, one for each token, are in the rows called `numbers`, [N, W]."""
        pieces, row, column = self.pieces(numbers)
        lengths = self.packed.lengths_P[pieces]
        rows_NW = np.zeros((len(numbers), self.width), values.dtype)
        target = ranges(row * self.width + column, lengths)
        rows_NW.ravel()[target] = values[ranges(self.packed.starts_P[pieces], lengths)]
        return rows_NW

    def breaks(self, numbers: np.ndarray) -> Triple:
        """Where pieces begin in these rows behind the first column: (row, column, whether a document does)."""
        pieces, row, column = self.pieces(numbers)
        later = column > 0
        return row[later], column[later], self.packed.fresh_P[pieces[later]]

    def filled(self, numbers: np.ndarray) -> np.ndarray:
        """How many tokens are in each of these rows; padding follows them."""
        pieces, row, _ = self.pieces(numbers)
        return np.bincount(row, self.packed.lengths_P[pieces], len(numbers)).astype(np.int64)

    def pieces(self, numbers: np.ndarray) -> Triple:
        """The pieces in these rows: (number of the piece, index of its row in `numbers`, column where it begins)."""
        first = self.packed.first_R[numbers]
        counts = self.packed.first_R[numbers + 1] - first
        pieces, row = ranges(first, counts), np.repeat(np.arange(len(numbers)), counts)
        lengths = self.packed.lengths_P[pieces]
        begins = np.cumsum(lengths, dtype=np.int64) - lengths
        return pieces, row, begins - begins[np.cumsum(counts) - counts][row]


class Sequences:
    """The sequences `0 … count - 1` of a `.pbin`, in file order."""

    def __init__(
        self,
        path: Path,
        seq_len: int,
        vocab_size: int,
        *,
        mask: str = "",
        sampling: Sampling = "continuous",
        reuse_last_target: bool = True,
        document_mask: bool = False,
    ) -> None:
        """The arguments are those of `DataConfig`; the index is read where documents matter. Raises ValueError."""
        self.path, self.seq_len, self.vocab_size = path, seq_len, vocab_size
        self.sampling, self.document_mask, self.mask_path = sampling, document_mask, Path(mask)
        pbin = open_pbin(path)
        self.tokens = pbin.tokens
        self.mask = open_mask(self.mask_path, pbin) if mask else None
        self.rows: Stream | PackedRows
        if sampling == "continuous":
            stride = seq_len if reuse_last_target else seq_len + 1
            starts = documents(pbin)[0] if document_mask else np.empty(0, np.int64)
            self.rows = Stream(len(self.tokens), seq_len + 1, stride, starts)
        else:
            self.rows = PackedRows(pack(*documents(pbin), seq_len + 1, best=sampling == "best_fit"))
        self.count = self.rows.num_rows
        if self.count < 1:
            raise ValueError(
                f"{path} has {len(self.tokens):,} tokens, too few for one sequence of data.seq_len {seq_len:,} + 1; "
                "give a shorter data.seq_len or more data"
            )

    def facts(self) -> str:
        """How documents became sequences, in one line."""
        if isinstance(self.rows, Stream):
            return f"{self.count:,} sequences, documents cut wherever they fall"
        packed = self.rows.packed
        return (
            f"{self.count:,} sequences, {packed.padding:.1%} padding, "
            f"{packed.num_cut:,} of {packed.num_documents:,} documents cut"
        )

    def read(self, numbers: np.ndarray) -> Batch:
        """The sequences called `numbers`: `inputs` and `targets`, int64 [N, T]; with document_mask also `documents`
        (int32) and `positions` (int64). Raises ValueError if a token is beyond the vocabulary or a mask is no mask.
        """
        tokens_NW = self.rows.gather(self.tokens, numbers)
        if tokens_NW.max(initial=0) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds token {tokens_NW.max()}, but model.vocab_size is {self.vocab_size}; "
                "train with the tokenizer's vocabulary, or pack with another tokenizer"
            )
        inputs_NT, targets_NT = tokens_NW[:, :-1].astype(np.int64), tokens_NW[:, 1:].astype(np.int64)
        arrays = {"inputs": inputs_NT, "targets": targets_NT}
        if self.mask is not None:
            np.copyto(targets_NT, IGNORED, where=self.read_mask(self.mask, numbers)[:, 1:] == 0)
        if self.document_mask or isinstance(self.rows, PackedRows):
            arrays |= self.mark_documents(targets_NT, numbers)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def read_mask(self, mask: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        mask_NW = self.rows.gather(mask, numbers)
        if mask_NW.max(initial=0) > 1:
            raise ValueError(
                f"{self.mask_path} holds {mask_NW.max()}, but a mask has 1 for a token that is a target and 0 for one "
                "that is not; give data.masks and data.val_masks mask files"
            )
        return mask_NW

    def mark_documents(self, targets_NT: np.ndarray, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Ignore, in place, targets that are padding or of another document; say which token is of which document.

        Without document_mask the first token of a document counts as the target of the last token of the one before
        it, as in the stream. The first token of a piece that continues a document never does: its own document had
        it as a target already.
        """
        row, column, fresh = self.rows.breaks(numbers)
        filled_N = self.rows.filled(numbers)
        crossing = np.ones(len(row), bool) if self.document_mask else ~fresh
        targets_NT[row[crossing], column[crossing] - 1] = IGNORED
        np.copyto(targets_NT, IGNORED, where=np.arange(1, self.rows.width) >= filled_N[:, None])
        if not self.document_mask:
            return {}
        begins_NW = np.zeros((len(numbers), self.rows.width), bool)
        begins_NW[row, column] = True
        padded = np.flatnonzero(filled_N < self.rows.width)
        begins_NW[padded, filled_N[padded]] = True
        begins_NT, index_T = begins_NW[:, :-1], np.arange(self.seq_len)
        positions_NT = index_T - np.maximum.accumulate(np.where(begins_NT, index_T, 0), axis=1)
        return {"documents": begins_NT.cumsum(1, dtype=np.int32), "positions": positions_NT}


def documents(pbin: Pbin) -> tuple[np.ndarray, np.ndarray]:
    """Where each document begins and how long it is [tokens], both int64; documents without tokens are left out."""
    starts, lengths = pbin.index[pbin.index[:, 1] > 0].T // pbin.tokens.itemsize
    return starts, lengths


def open_mask(path: Path, pbin: Pbin) -> np.ndarray:
    """The mask of `pbin`, one byte for each of its tokens; a ValueError if the file cannot be that."""
    mask = open_pbin(path).tokens
    if mask.itemsize != 1:
        raise ValueError(f"{path} is no mask: its tokens have {mask.itemsize} bytes, where a mask's have 1")
    if len(mask) != len(pbin.tokens):
        raise ValueError(
            f"{path} masks {len(mask):,} tokens, but {pbin.path} has {len(pbin.tokens):,}; make them again together"
        )
    return mask
