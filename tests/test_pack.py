"""What is packed is what `tokenizers` gives, however it was cut, interrupted or shared out; every document counts."""

import fcntl
import gzip
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer
from words import write_disagreeing, write_words

from modalities import pbin
from modalities.account import Account, read_account
from modalities.encode import PackConfig, make_job
from modalities.pack import pack
from modalities.sources import Table, find_sources
from modalities.tokenizer import EOD, train_tokenizer

TEXTS = [
    "def f(x):\n    return x\n",
    "ä€😀 naïve\x00\r\n\t",
    "a literal <|endoftext|> in a text",
    "<|endoftext|>",
    " ",
    "long " * 5000,
    *(f"document {i} of some more\n" * (i % 7 + 1) for i in range(200)),
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([inspect.getsource(module) for module in (inspect, json, textwrap)], 600, path)
    return path


def write_docs(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(docs: Path, out: Path, tokenizer: Path, **changes: object) -> tuple[Account, list[str]]:
    """The account of a packing, and what it said."""
    said: list[str] = []
    account = pack(find_sources([docs]), out, PackConfig(tokenizer=tokenizer, **changes), said.append)  # type: ignore[arg-type]
    assert account is not None
    assert account == read_account(out.with_name(f"{out.name}.json"))
    return account, said


def expected(texts: Sequence[str], tokenizer: Path) -> list[list[int]]:
    """The ids of each text, by `tokenizers` alone."""
    reference = Tokenizer.from_file(str(tokenizer))
    reference.encode_special_tokens = True
    end = reference.token_to_id(EOD)
    assert end is not None
    return [[*reference.encode(text).ids, end] for text in texts]


def documents_of(path: Path) -> list[list[int]]:
    opened = pbin.open_pbin(path)
    return [opened.document(i).tolist() for i in range(opened.num_documents)]


# ---------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("engine", ["tokenizers", "fastokens", "auto"])
def test_documents_are_their_tokens_and_decode_to_their_texts(bpe: Path, tmp_path: Path, engine: str) -> None:
    account, said = run(write_docs(tmp_path / "a.jsonl"), tmp_path / "a.pbin", bpe, engine=engine)
    documents = documents_of(tmp_path / "a.pbin")
    assert documents == expected(TEXTS, bpe)
    assert account.engine == ("tokenizers" if engine == "tokenizers" else "fastokens")
    assert (account.packed, account.documents, account.tokens) == (len(TEXTS), len(TEXTS), sum(map(len, documents)))
    binary_digits = Counter(len(document).bit_length() for document in documents)
    assert account.lengths == {f"{2 ** (k - 1)}-{2**k - 1}": binary_digits[k] for k in sorted(binary_digits)}
    tokenizer = Tokenizer.from_file(str(bpe))
    for text, ids in zip(TEXTS, documents, strict=True):
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text
        assert 0 not in ids[:-1], "a literal <|endoftext|> became the end of a document"
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.pbin", "a.pbin.json"]
    assert said == []


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("portion_bytes", [1, 300, 5000, 1 << 30])
def test_threads_and_portions_do_not_show(bpe: Path, tmp_path: Path, threads: int, portion_bytes: int) -> None:
    docs = write_docs(tmp_path / "a.jsonl")
    run(docs, tmp_path / "one.pbin", bpe, engine="tokenizers")
    run(docs, tmp_path / "many.pbin", bpe, engine="fastokens", threads=threads, portion_bytes=portion_bytes)
    assert (tmp_path / "many.pbin").read_bytes() == (tmp_path / "one.pbin").read_bytes()


RANK = """
import sys
from pathlib import Path
from modalities.encode import PackConfig, make_job
from modalities.pack import pack
from modalities.sources import find_sources
docs, out, tokenizer = map(Path, sys.argv[1:])
account = pack(find_sources([docs]), out, PackConfig(tokenizer=tokenizer, portion_bytes=900), print)
assert account is None or account.packed
"""


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_do_not_show(bpe: Path, tmp_path: Path, size: int) -> None:
    docs = write_docs(tmp_path / "a.jsonl")
    run(docs, tmp_path / "one.pbin", bpe)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(docs), str(tmp_path / "all.pbin"), str(bpe)],
            env=os.environ | {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}"},
        )
        for rank in range(size)
    ]
    assert [process.wait(60) for process in ranks] == [0] * size
    for name in ("pbin", "pbin.json"):
        assert (tmp_path / f"all.{name}").read_bytes() == (tmp_path / f"one.{name}").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "all.pbin", "all.pbin.json", "one.pbin", "one.pbin.json"]


