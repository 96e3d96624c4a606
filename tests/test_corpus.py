"""Every document is read or counted, every bad one named exactly; the index lists the lines that are JSON."""

import gzip
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities import pbin
from modalities.corpus import Tally, read_texts, read_values, skipped_line, write_index
from modalities.fields import Reject, make_select, value_of
from modalities.sources import CHUNK_BYTES, PORTION_BYTES, Chunk, Where, find_sources

GOOD = b'{"text": "a", "meta": {"t": ["x", "y"]}}'
# Lines that are no JSON, and the reason given.
NOT_JSON = {
    b"": "blank line",
    b" \t\r": "blank line",
    b"\x00": "invalid JSON",
    b'{"text": "a"': "invalid JSON",
    b'{"text": "a"} {"text": "b"}': "invalid JSON",
    b'{"text": "a"}\x00': "invalid JSON",
    b'{"text": "a\x1fb"}': "invalid JSON",
    b'{"text": NaN}': "invalid JSON",
    b'{"text": Infinity}': "invalid JSON",
    b"a": "invalid JSON",
    b"[1,]": "invalid JSON",
    b"01": "invalid JSON",
    b'\xef\xbb\xbf\xef\xbb\xbf{"text": "a"}': "invalid JSON",
    b'{"text": "\\ud800 alone"}': "lone surrogate",
    b'{"\\udfff": "alone in a key"}': "lone surrogate",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\xc1\xbf"}': "invalid UTF-8",
    b"[" * 1025 + b"]" * 1025: "nested too deep",
    b"[" * 200_000: "nested too deep",
}
# Lines that are JSON without a text at .text.
NO_TEXT = {
    b'{"other": "a"}': "no field .text",
    b'["text"]': "no field .text",
    b'"text"': "no field .text",
    b'{"text": null}': "field .text is null",
    b'{"text": 3}': "field .text is not a string",
    b'{"text": ["a"]}': "field .text is not a string",
    b'{"text": ""}': "empty text",
}
# Lines with a text that look as if they had none.
ODD = [
    b'{"text": "a"}\r',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": 1, "text": "last"}',
    b'{"text": "\\u0000\\ud83d\\ude00"}',
    b'{"text": "a", "n": 123456789012345678901234567890}',
    b'{"n": ' + b"[" * 1000 + b"]" * 1000 + b', "text": "a"}',
    b' {"text" : "a"} \t',
]


def read(path: Path, tally: Tally, field: str = ".text") -> list[tuple[Where, str]]:
    return list(read_texts(find_sources([path]), make_select(field), field, tally))


def index_of(path: Path, tally: Tally) -> list[tuple[int, int]]:
    """The pairs of a new index, as Modalities reads them."""
    out = path.with_suffix(".idx")
    kept = write_index(path, out, tally)
    pairs = pickle.loads(out.read_bytes())
    assert out.read_bytes() == pickle.dumps(pairs, protocol=4)
    assert all(type(pair) is tuple and [*map(type, pair)] == [int, int] for pair in pairs)
    assert kept == len(pairs) and tally.documents == kept + tally.skipped.total()
    return pairs


# ---------------------------------------------------------------------------------------------------------------- tally


