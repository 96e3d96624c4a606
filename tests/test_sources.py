"""Every line and row of a source comes out once and in order, wherever it is cut; what is broken is named."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub: no test here is to reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.fields import make_select, texts_of
from modalities.sources import CHUNK_BYTES, Chunk, Lines, Source, Table, Where, find_sources

BOM = b"\xef\xbb\xbf"
# A number of lines, of which the last may lack its newline; short ones, for cuts between them to be common.
CONTENTS = st.lists(st.sampled_from([b"", b"", b"\r", b"a", b"bc", b"\x00", "ä".encode(), BOM, b"long" * 9])).map(
    b"\n".join
)


def lines_of(content: bytes) -> list[tuple[int, int, bytes]]:
    """(number, byte, line) of every line, by hand."""
    start = len(BOM) if content.startswith(BOM) else 0
    pieces = content[start:].split(b"\n")
    lines, offset = [], start
    for number, piece in enumerate(pieces, 1):
        line = piece + b"\n" if number < len(pieces) else piece
        if line:
            lines.append((number, offset, line))
        offset += len(line)
    return lines


def read(source: Source, size: int = 1 << 30) -> Iterator[tuple[Where, Any]]:
    """Every document of a source cut into portions of `size` bytes, with where it stands."""
    before = 0
    for begin, end in source.portions(size):
        count = 0
        for chunk in source.chunks(begin, end):
            assert chunk.items and chunk.first == count
            for i, item in enumerate(chunk.items):
                yield chunk.where(source.name, i, before), item
            count += len(chunk.items)
        if isinstance(source, Lines) and not source.compression:
            assert before == source.documents_before(begin)
        before += count


def found(path: Path, size: int) -> list[tuple[int, int | None, bytes]]:
    return [(where.number, where.offset, line) for where, line in read(Lines(path), size)]


def complaint(source: Source) -> str:
    """The one line that reading a source fails with."""
    with pytest.raises(ValueError) as caught:
        list(read(source))
    message = str(caught.value)
    assert source.name in message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------- lines


@settings(deadline=None, derandomize=True, max_examples=300)
@given(content=CONTENTS, size=st.integers(1, 60))
def test_portions_of_any_size_lose_and_double_no_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    assert found(path, size) == lines_of(content)
    portions = Lines(path).portions(size)
    assert [begin for begin, _ in portions] == [0, *(end for _, end in portions[:-1])]
    assert portions[-1][1] == len(content)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 11, 1000])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\n" * 12,
        b"a",
        b"a\n",
        b"\na\n\nb",
        b"a\r\n\r\nb\r\n",
        BOM,
        BOM + b"a\nb",
        BOM + b"\n\n",
        b"a\n" + BOM + b"b\n",
        b"x" * 30 + b"\ny\n" + b"z" * 30,
        b"\xff\n\x00\n\n",
    ],
    ids=repr,
)
def test_portions_of_hostile_files(tmp_path: Path, content: bytes, size: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert found(tmp_path / "a.jsonl", size) == lines_of(content)


def test_an_empty_file_is_one_portion(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert Lines(tmp_path / "a.jsonl").portions(5) == [(0, 0)]
    assert list(Lines(tmp_path / "a.jsonl").chunks(0, 0)) == []


def test_portions_are_about_as_large_as_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"123456789\n" * 100)
    assert Lines(tmp_path / "a.jsonl").portions(250) == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert Lines(tmp_path / "a.jsonl").portions(251) == [(0, 260), (260, 520), (520, 780), (780, 1000)]
    assert Lines(tmp_path / "a.jsonl").portions(999) == [(0, 1000)]
    assert Lines(tmp_path / "a.jsonl").portions(1000) == Lines(tmp_path / "a.jsonl").portions(9999) == [(0, 1000)]


def test_a_chunk_ends_where_it_is_due_to_the_byte(tmp_path: Path) -> None:
    # readlines reads on until it has more than it is told, so that a portion would end with a line of the next one.
    (tmp_path / "a.jsonl").write_bytes(b"\n" * 10)
    source = Lines(tmp_path / "a.jsonl")
    for begin in range(10):
        for end in range(begin, 11):
            assert [line for chunk in source.chunks(begin, end) for line in chunk.items] == [b"\n"] * (end - begin)


@pytest.mark.parametrize(
    "lengths",
    [
        [1] * (2 * CHUNK_BYTES + 5),
        [64] * (CHUNK_BYTES // 32 + 3),
        [CHUNK_BYTES - 1, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 1, 1],
        [CHUNK_BYTES - 1, 2, CHUNK_BYTES - 2, 1, 1, 3],
        [1, 3 * CHUNK_BYTES, 1],
    ],
    ids=lambda lengths: f"{len(lengths)} lines of {lengths[0]}",
)
@pytest.mark.parametrize("size", [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 1 << 30])
def test_chunks_of_large_files(tmp_path: Path, lengths: list[int], size: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"x" * (length - 1) + b"\n" for length in lengths))
    read_lengths: list[int] = []
    offset = before = 0
    for begin, end in Lines(path).portions(size):
        assert begin == offset
        count = 0
        for chunk in Lines(path).chunks(begin, end):
            assert (chunk.offset, chunk.first) == (offset, count)
            assert sum(map(len, chunk.items[:-1])) < CHUNK_BYTES, "more than a chunk, or a line too many"
            read_lengths += map(len, chunk.items)
            offset, count = offset + sum(map(len, chunk.items)), count + len(chunk.items)
        assert before == Lines(path).documents_before(begin)
        before += count
    assert read_lengths == lengths


def test_a_line_that_ends_beyond_its_portion_is_the_last(tmp_path: Path) -> None:
    # As where a file was changed after it was cut.
    (tmp_path / "a.jsonl").write_bytes(b"one\ntwo\nthree\n")
    for end, lines in {1: 1, 3: 1, 4: 1, 5: 2, 8: 2, 9: 3}.items():
        assert sum(len(chunk.items) for chunk in Lines(tmp_path / "a.jsonl").chunks(0, end)) == lines


def test_a_file_that_shrinks_while_it_is_read_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\n")
    assert [chunk.items for chunk in Lines(path).chunks(0, 9)] == [[b"one\n", b"two\n"]]
    assert list(Lines(path).chunks(8, 9)) == list(Lines(path).chunks(20, 21)) == []


def test_where_a_document_stands(tmp_path: Path) -> None:
    chunk = Chunk([b"a\n", "ä\n".encode(), b"c"], 5, 100)
    assert [chunk.where("x.jsonl", i, 2) for i in range(3)] == [
        Where("x.jsonl", 8, 100),
        Where("x.jsonl", 9, 102),
        Where("x.jsonl", 10, 105),
    ]
    assert str(chunk.where("x.jsonl", 1)) == "x.jsonl, line 7 (byte 102)"
    assert str(Chunk([{}, {}], 5, None).where("x.parquet", 1, 10)) == "x.parquet, row 17"


# ----------------------------------------------------------------------------------------------------------- compressed


def compressed(content: bytes, ending: str, folder: Path) -> bytes:
    if ending == ".gz":
        return gzip.compress(content)
    with pa.output_stream(str(folder / "compress"), compression="zstd") as file:
        file.write(content)
    return (folder / "compress").read_bytes()


@pytest.fixture(params=[".gz", ".zst"])
def ending(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("content", [b"a\nb", b"\n\n", b"a\r\n", BOM + b"a\nb\n", b"x" * 3_000_000 + b"\ny\n"])
def test_compressed_lines(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compressed(content, ending, tmp_path))
    assert Lines(path).portions(1) == [(0, path.stat().st_size)]
    assert found(path, 1) == lines_of(content)


def test_many_members_are_read_on_and_chunked(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    lines = [b'{"text": "%d"}\n' % i for i in range(150_000)]
    halves = (lines[:1000] + [b'{"te'], [b'xt": "cut"}\n'] + lines[1000:], [b""])
    path.write_bytes(b"".join(compressed(b"".join(half), ending, tmp_path) for half in halves))
    chunks = list(Lines(path).chunks(0, path.stat().st_size))
    assert len(chunks) > 2
    found_lines = [line for chunk in chunks for line in chunk.items]
    assert found_lines == [*lines[:1000], b'{"text": "cut"}\n', *lines[1000:]]
    assert [chunk.first for chunk in chunks[:2]] == [0, len(chunks[0].items)]


def test_an_archive_of_nothing_has_no_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compressed(b"", ending, tmp_path))
    assert path.stat().st_size > 0 and found(path, 1) == []


def test_an_archive_that_breaks_off_anywhere_is_no_short_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    lines = b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(60))
    whole = compressed(lines, ending, tmp_path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "copy it again or make it again" in complaint(Lines(path))
    # Nor one that breaks off in its second member.
    for length in range(1, len(whole)):
        path.write_bytes(whole + whole[:length])
        complaint(Lines(path))


def test_an_archive_that_breaks_off_late_gives_what_came_before(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    lines = b"".join(os.urandom(500).hex().encode() + b"\n" for _ in range(5000))
    path.write_bytes(compressed(lines, ending, tmp_path)[:-1000])
    chunks = Lines(path).chunks(0, path.stat().st_size)
    assert lines.startswith(b"".join(next(chunks).items))
    with pytest.raises(ValueError, match="cannot be read"):
        list(chunks)


@pytest.mark.parametrize("more", [b"garbage", b"\n", bytes(20), b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_something_after_an_archive(tmp_path: Path, ending: str, more: bytes) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compressed(b'{"text": "a"}\n' * 5, ending, tmp_path) + more)
    complaint(Lines(path))


def test_damaged_archives(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    whole = compressed(os.urandom(3000).hex().encode(), ending, tmp_path)
    # A gzip has a checksum; Arrow's zstd has none, and only its headers and tables can be found out.
    for position in range(0, len(whole), 7) if ending == ".gz" else range(4):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        if position not in range(4, 10):  # the time and the system in gzip's header
            complaint(Lines(path))


@pytest.mark.parametrize("content", [b'{"text": "a"}\n', b"", b"\x00" * 100])
def test_no_archive_at_all(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(content)
    complaint(Lines(tmp_path / f"a.jsonl{ending}"))


# --------------------------------------------------------------------------------------------------------------- tables

ROWS: list[dict[str, Any]] = [
    {"text": f"row {i} ä😀" if i % 5 else None, "n": i, "a": {"b": [f"{i}"] * (i % 3)} if i % 4 else None}
    for i in range(600)
]


def arrow() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def write_table(folder: Path, kind: str) -> Path:
    """The rows above as a file of some kind."""
    if kind == "parquet":
        pa.parquet.write_table(arrow(), folder / "a.parquet", row_group_size=70)
        return folder / "a.parquet"
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, new(file, arrow().schema) as writer:
        writer.write_table(arrow(), max_chunksize=70)
    return folder / "a.arrow"


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_tables(tmp_path: Path, kind: str) -> None:
    path = write_table(tmp_path, kind)
    (source,) = find_sources([path])
    status = path.stat()
    assert source.facts() == {"name": str(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    documents = list(read(source))
    assert [row for _, row in documents] == ROWS
    assert [where for where, _ in documents] == [Where(str(path), i + 1, None) for i in range(len(ROWS))]
    (one,) = find_sources([str(path)], column="a")
    assert [row for _, row in read(one)] == [{"a": row["a"]} for row in ROWS]
    texts, rejects = texts_of([row for _, row in read(one)], make_select(".a.b[-1]"), ".a.b[-1]")
    assert texts == [row["a"]["b"][-1] for row in ROWS if row["a"] and row["a"]["b"]]
    assert {reject.reason for _, reject in rejects} == {"no field .a.b[-1]"}


@pytest.mark.parametrize(
    ("field", "reasons"),
    [
        (".text", {"field .text is null"}),
        (".n", {"field .n is not a string"}),
        (".a", {"field .a is null", "field .a is not a string"}),
        (".a.c", {"no field .a.c"}),
    ],
)
def test_what_is_no_text_in_a_table(tmp_path: Path, field: str, reasons: set[str]) -> None:
    (source,) = find_sources([write_table(tmp_path, "parquet")])
    _, rejects = texts_of([row for _, row in read(source)], make_select(field), field)
    assert {reject.reason for _, reject in rejects} == reasons


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_other_types_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["a", "", None, "ä"]).cast(kind)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (source,) = find_sources([tmp_path / "a.arrow"], column="text")
    assert [row["text"] for _, row in read(source)] == ["a", "", None, "ä"]


def test_a_text_that_is_no_utf8_is_one_bad_row(tmp_path: Path) -> None:
    texts = [b"ok", b"\xff\xfe", "fine ä".encode(), b"\xed\xa0\x80"]
    column = pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts).buffers())
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (source,) = find_sources([tmp_path / "a.parquet"])
    good, rejects = texts_of([row for _, row in read(source)], make_select(".text"), ".text")
    assert good == ["ok", "fine ä"]
    assert [(i, reject.reason) for i, reject in rejects] == [(1, "invalid UTF-8"), (3, "invalid UTF-8")]
    assert all("\n" not in str(reject) for _, reject in rejects)


@pytest.mark.parametrize("row_groups", [0, 1])
def test_a_table_without_rows(tmp_path: Path, row_groups: int) -> None:
    with pa.parquet.ParquetWriter(tmp_path / "a.parquet", arrow().schema) as writer:
        for _ in range(row_groups):
            writer.write_table(arrow().slice(0, 0))
    assert pa.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == row_groups
    (source,) = find_sources([tmp_path / "a.parquet"], column="text")
    assert list(read(source)) == []


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    (source,) = find_sources([write_table(tmp_path, "parquet")], column="content")
    assert complaint(source) == f"{source.name} has no column 'content'; it has text, n, a"


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_broken_tables(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole = write_table(tmp_path, kind).read_bytes()
    for i, broken in enumerate([b"", b"junk", b"\x00" * 500, whole[:100], whole[: len(whole) // 2], whole[50:]]):
        path = tmp_path / f"{i}.{'parquet' if kind == 'parquet' else 'arrow'}"
        path.write_bytes(broken)
        (source,) = find_sources([path])
        complaint(source)
    assert capfd.readouterr() == ("", ""), "something else speaks of it too"


def test_a_table_with_a_damaged_page_tells_how_far_it_came(tmp_path: Path) -> None:
    path = write_table(tmp_path, "parquet")
    column = pa.parquet.ParquetFile(path).metadata.row_group(6).column(0)
    damaged = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    damaged[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(damaged)
    (source,) = find_sources([path])
    assert "cannot be read after row " in complaint(source)


# ------------------------------------------------------------------------------------------------------------- datasets


def test_a_folder_of_tables_is_read_file_by_file(tmp_path: Path) -> None:
    for i, name in enumerate(["b.parquet", "a.parquet", "sub/c.parquet", "d.jsonl"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = [{"text": f"{name} {j}"} for j in range(i + 1)]
        if name.endswith("parquet"):
            pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        else:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = find_sources([tmp_path], column="text")
    assert [Path(source.name).name for source in sources] == ["a.parquet", "b.parquet", "d.jsonl", "c.parquet"]
    texts = texts_of([row for source in sources for _, row in read(source)], make_select(".text"), ".text").texts
    assert texts == [
        *(f"a.parquet {j}" for j in range(2)),
        "b.parquet 0",
        *(f"d.jsonl {j}" for j in range(4)),
        *(f"sub/c.parquet {j}" for j in range(3)),
    ]


def test_a_folder_that_spark_wrote(tmp_path: Path) -> None:
    # Its Parquet "file" is a folder of that name.
    (tmp_path / "x" / "docs.parquet").mkdir(parents=True)
    (tmp_path / "x" / "docs.parquet" / "_SUCCESS").touch()
    path = tmp_path / "x" / "docs.parquet" / "part-0.parquet"
    pa.parquet.write_table(arrow(), path)
    for given_path in (tmp_path / "x", tmp_path / "x" / "docs.parquet"):
        assert [source.name for source in find_sources([given_path])] == [str(path)]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_dataset_saved_to_disk(tmp_path: Path, num_shards: int) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=num_shards)
    source = Table(str(tmp_path / "one"), column="text")
    assert [row for _, row in read(source)] == [{"text": row["text"]} for row in ROWS]
    parts = datasets.DatasetDict(train=whole, val=whole.select(range(5)))
    parts.save_to_disk(tmp_path / "two")
    for split, rows in (("train", ROWS), ("val", ROWS[:5])):
        assert [row for _, row in read(Table(str(tmp_path / "two"), split))] == rows
    assert "split nope" in complaint(Table(str(tmp_path / "two"), "nope"))
    assert complaint(Table(str(tmp_path / "two"), "nope")).endswith("it has train, val")
    missing = complaint(Table(str(tmp_path / "one"), column="nope"))
    assert missing.endswith("has no column 'nope'; it has text, n, a")


def test_a_dataset_folder_with_splits(tmp_path: Path) -> None:
    for i, name in enumerate(["train-00000-of-00003", "train-00001-of-00003", "train-00002-of-00003", "test"]):
        rows = pa.Table.from_pylist(ROWS[200 * i : 200 * (i + 1)] or ROWS[:7])
        pa.parquet.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=64)
    source = Table(str(tmp_path), column="n")
    assert source.portions(1) == [(0, 1), (1, 2), (2, 3)]
    assert source.facts() == {"name": str(tmp_path), "split": "train", "shards": 3, "version": "0.0.0"}
    documents = list(read(source))
    in_order = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    assert [row["n"] for _, row in documents] == [row["n"] for row in in_order] == list(range(600))
    assert [where.number for where, _ in documents] == list(range(1, 601))
    assert [row["n"] for _, row in read(Table(str(tmp_path), "test", "n"))] == list(range(7))
    assert "nope" in complaint(Table(str(tmp_path), "nope"))
    assert "no column 'nope'; it has text, n, a" in complaint(Table(str(tmp_path), column="nope"))


@pytest.mark.parametrize("name", ["no_such_dataset_here", "no/such_dataset_here", "/no/such/folder"])
def test_a_dataset_that_cannot_be_had(name: str) -> None:
    assert complaint(Table(name)).startswith(f"dataset {name}, split train: ")


def test_an_empty_folder_is_no_dataset(tmp_path: Path) -> None:
    complaint(Table(str(tmp_path)))


# --------------------------------------------------------------------------------------------------------------- inputs


def names(*patterns: str | Path) -> list[str]:
    return [source.name for source in find_sources(patterns)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("c.jsonl", "a.jsonl", "b.jsonl.gz", "x.zst", "notes.txt", "sub/a.jsonl.zst", "sub/deep/d.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_files_are_taken_in_the_order_given(tree: Path) -> None:
    assert names(tree / "c.jsonl", tree / "a.jsonl") == [f"{tree}/c.jsonl", f"{tree}/a.jsonl"]
    assert names(tree / "notes.txt") == [f"{tree}/notes.txt"], "a name given in full may end in anything"


def test_globs_are_sorted(tree: Path) -> None:
    assert names(tree / "*.jsonl") == [f"{tree}/a.jsonl", f"{tree}/c.jsonl"]
    assert names(tree / "c.*", tree / "?.jsonl") == [f"{tree}/c.jsonl", f"{tree}/a.jsonl", f"{tree}/c.jsonl"]
    every = ["a.jsonl", "b.jsonl.gz", "c.jsonl", "sub/a.jsonl.zst"]
    assert names(tree / "**" / "*.jsonl*") == [f"{tree}/{name}" for name in every]


def test_a_folder_stands_for_the_documents_in_it(tree: Path) -> None:
    every = ["a.jsonl", "b.jsonl.gz", "c.jsonl", "sub/a.jsonl.zst", "sub/deep/d.parquet"]
    assert names(tree) == [f"{tree}/{name}" for name in every]


def test_a_name_with_the_signs_of_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.jsonl").touch()
    assert names(tmp_path / "a[1]*.jsonl") == [f"{tmp_path}/a[1]*.jsonl"]


def test_files_are_read_by_their_endings(tree: Path) -> None:
    kinds = [type(source) for source in find_sources([tree], column="x")]
    assert kinds == [Lines] * 4 + [Table]
    assert find_sources([tree / "sub" / "deep"], "x") == [
        Table(f"{tree}/sub/deep/d.parquet", column="x", builder="parquet")
    ]
    (source,) = find_sources([tree / "x.zst"])
    assert isinstance(source, Lines) and source.compression == "zstd"


def test_inputs_that_are_none(tree: Path) -> None:
    os.mkfifo(tree / "pipe.jsonl")
    (tree / "empty").mkdir()
    (tree / "dangling.jsonl").symlink_to(tree / "nowhere")
    for pattern, what in {
        tree / "none.jsonl": "is missing",
        tree / "none*.jsonl": "is missing",
        tree / "dangling.jsonl": "is missing",
        tree / "pipe.jsonl": "is no regular file",
        Path("/dev/null"): "is no regular file",
        tree / "empty": "is a folder without .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow",
    }.items():
        # Before any work: what comes first is fine.
        with pytest.raises(ValueError) as caught:
            find_sources([tree / "a.jsonl", pattern])
        assert str(caught.value).startswith(f"{pattern} {what}; give ")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^no input; give at least one file, or --dataset$"):
        find_sources([])


def test_facts_tell_versions_of_a_file_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one")
    before = Lines(path).facts()
    assert before == {"name": str(path), "bytes": 3, "modified_ns": path.stat().st_mtime_ns}
    os.utime(path, ns=(0, 12345))
    assert Lines(path).facts() == {"name": str(path), "bytes": 3, "modified_ns": 12345}