def test_special_tokens_in_a_text(bpe: Path, tmp_path: Path) -> None:
    docs = write_docs(tmp_path / "a.jsonl", ["x<|endoftext|>y", "z<|endoftext|>", "<|endoftext|>"])
    run(docs, tmp_path / "text.pbin", bpe)
    assert [document.count(0) for document in documents_of(tmp_path / "text.pbin")] == [1, 1, 1]
    run(docs, tmp_path / "parse.pbin", bpe, special_tokens="parse")
    x, y, z = (Tokenizer.from_file(str(bpe)).encode(letter).ids for letter in "xyz")
    assert documents_of(tmp_path / "parse.pbin") == [[*x, 0, *y, 0], [*z, 0], [0]], "an end is not doubled"


@pytest.mark.parametrize("engine", ["tokenizers", "auto"])
def test_tokenizers_of_other_kinds(tmp_path: Path, engine: str) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    filled: dict[str, object] = {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None}
    filled |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<eod>"}
    letters = {"<": 0, ">": 1, "e": 2, "o": 3, "d": 4, "<eod>": 5}
    for name, tokenizer, eod, texts, tokens in [
        ("ends", write_words(tmp_path / "1.json", {"a": 0, "b": 1}), "b", ["a b", "b a"], [0, 1, 1, 0, 1]),
        ("gap", write_words(tmp_path / "2.json", {"a": 0, "<eod>": 300}), "<eod>", ["a"], [0, 300]),
        ("special", write_words(tmp_path / "3.json", letters), "<eod>", ["<eod>", "e"], [0, 2, 3, 4, 1, 5, 2, 5]),
        ("plain", write_words(tmp_path / "4.json", letters, False), "<eod>", ["<eod>", "e"], [0, 2, 3, 4, 1, 5, 2, 5]),
        ("whole", write_words(tmp_path / "5.json", {"a": 0, "<eod>": 1}, truncation=cut, padding=filled), "<eod>",
         ["a", "a a a"], [0, 1, 0, 0, 0, 1]),
    ]:  # fmt: skip
        out = tmp_path / f"{name}.pbin"
        account, said = run(write_docs(tmp_path / f"{name}.jsonl", texts), out, tokenizer, eod=eod, engine=engine)
        # Ids with gaps are beyond fastokens.
        assert ["packing with tokenizers: fastokens cannot do" in line for line in said] == [True] * (
            engine == "auto" and name == "gap"
        )
        assert account.engine == ("fastokens" if engine == "auto" and name != "gap" else "tokenizers")
        assert pbin.open_pbin(out).tokens.tolist() == tokens, name


@pytest.mark.parametrize(
    ("portion_bytes", "at", "seen"),
    [
        (1 << 20, 17, True),  # of the first 1,000
        (1 << 20, 2000, True),  # 1 of 1,000 after that
        (1 << 20, 2001, False),
        (9600, 1200, True),  # a line has 16 bytes: the first of the third portion, in which numbers begin anew
        (9600, 1201, False),
    ],
)
def test_auto_finds_where_the_engines_differ(tmp_path: Path, portion_bytes: int, at: int, seen: bool) -> None:
    tokenizer = write_disagreeing(tmp_path / "t.json")
    texts = ["a a"] * 2500
    texts[at] = "a\u180ea"
    docs = write_docs(tmp_path / "a.jsonl", texts)
    account, said = run(docs, tmp_path / "a.pbin", tokenizer, eod="<eod>", portion_bytes=portion_bytes)
    assert account.engine == ("tokenizers" if seen else "fastokens")
    assert ["fastokens gives other ids" in line for line in said] == [True] * seen
    documents = documents_of(tmp_path / "a.pbin")
    assert documents[at] == ([0, 2, 0, 3] if seen else [0, 0, 3])
    assert documents[:at] + documents[at + 1 :] == [[0, 0, 3]] * 2499
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.pbin", "a.pbin.json", "t.json"]


