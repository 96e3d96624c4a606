"""Documents → tokens → `.pbin`, in threads and on any number of machines, with an account of every document.

Threads encode chunks, for the engines leave Python's lock alone; the main thread writes what they return in the order
of the input. So the file is the same for any number of threads and ranks, and an interrupted run goes on where it was.
"""

import json
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from modalities import __version__, pbin, ranks
from modalities.account import Account, SourceFacts, TokenizerFacts, account_path, skipped_path, write_account
from modalities.corpus import skipped_line
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
from modalities.sources import Chunk, Lines, Source

POLL_SECONDS = 0.2


def pack(sources: Sequence[Source], out: Path, config: PackConfig, say: Callable[[str], None]) -> Account | None:
    """Tokenize the documents of `sources`, end each with the token `eod`, and write `out` and its account.

    To be called on every rank; the main rank joins the parts and returns the account. An existing `out` is refused.
    `say` is told, on the main rank, what a user would want to know meanwhile.
    """
    if ranks.is_main():
        pbin.refuse_existing(out)
    job = make_job(sources, out, config)
    say = say if ranks.is_main() else lambda message: None
    open_folder(job, say)
    try:
        engine, done = work_until_done(job, say)
        wait_for_ranks(job)
    except (Exception, KeyboardInterrupt) as error:
        kept = sum(len(finished(job.folder, name, True)) for name in ENGINES)
        if not kept and ranks.world_size() == 1:
            shutil.rmtree(job.folder)
        if kept and isinstance(error, ValueError):
            raise ValueError(
                f"{error} ({kept} of {len(job.portions)} parts are done and kept in {job.folder})"
            ) from None
        raise
    return finish(job, engine, done) if ranks.is_main() else None


def open_folder(job: Job, say: Callable[[str], None]) -> None:
    """The folder of the parts: one of an interrupted run where that had the same plan, or a new one."""
    while not ranks.is_main():
        if read_plan(job) == job.plan:
            return
        time.sleep(POLL_SECONDS)
    if job.folder.exists():
        if read_plan(job) == job.plan:
            say(f"continuing what lies in {job.folder}")
        else:
            say(f"{job.folder} belongs to other inputs or options: starting anew")
            shutil.rmtree(job.folder)
    if not job.folder.exists():
        for listed in (account_path(job.out), skipped_path(job.out)):
            pbin.refuse_existing(listed)
    path = job.folder / "plan.json"
    path.unlink(missing_ok=True)
    with pbin.write_beside(path) as file:
        file.write(json.dumps({"launch": secrets.token_hex(8), **job.plan}, indent=2).encode())


def read_plan(job: Job, key: str | None = None) -> Any:
    """The plan that lies in the folder, or of it the entry `key`; None if there is none."""
    try:
        plan = json.loads((job.folder / "plan.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    launch = plan.pop("launch", None)
    return launch if key == "launch" else plan


def wait_for_ranks(job: Job) -> None:
    """Return on the main rank when the others need the parts no more, and on the others when it has joined them."""
    told = None
    while not ranks.is_main() and job.folder.exists():
        # The main rank may have started later than this one, over parts that were whole already: tell it again.
        launch = read_plan(job, "launch")
        if launch not in (told, None):
            (job.folder / f"{launch}.{ranks.rank()}.left").touch()
            told = launch
        time.sleep(POLL_SECONDS)
    if ranks.is_main():
        launch = read_plan(job, "launch")
        while len(list(job.folder.glob(f"{launch}.*.left"))) < ranks.world_size() - 1:
            time.sleep(POLL_SECONDS)


def work_until_done(job: Job, say: Callable[[str], None]) -> tuple[str, dict[int, Done]]:
    """Pack this rank's share and wait for the others'; the engine that it was done with, and the finished portions."""
    switch = job.folder / "use_tokenizers"
    chosen = choose_engine(job, say)
    share = job.share(ranks.rank(), ranks.world_size())
    while True:
        engine = "tokenizers" if switch.exists() else chosen
        done = finished(job.folder, engine, with_skips=job.config.on_error == "skip")
        todo = [portion for portion in share if portion.number not in done]
        if len(done) == len(job.portions):
            return engine, done
        if not todo:
            time.sleep(POLL_SECONDS)
            continue
        try:
            pack_portions(job, engine, todo)
        except EnginesDiffer as difference:
            switch.touch()
            say(f"{difference}: packing from the start with tokenizers")


# ----------------------------------------------------------------------------------------------------------------- work


Reading = tuple[Portion, Chunk | None, Future[Encoded] | None]


def pack_portions(job: Job, engine: str, portions: Sequence[Portion]) -> None:
    """Pack `portions` into the files of this rank."""
    from tqdm import tqdm

    encode, switch = make_encode(job, engine), job.folder / "use_tokenizers"
    waiting: deque[Reading] = deque()
    size = sum(portion.end - portion.begin for portion in portions)
    bar = tqdm(total=size, desc=job.out.name, unit="B", unit_scale=True, disable=None, leave=False)
    stem = job.folder / f"{ranks.rank()}.{engine}"
    with Writer(stem) as writer, bar, ThreadPoolExecutor(job.config.num_threads, "encode") as pool:

        def take() -> None:
            portion, chunk, encoded = waiting.popleft()
            if encoded is not None:
                write(job, writer, portion, chunk, encoded.result())
                return
            writer.finish(portion.number)
            bar.update(portion.end - portion.begin)
            if engine != "tokenizers" and switch.exists():
                raise EnginesDiffer("fastokens gives other ids than tokenizers on another rank")

        try:
            for reading in read(portions, lambda chunk: pool.submit(encode, chunk)):
                waiting.append(reading)
                # Bounded: whatever is read and not written lies in memory.
                while len(waiting) > 2 * job.config.num_threads:
                    take()
            while waiting:
                take()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
        before = source.lines_before(portion.begin) if isinstance(source, Lines) else 0
        i, reject = encoded.rejects[0]
        where = chunk.where(source.name, i, before)
        raise ValueError(f"{where}: {reject}; mend it, or leave out such documents with --on-error skip")
    counts.tokens = len(encoded.tokens)
    counts.skipped.update(reject.reason for _, reject in encoded.rejects)
    counts.lengths.update(np.frexp(encoded.lengths)[1].tolist())
    skipped = b"".join(skipped_line(chunk.where(source.name, i), reject) for i, reject in encoded.rejects)
    writer.add(encoded.tokens, encoded.lengths, skipped, counts)


# --------------------------------------------------------------------------------------------------------------- finish


def finish(job: Job, engine: str, done: dict[int, Done]) -> Account:
    """Join the parts to `out`, beside its account and the list of what was skipped, and remove them."""
    entries, total, facts = [done[portion.number] for portion in job.portions], Counts(), []
    for source in job.sources:
        documents = 0
        for portion in job.portions:
            if portion.source is source:
                total.add(done[portion.number].counts)
                documents += done[portion.number].counts.documents
        facts.append(SourceFacts(**source.facts(), documents=documents))
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
        shutil.rmtree(job.folder)
        raise ValueError(f"no document to pack: {job.out} would be empty, and is not written")
    # An earlier try may have come as far as these.
    for path in (account_path(job.out), skipped_path(job.out)):
        path.unlink(missing_ok=True)
    if account.skipped:
        list_skipped(job, done)
    write_account(account, account_path(job.out))
    join(entries, job.out, job.spec.dtype.itemsize)
    shutil.rmtree(job.folder)
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
