"""Merged, split, shuffled, masked and described files, against naive references over lists of documents."""

import itertools
import math
import os
import pickle
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities import files, histogram, pbin
from modalities.describe import describe
from modalities.files import mask_path, merge, split
from modalities.masks import mask_between
from modalities.shuffle import shuffle

Documents = list[list[int]]
BEGIN, END = 7, 8
few = settings(max_examples=40, deadline=None, database=None)


def write(path: Path, documents: Documents, size: int = 2, header: int = 12, order: str = "<") -> Path:
    """A `.pbin` by hand: with an `order` of ">" or 8 bytes of `header` as older Modalities wrote it."""
    data = b"".join(np.array(d, dtype=f"{order}u{size}").tobytes() for d in documents)
    head = struct.pack(f"{order}Q", len(data)) + (struct.pack(f"{order}I", size) if header == 12 else b"")
    ends = [*itertools.accumulate(size * len(d) for d in documents)]
    pairs = [(end - size * len(d), size * len(d)) for d, end in zip(documents, ends, strict=True)]
    path.write_bytes(head + data + pickle.dumps(pairs, protocol=4))
    return path


def read(path: Path) -> Documents:
    opened = pbin.open_pbin(path)
    return [opened.document(i).tolist() for i in range(opened.num_documents)]


def random_documents(seed: int, count: int, largest: int = 250, longest: int = 12) -> Documents:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, largest, length).tolist() for length in rng.integers(0, longest, count)]


def mask_of(documents: Documents) -> Documents:
    """A mask by which each token can be recognised: its parity."""
    return [[token % 2 for token in document] for document in documents]


def write_masked(path: Path, documents: Documents, size: int = 2) -> Path:
    write(mask_path(path), mask_of(documents), 1)
    return write(path, documents, size)


def refused(match: str, function: Callable[..., str], *args: object, **options: object) -> None:
    """`function` raises a `ValueError` of one line."""
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


def test_path_of_a_mask() -> None:
    assert mask_path(Path("a/docs.pbin")) == Path("a/docs.mask.pbin")
    assert mask_path(Path("docs.v1.pbin")) == Path("docs.v1.mask.pbin")


# ------------------------------------------------------------------------------------------------------ all_or_none