# -------------------------------------------------------------------------------------------------------------- account

HOSTILE: list[tuple[bytes, str | None]] = [
    (b'{"text": "good"}', None),
    (b"", "blank line"),
    (b" \t\r", "blank line"),
    (b'{"text": "carriage return"}\r', None),
    (b'\xef\xbb\xbf{"text": "byte order mark"}', None),
    (b'{"text": "a NUL \\u0000"}', None),
    (b'{"text": "a raw NUL \x00"}', "invalid JSON"),
    (b"\x00" * 50, "invalid JSON"),
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"no": "text"}', "no field .text"),
    (b'["text"]', "no field .text"),
    (b'{"text": null}', "field .text is null"),
    (b'{"text": 7}', "field .text is not a string"),
    (b'{"text": ["a"]}', "field .text is not a string"),
    (b'{"text": ""}', "empty text"),
    (b'{"text": "first", "text": "last"}', None),
    (b'{"deep": ' + b"[" * 900 + b"]" * 900 + b', "text": "deep"}', None),
    (b'{"deep": ' + b"[" * 9000 + b"]" * 9000 + b', "text": "too deep"}', "nested too deep"),
    (b'{"text": "half', "invalid JSON"),
    (b'{"text": "two"} {"text": "documents"}', "invalid JSON"),
    (b'{"big": 123456789012345678901234567890, "text": "big"}', None),
    (b'{"text": "no newline"}', None),
]


@pytest.mark.parametrize("portion_bytes", [1, 64, 1 << 20])
def test_every_document_is_packed_or_listed(bpe: Path, tmp_path: Path, portion_bytes: int) -> None:
    docs, out = tmp_path / "a.jsonl", tmp_path / "a.pbin"
    docs.write_bytes(b"\n".join(line for line, _ in HOSTILE))
    account, _ = run(docs, out, bpe, on_error="skip", portion_bytes=portion_bytes)
    good = [json.loads(line.removeprefix(b"\xef\xbb\xbf"))["text"] for line, reason in HOSTILE if reason is None]
    assert documents_of(out) == expected(good, bpe)
    assert (account.documents, account.packed) == (len(HOSTILE), len(good))
    listed = [json.loads(line) for line in (tmp_path / "a.pbin.skipped.jsonl").read_text().splitlines()]
    offset = 0
    for number, (line, reason) in enumerate(HOSTILE, 1):
        if reason is not None:
            found = listed.pop(0)
            assert found.pop("detail") is not None
            assert found == {"file": str(docs), "line": number, "byte": offset, "reason": reason}
        offset += len(line) + 1
    assert not listed


@pytest.mark.parametrize(("line", "reason"), [case for case in HOSTILE if case[1]])
def test_the_first_bad_document_ends_the_packing(bpe: Path, tmp_path: Path, line: bytes, reason: str) -> None:
    docs, out = tmp_path / "a.jsonl", tmp_path / "a.pbin"
    docs.write_bytes(b'{"text": "one"}\n{"text": "two"}\n' + line + b"\n{}\n")
    for portion_bytes in (1 << 20, 20):
        with pytest.raises(ValueError, match="--on-error skip") as caught:
            run(docs, out, bpe, portion_bytes=portion_bytes)
        assert str(caught.value).startswith(f"{docs}, line 3 (byte 32): {reason}")
        assert "\n" not in str(caught.value)
        assert not out.exists()


def test_a_text_without_tokens_is_rejected(tmp_path: Path) -> None:
    tokenizer = write_words(tmp_path / "t.json", {"a": 0, "<eod>": 1})
    docs = write_docs(tmp_path / "a.jsonl", ["a", " ", "a"])
    for engine in ("tokenizers", "auto"):
        out = tmp_path / f"{engine}.pbin"
        account, _ = run(docs, out, tokenizer, eod="<eod>", on_error="skip", engine=engine)
        assert (account.packed, account.skipped) == (2, {"no token": 1})
        assert documents_of(out) == [[0, 1], [0, 1]]
        assert '"line":2' in out.with_name(f"{out.name}.skipped.jsonl").read_text()


