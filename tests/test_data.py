"""From a `.pbin` to batches: order, cursor, ranks, prefetch, validation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modalities.data import DataConfig, Sequences, TrainData, ValData, sequence_numbers
from modalities.dist import World
from modalities.loss import IGNORED
from modalities.pbin import write_pbin

T = 8  # tokens a sequence
COUNT = 37  # sequences in the file
VOCAB = 512


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    """In documents of 1, 2, 3, … tokens, so that sequences and documents do not coincide."""
    with write_pbin(path, VOCAB) as append:
        first = length = 0
        while first < len(tokens):
            length += 1
            append(tokens[first : first + length])
            first += length


@pytest.fixture
def tokens(tmp_path: Path) -> np.ndarray:
    """What lies in `a.pbin`: token i is i, so that a sequence tells its number; and some more than COUNT sequences."""
    tokens = np.arange(COUNT * T + 1 + 5)
    write_tokens(tmp_path / "a.pbin", tokens)
    return tokens


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, torch.device("cpu"), None)


def train_data(
    folder: Path, batch: int = 8, micro_batch: int = 2, seed: int = 0, ranks: World | None = None
) -> TrainData:
    config = DataConfig(train=str(folder / "a.pbin"), seq_len=T, global_batch=batch)
    return TrainData(config, VOCAB, seed, micro_batch, ranks or world())


def numbers_of(inputs: Tensor) -> list[int]:
    """The numbers of the sequences [..., T], by their first token."""
    return (inputs.reshape(-1, T)[:, 0] // T).tolist()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def complaint(function: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_batches_hold_the_tokens_of_the_file_shifted_by_one(tmp_path: Path, tokens: np.ndarray) -> None:
    batch = train_data(tmp_path).read(0)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "inputs": ((4, 2, T), torch.int64),
        "targets": ((4, 2, T), torch.int64),
    }
    inputs, targets = batch["inputs"].view(-1, T), batch["targets"].view(-1, T)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for row, number in enumerate(numbers_of(inputs)):
        assert inputs[row].tolist() == tokens[number * T : number * T + T].tolist()
        assert targets[row].tolist() == tokens[number * T + 1 : number * T + T + 1].tolist()


def test_an_epoch_has_every_sequence_once_and_the_next_another_order(tmp_path: Path, tokens: np.ndarray) -> None:
    data = train_data(tmp_path)
    read = [n for samples in range(0, 4 * COUNT, 8) for n in numbers_of(data.batch(samples)["inputs"])]
    epochs = [read[e * COUNT : (e + 1) * COUNT] for e in range(4)]  # which batches of 8 cross
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in [*epochs, list(range(COUNT))]}) == 5
    other = train_data(tmp_path, seed=1)
    assert numbers_of(other.read(0)["inputs"]) != read[:8]


def test_a_batch_larger_than_an_epoch() -> None:
    numbers = sequence_numbers(3, 5 * 7, per_epoch=7, seed=0)
    assert [sorted(numbers[4 + 7 * e : 11 + 7 * e]) for e in range(4)] == [list(range(7))] * 4
    assert sequence_numbers(5, 3, per_epoch=1, seed=0).tolist() == [0, 0, 0]


def test_a_batch_is_a_pure_function_of_the_cursor(tmp_path: Path, tokens: np.ndarray) -> None:
    walking = train_data(tmp_path)
    walked = {samples: walking.batch(samples) for samples in range(0, 160, 8)}
    jumping = train_data(tmp_path)
    for samples in (152, 0, 72, 72, 80, 8):
        assert same(jumping.batch(samples), walked[samples])
        assert same(train_data(tmp_path).read(samples), walked[samples])


def test_prefetched_batches_are_those_that_are_read(tmp_path: Path, tokens: np.ndarray) -> None:
    data, ranks = train_data(tmp_path), train_data(tmp_path, ranks=world(1, 2))
    for samples in (0, 8, 16, 24, 100, 108, 3):
        assert same(data.batch(samples), data.read(samples))
        assert data.next is not None and data.next[0] == samples + 8, "the next batch is not being read"
        assert same(ranks.batch(samples), ranks.read(samples))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_same_global_batch(tmp_path: Path, tokens: np.ndarray, size: int) -> None:
    whole = train_data(tmp_path)
    parts = [train_data(tmp_path, ranks=world(rank, size)) for rank in range(size)]
    for samples in (0, 8, 32, 1000):  # the batch at 32 crosses an epoch
        for key in ("inputs", "targets"):
            together = torch.cat([part.read(samples)[key] for part in parts])
            assert torch.equal(together, whole.read(samples)[key])


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_micro_batches_only_reshape(tmp_path: Path, tokens: np.ndarray, micro_batch: int) -> None:
    cut = train_data(tmp_path, micro_batch=micro_batch).read(16)
    for key, value in train_data(tmp_path).read(16).items():
        assert cut[key].shape == (8 // micro_batch, micro_batch, T)
        assert torch.equal(cut[key].view(-1, T), value.view(-1, T))


def test_the_global_batch_does_not_change_the_order(tmp_path: Path, tokens: np.ndarray) -> None:
    eights = [n for s in (40, 48, 56) for n in numbers_of(train_data(tmp_path, batch=8).read(s)["inputs"])]
    assert numbers_of(train_data(tmp_path, batch=24).read(40)["inputs"]) == eights


@pytest.mark.parametrize("samples", [10**9, 10**15])
def test_a_start_far_into_training(tmp_path: Path, tokens: np.ndarray, samples: int) -> None:
    data = train_data(tmp_path)
    assert same(data.batch(samples), data.read(samples))
    first = samples // COUNT * COUNT  # the epoch that it lies in
    assert sorted(sequence_numbers(first, COUNT, COUNT, 0).tolist()) == list(range(COUNT))


def test_a_token_beyond_the_vocabulary_reaches_the_caller_from_the_thread(tmp_path: Path) -> None:
    tokens = np.arange(COUNT * T + 1)
    tokens[20 * T + 3] = 511
    write_tokens(tmp_path / "a.pbin", tokens)
    config = DataConfig(train=str(tmp_path / "a.pbin"), seq_len=T, global_batch=8)
    data = TrainData(config, 511, 0, 2, world())
    bad = next(samples for samples in range(0, 40, 8) if 20 in data.numbers(samples))
    for samples in range(0, bad, 8):
        data.batch(samples)
    for _ in range(2):
        message = complaint(lambda: data.batch(bad))
        assert "a.pbin holds token 511, but model.vocab_size is 511" in message
    assert TrainData(config, 512, 0, 2, world()).batch(bad)["inputs"].max() == 511


def test_data_that_is_missing_or_too_short(tmp_path: Path, tokens: np.ndarray) -> None:
    path = tmp_path / "a.pbin"
    assert "none.pbin is missing" in complaint(lambda: Sequences(tmp_path / "none.pbin", T, VOCAB))
    assert Sequences(path, len(tokens) - 1, VOCAB).count == 1
    message = complaint(lambda: Sequences(path, len(tokens), VOCAB))
    assert str(path) in message and "data.seq_len 302" in message and "has 302 tokens" in message
    write_tokens(tmp_path / "empty.pbin", np.arange(0))
    assert "has 0 tokens" in complaint(lambda: Sequences(tmp_path / "empty.pbin", T, VOCAB))
    for fields in ({"seq_len": 0}, {"global_batch": 0}):
        assert next(iter(fields)) in complaint(lambda fields=fields: DataConfig(**fields))  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------------------- validation


def val_data(folder: Path, count: int = 0, batch: int = 4, ranks: World | None = None) -> ValData:
    return ValData(DataConfig(val=str(folder / "a.pbin"), seq_len=T), VOCAB, count, batch, ranks or world())


@pytest.mark.parametrize(("count", "expected"), [(0, COUNT), (10, 10), (1, 1), (12, 12), (1000, COUNT)])
@pytest.mark.parametrize("size", [1, 3])
def test_validation_covers_every_sequence_once(
    tmp_path: Path, tokens: np.ndarray, count: int, expected: int, size: int
) -> None:
    ranks = [list(val_data(tmp_path, count, ranks=world(rank, size))) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {-(-expected // (4 * size))}, "ranks must make as many steps"
    assert {batch["inputs"].shape for batches in ranks for batch in batches} == {(4, T)}
    valid, order = 0, []
    for step in zip(*ranks, strict=True):
        for batch in step:
            counted_B = (batch["targets"] != IGNORED).sum(1)
            assert set(counted_B.tolist()) <= {0, T}, "a row counts whole or not at all"
            real_B = counted_B == T
            order += numbers_of(batch["inputs"][real_B])
            assert torch.equal(batch["inputs"][real_B, 1:], batch["targets"][real_B, :-1])
            valid += int(counted_B.sum())
    assert order == list(range(expected)), "in the order of the file"
    assert valid == expected * T


def test_validation_can_be_read_again(tmp_path: Path, tokens: np.ndarray) -> None:
    data = val_data(tmp_path)
    assert all(same(a, b) for a, b in zip(data, data, strict=True))


def test_validation_data_that_is_missing_or_beyond_the_vocabulary(tmp_path: Path, tokens: np.ndarray) -> None:
    assert "a.pbin is missing" in complaint(lambda: val_data(tmp_path / "none"))
    config = DataConfig(val=str(tmp_path / "a.pbin"), seq_len=T)
    assert "model.vocab_size is 100" in complaint(lambda: list(ValData(config, 100, 0, 4, world())))