def test_a_tally_fails_at_the_first_bad_document(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught, Tally("fail", tmp_path / "skipped.jsonl") as tally:
        tally.reject(Where("a.jsonl", 3, 17), Reject("invalid JSON", "why"))
    assert str(caught.value) == (
        "a.jsonl, line 3 (byte 17): invalid JSON: why; mend it, or leave out such documents with --on-error skip"
    )
    assert os.listdir(tmp_path) == []


def test_a_tally_counts_and_lists_what_is_skipped(tmp_path: Path) -> None:
    listed = tmp_path / "new" / "a.skipped.jsonl"
    with Tally("skip", listed) as tally:
        tally.documents = 1_234_567
        tally.reject(Where("a ä.jsonl", 3, 17), Reject("invalid JSON", "why"))
        for number in range(1, 1001):
            tally.reject(Where("b.parquet", number, None), Reject("empty text"))
        assert not listed.exists(), "it is whole when it appears"
    assert tally.skipped == {"invalid JSON": 1, "empty text": 1000}
    assert tally.left_out() == "; skipped 1,001 of 1,234,567: 1,000 × empty text, 1 × invalid JSON"
    rows = [json.loads(line) for line in listed.read_bytes().splitlines()]
    assert rows[:2] == [
        {"file": "a ä.jsonl", "line": 3, "byte": 17, "reason": "invalid JSON", "detail": "why"},
        {"file": "b.parquet", "row": 1, "reason": "empty text", "detail": ""},
    ]
    assert len(rows) == 1001
    assert (
        skipped_line(Where("a ä.jsonl", 3, 17), Reject("invalid JSON", "why"))
        == listed.read_bytes().splitlines(keepends=True)[0]
    )


def test_nothing_skipped_nothing_listed(tmp_path: Path) -> None:
    with Tally("skip", tmp_path / "a.skipped.jsonl") as tally:
        tally.documents = 5
    assert tally.left_out() == "" and os.listdir(tmp_path) == []


def test_the_list_vanishes_where_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Tally("skip", tmp_path / "a.skipped.jsonl") as tally:
        tally.reject(Where("a", 1, 0), Reject("empty text"))
        assert len(os.listdir(tmp_path)) == 1
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_existing_list_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.skipped.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="exists already"), Tally("skip", tmp_path / "a.skipped.jsonl") as tally:
        tally.reject(Where("a", 1, 0), Reject("empty text"))
    assert (tmp_path / "a.skipped.jsonl").read_text() == "mine"


def test_a_report_adds_up(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(bytes(1500))
    tally = Tally("skip", documents=3)
    tally.reject("anywhere", Reject("empty text"))
    assert tally.report(tmp_path / "out", kept=2) == (
        f"{tmp_path}/out: 2 documents, 1,500 bytes; skipped 1 of 3: 1 × empty text"
    )
    assert ": 2 documents, 7,000 tokens, 1,500 bytes; " in tally.report(tmp_path / "out", 2, 7000)
    with pytest.raises(AssertionError):
        tally.report(tmp_path / "out", kept=3)


# ----------------------------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize("bad", NOT_JSON | NO_TEXT, ids=lambda line: repr(line[:40]))
def test_fail_names_file_line_byte_and_reason(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD)
    with pytest.raises(ValueError) as caught:
        read(path, Tally("fail"))
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2 (byte {len(GOOD) + 1}): {(NOT_JSON | NO_TEXT)[bad]}")
    assert "--on-error skip" in message and "\n" not in message


def test_skip_counts_every_line(tmp_path: Path) -> None:
    path, bad = tmp_path / "a.jsonl", NOT_JSON | NO_TEXT
    lines = [line for one in bad for line in (one, GOOD)] + ODD
    path.write_bytes(b"\n".join(lines))
    with Tally("skip", tmp_path / "skipped.jsonl") as tally:
        documents = read(path, tally)
    assert len(documents) == len(bad) + len(ODD)
    assert tally.documents == len(lines)
    assert tally.skipped == {reason: list(bad.values()).count(reason) for reason in bad.values()}
    content = path.read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_bytes().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, 2 * len(bad), 2))
    assert [row["reason"] for row in rows] == list(bad.values())
    for row, line in zip(rows, bad, strict=True):
        assert row["file"] == str(path)
        assert content[row["byte"] :].startswith(line + b"\n")
        assert content.count(b"\n", 0, row["byte"]) + 1 == row["line"]


def test_documents_know_where_they_stand(tmp_path: Path) -> None:
    lines = ['{"text": "ä€😀"}', '{"text": "two"}\r', ' {"text": "three"}']
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode())  # no final newline
    found = read(tmp_path / "a.jsonl", Tally())
    assert [text for _, text in found] == ["ä€😀", "two", "three"]
    assert [where.number for where, _ in found] == [1, 2, 3]
    content = (tmp_path / "a.jsonl").read_bytes()
    for (where, _), line in zip(found, lines, strict=True):
        assert where.offset is not None and content[where.offset :].startswith(line.encode())


