"""The documents of `.pbin` files in a random order, however many they are.

A permutation that needs no memory says where each document goes. The first pass reads the files in order and
scatters the documents over buckets on disk, each for a range of the places; the second takes one bucket after
another into memory and sorts it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from modalities import files
from modalities.files import Block, Input, Output
from modalities.rng import fold, permute

# Bytes that a document takes in memory beside its tokens, while its bucket is sorted.
DOCUMENT_BYTES = 64
LARGEST_CHUNKS = 10_000


def shuffle(paths: Sequence[Path], out: Path, seed: int, chunks: int = 1, memory: int = 1 << 30) -> str:
    """Write the documents of `paths` to `out` in an order that depends on `seed` and their number alone.

    With `chunks` > 1 the order is cut into that many files of equally many documents, `OUT.0000-of-0004.pbin` and
    so on. `memory` [bytes] is about what it takes, unless a single document takes more; as much disk as the files
    take is used beside `out` meanwhile. Masks go along. Returns a line for each file written.
    """
    if memory < 1:
        raise ValueError(f"memory is {memory}, but must be at least 1 byte")
    if chunks > LARGEST_CHUNKS:
        raise ValueError(f"chunks is {chunks:,}, but must be at most {LARGEST_CHUNKS:,}: each is a file")
    outs = chunk_paths(out, chunks)
    with files.all_or_none(files.with_masks(outs)) as parts:
        inputs = files.open_inputs(paths)
        num_documents = sum(source.num_documents for source in inputs)
        if chunks > num_documents:
            raise ValueError(
                f"{num_documents:,} document(s) cannot make {chunks:,} chunk(s): each takes one at least; "
                "give fewer chunks or more documents"
            )
        masked = inputs[0].mask is not None
        itemsize = files.widest(source.tokens for source in inputs)
        num_bytes = sum(len(source.tokens.tokens) for source in inputs) * (itemsize + masked)
        # Half of the memory for a bucket: a few long documents may make one larger than the others.
        wanted = 2 * (num_bytes + DOCUMENT_BYTES * num_documents) // memory + 1
        in_chunk = min(-(-wanted // chunks), num_documents // chunks)  # no bucket may be empty
        block = max(1, memory // 16 // (itemsize + masked))
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
            buckets = Buckets(Path(folder), chunks * in_chunk, np.dtype(f"<u{itemsize}"), masked)
            scatter(inputs, buckets, num_documents, fold(seed, "shuffle"), block)
            outputs = []
            for i, path in enumerate(outs):
                with ExitStack() as stack:
                    outputs.append(Output(stack, parts, path, itemsize, masked))
                    for bucket in range(i * in_chunk, (i + 1) * in_chunk):
                        for documents in buckets.sorted(bucket, block):
                            outputs[-1].append(documents)
    return "\n".join(output.facts() for output in outputs)


def chunk_paths(out: Path, chunks: int) -> list[Path]:
    """Where the chunks go: one is `out` itself, several are `OUT.0000-of-0004.pbin`, `OUT.0001-of-0004.pbin`, …"""
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}, but must be at least 1")
    if chunks == 1:
        return [out]
    return [out.with_name(f"{out.stem}.{i:04}-of-{chunks:04}{out.suffix}") for i in range(chunks)]


def scatter(inputs: list[Input], buckets: "Buckets", num_documents: int, seed: int, block: int) -> None:
    """Put every document into the bucket of its place in the order, a permutation of all `num_documents`."""
    number = 0
    for source in inputs:
        for documents in files.read_blocks(source, block):
            places = permute(np.arange(number, number + len(documents.lengths)), num_documents, seed)
            buckets.put(documents, places, places * buckets.count // num_documents)
            number += len(documents.lengths)


class Buckets:
    """Documents on disk in buckets numbered from 0, of up to three files each: tokens, mask, places and lengths."""

    def __init__(self, folder: Path, count: int, dtype: np.dtype, masked: bool) -> None:
        self.folder, self.count, self.dtype, self.masked = folder, count, dtype, masked

    def put(self, documents: Block, places: np.ndarray, bucket: np.ndarray) -> None:
        """Append each document, with its place in the order, to its bucket; both int64 [D]."""
        order = np.argsort(bucket, kind="stable")
        numbers, firsts = np.unique(bucket[order], return_index=True)
        for number, chosen in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True):
            some = documents.take(chosen)
            self._append(number, "tokens", some.tokens.astype(self.dtype, copy=False))
            if some.mask is not None:
                self._append(number, "mask", some.mask)
            self._append(number, "documents", np.stack((places[chosen], some.lengths), 1))

    def sorted(self, number: int, block: int) -> Iterator[Block]:
        """The documents of a bucket by their places, in blocks of at most `block` tokens or a longer document.

        It empties the bucket.
        """
        places, lengths = self._read(number, "documents", np.dtype("<i8")).reshape(-1, 2).T
        mask = self._read(number, "mask", np.dtype("u1")) if self.masked else None
        documents = Block(self._read(number, "tokens", self.dtype), mask, lengths)
        order = np.argsort(places)
        for run in files.runs(lengths[order], block):
            yield documents.take(order[run])

    def _append(self, number: int, kind: str, values: np.ndarray) -> None:
        # Opened anew each time: there may be more buckets than a process may have open files.
        with (self.folder / f"{number}.{kind}").open("ab") as file:
            file.write(values.data)

    def _read(self, number: int, kind: str, dtype: np.dtype) -> np.ndarray:
        path = self.folder / f"{number}.{kind}"
        values = np.fromfile(path, dtype)
        path.unlink()  # what is written needs the room
        return values