def test_a_file_made_meanwhile_takes_back_the_outputs_named_before_it(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(ValueError, match="b exists already"), files.all_or_none([a, b]) as parts:
        for part in parts.values():
            part.write_bytes(b"ours")
        b.write_bytes(b"another's")
    assert os.listdir(tmp_path) == ["b"] and b.read_bytes() == b"another's"


def test_an_output_given_twice(tmp_path: Path) -> None:
    a = write(tmp_path / "a.pbin", [[1], [2]])
    refused("written twice", split, a, 0.5, tmp_path / "b.pbin", tmp_path / "b.pbin")
    refused("written twice", split, a, 0.5, tmp_path / "b.pbin", tmp_path / "b.mask.pbin")


def test_existing_outputs_are_refused_before_the_inputs_are_read(tmp_path: Path) -> None:
    missing, out, other = tmp_path / "missing.pbin", tmp_path / "out.pbin", tmp_path / "other.pbin"
    chunk = tmp_path / "out.0001-of-0002.pbin"
    for taken in (out, mask_path(out), chunk):
        taken.write_bytes(b"a user's own")
    refused("out.pbin exists already", merge, [missing], out)
    refused("out.pbin exists already", shuffle, [missing], out, seed=0)
    refused("0001-of-0002.pbin exists already", shuffle, [missing], out, seed=0, chunks=2)
    refused("out.pbin exists already", split, missing, 0.5, other, out)
    refused("out.pbin exists already", mask_between, missing, out, 1, 2)
    refused("out.pbin exists already", describe, missing, png=out)
    out.unlink()
    refused(r"out\.mask\.pbin exists already", merge, [missing], out)  # it would be taken for the mask
    assert sorted(os.listdir(tmp_path)) == [chunk.name, "out.mask.pbin"]
    assert chunk.read_bytes() == b"a user's own"


def test_a_broken_index_leaves_nothing_behind(tmp_path: Path) -> None:
    a, out, other = write(tmp_path / "a.pbin", [[1, 2], [BEGIN, 3, END]]), tmp_path / "b.pbin", tmp_path / "c.pbin"
    a.write_bytes(a.read_bytes()[:-40] + pickle.dumps([(0, 4)], protocol=4))
    for function, args in (
        (merge, ([a], out)),
        (shuffle, ([a], out, 0)),
        (split, (a, 0.5, out, other)),
        (mask_between, (a, out, BEGIN, END)),
    ):
        with pytest.raises(ValueError, match=r"a\.pbin"):
            function(*args)
    assert os.listdir(tmp_path) == ["a.pbin"]


# ------------------------------------------------------------------------------------------------------------ merge


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_merge_of_token_sizes_headers_and_byte_orders(tmp_path: Path, block: int) -> None:
    parts = [random_documents(i, 50) for i in range(6)]
    kinds = [(1, 12, "<"), (2, 12, "<"), (2, 12, ">"), (4, 8, "<"), (4, 8, ">"), (1, 12, ">")]
    paths = [
        write(tmp_path / f"{i}.pbin", part, *kind) for i, (part, kind) in enumerate(zip(parts, kinds, strict=True))
    ]
    report = merge(paths, tmp_path / "out.pbin", block)
    assert (tmp_path / "out.pbin").read_bytes() == write(tmp_path / "due.pbin", sum(parts, []), 4).read_bytes()
    assert "300 documents" in report
    merge(paths[1:3], tmp_path / "two.pbin", block)
    assert pbin.open_pbin(tmp_path / "two.pbin").tokens.dtype == np.dtype("<u2")


def test_merge_of_what_modalities_merged(tmp_path: Path) -> None:
    # Its merge takes 12 bytes off the offsets of the second file.
    data = np.arange(6, dtype="<u2").tobytes() * 3
    index = pickle.dumps([(offset, 12) for offset in (0, 12, 12)], protocol=4)
    (tmp_path / "a.pbin").write_bytes(struct.pack("<QI", 36, 2) + data + index)
    merge([tmp_path / "a.pbin"], tmp_path / "b.pbin")
    assert read(tmp_path / "b.pbin") == [[0, 1, 2, 3, 4, 5]] * 3


def test_merge_takes_masks_along_and_a_file_twice(tmp_path: Path) -> None:
    first, second = random_documents(1, 20), random_documents(2, 30)
    a, b = write_masked(tmp_path / "a.pbin", first, 1), write_masked(tmp_path / "b.pbin", second, 4)
    assert "and its mask" in merge([a, b, a], tmp_path / "out.pbin", block=3)
    assert read(tmp_path / "out.pbin") == first + second + first
    assert read(tmp_path / "out.mask.pbin") == mask_of(first + second + first)
    assert pbin.open_pbin(tmp_path / "out.mask.pbin").tokens.itemsize == 1


def test_merge_of_files_without_documents(tmp_path: Path) -> None:
    assert "0 documents" in merge([write(tmp_path / "a.pbin", [])] * 2, tmp_path / "out.pbin")
    assert read(tmp_path / "out.pbin") == []


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    a = write_masked(tmp_path / "a.pbin", [[1, 2, 3], [4]])
    b = write(tmp_path / "b.pbin", [[1]])
    out = tmp_path / "out.pbin"
    refused(r"a\.pbin has a mask beside it, but .*b\.pbin has none", merge, [a, b], out)
    refused(r"a\.pbin has a mask beside it, but .*b\.pbin has none", shuffle, [b, a], out, 0)
    write(mask_path(b), [[1], []], 1)
    refused("not of the same documents", merge, [a, b], out)
    write(mask_path(a), [[1, 1], [0, 1]], 1)
    refused("not of the same documents", split, a, 0.5, out, tmp_path / "val.pbin")
    write(mask_path(a), [[1, 1, 0], [0]], 2)
    refused("is no mask: its tokens have 2 bytes", describe, a)
    write(mask_path(a), [[1, 2, 0], [0]], 1)
    refused("holds 2, but a mask has", describe, a)
    refused("no input is given", merge, [], out)
    assert not out.exists() and not mask_path(out).exists()


# ---------------------------------------------------------------------------------------------------------- shuffle


def place_in(documents: Documents, shuffled: Documents) -> list[int]:
    """The numbers of the shuffled documents, all different, in their new order."""
    return [documents.index(document) for document in shuffled]


def numbered(count: int) -> Documents:
    """Documents that tell their number by their first two tokens and have 2 to 8 tokens."""
    return [[i // 250, i % 250, *[i % 250] * (i % 7)] for i in range(count)]


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    documents = numbered(300)
    a = write_masked(tmp_path / "a.pbin", documents)
    orders = {}
    for name, seed, memory in (("big", 3, 1 << 30), ("tiny", 3, 1), ("small", 3, 2000), ("other", 4, 1 << 30)):
        out = tmp_path / f"{name}.pbin"
        assert "and its mask" in shuffle([a], out, seed, memory=memory)
        assert sorted(read(out)) == documents and read(out) != documents
        assert read(mask_path(out)) == mask_of(read(out))
        orders[name] = out.read_bytes()
    assert orders["big"] == orders["tiny"] == orders["small"] != orders["other"]
    assert sorted(os.listdir(tmp_path)) == sorted(
        [f"{name}{end}" for name in ("a", *orders) for end in (".pbin", ".mask.pbin")]
    )


@pytest.mark.parametrize("memory", [1, 3000, 1 << 30])
def test_chunks_cut_the_same_order(tmp_path: Path, memory: int) -> None:
    documents = numbered(101)
    half = [write(tmp_path / "a.pbin", documents[:40], 1), write(tmp_path / "b.pbin", documents[40:], 4, 8, ">")]
    shuffle(half, tmp_path / "whole.pbin", 5, memory=memory)
    report = shuffle(half, tmp_path / "out.pbin", 5, chunks=4, memory=memory)
    chunks = [read(tmp_path / f"out.000{i}-of-0004.pbin") for i in range(4)]
    assert sum(chunks, []) == read(tmp_path / "whole.pbin")
    assert sorted(map(len, chunks)) == [25, 25, 25, 26]
    assert len(report.splitlines()) == 4
    assert not (tmp_path / "out.pbin").exists()
    assert pbin.open_pbin(tmp_path / "whole.pbin").tokens.itemsize == 4


def test_every_order_is_equally_likely(tmp_path: Path) -> None:
    documents = [[1], [2, 2], [3]]
    a = write(tmp_path / "a.pbin", documents, 1)
    orders: Counter[tuple[int, ...]] = Counter()
    for seed in range(240):
        out = tmp_path / f"{seed}.pbin"
        shuffle([a], out, seed, memory=1)
        orders[tuple(place_in(documents, read(out)))] += 1
        out.unlink()
    # Chi-square of 6 orders: 20.5 is exceeded once in a thousand times.
    assert sum((orders[order] - 40) ** 2 / 40 for order in itertools.permutations(range(3))) < 20.5


def test_neighbours_part(tmp_path: Path) -> None:
    documents = numbered(2000)
    shuffle([write(tmp_path / "a.pbin", documents)], tmp_path / "b.pbin", 0, memory=9000)
    order = np.array([250 * d[0] + d[1] for d in read(tmp_path / "b.pbin")])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / math.sqrt(2000)
    assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 4 / math.sqrt(2000)


@given(st.lists(st.lists(st.integers(0, 255), max_size=6), min_size=1, max_size=20), st.data())
@few
def test_shuffle_loses_and_adds_nothing(
    tmp_path_factory: pytest.TempPathFactory, docs: Documents, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shuffle")
    chunks, memory = data.draw(st.integers(1, len(docs))), data.draw(st.sampled_from([1, 100, 500, 10_000]))
    shuffle([write_masked(folder / "a.pbin", docs, 1)], folder / "b" / "b.pbin", 0, chunks, memory)
    made = sorted(path for path in (folder / "b").iterdir() if "mask" not in path.name)
    assert len(made) == chunks
    assert sorted(document for path in made for document in read(path)) == sorted(docs)
    assert all(read(mask_path(path)) == mask_of(read(path)) for path in made)


def test_shuffles_that_cannot_be(tmp_path: Path) -> None:
    a, out = write(tmp_path / "a.pbin", [[1], [2]]), tmp_path / "b.pbin"
    refused("2 document.* cannot make 3 chunk", shuffle, [a], out, 0, chunks=3)
    refused("chunks is 0", shuffle, [a], out, 0, chunks=0)
    refused("memory is 0", shuffle, [a], out, 0, memory=0)
    refused("0 document.* cannot make 1 chunk", shuffle, [write(tmp_path / "c.pbin", [])], out, 0)
    assert sorted(os.listdir(tmp_path)) == ["a.pbin", "c.pbin"]


# ------------------------------------------------------------------------------------------------------------ split


def split_sides(folder: Path, path: Path, fraction: float, **options: int) -> tuple[Documents, Documents]:
    folder.mkdir()
    split(path, fraction, folder / "train.pbin", folder / "val.pbin", **options)
    return read(folder / "train.pbin"), read(folder / "val.pbin")


def test_split_is_by_content(tmp_path: Path) -> None:
    unique = [d for d, _ in itertools.groupby(sorted(random_documents(0, 3000)))]
    documents = [unique[i] for i in np.random.default_rng(1).integers(0, len(unique), 4000)]
    train, val = split_sides(tmp_path / "1", write(tmp_path / "a.pbin", documents, 1), 0.2)
    in_val = set(map(tuple, val))
    assert [d for d in documents if tuple(d) in in_val] == val
    assert [d for d in documents if tuple(d) not in in_val] == train
    distinct = {tuple(d) for d in documents}
    assert abs(len(in_val) - 0.2 * len(distinct)) < 4 * math.sqrt(0.2 * 0.8 * len(distinct))

    # The same documents in another order, file and width fall on the same sides, in blocks of any size.
    other = write(tmp_path / "b.pbin", documents[::-1], 4, 8, ">")
    assert split_sides(tmp_path / "2", other, 0.2, block=50) == (train[::-1], val[::-1])
    assert {*map(tuple, split_sides(tmp_path / "3", other, 0.3)[1])} > in_val
    assert split_sides(tmp_path / "4", other, 0.2, seed=1)[1] != val[::-1]


def test_split_does_not_change_from_release_to_release(tmp_path: Path) -> None:
    documents = [[i] for i in range(30)]
    _, val = split_sides(tmp_path / "1", write(tmp_path / "a.pbin", documents), 0.3)
    assert sum(val, []) == [9, 12, 14, 15, 19, 23, 26, 27, 28, 29]


def test_split_takes_masks_along(tmp_path: Path) -> None:
    a = write_masked(tmp_path / "a.pbin", random_documents(0, 400), 4)
    out = tmp_path / "s"
    train, val = split_sides(out, a, 0.4, block=20)
    assert len(train) + len(val) == 400
    assert read(out / "train.mask.pbin") == mask_of(train)
    assert read(out / "val.mask.pbin") == mask_of(val)
    assert pbin.open_pbin(out / "val.pbin").tokens.itemsize == 4


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_split_by_no_fraction(tmp_path: Path, fraction: float) -> None:
    refused("fraction is", split, tmp_path / "a.pbin", fraction, tmp_path / "b.pbin", tmp_path / "c.pbin")


def test_split_refuses_an_empty_side(tmp_path: Path) -> None:
    a = write_masked(tmp_path / "a.pbin", [[1, 2, 3]] * 10)
    for fraction, side in ((1e-9, "validation"), (1 - 1e-9, "training")):
        refused(f"none of its 10 documents would be {side}", split, a, fraction, tmp_path / "b", tmp_path / "c")
    refused("none of its 0", split, write(tmp_path / "e.pbin", []), 0.5, tmp_path / "b.pbin", tmp_path / "c.pbin")
    assert sorted(os.listdir(tmp_path)) == ["a.mask.pbin", "a.pbin", "e.pbin"]


# ----------------------------------------------------------------------------------------------------- mask_between


def naive_mask(document: list[int], include_end: bool) -> list[int] | None:
    """None where BEGIN and END do not alternate."""
    inside, mask = False, []
    for token in document:
        if token == (BEGIN if inside else END):
            return None
        mask.append(int(inside and (token != END or include_end)))
        inside = token == BEGIN or (inside and token != END)
    return None if inside else mask


@given(
    st.lists(st.lists(st.sampled_from([1, 2, 3, BEGIN, END, END]), max_size=8), min_size=1, max_size=8),
    st.booleans(),
    st.integers(1, 9),
    st.sampled_from([(1, 12, "<"), (2, 12, ">"), (4, 8, ">")]),
)
@settings(few, max_examples=300)
def test_mask_against_a_naive_one(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, include_end: bool, block: int, kind: tuple
) -> None:
    folder = tmp_path_factory.mktemp("mask")
    a, out = write(folder / "a.pbin", documents, *kind), folder / "a.mask.pbin"
    masks = [naive_mask(document, include_end) for document in documents]
    due = [mask for mask in masks if mask is not None]
    if None in masks:
        refused(f"document {masks.index(None)} has token", mask_between, a, out, BEGIN, END, include_end, block)
    elif not any(map(any, due)):
        refused("nothing lies between", mask_between, a, out, BEGIN, END, include_end, block)
    else:
        assert f" {sum(map(sum, due))} of " in mask_between(a, out, BEGIN, END, include_end, block)
        assert out.read_bytes() == write(folder / "due.pbin", due, 1).read_bytes()
    assert len(os.listdir(folder)) == 1 + 2 * out.exists()


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=3), max_size=6), st.data())
@few
def test_mask_of_well_formed_documents(
    tmp_path_factory: pytest.TempPathFactory, spans: list, data: st.DataObject
) -> None:
    documents = [sum(([1] * before + [BEGIN] + [2] * within + [END] for before, within in d), []) for d in spans]
    documents.append([BEGIN, 2, 3, END])
    include_end, block = data.draw(st.booleans()), data.draw(st.integers(1, 20))
    folder = tmp_path_factory.mktemp("mask")
    mask_between(write(folder / "a.pbin", documents), folder / "m.pbin", BEGIN, END, include_end, block)
    assert read(folder / "m.pbin") == [naive_mask(document, include_end) for document in documents]


@pytest.mark.parametrize("block", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ([1, END, BEGIN, 2, END], "token 8 with no token 7 before it"),
        ([BEGIN, 1, BEGIN, 2, END, END], "token 7 twice with no token 8 between"),
        ([BEGIN, 1, END, BEGIN, 2], "token 7 with no token 8 after it"),
    ],
)
def test_tokens_that_do_not_alternate(tmp_path: Path, block: int, wrong: list[int], what: str) -> None:
    good = [BEGIN, 1, END]
    a = write(tmp_path / "a.pbin", [good, [], [], good, [], wrong, [], good, wrong])
    refused(f"document 5 has {what}", mask_between, a, tmp_path / "b.pbin", BEGIN, END, False, block)
    assert os.listdir(tmp_path) == ["a.pbin"]