def test_numbers_go_on_over_portions_and_begin_again_with_a_file(tmp_path: Path) -> None:
    long = b'{"text": "' + b"x" * (PORTION_BYTES // 5) + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(long * 11 + b"{\n" + GOOD)
    (tmp_path / "b.jsonl").write_bytes(b"\n" + GOOD)
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as file:
        file.write(GOOD + b"\nnull\n")
    assert len(find_sources([tmp_path / "a.jsonl"])[0].portions(PORTION_BYTES)) == 3
    with Tally("skip", tmp_path / "list") as tally:
        documents = list(read_texts(find_sources([tmp_path / "*.jsonl*"]), make_select(".text"), ".text", tally))
    places = [(Path(where.source).name, where.number, where.offset) for where, _ in documents]
    assert places == [
        *(("a.jsonl", i + 1, i * len(long)) for i in range(11)),
        ("a.jsonl", 13, 11 * len(long) + 2),
        ("b.jsonl", 2, 1),
        ("c.jsonl.gz", 1, 0),
    ]
    rows = [json.loads(line) for line in (tmp_path / "list").read_bytes().splitlines()]
    assert [(Path(row["file"]).name, row["line"], row["reason"]) for row in rows] == [
        ("a.jsonl", 12, "invalid JSON"),
        ("b.jsonl", 1, "blank line"),
        ("c.jsonl.gz", 2, "no field .text"),
    ]
    assert (tally.documents, tally.skipped.total()) == (17, 3)


def test_rows_of_a_table_are_numbered(tmp_path: Path) -> None:
    texts = [None if i in (0, 300) else f"text {i}" for i in range(600)]
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: field \.text is null; mend it"):
        read(tmp_path / "a.parquet", Tally("fail"))
    with Tally("skip", tmp_path / "list") as tally:
        documents = read(tmp_path / "a.parquet", tally)
    assert [text for _, text in documents] == [text for text in texts if text]
    assert [where.number for where, _ in documents] == [i + 1 for i, text in enumerate(texts) if text]
    assert [json.loads(line)["row"] for line in (tmp_path / "list").read_bytes().splitlines()] == [1, 301]


def test_values_of_any_type(tmp_path: Path) -> None:
    values: list[Any] = [None, 1, 2.5, True, "", "a", [], [{"b": None}], {}]
    lines = [json.dumps({"v": value}) for value in values] + ["{}", "", "3"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with Tally("skip") as tally:
        found = list(read_values(find_sources([tmp_path / "a.jsonl"]), make_select(".v"), tally))
    assert [value for _, value in found] == values
    assert [where.number for where, _ in found] == list(range(1, len(values) + 1))
    assert tally.documents == len(lines)
    assert tally.skipped == {"no field .v": 2, "blank line": 1}


def test_documents_come_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + b"{\n")
    documents = read_texts(find_sources([tmp_path / "a.jsonl"]), make_select(".text"), ".text", Tally())
    assert next(documents)[1] == "a"
    with pytest.raises(ValueError, match="line 2"):
        next(documents)


def test_an_empty_file_has_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read(tmp_path / "a.jsonl", Tally()) == []
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n")
    tally = Tally()
    assert len(read(tmp_path / "a.jsonl", tally)) == tally.documents == 1, "a final newline is no blank line"


# ---------------------------------------------------------------------------------------------------------------- index


def test_index_lists_the_lines_that_are_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": 1}\r\n\n[2]\n{"x"\n3')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 \(byte 10\): blank line; mend it"):
        write_index(path, tmp_path / "a.idx", Tally())
    assert os.listdir(tmp_path) == ["a.jsonl"]
    with Tally("skip", tmp_path / "list") as tally:
        assert index_of(path, tally) == [(0, 9), (11, 3), (20, 1)]
    assert (tally.documents, tally.skipped) == (5, {"blank line": 1, "invalid JSON": 1})
    assert pbin.read_idx(tmp_path / "a.idx", path).tolist() == [[0, 9], [11, 3], [20, 1]]
    rows = [json.loads(line) for line in (tmp_path / "list").read_bytes().splitlines()]
    assert [(row["line"], row["byte"], row["reason"]) for row in rows] == [
        (2, 10, "blank line"),
        (4, 15, "invalid JSON"),
    ]


