"""How documents become rows of inputs and targets, and which targets count, against a plain reading of the file."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modalities.loss import IGNORED, Batch
from modalities.packing import pack
from modalities.pbin import write_pbin
from modalities.sequences import Sampling, Sequences

T = 8
VOCAB = 2000
SAMPLINGS: list[Sampling] = ["continuous", "documents", "best_fit"]


def write(path: Path, lengths: list[int]) -> np.ndarray:
    """Documents of these lengths in `a.pbin`, whose token i is i; and a random `mask.pbin`, which is returned."""
    mask = np.random.default_rng(0).integers(0, 2, sum(lengths))
    with write_pbin(path / "a.pbin", VOCAB) as append, write_pbin(path / "mask.pbin", 2) as append_mask:
        for first, length in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
            append(np.arange(first, first + length))
            append_mask(mask[first : first + length])
    return mask


def random_lengths(seed: int = 0) -> list[int]:
    """Documents of 0 to 29 tokens, so that some are empty, some fit and some are cut more than once."""
    return np.random.default_rng(seed).integers(0, 30, 60).tolist()


def sequences(folder: Path, **options: Any) -> Sequences:
    return Sequences(folder / "a.pbin", T, VOCAB, **options)


def read_all(data: Sequences) -> Batch:
    """All sequences; shuffled portions must give what one reading gives."""
    whole = data.read(np.arange(data.count))
    order = np.random.default_rng(1).permutation(data.count)
    for part in np.array_split(order, 3):
        for key, value in data.read(part).items():
            assert torch.equal(value, whole[key][torch.from_numpy(part)]), key
    return whole


def complaint(function: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plain_rows(lengths: list[int], sampling: Sampling, reuse: bool) -> list[list[tuple[int, bool]]]:
    """The rows as lists of (token, whether a document or a piece begins with it), and of None where padding is."""
    starts = np.cumsum(lengths) - lengths
    begins = {int(start) for start, length in zip(starts, lengths, strict=True) if length}
    if sampling == "continuous":
        stride = T if reuse else T + 1
        return [
            [(token, token in begins) for token in range(first, first + T + 1)]
            for first in range(0, sum(lengths) - T, stride)
        ]
    packed = pack(starts, np.array(lengths), T + 1, sampling == "best_fit")
    rows = []
    for first, end in itertools.pairwise(packed.first_R.tolist()):
        pieces = zip(packed.starts_P[first:end].tolist(), packed.lengths_P[first:end].tolist(), strict=True)
        rows.append([(start + i, i == 0) for start, length in pieces for i in range(length)])
    return rows


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
@pytest.mark.parametrize("reuse", [True, False], ids=["", "stride"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rows_are_those_of_a_plain_reading(
    tmp_path: Path, sampling: Sampling, reuse: bool, apart: bool, masked: bool
) -> None:
    lengths = random_lengths()
    mask = write(tmp_path, lengths)
    begins = set((np.cumsum(lengths) - lengths)[np.array(lengths) > 0].tolist())
    data = sequences(
        tmp_path,
        sampling=sampling,
        reuse_last_target=reuse,
        document_mask=apart,
        mask=str(tmp_path / "mask.pbin") if masked else "",
    )
    batch = read_all(data)
    rows = plain_rows(lengths, sampling, reuse)
    assert data.count == len(rows)
    assert batch.keys() == {"inputs", "targets"} | ({"documents", "positions"} if apart else set())
    assert all(value.shape == (data.count, T) and value.is_contiguous() for value in batch.values())
    assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
    for n, row in enumerate(rows):
        inputs, targets, documents, positions = [], [], [], []
        document = position = 0
        for t in range(T):
            if t > 0 and (t == len(row) or (t < len(row) and row[t][1])):
                document, position = document + 1, 0
            inputs.append(row[t][0] if t < len(row) else 0)
            documents.append(document)
            positions.append(position)
            position += 1
            target, begins_piece = row[t + 1] if t + 1 < len(row) else (IGNORED, False)
            if begins_piece and (apart or target not in begins):  # another document; or the middle of one
                target = IGNORED
            if masked and target != IGNORED and not mask[target]:
                target = IGNORED
            targets.append(target)
        assert batch["inputs"][n].tolist() == inputs
        assert batch["targets"][n].tolist() == targets
        if apart:
            assert batch["documents"][n].tolist() == documents and batch["positions"][n].tolist() == positions


def counted(targets: Tensor) -> list[int]:
    return sorted(targets[targets != IGNORED].tolist())


@pytest.mark.parametrize("sampling", ["documents", "best_fit"])
def test_every_token_of_a_document_but_its_first_is_a_target_once(tmp_path: Path, sampling: Sampling) -> None:
    lengths = random_lengths(1)
    write(tmp_path, lengths)
    begins = set((np.cumsum(lengths) - lengths)[np.array(lengths) > 0].tolist())
    inner = [token for token in range(sum(lengths)) if token not in begins]
    assert counted(read_all(sequences(tmp_path, sampling=sampling, document_mask=True))["targets"]) == inner
    together = counted(read_all(sequences(tmp_path, sampling=sampling))["targets"])
    assert len(together) == len(set(together)) and set(inner) < set(together)


def test_continuous_sequences_share_a_token_or_none(tmp_path: Path) -> None:
    write(tmp_path, [100])
    shared = sequences(tmp_path).read(np.arange(2))
    assert shared["inputs"][1, 0] == shared["targets"][0, -1] == T
    assert counted(read_all(sequences(tmp_path))["targets"]) == list(range(1, 12 * T + 1))
    apart = sequences(tmp_path, reuse_last_target=False)
    assert apart.count == 100 // (T + 1) and apart.read(np.arange(2))["inputs"][1, 0] == T + 1
    for length in (T, T + 1, 2 * T, 2 * T + 1, 2 * T + 2, 3 * T + 3):
        folder = tmp_path / f"{length}"
        write(folder, [length])
        for reuse, count in ((True, (length - 1) // T), (False, length // (T + 1))):
            if count:
                assert sequences(folder, reuse_last_target=reuse).count == count
            else:
                assert f"has {length} tokens" in complaint(lambda: sequences(folder, reuse_last_target=reuse))  # noqa: B023


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seq_len", [1, 2, 700])
def test_sequences_of_unusual_length(tmp_path: Path, sampling: Sampling, seq_len: int) -> None:
    lengths = random_lengths(2)
    write(tmp_path, lengths)
    data = Sequences(tmp_path / "a.pbin", seq_len, VOCAB, sampling=sampling, document_mask=True)
    batch = read_all(data)
    assert batch["targets"].shape == (data.count, seq_len)
    assert (batch["positions"] >= 0).all() and (batch["documents"].diff(dim=1) >= 0).all()


def test_one_token_documents_and_tokens_of_every_size(tmp_path: Path) -> None:
    for vocab_size in (200, 2000, 70_000):
        folder = tmp_path / f"{vocab_size}"
        with write_pbin(folder / "a.pbin", vocab_size) as append:
            for i in range(40):
                append(np.array([vocab_size - 1 - i]))
        data = Sequences(folder / "a.pbin", T, vocab_size, sampling="best_fit", document_mask=True)
        batch = read_all(data)
        assert data.count == 5 and (batch["targets"] == IGNORED).all() and (batch["positions"][:4] == 0).all()
        assert Sequences(folder / "a.pbin", T, vocab_size).read(np.zeros(1, np.int64))["inputs"][0, 0] == vocab_size - 1


def test_facts(tmp_path: Path) -> None:
    write(
        tmp_path, [4, 0, 6, 20, 3]
    )  # rows of 9: [9][9][4 + 4][6 + 3], and the cut document's pieces share a token each
    assert sequences(tmp_path, sampling="best_fit").facts() == "4 sequences, 2.8% padding, 1 of 4 documents cut"
    assert sequences(tmp_path, sampling="documents").facts() == "5 sequences, 22.2% padding, 1 of 4 documents cut"
    assert sequences(tmp_path).facts() == "4 sequences, documents cut wherever they fall"


def test_continuous_reading_needs_no_index(tmp_path: Path) -> None:
    write(tmp_path, [100])
    content = (tmp_path / "a.pbin").read_bytes()
    (tmp_path / "a.pbin").write_bytes(content[:-4] + b"xxx" + content[-1:])
    assert sequences(tmp_path).read(np.arange(3))["inputs"][2, 0] == 2 * T
    for options in ({"sampling": "documents"}, {"document_mask": True}):
        assert "a.pbin" in complaint(lambda options=options: sequences(tmp_path, **options))  # type: ignore[misc]


def test_data_that_is_missing_or_has_no_tokens(tmp_path: Path) -> None:
    assert "a.pbin is missing" in complaint(lambda: sequences(tmp_path))
    write(tmp_path, [0, 0])
    for sampling in SAMPLINGS:
        assert "a.pbin has 0 tokens" in complaint(lambda sampling=sampling: sequences(tmp_path, sampling=sampling))  # type: ignore[misc]


def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [100])
    for name, values, vocab_size in (("short", np.ones(99, int), 2), ("wide", np.ones(100, int), 2000)):
        with write_pbin(tmp_path / f"{name}.pbin", vocab_size) as append:
            append(values)
    with write_pbin(tmp_path / "two.pbin", 3) as append:
        append(np.arange(100) // 60 * 2)
    assert "none.pbin is missing" in complaint(lambda: sequences(tmp_path, mask=str(tmp_path / "none.pbin")))
    short = complaint(lambda: sequences(tmp_path, mask=str(tmp_path / "short.pbin")))
    assert "short.pbin masks 99 tokens" in short and "a.pbin has 100" in short
    assert "wide.pbin is no mask" in complaint(lambda: sequences(tmp_path, mask=str(tmp_path / "wide.pbin")))
    data = sequences(tmp_path, mask=str(tmp_path / "two.pbin"))
    data.read(np.arange(3))
    assert "two.pbin holds 2, but a mask" in complaint(lambda: data.read(np.arange(9)))