def test_a_mask_by_one_token_or_by_tokens_that_do_not_occur(tmp_path: Path) -> None:
    a = write(tmp_path / "a.pbin", [[1, 2], [3]], 1)
    refused("must be two different ones", mask_between, a, tmp_path / "b.pbin", 1, 1)
    refused("nothing lies between tokens 1000 and 4", mask_between, a, tmp_path / "b.pbin", 1000, 4)
    refused("nothing lies between", mask_between, write(tmp_path / "e.pbin", []), tmp_path / "b.pbin", 1, 2)
    assert sorted(os.listdir(tmp_path)) == ["a.pbin", "e.pbin"]


def test_many_documents_over_several_pieces_of_the_index(tmp_path: Path) -> None:
    # Some 300,000 documents are more than one piece of 1 MiB, and the pieces of tokens and mask differ.
    lengths = np.random.default_rng(0).integers(0, 5, 300_000)
    tokens = np.where(np.arange(lengths.sum()) % 3 == 0, BEGIN, 1).astype("<u4")
    starts = np.cumsum(lengths) - lengths
    tokens[starts[lengths == 4]], tokens[starts[lengths == 4] + 3] = BEGIN, END
    for i in range(4):
        tokens[starts[(lengths > i) & (lengths < 4)] + i] = 1
    for i in (1, 2):
        tokens[starts[lengths == 4] + i] = 1
    with pbin.write_pbin(tmp_path / "a.pbin", 1 << 20) as append:
        append(tokens, lengths)
    mask_between(tmp_path / "a.pbin", tmp_path / "a.mask.pbin", BEGIN, END)
    assert pbin.open_pbin(tmp_path / "a.mask.pbin").tokens.sum() == 2 * (lengths == 4).sum()
    assert len([*pbin.open_pbin(tmp_path / "a.pbin").index_pieces()]) > 1
    shuffle([tmp_path / "a.pbin"], tmp_path / "b.pbin", 0, memory=4 << 20)
    opened, mask = pbin.open_pbin(tmp_path / "b.pbin"), pbin.open_pbin(tmp_path / "b.mask.pbin")
    assert opened.num_documents == 300_000
    assert (opened.index[:, 1] == 4 * mask.index[:, 1]).all()
    long = opened.index[opened.index[:, 1] == 16, 0] // 4
    assert (opened.tokens[long] == BEGIN).all() and (opened.tokens[long + 3] == END).all()
    assert (mask.tokens[long + 1] == 1).all() and mask.tokens.sum() == 2 * len(long)


