"""What a field path finds in a line of JSON, what jq finds, and the reason of every line that has no text."""

import json
import subprocess
import sys
from typing import Any

import jq
import pytest

from modalities.fields import Reject, make_select, parse_field, texts_of, value_of

GOOD = b'{"text": "a", "meta": {"t": ["x", "y"]}}'
# What a line can have wrong with it for `--field .text`, and the reason given.
BAD = {
    b"": "blank line",
    b"\n": "blank line",
    b" \t\r\n": "blank line",
    b"\xef\xbb\xbf\n": "blank line",
    b'{"text": "a"': "invalid JSON",
    b'{"text": "a"} {"text": "b"}': "invalid JSON",
    b'{"text": "a"}\x00': "invalid JSON",
    b'{"text": "\x00"}': "invalid JSON",
    b'{"text": "a\tb"}': "invalid JSON",
    b'{"text": "a",}': "invalid JSON",
    b"{'text': 'a'}": "invalid JSON",
    b'{"text": NaN}': "invalid JSON",
    b'{"text": -Infinity}': "invalid JSON",
    b'{"text": 01}': "invalid JSON",
    b'{"text": "a", "n": 1e400}': "invalid JSON",  # no float holds it; Python's json makes it infinite
    b'{"text": "a", "n": 1' + b"0" * 400 + b"}": "invalid JSON",
    b'\xef\xbb\xbf\xef\xbb\xbf{"text": "a"}': "invalid JSON",
    b'{"text": \xef\xbb\xbf"a"}': "invalid JSON",
    b"a": "invalid JSON",
    b"\x00": "invalid JSON",
    b'{"text": "\\ud800 alone"}': "lone surrogate",
    b'{"text": "\\udc00\\ud800"}': "lone surrogate",
    b'{"text": "a", "other": "\\ud83d"}': "lone surrogate",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\xc0\x80"}': "invalid UTF-8",
    b'{"text": "\xf4\x90\x80\x80"}': "invalid UTF-8",
    b'{"text": "a", "\xe4": 1}': "invalid UTF-8",
    '{"text": "a"}'.encode("utf-16"): "invalid UTF-8",
    b"[" * 1025 + b"]" * 1025: "nested too deep",
    b"[" * 200_000 + b"]" * 200_000: "nested too deep",
    b'{"text":' * 5000 + b'"a"' + b"}" * 5000: "nested too deep",
    b'{"other": "a"}': "no field .text",
    b'{"TEXT": "a"}': "no field .text",
    b'["text"]': "no field .text",
    b'"text"': "no field .text",
    b"null": "no field .text",
    b"3": "no field .text",
    b'{"text": null}': "field .text is null",
    b'{"text": 3}': "field .text is not a string",
    b'{"text": 123456789012345678901234567890}': "field .text is not a string",
    b'{"text": true}': "field .text is not a string",
    b'{"text": ["a"]}': "field .text is not a string",
    b'{"text": {"text": "a"}}': "field .text is not a string",
    b'{"text": ""}': "empty text",
    b'{"text": "a", "text": null}': "field .text is null",
}


def read(line: Any, field: str = ".text") -> str | Reject:
    """The text of a single line, or why it has none."""
    texts, rejects = texts_of([line], make_select(field), field)
    assert len(texts) + len(rejects) == 1
    if texts:
        return texts[0]
    number, reject = rejects[0]
    assert number == 0
    return reject


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        (".", ()),
        (".text", ("text",)),
        (".a.b", ("a", "b")),
        (".a_1._b", ("a_1", "_b")),
        (".a[0]", ("a", 0)),
        (".a.[0]", ("a", 0)),
        (".a[-1].b", ("a", -1, "b")),
        (".[2]", (2,)),
        (".[0][-0][12]", (0, 0, 12)),
        ('.["any key"].x', ("any key", "x")),
        ('.a["b.c"]', ("a", "b.c")),
        ('.a.["[0]"]', ("a", "[0]")),
        ('.["é\\u00e9\\n\\"\\\\"]', ('éé\n"\\',)),
        ('.[""]', ("",)),
    ],
)
def test_field_paths(path: str, keys: tuple[str | int, ...]) -> None:
    assert parse_field(path) == keys
    nested: Any = "found"
    for key in reversed(keys):
        nested = {key: nested} if isinstance(key, str) else [nested] * (13 if key > 0 else 1)
    assert read(json.dumps(nested).encode(), path) == "found"
    assert jq.compile(path).input_value(nested).first() == "found"


