"""From `.pbin` files to batches: a shuffled order without memory, a cursor of one integer, prefetch in a thread.

Which sequences a rank reads is a pure function of (seed, sequences consumed so far, global batch, rank, ranks), so a
run resumes in O(1) and the global order is the same on any number of ranks. It knows nothing of models or steps.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modalities.dist import World
from modalities.loss import IGNORED, Batch
from modalities.pbin import open_pbin
from modalities.rng import fold, permute


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which portions."""

    train: str = "data/demo/train.pbin"
    """Packed tokens to train on."""
    val: str = "data/demo/val.pbin"
    """Packed tokens to evaluate on, in fixed order; empty: no evaluation."""
    tokenizer: str = "data/demo/tokenizer.json"
    """The tokenizer that packed them, for samples and export; empty: no samples."""
    eod: str = "<|endoftext|>"
    """The token that ends a document there; a sample ends at it."""
    seq_len: int = 1024
    """Length of a training sequence [tokens]. Sequences are cut from the stream of documents wherever they fall."""
    global_batch: int = 32
    """Sequences of one optimizer step, over all ranks and micro-batches."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, but must be at least 1")


class Sequences:
    """A `.pbin` as sequences: number `i` is tokens `i*T … i*T + T`, the first T inputs and the last T targets.

    So every token but the first is a target once.
    """

    def __init__(self, path: Path, seq_len: int, vocab_size: int) -> None:
        self.path, self.seq_len, self.vocab_size = path, seq_len, vocab_size
        self.tokens = open_pbin(path).tokens
        self.count = (len(self.tokens) - 1) // seq_len
        if self.count < 1:
            raise ValueError(
                f"{path} has {len(self.tokens):,} tokens, too few for one sequence of data.seq_len {seq_len:,} + 1; "
                "give a shorter data.seq_len or more data"
            )

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each int64 [len(numbers), T]. Raises ValueError if a token is beyond the vocabulary."""
        rows = np.empty((len(numbers), self.seq_len + 1), np.int64)
        for row, number in zip(rows, numbers, strict=True):
            row[:] = self.tokens[number * self.seq_len : (number + 1) * self.seq_len + 1]
        if rows.max(initial=0) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds token {rows.max()}, but model.vocab_size is {self.vocab_size}; "
                "train with the tokenizer's vocabulary, or pack with another tokenizer"
            )
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def sequence_numbers(first: int, count: int, per_epoch: int, seed: int) -> np.ndarray:
    """The sequences at positions `first … first + count - 1` of the endless training order, int64 [count].

    Each epoch is a permutation of its own of all `per_epoch` sequences.
    """
    positions = np.arange(first, first + count)
    numbers = np.empty_like(positions)
    for epoch in range(first // per_epoch, (first + count - 1) // per_epoch + 1):
        here = positions // per_epoch == epoch
        numbers[here] = permute(positions[here] % per_epoch, per_epoch, fold(seed, "order", epoch))
    return numbers


def rank_positions(samples: int, global_batch: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first position, count) of a rank's contiguous part of the global batch that starts at position `samples`."""
    assert global_batch % ranks == 0
    return samples + rank * (global_batch // ranks), global_batch // ranks


class TrainData:
    """`batch(samples)` gives this rank's part of the global batch that follows the first `samples` sequences.

    `read` is the pure function; `batch` is the same on the device, with the next batch being read meanwhile.
    """

    def __init__(self, config: DataConfig, vocab_size: int, seed: int, micro_batch: int, world: World) -> None:
        self.config, self.seed, self.micro_batch, self.world = config, seed, micro_batch, world
        self.sequences = Sequences(Path(config.train), config.seq_len, vocab_size)
        self.thread = ThreadPoolExecutor(1, "prefetch")
        self.next: tuple[int, Future[Batch]] | None = None

    def numbers(self, samples: int) -> np.ndarray:
        """The numbers of the sequences in that batch, int64 [A·B]."""
        first, count = rank_positions(samples, self.config.global_batch, self.world.rank, self.world.size)
        return sequence_numbers(first, count, self.sequences.count, self.seed)

    def read(self, samples: int) -> Batch:
        """`inputs` and `targets`, int64 [A, B, T] in (pinned) host memory: A micro-batches of B sequences."""
        inputs, targets = self.sequences.read(self.numbers(samples))
        shape = (-1, self.micro_batch, self.config.seq_len)
        batch = {"inputs": inputs.view(shape), "targets": targets.view(shape)}
        return {k: v.pin_memory() for k, v in batch.items()} if self.world.device.type == "cuda" else batch

    def batch(self, samples: int) -> Batch:
        """`read(samples)` on the device, while a thread already reads the batch after it."""
        if self.next is None or self.next[0] != samples:
            self.next = samples, self.thread.submit(self.read, samples)
        batch = self.next[1].result()
        after = samples + self.config.global_batch
        self.next = after, self.thread.submit(self.read, after)
        return {key: value.to(self.world.device, non_blocking=True) for key, value in batch.items()}


class ValData:
    """The first `count` sequences of a file (0: all) in file order, cut among ranks; iterable again and again."""

    def __init__(self, config: DataConfig, vocab_size: int, count: int, batch: int, world: World) -> None:
        self.sequences = Sequences(Path(config.val), config.seq_len, vocab_size)
        self.count = min(count or self.sequences.count, self.sequences.count)
        self.batch, self.world = batch, world

    def __iter__(self) -> Iterator[Batch]:
        """Batches [B, T], of one shape and as many on every rank (FSDP2 needs that): ignored rows fill up the last."""
        for first in range(0, self.count, self.batch * self.world.size):
            numbers = first + self.world.rank * self.batch + np.arange(self.batch)
            inputs, targets = self.sequences.read(np.minimum(numbers, self.count - 1))
            targets[torch.from_numpy(numbers >= self.count)] = IGNORED
            yield {"inputs": inputs.to(self.world.device), "targets": targets.to(self.world.device)}
