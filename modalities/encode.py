"""What a packing is to do, with which engine, and what a thread does with a chunk: documents in, tokens out.

Nothing here writes.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modalities import __version__, ranks
from modalities.corpus import OnError
from modalities.fields import Reject, Select, make_select, texts_of
from modalities.sources import PORTION_BYTES, Chunk, Source
from modalities.tokenizer import (
    EOD,
    EngineName,
    Spec,
    SpecialTokens,
    disagreement,
    fastokens_engine,
    read_spec,
    tokenizers_engine,
)

ENGINES = {"tokenizers": tokenizers_engine, "fastokens": fastokens_engine}
FIRST_CHECKED = 1000
CHECKED_EVERY = 1000
LONGEST_CHECKED = 1_000_000  # characters: beyond them tokenizers takes gigabytes


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How documents become tokens."""

    tokenizer: Path
    field: str = ".text"
    eod: str = EOD
    on_error: OnError = "fail"
    engine: EngineName = "auto"
    special_tokens: SpecialTokens = "text"
    threads: int = 0
    """0: as many as there are cores for this process."""
    portion_bytes: int = PORTION_BYTES
    """What an interruption may cost."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(
                f"--threads is {self.threads}, but must be at least 1, or 0 for as many as there are cores"
            )

    @property
    def num_threads(self) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size())


class Portion(NamedTuple):
    """Part `number` of the input: `source` from `begin` to `end`."""

    number: int
    source: Source
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes(self.begin, self.end)


@dataclass(frozen=True)
class Job:
    """One packing, as every rank knows it."""

    config: PackConfig
    out: Path
    sources: Sequence[Source]
    spec: Spec
    select: Select
    portions: Sequence[Portion]
    plan: dict[str, Any]
    """What the parts depend on, as JSON: on any change they are made anew."""

    @property
    def folder(self) -> Path:
        """Where the parts lie until they are joined."""
        return self.out.with_name(f"{self.out.name}.parts")

    def share(self, rank: int, ranks: int) -> list[Portion]:
        """The portions of one rank: a contiguous run, about as many bytes as every other rank's."""
        sizes = np.array([portion.num_bytes for portion in self.portions], np.float64)
        middles = (np.cumsum(sizes) - sizes / 2) / max(1, sizes.sum())
        owners = np.minimum(middles * ranks, ranks - 1).astype(int)
        return [portion for portion, owner in zip(self.portions, owners, strict=True) if owner == rank]


def make_job(sources: Sequence[Source], out: Path, config: PackConfig) -> Job:
    """Check everything that can be checked before the work."""
    select, spec = make_select(config.field), read_spec(config.tokenizer, config.eod)
    cuts = ((source, *cut) for source in sources for cut in source.portions(config.portion_bytes))
    plan = {
        "version": __version__,
        "tokenizer": spec.sha256,
        "options": [config.eod, config.field, config.special_tokens, config.engine, config.portion_bytes],
        "sources": [source.facts() for source in sources],
    }
    return Job(config, out, sources, spec, select, [Portion(i, *cut) for i, cut in enumerate(cuts)], plan)


# --------------------------------------------------------------------------------------------------------------- engine


class EnginesDiffer(Exception):
    """The fast engine's ids are not those of the reference."""


def choose_engine(job: Job, say: Callable[[str], None]) -> str:
    """The engine that was asked for; with "auto" the fast one, if it can do the tokenizer and begins with equal ids."""
    name = job.config.engine
    try:
        fast = fastokens_engine(job.spec, job.config.special_tokens) if name != "tokenizers" else None
    except ValueError as error:
        if name == "fastokens":
            raise
        say(f"packing with tokenizers: {error}")
        return "tokenizers"
    if fast is None or name == "fastokens":
        return name
    reference = tokenizers_engine(job.spec, job.config.special_tokens)
    batches = _first_texts(job)
    with contextlib.suppress(ValueError), ThreadPoolExecutor(job.config.num_threads) as pool:
        # What cannot be read will show in its turn.
        while some := list(islice(batches, 2 * job.config.num_threads)):
            if any(found is not None for found in pool.map(partial(disagreement, fast, reference), some)):
                say("packing with tokenizers: fastokens gives other ids")
                return "tokenizers"
    return "fastokens"


def _first_texts(job: Job) -> Iterator[list[str]]:
    """The texts that are checked before the work, in batches that the slow engine has memory for."""
    batch: list[str] = []
    for text in islice(_texts(job), FIRST_CHECKED):
        batch.append(text[:LONGEST_CHECKED])
        if sum(map(len, batch)) >= LONGEST_CHECKED:
            yield batch
            batch = []
    yield batch


def _texts(job: Job) -> Iterator[str]:
    for portion in job.portions:
        for chunk in portion.source.chunks(portion.begin, portion.end):
            yield from texts_of(chunk.items, job.select, job.config.field).texts


class Encoded(NamedTuple):
    """A chunk as tokens: flat, in the dtype of the file, and lengths int64 [D]; and what was left out of it."""

    tokens: np.ndarray
    lengths: np.ndarray
    rejects: list[tuple[int, Reject]]


def make_encode(job: Job, name: str) -> Callable[[Chunk], Encoded]:
    """What a thread does with a chunk."""
    engine = ENGINES[name](job.spec, job.config.special_tokens)
    checked = job.config.engine == "auto" and name == "fastokens"
    reference = tokenizers_engine(job.spec, job.config.special_tokens) if checked else None

    def encode(chunk: Chunk) -> Encoded:
        texts, rejects = texts_of(chunk.items, job.select, job.config.field)
        tokens, lengths = engine(texts)
        if reference is not None:
            sample = [text[:LONGEST_CHECKED] for text in texts[-chunk.first % CHECKED_EVERY :: CHECKED_EVERY]]
            if disagreement(engine, reference, sample) is not None:
                raise EnginesDiffer("fastokens gives other ids than tokenizers")
        if len(lengths) and not lengths.all():
            kept = np.delete(np.arange(len(chunk.items)), [i for i, _ in rejects])
            why = Reject("no token", "the tokenizer makes none of the text")
            rejects = sorted(rejects + [(int(i), why) for i in kept[lengths == 0]])
            lengths = lengths[lengths > 0]
        return Encoded(tokens, lengths, rejects)

    return encode