@pytest.mark.parametrize(
    "program", ["text", "..", ".a.", ".a[x]", ".a[0", '["a"]', ".a b", ".a | .b", ".[]", ".1", ".a-b", '.["\\(1)"]']
)
def test_what_is_no_plain_path(program: str) -> None:
    assert parse_field(program) is None


@pytest.mark.parametrize("field", ["", " ", "\t\n"])
def test_an_empty_field(field: str) -> None:
    with pytest.raises(ValueError, match=r"^--field is empty; write one like \.text$"):
        make_select(field)


@pytest.mark.parametrize(
    ("field", "text"),
    [(".meta.t[1]", "y"), (".meta.t[-2]", "x"), ('.["meta"]["t"][0]', "x"), (".text", "a"), ('."text"', "a")],
)
def test_text_at_a_path(field: str, text: str) -> None:
    assert read(GOOD, field) == read(json.loads(GOOD), field) == text


@pytest.mark.parametrize(
    "field",
    [".x", ".x.y", ".meta.x", ".meta.t[2]", ".meta.t[-3]", ".meta.t.x", ".meta[0]", ".text[0]", ".text.a", ".[0]"],
)
def test_a_key_is_missing_at_some_level(field: str) -> None:
    assert read(GOOD, field) == read(json.loads(GOOD), field) == Reject(f"no field {field}")


@pytest.mark.parametrize("value", ["null", "1", "true", '"a"', "[]", "{}", "[[]]"])
def test_a_path_through_what_holds_no_keys(value: str) -> None:
    assert read(f'{{"a": {value}}}'.encode(), ".a.b") == Reject("no field .a.b")
    assert read(f'{{"a": {value}}}'.encode(), ".a[0].b") == Reject("no field .a[0].b")


def test_a_document_that_is_a_string() -> None:
    assert [read(line, ".") for line in (b'"one"\n', b'"two"')] == ["one", "two"]
    assert read(b"1", ".") == Reject("field . is not a string")
    assert read(b"null", ".") == Reject("field . is null")


# ---------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize("line", BAD, ids=lambda line: repr(line[:40]))
def test_why_a_line_has_no_text(line: bytes) -> None:
    reject = read(line)
    assert isinstance(reject, Reject)
    assert reject.reason == BAD[line]
    assert "\n" not in str(reject)


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b'{"text": x}', " at character 9 of the line"),
        ('{"text": "ä€", x}'.encode(), " at character 15 of the line"),
        (b'{"text": "\\ud800"}', "at character 10 of the line"),
        (b'{"text": "ab\xff"}', "byte 0xff at 12 of the line"),
        (b'{"text": "\xed\xa0\x80"}', "byte 0xed at 10 of the line"),
        (b"\n", ""),
    ],
)
def test_where_in_a_line_it_is_wrong(line: bytes, detail: str) -> None:
    reject = read(line)
    assert isinstance(reject, Reject)
    assert reject.detail.endswith(detail)
    assert bool(reject.detail) == bool(detail)
    assert str(reject) == (f"{reject.reason}: {reject.detail}" if detail else reject.reason)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "a"}\r\n', "a"),
        (b' \t{"text" : "a"} \n', "a"),
        (b'\xef\xbb\xbf{"text": "a"}\n', "a"),
        (b'{"text": "\xef\xbb\xbfa"}', "\ufeffa"),
        (b'{"text": "a", "text": "b"}', "b"),
        (b'{"text": null, "text": "b"}', "b"),
        (b'{"text": "\\u0000"}', "\x00"),
        (b'{"text": "\\ud83d\\ude00"}', "😀"),
        ('{"text": "ä€😀\u2028"}'.encode(), "ä€😀\u2028"),
        (b'{"text": " "}', " "),
        (b'{"text": "\\r\\n"}', "\r\n"),
        (b'{"n": 123456789012345678901234567890, "m": 1e300, "k": -0, "text": "a"}', "a"),
        (b'{"n": 1' + b"0" * 300 + b', "text": "a"}', "a"),
        (b'{"n": ' + b"[" * 500 + b"]" * 500 + b', "text": "a"}', "a"),
    ],
)
def test_lines_with_a_text(line: bytes, text: str) -> None:
    assert read(line) == text
    assert json.loads(line)["text"] == text