@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_index_of_hostile_lines(tmp_path: Path, newline: bytes) -> None:
    path = tmp_path / "a.jsonl"
    good = [GOOD, *NO_TEXT, *ODD]
    lines = [*good, *NOT_JSON, *reversed(good)]
    path.write_bytes(b"\n".join(lines) + newline)
    with Tally("skip") as tally:
        pairs = index_of(path, tally)
    assert tally.documents == len(lines)
    assert tally.skipped == {reason: list(NOT_JSON.values()).count(reason) for reason in NOT_JSON.values()}
    content = path.read_bytes()
    assert [content[offset : offset + length] for offset, length in pairs] == good + good[::-1]


@pytest.mark.parametrize("bad", NOT_JSON, ids=lambda line: repr(line[:40]))
def test_index_stops_at_the_first_bad_line(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD + b"\n{\n")
    with pytest.raises(ValueError) as caught, Tally("fail", tmp_path / "list") as tally:
        write_index(path, tmp_path / "a.idx", tally)
    assert str(caught.value).startswith(f"{path}, line 2 (byte {len(GOOD) + 1}): {NOT_JSON[bad]}")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_index_of_long_lines_and_many_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * 5_000_000 + b'"}'
    short = [b'{"n": %d}' % i for i in range(3 * CHUNK_BYTES // 8)]
    lines = [b"1", long, *short, b"[", long[:-1], long]
    path.write_bytes(b"\n".join(lines))
    due, offset = [], 0
    for line in lines:
        due.append((offset, len(line)))
        offset += len(line) + 1
    del due[-3:-1]
    with Tally("skip") as tally:
        assert index_of(path, tally) == due
    assert tally.skipped == {"invalid JSON": 2}


def test_index_of_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf{}\n\xef\xbb\xbf[]\n1")
    pairs = index_of(tmp_path / "a.jsonl", Tally())
    assert pairs == [(3, 2), (6, 5), (12, 1)]
    content = (tmp_path / "a.jsonl").read_bytes()
    assert [json.loads(content[offset : offset + length]) for offset, length in pairs] == [{}, [], 1]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n", b"\n" * 100_000, b" \r\n{\n"], ids=len)
def test_index_of_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    tally = Tally("skip", tmp_path / "list")
    with pytest.raises(ValueError, match="holds no document: nothing to index"), tally:
        write_index(tmp_path / "a.jsonl", tmp_path / "a.idx", tally)
    assert tally.documents == tally.skipped.total() == content.count(b"\n")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_what_cannot_be_indexed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD))
    (tmp_path / "folder").mkdir()
    for name, what in {"none.jsonl": "missing", "folder": "a folder", "a.jsonl.gz": "no such file"}.items():
        with pytest.raises(ValueError, match=rf"{name} is {what}; an index tells bytes of a JSONL file"):
            write_index(tmp_path / name, tmp_path / "a.idx", Tally())
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "a.idx").write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists already"):
        write_index(tmp_path / "a.jsonl", tmp_path / "a.idx", Tally())
    assert (tmp_path / "a.idx").read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------- simdjson, orjson and json

NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(TEXTS, values, max_size=4),
    max_leaves=12,
)
JSON = st.builds(
    lambda value, ascii_only, spaces: json.dumps(value, ensure_ascii=ascii_only, separators=spaces).encode(),
    VALUES,
    st.booleans(),
    st.sampled_from([(",", ":"), (" , ", "\t:\r ")]),
)
# What a mutation puts in: what JSON is made of, and what it must not hold.
BITS = st.sampled_from(
    [
        *(bytes([byte]) for byte in b'{}[],:"\\/0123456789.-+eEntfaulse \t\r\x00\x01\x1f\x7f\x80\xbf\xc0\xff'),
        *(b"NaN", b"Infinity", b"-Infinity", b"null", b"true", b"1e999", b"00", b"1.", b".5", b"0x1", b"1_0"),
        *(
            b"\\ud800",
            b"\\udc00",
            b"\\ud83d\\ude00",
            b"\\u12",
            b"\\x41",
            b"\\u0000",
            b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80",
        ),
        *(
            b"\xef\xbb\xbf",
            b"\xef\xbf\xbf",
            b"\xe2\x80\xa8",
            b"\xc3\xa4",
            b"\x0b",
            b"\x0c",
            b"\xc2\xa0",
            b"//",
            b"/**/",
        ),
        *(b"[" * 1023, b"[" * 1024 + b"]" * 1024, b"[" * 1025 + b"]" * 1025, b'"a":1,"a":2', b"9" * 400, b"'"),
    ]
)


