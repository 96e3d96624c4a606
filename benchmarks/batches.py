"""How long a batch takes from a packed file to tensors, against nanoGPT's way.

    python benchmarks/batches.py [--batch 32] [--seq-len 1024] [--repeats 7]

Random tokens of 2 bytes, in the page cache. nanoGPT draws its sequences anew each time (`get_batch` in its train.py: a
memory map, `torch.randint`, a tensor for every row, stacked); ours are the next ones of a shuffled epoch. Rounds of the
contestants take turns; a figure is the median of the rounds' medians.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from modalities import cli
from modalities.data import DataConfig, TrainData
from modalities.dist import World
from modalities.pbin import write_pbin

VOCAB = 50_257
DOCUMENT = 1000


def write_tokens(path: Path, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    with write_pbin(path, VOCAB) as append:
        for _ in range(num_tokens // (1000 * DOCUMENT)):
            tokens = rng.integers(0, VOCAB, 1000 * DOCUMENT, dtype=np.uint16)
            append(tokens, np.full(1000, DOCUMENT))


def nanogpt(path: Path, batch: int, seq_len: int) -> Callable[[int], object]:
    """Its way, in our words."""

    def read(_: int) -> object:
        tokens = np.memmap(path, np.uint16, "r", 12)
        starts = torch.randint(len(tokens) - seq_len, (batch,)).tolist()
        inputs = torch.stack([torch.from_numpy(tokens[i : i + seq_len].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
        return inputs, targets

    return read


def ours(path: Path, batch: int, seq_len: int, **config: object) -> Callable[[int], object]:
    data_config = DataConfig(train=(str(path),), seq_len=seq_len, global_batch=batch, **config)  # type: ignore[arg-type]
    world = World(0, 1, torch.device("cpu"), None)
    return TrainData(data_config, VOCAB, 0, batch, world).read


def microseconds(read: Callable[[int], object], first: int, batch: int, reads: int) -> list[float]:
    """Of each of `reads` batches one after another, from the sample `first` on."""
    times = []
    for i in range(reads):
        began = time.perf_counter_ns()
        read(first + i * batch)
        times.append((time.perf_counter_ns() - began) / 1000)
    return times


def start(path: Path, batch: int, seq_len: int, first: int) -> float:
    """Microseconds from nothing to the batch at sample `first`."""
    began = time.perf_counter_ns()
    ours(path, batch, seq_len)(first)
    return (time.perf_counter_ns() - began) / 1000


def main(batch: int = 32, seq_len: int = 1024, repeats: int = 7, reads: int = 500, megatokens: int = 100) -> None:
    """Print the table.

    Args:
        batch: Sequences of a batch.
        seq_len: Tokens of a sequence.
        repeats: Rounds.
        reads: Batches of a round.
        megatokens: Size of the file [million tokens].
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.pbin"
        write_tokens(path, megatokens * 1_000_000)
        contestants = {
            "continuous": (ours(path, batch, seq_len), 0),
            "continuous, from sample 10^9": (ours(path, batch, seq_len), 10**9),
            "whole documents": (ours(path, batch, seq_len, sampling="documents"), 0),
            "best fit": (ours(path, batch, seq_len, sampling="best_fit"), 0),
            "best fit, document mask": (ours(path, batch, seq_len, sampling="best_fit", document_mask=True), 0),
            "nanoGPT's get_batch": (nanogpt(path, batch, seq_len), 0),
        }
        rounds: dict[str, list[list[float]]] = {name: [] for name in contestants}
        for i in range(repeats + 1):
            for name, (read, first) in contestants.items():
                times = microseconds(read, first + i * reads * batch, batch, reads)
                if i:  # the first round warms up
                    rounds[name].append(times)
        starts = {first: [start(path, batch, seq_len, first) for _ in range(2 * repeats)] for first in (0, 10**9)}
    base = statistics.median(map(statistics.median, rounds["nanoGPT's get_batch"]))
    print(f"| {batch} × {seq_len:,} tokens | median µs | mean µs | nanoGPT's time over it |\n|---|---|---|---|")
    for name, each in rounds.items():
        median, mean = statistics.median(map(statistics.median, each)), statistics.mean(map(statistics.mean, each))
        print(f"| {name} | {median:,.0f} | {mean:,.0f} | {base / median:.1f}× |")
    for first, times in starts.items():
        print(f"| opening the file and the first batch from sample {first:,} | {statistics.median(times):,.0f} | | |")


if __name__ == "__main__":
    cli.run(lambda args: cli.call(main, args))
