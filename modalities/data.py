"""Batches from one or several sources: a cursor of one integer, ranks, prefetch in a thread, validation sets.

Which sequences a rank reads is a pure function of (seed, sequences consumed so far, global batch, rank, ranks), so
a run resumes in O(1) and the global order is the same on any number of ranks. It knows nothing of models or steps.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from modalities.dist import World
from modalities.loss import IGNORED, Batch
from modalities.mixture import BLOCK, Mixture, Stage, check_weights
from modalities.profiling import span
from modalities.sequences import Sampling, Sequences

ORDER_AT_ONCE = 4096  # positions of the order that are computed together: alone, each takes a hundred times as long


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which portions."""

    train: tuple[str, ...] = ("data/demo/train.pbin",)
    """Packed files to train on, each a source."""
    names: tuple[str, ...] = ()
    """What the sources are called, in the order of train; empty: the files' names without ending."""
    weights: tuple[float, ...] = ()
    """Share of the sequences drawn from each source, any numbers that are not negative; empty: as many as it has."""
    stages: tuple[Stage, ...] = ()
    """Weights that hold from a number of training tokens on, in ascending order."""
    masks: tuple[str, ...] = ()
    """Mask file of each source, "" where it has none: a `.pbin` of 1-byte tokens, 1 where the source's token may be
    a target and 0 where not. Empty: every token may."""
    val: tuple[str, ...] = ("data/demo/val.pbin",)
    """Packed files to evaluate on, each in its own order; empty: no evaluation."""
    val_masks: tuple[str, ...] = ()
    """Their mask files, as in masks."""
    sampling: Sampling = "continuous"
    """How documents become sequences: their stream is cut wherever a sequence ends; or they are put in whole, one after
    another, and what is left of a sequence is padded; or whole, each into the sequence that it fills best, with next
    to no padding. Documents longer than a sequence are cut in any case."""
    reuse_last_target: bool = True
    """Continuous: whether the last target of a sequence is the first input of the next, so that each token is a
    target once; if not, sequences share no token."""
    document_mask: bool = False
    """Whether documents in a sequence are kept apart: attention stays within one, positions begin anew with each,
    and the first token of a document is no target."""
    tokenizer: str = "data/demo/tokenizer.json"
    """The tokenizer that packed them, for samples and export; empty: no samples."""
    eod: str = "<|endoftext|>"
    """The token that ends a document there; a sample ends at it."""
    seq_len: int = 1024
    """Length of a training sequence [tokens]."""
    global_batch: int = 32
    """Sequences of one optimizer step, over all ranks and micro-batches."""
    ramp: tuple[tuple[int, int], ...] = ()
    """(tokens, sequences of one step): sizes that the global batch has from a number of training tokens on."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("train", "names", "masks", "val", "val_masks"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"data.{name} is {value!r}, but must be a tuple: ({value!r},), or () for none")
            if "" in value and name not in ("masks", "val_masks"):
                raise ValueError(f"data.{name} has an empty entry; for none write (), or the flag without a value")
        if not self.train:
            raise ValueError("data.train is empty, but must name at least one .pbin")
        self._check_lengths()
        self._check_names()
        if self.weights:
            check_weights("data.weights", self.weights)
        for one, after in itertools.pairwise(stage.tokens for stage in self.stages):
            if after <= one:
                raise ValueError(f"data.stages: tokens {after} come after {one}, but must ascend")
        self._check_ramp()

    def _check_ramp(self) -> None:
        for tokens, size in self.ramp:
            if tokens < 1 or size < 1:
                raise ValueError(f"data.ramp has ({tokens}, {size}), but tokens and sequences must be at least 1")
        for (one, _), (after, _) in itertools.pairwise(self.ramp):
            if after <= one:
                raise ValueError(f"data.ramp: tokens {after} come after {one}, but must ascend")

    def _check_lengths(self) -> None:
        for name, entries, of in (
            ("names", self.names, "train"),
            ("weights", self.weights, "train"),
            ("masks", self.masks, "train"),
            ("val_masks", self.val_masks, "val"),
            *(("stages: weights", stage.weights, "train") for stage in self.stages),
        ):
            if entries and len(entries) != len(getattr(self, of)):
                raise ValueError(
                    f"data.{name}: {len(entries)} given for the {len(getattr(self, of))} file(s) of data.{of}; "
                    "give one for each"
                )

    def _check_names(self) -> None:
        for name, names, remedy in (
            ("train", self.source_names, "give each a name of its own in data.names"),
            ("val", self.val_names, "rename a file"),
        ):
            for twice in (n for i, n in enumerate(names) if n in names[:i]):
                raise ValueError(f"data.{name} has two files called {twice!r}; {remedy}")

    @property
    def source_names(self) -> tuple[str, ...]:
        return self.names or tuple(Path(path).stem for path in self.train)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All sizes that the global batch has in a run, in their order."""
        return self.global_batch, *(size for _, size in self.ramp)

    def batch_at(self, samples: int) -> int:
        """Sequences of the step that begins after `samples` sequences."""
        begun = sum(tokens <= samples * self.seq_len for tokens, _ in self.ramp)
        return self.batch_sizes[begun]

    def samples_after(self, steps: int) -> int:
        """Sequences that the first `steps` steps consume."""
        samples = 0
        for (tokens, _), size in zip(self.ramp, self.batch_sizes, strict=False):
            # The steps that begin before the size changes, all of them of this size.
            until = min(steps, max(0, -(-(-(-tokens // self.seq_len) - samples) // size)))
            samples, steps = samples + until * size, steps - until
        return samples + steps * self.batch_sizes[-1]

    @property
    def val_names(self) -> tuple[str, ...]:
        return tuple(Path(path).stem for path in self.val)

    @property
    def files(self) -> dict[str, str]:
        """What is read, by what it is for: sources by their place, validation sets by their names."""
        by_place = {"data.train": self.train, "data.masks": self.masks}
        files = {f"{field}[{i}]": path for field, paths in by_place.items() for i, path in enumerate(paths)}
        for field, paths in (("data.val", self.val), ("data.val_masks", self.val_masks)):
            files |= {f"{field}.{name}": path for name, path in zip(self.val_names, paths, strict=False)}
        files["data.tokenizer"] = self.tokenizer
        return {name: path for name, path in files.items() if path}


def open_sequences(config: DataConfig, path: str, mask: str, vocab_size: int) -> Sequences:
    """A file as sequences, made as `config` says; a ValueError if it cannot be used."""
    return Sequences(
        Path(path),
        config.seq_len,
        vocab_size,
        mask=mask,
        sampling=config.sampling,
        reuse_last_target=config.reuse_last_target,
        document_mask=config.document_mask,
    )


def rank_positions(samples: int, global_batch: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first position, count) of a rank's contiguous part of the global batch that starts at position `samples`."""
    assert global_batch % ranks == 0
    return samples + rank * (global_batch // ranks), global_batch // ranks


class TrainData:
    """`batch(samples)` gives this rank's part of the global batch that follows the first `samples` sequences.

    `read` is the pure function; `batch` is the same on the device, with the next batch being read meanwhile.
    """

    def __init__(
        self,
        config: DataConfig,
        vocab_size: int,
        seed: int,
        micro_batch: int,
        world: World,
        beside: Callable[[np.ndarray], Batch] | None = None,
    ) -> None:
        """`beside`: what batches are to hold besides, by the numbers of sequences of the only source."""
        self.config, self.micro_batch, self.world, self.beside = config, micro_batch, world, beside
        masks = config.masks or ("",) * len(config.train)
        files = zip(config.train, masks, strict=True)
        self.sources = [open_sequences(config, path, mask, vocab_size) for path, mask in files]
        stages = [(-(-stage.tokens // config.seq_len), stage.weights) for stage in config.stages]
        self.mixture = Mixture([source.count for source in self.sources], seed, config.weights, stages)
        self.orders = functools.lru_cache(4)(self._orders)
        self.thread = ThreadPoolExecutor(1, "prefetch")
        self.next: tuple[int, Future[Batch]] | None = None

    def order(self, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of the sequence in it) of each sequence of that batch, both int64 [A·B]."""
        batch = self.config.batch_at(samples)
        step, offset = divmod(samples, batch)
        # Not more than a block of the mixture or an epoch, so that no batch waits for many of them.
        positions = min(ORDER_AT_ONCE * self.world.data_size, BLOCK, sum(self.mixture.counts))
        steps = max(1, positions // batch)
        sources, numbers = self.orders(step // steps, steps, offset, batch)
        return sources[step % steps], numbers[step % steps]

    def _orders(self, chunk: int, steps: int, offset: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The orders of `steps` batches of `batch` sequences, both int64 [steps, A·B]: those of this rank alone."""
        first, count = rank_positions(offset + chunk * steps * batch, batch, self.world.data_rank, self.world.data_size)
        return self.mixture.at(first + np.arange(steps)[:, None] * batch + np.arange(count))

    def read(self, samples: int) -> Batch:
        """`inputs` and `targets`, int64 [A, B, T] in (pinned) host memory: A micro-batches of B sequences.

        With document_mask also `documents` and `positions` [A, B, T]; with several sources `sources`, int64 [A, B].
        """
        sources, numbers = self.order(samples)
        batch = self.sources[0].read(numbers) if len(self.sources) == 1 else self.read_mixed(sources, numbers)
        if self.beside is not None:
            batch |= self.beside(numbers)
        batch = {key: value.unflatten(0, (-1, self.micro_batch)) for key, value in batch.items()}
        return {k: v.pin_memory() for k, v in batch.items()} if self.world.device.type == "cuda" else batch

    def read_mixed(self, sources: np.ndarray, numbers: np.ndarray) -> Batch:
        """The sequences `numbers` of `sources`, and the sources, each [A·B, …]."""
        by_source = np.argsort(sources, kind="stable")
        parts = [self.sources[s].read(numbers[sources == s]) for s in np.unique(sources).tolist()]
        batch = {"sources": torch.from_numpy(sources.copy())}
        for key in parts[0]:
            joined = torch.cat([part[key] for part in parts])
            batch[key] = torch.empty_like(joined)
            batch[key][torch.from_numpy(by_source)] = joined
        return batch

    def facts(self, samples: int) -> list[str]:
        """A line for each source: its sequences, and how much of them the first `samples` of training are."""
        lines, draws = [], self.mixture.drawn(samples)
        for name, source, drawn in zip(self.config.source_names, self.sources, draws, strict=True):
            share = f"{drawn / samples:.1%} of the run, " if len(self.sources) > 1 else ""
            lines.append(f"{name} ({source.sampling}): {source.facts()}; {share}{drawn / source.count:.2f} epochs")
        return lines

    def batch(self, samples: int) -> Batch:
        """`read(samples)` on the device, while a thread already reads the batch after it."""
        if self.next is None or self.next[0] != samples:
            self.next = samples, self.thread.submit(self.read, samples)
        with span("batch"):
            batch = self.next[1].result()
        after = samples + self.config.batch_at(samples)
        self.next = after, self.thread.submit(self.read, after)
        return {key: value.to(self.world.device, non_blocking=True) for key, value in batch.items()}


class ValData:
    """The first `count` sequences of a file (0: all) in file order, cut among ranks; iterable again and again."""

    def __init__(self, sequences: Sequences, count: int, batch: int, world: World) -> None:
        self.sequences, self.batch, self.world = sequences, batch, world
        self.count = min(count or sequences.count, sequences.count)

    def __iter__(self) -> Iterator[Batch]:
        """Batches [B, T] of one shape, as many on every rank (FSDP2 needs that): ignored rows fill up the last."""
        for first in range(0, self.count, self.batch * self.world.data_size):
            numbers = first + self.world.data_rank * self.batch + np.arange(self.batch)
            batch = self.sequences.read(np.minimum(numbers, self.count - 1))
            batch["targets"][torch.from_numpy(numbers >= self.count)] = IGNORED
            yield {key: value.to(self.world.device) for key, value in batch.items()}


def open_val(config: DataConfig, vocab_size: int, count: int, batch: int, world: World) -> dict[str, ValData]:
    """The validation sets by name, made as the training sequences are."""
    masks = config.val_masks or ("",) * len(config.val)
    return {
        name: ValData(open_sequences(config, path, mask, vocab_size), count, batch, world)
        for name, path, mask in zip(config.val_names, config.val, masks, strict=True)
    }
