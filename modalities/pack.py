"""Documents → tokens → `.pbin`, in threads and on any number of machines, with an account of every document.

Threads encode chunks, for the engines leave Python's lock alone; the main thread writes what they return in the order
of the input. So the file is the same for any number of threads and ranks, and an interrupted run goes on where it was.
"""

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from modalities import __version__, pbin, ranks, workplace
from modalities.account import (
    Account,
    SourceFacts,
    TokenizerFacts,
    account_path,
    read_account,
    skipped_path,
    write_account,
)
from modalities.corpus import rejected, skipped_line
from modalities.encode import (
    ENGINES,
    Encoded,
    EnginesDiffer,
    Job,
    PackConfig,
    Portion,
    choose_engine,
    make_encode,
    make_job,
)
from modalities.parts import Counts, Done, Writer, finished, join
from modalities.sources import Chunk, Source

USE_TOKENIZERS = "use_tokenizers"  # lies in the folder once a rank has seen the engines differ
TOKENS_PER_THREAD = 1 << 25
"""How many tokens a thread makes, about, before another takes its place."""


def pack(sources: Sequence[Source], out: Path, config: PackConfig, say: Callable[[str], None]) -> Account | None:
    """Tokenize the documents of `sources`, end each with the token `eod`, and write `out` and its account.

    To be called on every rank; the main rank joins the parts and returns the account. An existing `out` is refused.
    `say` is told, on the main rank, what a user would want to know meanwhile.
    """
    job = make_job(sources, out, config)
    if not ranks.is_main():
        if out.exists():  # what that means is for the main rank to say
            return None
        pack_share(job, workplace.wait_for_begin(job.folder, job.plan), lambda message: None)
        workplace.leave(job.folder)
        return None
    if out.exists() and workplace.was_joined(job.folder, job.plan):  # it was stopped after all was done
        workplace.remove(job.folder)
        return read_account(account_path(out))
    pbin.refuse_existing(out)
    with workplace.locked(job.folder):
        beside = [account_path(out), skipped_path(out)]
        chosen = workplace.begin(job.folder, job.plan, beside, lambda: choose_engine(job, say), say)
        try:
            engine, done = pack_share(job, chosen, say)
            workplace.wait_for_ranks(job.folder)
            return finish(job, engine, done)
        except (Exception, KeyboardInterrupt) as error:
            kept = sum(len(finished(job.folder, name, True)) for name in ENGINES)
            if not kept and ranks.world_size() == 1:
                workplace.remove(job.folder)
            if kept and isinstance(error, ValueError):
                what = f"{kept} of {len(job.portions)} parts are done and kept in {job.folder}"
                raise ValueError(f"{error} ({what})") from None
            raise


def pack_share(job: Job, chosen: str, say: Callable[[str], None]) -> tuple[str, dict[int, Done]]:
    """Pack this rank's share and wait for the others'; the engine that it was done with, and the finished portions."""
    switch = job.folder / USE_TOKENIZERS
    share = job.share(ranks.rank(), ranks.world_size())
    while True:
        engine = "tokenizers" if switch.exists() else chosen
        done = finished(job.folder, engine, with_skips=job.config.on_error == "skip")
        todo = [portion for portion in share if portion.number not in done]
        if len(done) == len(job.portions):
            return engine, done
        if not todo:
            time.sleep(workplace.POLL_SECONDS)
            continue
        try:
            pack_portions(job, engine, todo)
        except EnginesDiffer as difference:
            switch.touch()
            say(f"{difference}: packing from the start with tokenizers")


# ----------------------------------------------------------------------------------------------------------------- work


class Encoders:
    """Threads that encode, each replaced after a while: a context around their work.

    fastokens keeps the words that each thread has met, and lets go of them only when the thread ends. So memory does
    not grow with the corpus; to meet the commonest words again costs little.
    """

    def __init__(self, encode: Callable[[Chunk], Encoded], num_threads: int) -> None:
        self.encode, self.num_threads, self.tokens = encode, num_threads, 0
        self.pool = ThreadPoolExecutor(num_threads, "encode")

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def submit(self, chunk: Chunk) -> Future[Encoded]:
        if self.tokens > TOKENS_PER_THREAD * self.num_threads:
            self.pool.shutdown()
            give_back_freed()
            self.pool, self.tokens = ThreadPoolExecutor(self.num_threads, "encode"), 0
        return self.pool.submit(self.encode, chunk)