def test_how_deep_a_document_may_nest() -> None:
    for depth in (1023, 1024, 1025):
        line = b'{"text": "a", "n": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
        assert (read(line) == "a") == (depth <= 1024)


def test_duplicate_keys_are_as_in_json_and_jq() -> None:
    line = '{"a": {"b": "no"}, "a": {"b": "first", "b": "last"}}'
    assert read(line.encode(), ".a.b") == json.loads(line)["a"]["b"] == jq.first(".a.b", text=line) == "last"


def test_rejects_are_numbered_among_the_documents() -> None:
    lines = [b"{", GOOD, b"\n", b'{"text": "b"}', b'{"text": 1}', UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why")]
    texts, rejects = texts_of(lines, make_select(".text"), ".text")
    assert texts == ["a", "b"]
    assert [number for number, _ in rejects] == [0, 2, 4, 5]
    assert [reject.reason for _, reject in rejects] == [
        "invalid JSON",
        "blank line",
        "field .text is not a string",
        "invalid UTF-8",
    ]
    assert texts_of([], make_select(".text"), ".text") == ([], [])


# ------------------------------------------------------------------------------------------------------------------- jq


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ('.meta.t | join("-")', "x-y"),
        (".meta.t[]", "x"),  # the first of two
        (".text, .meta", "a"),
        (".nothing // .text", "a"),
        ("[.text, .meta.t[1]] | add", "ay"),
        ('.["te" + "xt"]', "a"),
        (".text # a comment", "a"),
        ("empty", Reject("no output of jq empty")),
        (".meta.t[2:][]", Reject("no output of jq .meta.t[2:][]")),
        (".text | .[0]", Reject("jq .text | .[0] fails", "Cannot index string with number (0)")),
        ('error("two\\nlines")', Reject('jq error("two\\nlines") fails', "two lines")),
        ('error("")', Reject('jq error("") fails')),
        (".meta | .t", Reject("field .meta | .t is not a string")),
        (".nothing | .x", Reject("field .nothing | .x is null")),
        ('.text | ltrimstr("a")', Reject("empty text")),
    ],
)
def test_jq_programs(program: str, found: str | Reject) -> None:
    assert read(GOOD, program) == read(json.loads(GOOD), program) == found


def test_a_jq_program_gives_up_one_document_and_not_the_next() -> None:
    select = make_select(".a | ascii_downcase")
    texts, rejects = texts_of([b'{"a": 1}', b'{"a": "X"}', b"{", b'{"a": "Y"}'], select, "it")
    assert texts == ["x", "y"]
    assert [number for number, _ in rejects] == [0, 2]


@pytest.mark.parametrize("program", ["text", ".a |", ".a-b", "..a", "{", '"', "$x", ".a[0", 'import "x" as y; .'])
def test_a_program_that_does_not_compile(program: str) -> None:
    with pytest.raises(ValueError, match="is no jq program: jq: error: ") as caught:
        make_select(program)
    assert str(caught.value).startswith(f"--field {program!r} ")
    assert "\n" not in str(caught.value)


def test_without_the_jq_package_plain_paths_work_and_programs_say_what_to_install() -> None:
    code = """if True:
        import sys
        sys.modules["jq"] = None
        from modalities.fields import make_select, texts_of
        print(texts_of([b'{"a": ["x"]}'], make_select('.["a"][0]'), "it").texts)
        try:
            make_select(".a | .b")
        except ValueError as error:
            print(error)
    """
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == [
        "['x']",
        "--field '.a | .b' is no plain path like .text, .a.b or .a[0], and other jq programs need the package jq "
        "(pip install 'modalities[jq]')",
    ]


def test_a_value_of_any_type_is_found() -> None:
    select = make_select(".v")
    values: list[Any] = [None, 1, 2.5, True, "", "x", [], {"a": [1]}]
    for value in values:
        assert value_of(json.dumps({"v": value}).encode(), select) == value
        assert value_of({"v": value}, select) == value