def test_empty_files_and_nothing_to_pack(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").touch()
    for on_error in ("fail", "skip"):
        with pytest.raises(ValueError, match="no document to pack"):
            run(tmp_path / "1.jsonl", tmp_path / "out.pbin", bpe, on_error=on_error)
        assert os.listdir(tmp_path) == ["1.jsonl"]
    write_docs(tmp_path / "2.jsonl", ["text"])
    (tmp_path / "3.jsonl").touch()
    account, _ = run(tmp_path, tmp_path.parent / f"{tmp_path.name}.pbin", bpe)
    assert [(Path(source.name).name, source.documents) for source in account.sources] == [
        ("1.jsonl", 0),
        ("2.jsonl", 1),
        ("3.jsonl", 0),
    ]


def test_rows_are_counted_over_all_shards_of_a_dataset(bpe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for i, texts in enumerate((["a", "b", "c"], ["d", "e"], ["f", "g", None, "h"])):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{i}.parquet")
    table, config = Table(str(folder), column="text"), PackConfig(tokenizer=bpe)
    with pytest.raises(ValueError, match=r"docs, row 8: field \.text is null"):
        pack([table], tmp_path / "a.pbin", config, print)
    pack([table], tmp_path / "a.pbin", replace(config, on_error="skip"), print)
    assert json.loads((tmp_path / "a.pbin.skipped.jsonl").read_text())["row"] == 8
    assert documents_of(tmp_path / "a.pbin") == expected("abcdefgh", bpe)


def test_work_is_shared_by_bytes_whatever_holds_them(bpe: Path, tmp_path: Path) -> None:
    for i in range(4):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"] * 1000}), tmp_path / f"{i}.parquet")
    size = (tmp_path / "0.parquet").stat().st_size
    (tmp_path / "4.jsonl").write_bytes(b'{"text": "x"}\n' * (4 * size // 14))
    job = make_job(find_sources([tmp_path]), tmp_path / "a.pbin", PackConfig(tokenizer=bpe, portion_bytes=size))
    shares = [[Path(portion.source.name).name for portion in job.share(rank, 2)] for rank in range(2)]
    assert shares[0] == [f"{i}.parquet" for i in range(4)] and set(shares[1]) == {"4.jsonl"}


def test_a_line_of_100_megabytes(bpe: Path, tmp_path: Path) -> None:
    words = " some words of a text" * 1000
    times = 100_000_000 // len(words)
    write_docs(tmp_path / "a.jsonl", ["before", words * times, "after"])
    account, _ = run(tmp_path / "a.jsonl", tmp_path / "a.pbin", bpe, engine="fastokens")
    assert (account.documents, account.packed) == (3, 3)
    opened = pbin.open_pbin(tmp_path / "a.pbin")
    assert [opened.document(0).tolist(), opened.document(2).tolist()] == expected(["before", "after"], bpe)
    # Where a text may be cut between words its tokens are those of its pieces.
    (one,), (two,) = expected([words], bpe), expected([words * 2], bpe)
    period = len(two) - len(one)
    document = opened.document(1)
    assert len(document) == len(one) + (times - 1) * period
    assert document[: len(one) - 1].tolist() == one[:-1]
    assert np.array_equal(document[period:-1], document[: -1 - period])


PEAK = """
import sys
from pathlib import Path
from modalities import pack
from modalities.encode import PackConfig
from modalities.sources import find_sources
docs, out, tokenizer, pack.TOKENS_PER_THREAD = *map(Path, sys.argv[1:4]), int(sys.argv[4])
pack.pack(find_sources([docs]), out, PackConfig(tokenizer=tokenizer, engine="fastokens", threads=1), print)
peak, = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # getrusage's may be the parent's
print(int(peak.split()[1]) // 1024)
"""


def test_threads_that_are_replaced_let_go_of_the_words_that_they_met(bpe: Path, tmp_path: Path) -> None:
    numbers = random.Random(0)
    write_docs(
        tmp_path / "a.jsonl", [" ".join(f"{numbers.getrandbits(40):x}" for _ in range(1000)) for _ in range(1500)]
    )
    peaks, packed = [], []
    # Never and often: at the size that is used, a corpus large enough to show it would take a minute to make.
    for tokens in (1 << 30, 1 << 19):
        out = tmp_path / f"{tokens}.pbin"
        command = [sys.executable, "-c", PEAK, str(tmp_path / "a.jsonl"), str(out), str(bpe), f"{tokens}"]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout.split()[-1]))
        packed.append(out.read_bytes())
    assert packed[0] == packed[1]
    assert peaks[0] - peaks[1] > 10, f"one thread for all took {peaks[0]} MiB, several in turn {peaks[1]}"


# --------------------------------------------------------------------------------------------------------- interruption


def test_an_interrupted_packing_goes_on_where_it_stopped(bpe: Path, tmp_path: Path) -> None:
    docs, out, parts = tmp_path / "a.jsonl", tmp_path / "a.pbin", tmp_path / "a.pbin.parts"
    with write_docs(docs).open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"no field \.text.*\d+ of \d+ parts are done and kept"):
        run(docs, out, bpe, portion_bytes=1000, engine="tokenizers")
    journal = (parts / "0.tokenizers.journal").read_text()
    assert journal.count("\n") > 5
    # The last line is bad, and may be left out: all that was done before stays.
    account, said = run(docs, out, bpe, portion_bytes=1000, engine="tokenizers", on_error="skip")
    assert said == [f"continuing what lies in {parts}"]
    assert documents_of(out) == expected(TEXTS, bpe)
    assert (account.documents, account.skipped) == (len(TEXTS) + 1, {"no field .text": 1})
    assert not parts.exists()


def interrupted(docs: Path, out: Path, bpe: Path, **changes: object) -> Path:
    """The folder of parts of a packing that stopped shortly before its end."""
    with docs.open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="are done and kept"):
        run(docs, out, bpe, portion_bytes=1000, engine="tokenizers", **changes)
    return out.with_name(f"{out.name}.parts")