def give_back_freed() -> None:
    """Give freed memory back to the system: glibc keeps what lies scattered, and would take as much again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # which glibc alone has
    if trim is not None:
        trim(0)


Reading = tuple[Portion, Chunk | None, Future[Encoded] | None]


def pack_portions(job: Job, engine: str, portions: Sequence[Portion]) -> None:
    """Pack `portions` into the files of this rank."""
    from tqdm import tqdm

    encode, switch = make_encode(job, engine), job.folder / USE_TOKENIZERS
    waiting: deque[Reading] = deque()
    size = sum(portion.num_bytes for portion in portions)
    bar = tqdm(total=size, desc=job.out.name, unit="B", unit_scale=True, disable=None, leave=False)
    stem = job.folder / f"{ranks.rank()}.{engine}"
    with Writer(stem) as writer, bar, Encoders(encode, job.config.num_threads) as encoders:

        def take() -> None:
            portion, chunk, encoded = waiting.popleft()
            if encoded is not None:
                result = encoded.result()
                encoders.tokens += len(result.tokens)
                write(job, writer, portion, chunk, result)
                return
            writer.finish(portion.number)
            bar.update(portion.num_bytes)
            if engine != "tokenizers" and switch.exists():
                raise EnginesDiffer("fastokens gives other ids than tokenizers on another rank")

        for reading in read(portions, encoders.submit):
            waiting.append(reading)
            # Bounded: whatever is read and not written lies in memory.
            while len(waiting) > 2 * job.config.num_threads:
                take()
        while waiting:
            take()


def read(portions: Sequence[Portion], submit: Callable[[Chunk], Future[Encoded]]) -> Iterator[Reading]:
    """Every chunk with what will come of it, and each portion's end.

    An error in reading comes in its turn, after what comes of the chunks before it.
    """
    for portion in portions:
        try:
            for chunk in portion.source.chunks(portion.begin, portion.end):
                yield portion, chunk, submit(chunk)
        except ValueError as error:
            broken: Future[Encoded] = Future()
            broken.set_exception(error)
            yield portion, None, broken
            return
        yield portion, None, None


def write(job: Job, writer: Writer, portion: Portion, chunk: Chunk | None, encoded: Encoded) -> None:
    """Add an encoded chunk to the parts; raise at its first rejected document where that is to end the packing."""
    assert chunk is not None
    source, counts = portion.source, Counts(documents=len(chunk.items), packed=len(encoded.lengths))
    if encoded.rejects and job.config.on_error == "fail":
        i, reject = encoded.rejects[0]
        raise rejected(chunk.where(source.name, i, source.documents_before(portion.begin)), reject)
    counts.tokens = len(encoded.tokens)
    counts.skipped.update(reject.reason for _, reject in encoded.rejects)
    counts.lengths.update(np.frexp(encoded.lengths)[1].tolist())
    skipped = b"".join(skipped_line(chunk.where(source.name, i), reject) for i, reject in encoded.rejects)
    writer.add(encoded.tokens, encoded.lengths, skipped, counts)


# --------------------------------------------------------------------------------------------------------------- finish


def finish(job: Job, engine: str, done: dict[int, Done]) -> Account:
    """Join the parts to `out`, beside its account and the list of what was skipped, and remove them."""
    entries, total, facts = [done[portion.number] for portion in job.portions], Counts(), []
    for source, planned in zip(job.sources, job.plan["sources"], strict=True):
        if source.facts() != planned:
            workplace.remove(job.folder)
            raise ValueError(f"{source.name} was changed while it was packed; pack again")
        documents = 0
        for portion in job.portions:
            if portion.source is source:
                total.add(done[portion.number].counts)
                documents += done[portion.number].counts.documents
        facts.append(SourceFacts(**planned, documents=documents))
    account = Account(
        documents=total.documents,
        packed=total.packed,
        skipped=dict(total.skipped),
        tokens=total.tokens,
        lengths={f"{2**k // 2}-{2**k - 1}": total.lengths[k] for k in sorted(total.lengths)},
        field=job.config.field,
        engine=engine,
        tokenizer=TokenizerFacts(
            path=str(job.spec.path),
            sha256=job.spec.sha256,
            vocab_size=job.spec.vocab_size,
            eod=job.spec.eod,
            special_tokens=job.config.special_tokens,
        ),
        sources=tuple(facts),
        version=__version__,
    )
    if not account.packed:
        workplace.remove(job.folder)
        raise ValueError(f"no document to pack: {job.out} would be empty, and is not written")
    (job.folder / workplace.JOINED).touch()
    if account.skipped:
        list_skipped(job, done)
    write_account(account, account_path(job.out))
    join(entries, job.folder / "joined.tmp", job.out, job.spec.dtype.itemsize)
    workplace.remove(job.folder)
    return account


def list_skipped(job: Job, done: dict[int, Done]) -> None:
    """Write the list of skipped documents, numbered from the beginning of each source."""
    before = 0
    with pbin.write_beside(skipped_path(job.out)) as file:
        for i, portion in enumerate(job.portions):
            entry = done[portion.number]
            if i and job.portions[i - 1].source is not portion.source:
                before = 0
            with entry.open("skipped") as part:
                while part.tell() < entry.end["skipped"]:
                    row = orjson.loads(part.readline())
                    row["line" if "line" in row else "row"] += before
                    file.write(orjson.dumps(row) + b"\n")
            before += entry.counts.documents