@st.composite
def mutated(draw: Any) -> bytes:
    """A line of JSON in which some bytes are put in, taken out or replaced."""
    line = draw(JSON)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(line)))
        line = line[:position] + draw(BITS | st.just(b"")) + line[position + draw(st.integers(0, 2)) :]
    return line.replace(b"\n", b"")


def judged(line: bytes) -> Any:
    return value_of(line, lambda value: Reject("none") if isinstance(value, Reject) else [value])


def accepted(folder: Path, lines: list[bytes]) -> list[bytes]:
    """The lines that an index of them lists."""
    path = folder / "fuzzed.jsonl"
    path.write_bytes(b"\n".join([b"1", *lines, b"2"]))
    path.with_suffix(".idx").unlink(missing_ok=True)
    first, *pairs, last = index_of(path, Tally("skip"))
    content = path.read_bytes()
    assert first == (0, 1) and last == (len(content) - 1, 1)
    return [content[offset : offset + length] for offset, length in pairs]


def as_orjson(digits: str) -> int | float:
    """An integer as orjson reads it: one that 64 bits do not hold is a float."""
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(line=JSON)
def test_generated_json_is_accepted(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    assert accepted(tmp_path_factory.getbasetemp(), [line]) == [line]
    assert judged(line) == [json.loads(line, parse_int=as_orjson)]


@settings(deadline=None, derandomize=True, max_examples=400)
@given(line=mutated())
def test_the_index_takes_what_packing_takes(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    # The other lines of its chunk are good, so that simdjson's word counts where it takes this one.
    good = not isinstance(judged(line), Reject)
    assert (accepted(tmp_path_factory.getbasetemp(), [line]) == [line]) == good
    if good and line.count(b"[") < 900:  # Python's json stops a little before orjson's 1,024 levels
        assert judged(line) == [json.loads(line, parse_int=as_orjson)]


def test_simdjson_is_no_more_lenient_than_orjson(tmp_path: Path) -> None:
    for line in [*NOT_JSON, *NO_TEXT, *ODD, b"[" * 1024 + b"]" * 1024, b"[" * 1023 + b"]" * 1023, b'{"n": 1e400}']:
        good = not isinstance(judged(line), Reject)
        assert (accepted(tmp_path, [line]) == [line]) == good, line[:50]


def test_json_and_orjson_differ_only_in_what_is_written_down_here() -> None:
    # Python's json takes these, which are no JSON, no text, or no number that a float holds; a file with them is
    # refused, line by line.
    for line in [b"NaN", b"[-Infinity]", b'"\\ud800"', b"1e999", b"1" + b"0" * 400]:
        json.loads(line)
        assert isinstance(judged(line), Reject), line
    assert judged(b'{"a": 1, "a": 2}') == [json.loads(b'{"a": 1, "a": 2}')]
    assert judged(b"123456789012345678901234567890") == [float("123456789012345678901234567890")]


def test_sources_may_be_of_any_make() -> None:
    class Two:
        """A source that is no file."""

        name = "two"

        def facts(self) -> dict[str, Any]:
            return {}

        def portions(self, size: int) -> list[tuple[int, int]]:
            return [(0, 1), (1, 2)]

        def num_bytes(self, begin: int, end: int) -> int:
            return 1

        def documents_before(self, begin: int) -> int:
            return 2 * begin

        def chunks(self, begin: int, end: int) -> Iterator[Chunk]:
            yield Chunk([{"text": f"{begin}"}, {"text": None}], 0, None)

    tally = Tally("skip")
    found = list(read_texts([Two()], make_select(".text"), ".text", tally))
    assert found == [(Where("two", 1, None), "0"), (Where("two", 3, None), "1")]
    assert tally.skipped == {"field .text is null": 2}
