"""Every line of a JSONL file is read or counted, and bad ones are named exactly."""

import json
import os
from pathlib import Path

import pytest

from modalities import corpus, pbin

GOOD = b'{"text": "a", "meta": {"t": ["x", "y"]}}'
# What a line can have wrong with it for `--field .text`, and the reason given.
BAD = {
    b"": "blank line",
    b" \t\r": "blank line",
    b'{"text": "a"': "invalid JSON",
    b'{"text": "a"} {"text": "b"}': "invalid JSON",
    b"a": "invalid JSON",
    b'{"text": "\\ud800 alone"}': "invalid JSON",
    b'\xef\xbb\xbf{"text": "a"}': "invalid JSON",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8",
    b'{"other": "a"}': "no field .text",
    b'["text"]': "no field .text",
    b'"text"': "no field .text",
    b'{"text": null}': "field .text is null",
    b'{"text": 3}': "field .text is not a string",
    b'{"text": ["a"]}': "field .text is not a string",
    b'{"text": ""}': "empty text",
}


def read(path: Path, tally: corpus.Tally, field: str = ".text") -> list[tuple[corpus.Line, str]]:
    return list(corpus.read_documents([path], field, tally))


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        (".text", ("text",)),
        (".a.b", ("a", "b")),
        (".a[0]", ("a", 0)),
        (".a[-1].b", ("a", -1, "b")),
        (".[2]", (2,)),
        ('.["any key"].x', ("any key", "x")),
        ('.a["b.c"]', ("a", "b.c")),
        (".", ()),
    ],
)
def test_field_paths(path: str, keys: tuple[str | int, ...]) -> None:
    assert corpus.parse_field(path) == keys


@pytest.mark.parametrize("path", ["", "text", "..text", ".a.", ".a[x]", ".a[0", "[0]", ".a b", ".a | .b", ".[]", ".1"])
def test_bad_field_paths(path: str) -> None:
    with pytest.raises(ValueError, match="--field"):
        corpus.parse_field(path)


@pytest.mark.parametrize(
    ("field", "text"), [(".meta.t[1]", "y"), (".meta.t[-2]", "x"), ('.["meta"]["t"][0]', "x"), (".text", "a")]
)
def test_text_at_a_path(tmp_path: Path, field: str, text: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert [text for _, text in read(tmp_path / "a.jsonl", corpus.Tally(), field)] == [text]


@pytest.mark.parametrize("field", [".meta.t[2]", ".meta.t[-3]", ".meta.t.x", ".meta[0]", ".text[0]", ".text.a"])
def test_no_text_at_a_path(tmp_path: Path, field: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(ValueError, match="no field"):
        read(tmp_path / "a.jsonl", corpus.Tally(), field)


def test_a_document_that_is_a_string(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'"one"\n"two"\n')
    assert [text for _, text in read(tmp_path / "a.jsonl", corpus.Tally(), ".")] == ["one", "two"]


def test_lines_know_where_they_stand(tmp_path: Path) -> None:
    lines = ['{"text": "ä€😀"}', '{"text": "two"}\r', ' {"text": "three"}']
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode())  # no final newline
    found = read(tmp_path / "a.jsonl", corpus.Tally())
    assert [text for _, text in found] == ["ä€😀", "two", "three"]
    assert [line.number for line, _ in found] == [1, 2, 3]
    content = (tmp_path / "a.jsonl").read_bytes()
    assert [content[line.offset : line.offset + line.num_bytes].decode() for line, _ in found] == lines


@pytest.mark.parametrize("bad", BAD)
def test_fail_names_file_line_byte_and_reason(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD)
    with pytest.raises(ValueError) as caught:
        read(path, corpus.Tally("fail"))
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2 (byte {len(GOOD) + 1}): {BAD[bad]}")
    assert "--on-error skip" in message and "\n" not in message


def test_skip_counts_every_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line + b"\n" + GOOD for line in BAD))
    tally = corpus.Tally("skip")
    assert len(read(path, tally)) == len(BAD)
    assert tally.documents == 2 * len(BAD)
    assert tally.skipped.total() == len(BAD)
    assert set(tally.skipped) == set(BAD.values())
    report = tally.report(path, kept=len(BAD))
    assert f"skipped {len(BAD)} of {2 * len(BAD)}: 5 × invalid JSON" in report


def test_a_final_newline_is_no_blank_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n")
    tally = corpus.Tally()
    assert len(read(tmp_path / "a.jsonl", tally)) == tally.documents == 1


def test_an_empty_file_has_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read(tmp_path / "a.jsonl", corpus.Tally()) == []
    with pytest.raises(ValueError, match="holds no document"):
        corpus.write_index(tmp_path / "a.jsonl", tmp_path / "a.idx", corpus.Tally())
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_arguments_are_checked_before_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(ValueError, match="b.jsonl is missing"):
        corpus.read_documents([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ".text", corpus.Tally())
    with pytest.raises(ValueError, match="is a folder"):
        corpus.read_documents([tmp_path], ".text", corpus.Tally())
    with pytest.raises(ValueError, match="--field"):
        corpus.read_documents([tmp_path / "a.jsonl"], "text", corpus.Tally())


def test_output_beside_a_single_input() -> None:
    assert corpus.output_for([Path("x/a.jsonl")], None, ".pbin") == Path("x/a.pbin")
    assert corpus.output_for([Path("a"), Path("b")], Path("c.pbin"), ".pbin") == Path("c.pbin")
    with pytest.raises(ValueError, match="2 inputs make one .pbin file; name it with --out"):
        corpus.output_for([Path("a"), Path("b")], None, ".pbin")
    with pytest.raises(ValueError, match="no input"):
        corpus.output_for([], None, ".pbin")


def test_index_lists_the_lines_that_are_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": 1}\r\n\n[2]\n{"x"\n3')
    with pytest.raises(ValueError, match=r"line 2 \(byte 10\): blank line"):
        corpus.write_index(path, tmp_path / "a.idx", corpus.Tally())
    assert os.listdir(tmp_path) == ["a.jsonl"]
    tally = corpus.Tally("skip")
    assert corpus.write_index(path, tmp_path / "a.idx", tally) == 3
    assert (tally.documents, tally.skipped.total()) == (5, 2)
    assert pbin.read_idx(tmp_path / "a.idx", path).tolist() == [[0, 9], [11, 3], [20, 1]]


def test_demo_takes_every_source_once(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    names = [f"package/module_{i}.py" for i in range(200)]
    for name in [*names, "latin.py", "empty.py", "test/t.py", "site-packages/x.py", "package/tests/t.py"]:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(f"# {name} ä\n".encode("latin-1" if name == "latin.py" else "utf-8"))
    (library / "empty.py").write_bytes(b"")
    found = {}
    for validation in (False, True):
        out = tmp_path / f"{validation}.jsonl"
        corpus.write_demo(out, validation, library)
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
        assert all(row["text"] == f"# {row['path']} ä\n" for row in rows)
        found[validation] = {row["path"] for row in rows}
    assert not found[True] & found[False]
    assert found[True] | found[False] == set(names)
    assert 1 <= len(found[True]) <= 25


def test_demo_without_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no source files"):
        corpus.write_demo(tmp_path / "a.jsonl", False, tmp_path / "lib")
    assert os.listdir(tmp_path) == []