@pytest.mark.parametrize("kind", ["journal", "tokens", "lengths"])
@pytest.mark.parametrize("left", [0.0, 0.3, 0.9, 0.99])
def test_parts_that_a_crash_tore(bpe: Path, tmp_path: Path, kind: str, left: float) -> None:
    docs, out = write_docs(tmp_path / "a.jsonl"), tmp_path / "a.pbin"
    torn = interrupted(docs, out, bpe) / f"0.tokenizers.{kind}"
    os.truncate(torn, int(left * torn.stat().st_size))
    with torn.open("ab") as file:
        file.write(b'{"half' if kind == "journal" else b"")
    account, _ = run(docs, out, bpe, portion_bytes=1000, engine="tokenizers", on_error="skip")
    assert documents_of(out) == expected(TEXTS, bpe)
    assert account.packed == len(TEXTS)


def test_parts_with_skipped_documents_are_not_kept_where_none_may_be(bpe: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "1.jsonl").write_bytes(b"{}\n" + b'{"text": "one"}\n' * 50)
    (docs / "2.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n' * 50)[:-9])  # ends every packing
    for on_error, what in [("skip", "2.jsonl.gz cannot be read"), ("fail", r"1.jsonl, line 1 \(byte 0\): no field")]:
        with pytest.raises(ValueError, match=what):
            run(docs, tmp_path / "a.pbin", bpe, portion_bytes=100, on_error=on_error)


def test_parts_of_other_inputs_are_not_used(bpe: Path, tmp_path: Path) -> None:
    docs, out = write_docs(tmp_path / "a.jsonl"), tmp_path / "a.pbin"
    parts = interrupted(docs, out, bpe)
    write_docs(docs, ["another text"])
    _, said = run(docs, out, bpe, portion_bytes=1000)
    assert said == [f"{parts} belongs to other inputs or options: starting anew"]
    assert documents_of(out) == expected(["another text"], bpe)


def test_two_at_once_are_refused(bpe: Path, tmp_path: Path) -> None:
    docs, out = write_docs(tmp_path / "a.jsonl"), tmp_path / "a.pbin"
    parts = interrupted(docs, out, bpe)
    with (parts / "0.tokenizers.journal").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is packing into"):
            run(docs, out, bpe, portion_bytes=1000, engine="tokenizers")


def start(docs: Path, out: Path, bpe: Path, rank: int = 0, size: int = 1, before: str = "") -> subprocess.Popen:
    environment = {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}"}
    command = [sys.executable, "-c", before + RANK, str(docs), str(out), str(bpe)]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def test_a_second_command_leaves_the_first_alone(bpe: Path, tmp_path: Path) -> None:
    docs, out = write_docs(tmp_path / "a.jsonl", TEXTS * 200), tmp_path / "a.pbin"
    first = start(docs, out, bpe)
    while not (tmp_path / "a.pbin.parts" / "plan.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    for changes in ({}, {"special_tokens": "parse"}):
        with pytest.raises(ValueError, match="another process is packing into"):
            run(docs, out, bpe, **changes)
    assert first.wait(60) == 0
    assert documents_of(out) == expected(TEXTS, bpe) * 200


@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_comes_late_finds_its_place(bpe: Path, tmp_path: Path, late: int) -> None:
    docs, out = write_docs(tmp_path / "a.jsonl", ["one"]), tmp_path / "a.pbin"  # too little for three
    ranks = [start(docs, out, bpe, rank, 3) for rank in range(3) if rank != late]
    time.sleep(2)
    ranks.append(start(docs, out, bpe, late, 3))
    assert [process.wait(30) for process in ranks] == [0, 0, 0]
    assert documents_of(out) == expected(["one"], bpe)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.pbin", "a.pbin.json"]


KILLED = """
import os, signal, sys
def kill(event, args):
    if event == "os.rename" and str(args[AT]).endswith(ENDING):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
"""


@pytest.mark.parametrize(
    ("at", "ending"),
    [(1, "a.pbin.json"), (1, "a.pbin"), (0, "a.pbin.parts")],
    ids=["before the account", "before the file itself", "before the parts are removed"],
)
def test_killed_while_the_files_are_put_in_place(bpe: Path, tmp_path: Path, at: int, ending: str) -> None:
    docs, out = write_docs(tmp_path / "a.jsonl"), tmp_path / "a.pbin"
    before = KILLED.replace("AT", f"{at}").replace("ENDING", repr(f"/{ending}"))
    assert start(docs, out, bpe, before=before).wait(60) == -signal.SIGKILL
    assert (tmp_path / "a.pbin.parts").exists()
    ranks = [start(docs, out, bpe, rank, 2) for rank in range(2)]  # as many as come
    assert [process.wait(60) for process in ranks] == [0, 0]
    assert documents_of(out) == expected(TEXTS, bpe)
    assert read_account(tmp_path / "a.pbin.json").packed == len(TEXTS)
    left = [name for name in os.listdir(tmp_path) if not name.endswith(".tmp")]
    assert sorted(left) == ["a.jsonl", "a.pbin", "a.pbin.json"]


def test_a_folder_of_somebody_elses_is_not_touched(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pbin.parts").mkdir()
    (tmp_path / "a.pbin.parts" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="is in the way, and not a folder of parts"):
        run(write_docs(tmp_path / "a.jsonl"), tmp_path / "a.pbin", bpe)
    assert (tmp_path / "a.pbin.parts" / "mine.txt").read_text() == "precious"


def test_a_source_that_changes_meanwhile_is_named(bpe: Path, tmp_path: Path) -> None:
    docs, out = write_docs(tmp_path / "a.jsonl"), tmp_path / "a.pbin"
    interrupted(docs, out, bpe)
    config = PackConfig(tokenizer=bpe, portion_bytes=1000, engine="tokenizers", on_error="skip")

    def change(said: str) -> None:
        assert "continuing" in said
        with docs.open("a") as file:
            file.write('{"text": "more"}\n')

    with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was packed"):
        pack(find_sources([docs]), out, config, change)
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("name", ["a.pbin", "a.pbin.json", "a.pbin.skipped.jsonl"])
def test_what_exists_is_refused_before_any_work(bpe: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"a user's own")
    with pytest.raises(ValueError, match="exists already"):
        run(write_docs(tmp_path / "a.jsonl"), tmp_path / "a.pbin", bpe)
    assert (tmp_path / name).read_bytes() == b"a user's own"
    assert sorted(os.listdir(tmp_path)) == sorted(["a.jsonl", name])