# ---------------------------------------------------------------------------------------------- describe, histogram


@given(st.lists(st.integers(0, 5000), max_size=50), st.integers(1, 7))
@few
def test_histogram_against_a_naive_one(lengths: list[int], piece: int) -> None:
    pieces = [np.array(lengths[i : i + piece], np.int64) for i in range(0, len(lengths), piece)]
    counts = histogram.length_histogram(pieces)
    assert counts.shape == (histogram.NUM_BINS,)
    due = Counter(length.bit_length() for length in lengths)
    assert {b: n for b, n in enumerate(counts.tolist()) if n} == due
    if lengths:
        assert histogram.median_bin(counts) == sorted(lengths)[(len(lengths) - 1) // 2].bit_length()


def test_bins_at_their_bounds() -> None:
    for b in range(1, 53):
        counts = histogram.length_histogram([np.array([2 ** (b - 1), 2**b - 1])])
        assert counts[b] == 2
    assert [histogram.bin_name(b) for b in (0, 1, 2, 3, 11)] == ["0", "1", "2–3", "4–7", "1,024–2,047"]


def test_table_lines_up(tmp_path: Path) -> None:
    lines = histogram.table(histogram.length_histogram([np.repeat([0, 1, 9, 2000], [1, 500, 1000, 2])]))
    assert lines == [
        "       tokens  documents  share",
        "            0          1   0.1%  ▏",
        "            1        500  33.3%  ████████████████████",
        "          2–3          0   0.0%",
        "          4–7          0   0.0%",
        "         8–15      1,000  66.5%  ████████████████████████████████████████",
        *(f"{histogram.bin_name(b):>13}          0   0.0%" for b in range(5, 11)),
        "  1,024–2,047          2   0.1%  ▏",
    ]


def facts_of(report: str) -> dict[str, str]:
    named = report.replace("largest token ", "largest ").replace("tokens a document", "lengths")
    lines = (line.split(maxsplit=1) for line in named.split("\n\n")[0].splitlines())
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_facts(tmp_path: Path) -> None:
    documents = [[1], [2, 300, 4, 5], [], [7, 8]]
    a = write(tmp_path / "a.pbin", documents)
    assert facts_of(describe(a)) == {
        "file": f"{a.stat().st_size:,} bytes",
        "header": "12 bytes, little-endian",
        "documents": "4",
        "tokens": "7, of 2 bytes each",
        "largest": "300",
        "lengths": "0 to 4, mean 1.8, median in 1",
    }
    write_masked(a, documents)
    assert facts_of(describe(a))["mask"] == "a.mask.pbin: 3 tokens (42.9%) are targets"
    old = write(tmp_path / "old.pbin", documents, 4, 8, ">")
    assert facts_of(describe(old))["header"] == "8 bytes, big-endian (of Modalities before 2024)"
    assert facts_of(describe(mask_path(a)))["header"] == "12 bytes"
    empty = facts_of(describe(write(tmp_path / "empty.pbin", [])))
    assert (empty["documents"], empty["largest"]) == ("0", "none")


def write_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 3}, unk_token="a")).save(str(path))
    return path


