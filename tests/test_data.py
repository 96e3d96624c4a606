"""From a `.pbin` to batches: order, cursor, ranks, prefetch, validation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modalities.data import DataConfig, TrainData, ValData, open_val
from modalities.dist import World
from modalities.loss import IGNORED
from modalities.mixture import Stage, sequence_numbers
from modalities.pbin import write_pbin
from modalities.sequences import Sequences

T = 8  # tokens a sequence
COUNT = 37  # sequences in the file
VOCAB = 512


def write_tokens(path: Path, tokens: np.ndarray, vocab_size: int = VOCAB) -> None:
    """In documents of 1, 2, 3, … tokens, so that sequences and documents do not coincide."""
    with write_pbin(path, vocab_size) as append:
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
    config = DataConfig(train=(str(folder / "a.pbin"),), seq_len=T, global_batch=batch)
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
    assert sorted(sequence_numbers(first + np.arange(COUNT), COUNT, 0).tolist()) == list(range(COUNT))


def test_a_token_beyond_the_vocabulary_reaches_the_caller_from_the_thread(tmp_path: Path) -> None:
    tokens = np.arange(COUNT * T + 1)
    tokens[20 * T + 3] = 511
    write_tokens(tmp_path / "a.pbin", tokens)
    config = DataConfig(train=(str(tmp_path / "a.pbin"),), seq_len=T, global_batch=8)
    data = TrainData(config, 511, 0, 2, world())
    bad = next(samples for samples in range(0, 40, 8) if 20 in data.order(samples)[1])
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


HALF = Stage(tokens=100, weights=(0.5, 0.5))
BAD: list[tuple[dict[str, Any], str]] = [
    ({"seq_len": 0}, "data.seq_len is 0"),
    ({"global_batch": 0}, "data.global_batch is 0"),
    ({"train": "a.pbin"}, "data.train is 'a.pbin', but must be a tuple: ('a.pbin',)"),
    ({"val": "a.pbin"}, "data.val is 'a.pbin', but must be a tuple: ('a.pbin',), or () for none"),
    ({"val": ("",)}, "data.val has an empty entry"),
    ({"train": ()}, "data.train is empty"),
    ({"train": ("x/a.pbin", "y/a.pbin")}, "data.train has two files called 'a'; give each a name of its own"),
    ({"train": ("x/a.pbin", "y/b.pbin"), "names": ("a", "a")}, "data.train has two files called 'a'"),
    ({"val": ("x/a.pbin", "y/a.pbin")}, "data.val has two files called 'a'; rename a file"),
    ({"ramp": ((0, 8),)}, "data.ramp has (0, 8), but tokens and sequences must be at least 1"),
    ({"ramp": ((10, 0),)}, "data.ramp has (10, 0), but tokens"),
    ({"ramp": ((10, 8), (10, 16))}, "data.ramp: tokens 10 come after 10, but must ascend"),
    ({"names": ("a", "b")}, "data.names: 2 given for the 1 file(s) of data.train"),
    ({"weights": (0.5, 0.5)}, "data.weights: 2 given for the 1 file(s)"),
    ({"weights": (-1.0,)}, "data.weights are (-1.0,), but must be finite"),
    ({"masks": ("a.pbin", "")}, "data.masks: 2 given for the 1 file(s)"),
    ({"val_masks": ("a.pbin", "")}, "data.val_masks: 2 given for the 1 file(s) of data.val"),
    ({"stages": (HALF,)}, "data.stages: weights: 2 given for the 1 file(s)"),
    ({"train": ("a", "b"), "stages": (HALF, HALF)}, "data.stages: tokens 100 come after 100, but must ascend"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message.partition(",")[0] for _, message in BAD])
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    assert message in complaint(lambda: DataConfig(**fields))


# --------------------------------------------------------------------------------------------------- ramp of the batch


def ramped(folder: Path, ranks: World | None = None) -> TrainData:
    """Batches of 4; of 8 from 100 tokens on (12.5 sequences), and of 24 from 400 on (50 sequences)."""
    config = DataConfig(train=(str(folder / "a.pbin"),), seq_len=T, global_batch=4, ramp=((100, 8), (400, 24)))
    return TrainData(config, VOCAB, 0, 2, ranks or world())


def test_a_ramp_says_how_large_each_step_is(tmp_path: Path, tokens: np.ndarray) -> None:
    config, samples, sizes = ramped(tmp_path).config, [0], []
    for _ in range(12):
        sizes.append(config.batch_at(samples[-1]))
        samples.append(samples[-1] + sizes[-1])
    # A step has one size: the first that begins after 100 tokens, which is at 16 sequences, has the next.
    assert sizes == [4] * 4 + [8] * 5 + [24] * 3
    assert [config.samples_after(step) for step in range(13)] == samples
    steps = 10**12
    assert config.samples_after(steps) == samples[-1] + (steps - 12) * 24
    assert config.batch_sizes == (4, 8, 24)
    leap = replace(config, ramp=((1, 8), (2, 16), (3, 2)))  # sizes that no step ever has
    assert [leap.batch_at(n) for n in (0, 1, 4)] == [4, 2, 2] and leap.samples_after(3) == 8
    flat = replace(config, ramp=())
    assert flat.samples_after(7) == 28 and flat.batch_at(10**9) == 4


def test_a_ramp_leaves_the_order_as_it_is(tmp_path: Path, tokens: np.ndarray) -> None:
    data, samples, order = ramped(tmp_path), 0, []
    for _ in range(12):
        batch = data.batch(samples)
        assert same(batch, data.read(samples)) and same(batch, ramped(tmp_path).batch(samples))
        order += numbers_of(batch["inputs"])
        samples += data.config.batch_at(samples)
        assert len(order) == samples
        assert data.next is not None and data.next[0] == samples, "the next batch is not being read"
    plain = train_data(tmp_path, batch=samples)
    assert order == numbers_of(plain.read(0)["inputs"])
    parts = [ramped(tmp_path, world(rank, 2)) for rank in range(2)]
    for first in (0, 12, 16, 56, 80):
        together = torch.cat([part.read(first)["inputs"].view(-1, T) for part in parts])
        assert torch.equal(together, data.read(first)["inputs"].view(-1, T))


# ------------------------------------------------------------------------------------------------------ several sources


@pytest.fixture
def mixed(tmp_path: Path) -> DataConfig:
    """Three sources of 30, 20 and 10 sequences, whose tokens begin at 0, 1,000 and 2,000; b has a mask of its own."""
    for i, (name, count) in enumerate((("a", 30), ("b", 20), ("c", 10))):
        write_tokens(tmp_path / f"{name}.pbin", 1000 * i + np.arange(count * T + 1), 4000)
    write_tokens(tmp_path / "mask.pbin", np.arange(20 * T + 1) % 3 != 0, 2)
    return DataConfig(
        train=tuple(str(tmp_path / f"{name}.pbin") for name in "abc"),
        weights=(2, 1, 1),
        stages=(Stage(tokens=20 * T - 1, weights=(0, 1, 3)),),
        masks=("", str(tmp_path / "mask.pbin"), ""),
        seq_len=T,
        global_batch=8,
    )


def mixed_data(config: DataConfig, ranks: World | None = None) -> TrainData:
    return TrainData(config, 4000, 0, 2, ranks or world())


def test_a_mixed_batch_tells_the_source_of_each_sequence(mixed: DataConfig) -> None:
    data = mixed_data(mixed)
    assert list(mixed.source_names) == ["a", "b", "c"]
    batches = [data.read(samples) for samples in range(0, 80, 8)]
    assert {key: (value.shape, value.dtype) for key, value in batches[0].items()} == {
        "sources": ((4, 2), torch.int64),
        "inputs": ((4, 2, T), torch.int64),
        "targets": ((4, 2, T), torch.int64),
    }
    for batch in batches:
        assert torch.equal(batch["inputs"][..., 0] // 1000, batch["sources"])
        for source, target in zip(
            batch["sources"].repeat_interleave(T).tolist(), batch["targets"].ravel().tolist(), strict=True
        ):
            assert source == 1 or target != IGNORED
        kept = batch["targets"][(batch["sources"][..., None] == 1) & (batch["targets"] != IGNORED)]
        assert ((kept - 1000) % 3 != 0).all()
        shifted = torch.where(batch["targets"][..., :-1] == IGNORED, IGNORED, batch["inputs"][..., 1:])
        assert torch.equal(shifted, batch["targets"][..., :-1])
    sources = torch.cat([batch["sources"].ravel() for batch in batches])
    # 159 tokens are 20 sequences: the stage begins with the 21st.
    assert torch.bincount(sources[:20]).tolist() == [10, 5, 5]
    assert not (sources[20:] == 0).any()


def test_each_source_gives_every_sequence_once_an_epoch(mixed: DataConfig) -> None:
    data = mixed_data(replace(mixed, stages=(), masks=()))
    read = torch.cat([data.read(samples)["inputs"].view(-1, T) for samples in range(0, 1200, 8)])
    for source, count in enumerate((30, 20, 10)):
        own = ((read[:, 0] - 1000 * source) // T)[read[:, 0] // 1000 == source]
        epochs = own[: len(own) // count * count].view(-1, count)
        assert len(epochs) >= 12 and (epochs.sort(dim=1).values == torch.arange(count)).all()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_same_mixed_batch(mixed: DataConfig, size: int) -> None:
    whole, parts = mixed_data(mixed), [mixed_data(mixed, world(rank, size)) for rank in range(size)]
    again = mixed_data(mixed)
    for samples in (0, 8, 16, 24, 3, 1000, 10**9):
        for key, value in whole.read(samples).items():
            assert torch.equal(torch.cat([part.read(samples)[key] for part in parts]), value)
            assert torch.equal(again.read(samples)[key], value)
    larger = mixed_data(replace(mixed, global_batch=24)).read(16)
    assert torch.equal(larger["inputs"].view(-1, T)[:8], whole.read(16)["inputs"].view(-1, T))


def test_every_kind_of_batch_can_be_mixed(mixed: DataConfig) -> None:
    for sampling in ("documents", "best_fit"):
        data = mixed_data(replace(mixed, sampling=sampling, document_mask=True))
        batch = data.read(0)
        assert batch["documents"].shape == batch["positions"].shape == (4, 2, T)
        for source, number, inputs, positions in zip(
            *data.order(0), batch["inputs"].view(-1, T), batch["positions"].view(-1, T), strict=True
        ):
            alone = data.sources[source].read(np.array([number]))
            assert torch.equal(alone["inputs"][0], inputs) and torch.equal(alone["positions"][0], positions)


def test_facts_tell_what_a_run_takes_of_each_source(mixed: DataConfig) -> None:
    facts = mixed_data(replace(mixed, stages=())).facts(80)
    assert facts[0] == "a (continuous): 30 sequences, documents cut wherever they fall; 50.0% of the run, 1.33 epochs"
    assert facts[2].endswith("25.0% of the run, 2.00 epochs")
    (alone,) = mixed_data(DataConfig(train=mixed.train[1:2], seq_len=T, global_batch=8)).facts(40)
    assert alone.endswith("; 2.00 epochs") and "of the run" not in alone


# ----------------------------------------------------------------------------------------------------------- validation


def val_data(folder: Path, count: int = 0, batch: int = 4, ranks: World | None = None, **fields: Any) -> ValData:
    config = DataConfig(val=(str(folder / "a.pbin"),), seq_len=T, **fields)
    return open_val(config, VOCAB, count, batch, ranks or world())["a"]


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
    config = DataConfig(val=(str(tmp_path / "a.pbin"),), seq_len=T)
    assert "model.vocab_size is 100" in complaint(lambda: list(open_val(config, 100, 0, 4, world())["a"]))


def test_several_validation_sets_are_read_as_training_data_is(tmp_path: Path, tokens: np.ndarray) -> None:
    write_tokens(tmp_path / "b.pbin", tokens)
    write_tokens(tmp_path / "mask.pbin", np.arange(len(tokens)) % 2, 2)
    config = DataConfig(
        val=(str(tmp_path / "a.pbin"), str(tmp_path / "b.pbin")),
        val_masks=("", str(tmp_path / "mask.pbin")),
        sampling="documents",
        document_mask=True,
        seq_len=T,
    )
    a, b = open_val(config, VOCAB, 0, 4, world()).values()
    for plain, masked in zip(a, b, strict=True):
        assert plain.keys() == {"inputs", "targets", "documents", "positions"}
        odd = torch.where(plain["targets"] % 2 == 1, plain["targets"], IGNORED)
        assert torch.equal(masked["targets"], odd) and torch.equal(masked["inputs"], plain["inputs"])
    assert open_val(replace(config, val=(), val_masks=()), VOCAB, 0, 4, world()) == {}