def test_a_document_as_ids_and_as_text(tmp_path: Path) -> None:
    a, tokenizer = write(tmp_path / "a.pbin", [[0], [1, 0, 3], [2]]), write_tokenizer(tmp_path / "tokenizer.json")
    assert describe(a, document=1) == f"{a}, document 1: 3 tokens\n1 0 3"
    assert describe(a, tokenizer, document=1) == f"{a}, document 1: 3 tokens\nb a c"
    refused("does not know token 2", describe, a, tokenizer, document=2)
    for number in (3, -1):
        refused(f"has no document {number}; it has 3, numbered from 0", describe, a, document=number)
    assert facts_of(describe(a, tokenizer))["tokenizer"] == f"{tokenizer} knows the largest token"
    b = write(tmp_path / "b.pbin", [[4]])
    assert facts_of(describe(b, tokenizer))["tokenizer"] == f"{tokenizer} does NOT know the largest token"
    refused("is missing; give a tokenizer.json", describe, a, tmp_path / "no.json")
    refused("is not a tokenizer.json", describe, a, a)


def test_histogram_as_a_picture(tmp_path: Path) -> None:
    for name, documents in (("a", random_documents(0, 99)), ("e", []), ("$_$", [[], [1] * 3000])):
        a, png = write(tmp_path / f"{name}.pbin", documents), tmp_path / f"{name}.png"
        assert describe(a, png=png).endswith(f"wrote {png}")
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert describe(a, document=1, png=tmp_path / "b.png").splitlines()[1:] == [
        "1 " * 2999 + "1",
        f"wrote {tmp_path}/b.png",
    ]
