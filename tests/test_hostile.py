"""Truncated, bit-flipped and malicious `.pbin`, `.idx`, mask and account files, by the thousand.

Each goes through every reader that a user has. Two ends are right: it works, and what comes back is sound; or one
`ValueError` of one line that names the file. Nothing may crash, run code, read past the file or take memory that
the file only claims to need.
"""

import copyreg
import functools
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import resource
import shutil
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modalities import files, pbin
from modalities.account import Account, SourceFacts, TokenizerFacts, read_account, write_account
from modalities.config import from_dict, to_dict
from modalities.data import DataConfig, open_sequences
from modalities.describe import describe
from modalities.loss import IGNORED
from modalities.masks import mask_between
from modalities.shuffle import shuffle

T = TypeVar("T")
Pairs = list[tuple[Any, Any]]
Region = tuple[int, int]

# Files that each test makes: so many in `make test`, ten times as many besides in `make test-all`.
EXAMPLES = {"pbin": 300, "mask": 100, "idx": 120, "pickle": 250, "account": 180, "tools": 60}
SLOW = 10
assert sum(EXAMPLES.values()) >= 1000

SEQ_LEN = 8
BEGIN, END = 7, 8
EXTREMES = [
    0, 1, 2, 4, 5, 8, 11, 12, 13, 127, 128, 255, 256, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**62, 2**63 - 13, 2**63 - 1, 2**63, 2**64 - 13, 2**64 - 1,
]  # fmt: skip


def hunt(examples: int, cases: st.SearchStrategy[T], check: Callable[[T], bool], spared: float = 0.01) -> None:
    """`check` says of so many cases whether the file was refused; some must be, and of `spared` this share not."""
    refused: Counter[bool] = Counter()

    # Drawing a whole file and its damage takes Hypothesis longer than it thinks a test should take.
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases)
    def one(case: T) -> None:
        measured = refused.total() % 10 == 0  # measuring makes it slow
        with bounded(measured):
            refused[check(case)] += 1

    with address_space(2 << 30):
        one()
    assert refused.total() >= examples
    assert refused[True] > 0.1 * examples and refused[False] >= spared * examples, refused


def counted(kind: str) -> pytest.MarkDecorator:
    """Run a test with the number of examples of its kind, and marked slow with more of them."""
    few = EXAMPLES[kind]
    return pytest.mark.parametrize("examples", [few, pytest.param(SLOW * few, marks=pytest.mark.slow)])


# -------------------------------------------------------------------------------------------------------- bounds


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """Whoever asks for `more` bytes gets a MemoryError."""
    statm = Path("/proc/self/statm")
    if not statm.exists():  # only Linux says how much it is
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def bounded(measured: bool = True, num_bytes: int = 0) -> Iterator[None]:
    """Not more than 16 MiB, and 50 times the file, may be taken at a time."""
    if not measured:
        yield
        return
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= 50 * num_bytes + (16 << 20)
    finally:
        tracemalloc.stop()


def refuses(function: Callable[[], object], *paths: Path) -> bool:
    """Whether `function` refuses the file at one of `paths`; it must say so in one clear line."""
    try:
        function()
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError, repr(error)
        assert any(str(path) in message for path in paths)
        assert message.isprintable(), "more than a line, or what a terminal would obey"
        assert len(message) < 1000, "a line that nobody can read"
        return True
    return False


# ------------------------------------------------------------------------------------------------------- readers


def read_pbin(path: Path) -> list[list[int]]:
    """The documents of a `.pbin`, read in every way there is; each must tell the same."""
    opened = pbin.open_pbin(path)
    tokens, itemsize = opened.tokens, opened.tokens.itemsize
    assert opened.header_bytes + tokens.nbytes <= path.stat().st_size
    assert 0 <= int(tokens.sum(dtype=np.uint64)) <= len(tokens) * (256**itemsize - 1)
    due = 0
    for pairs in opened.index_pieces():  # what is handed out before an error must be sound too
        for offset, length in pairs.tolist():
            assert offset == due and length >= 0 and length % itemsize == 0
            due += length
            assert due <= tokens.nbytes
    assert due == tokens.nbytes
    assert opened.index.tolist() == np.concatenate([np.empty((0, 2), np.int64), *opened.index_pieces()]).tolist()
    documents = [opened.document(i).tolist() for i in range(opened.num_documents)]
    assert sum(documents, []) == tokens.tolist()
    return documents


def refuses_pbin(path: Path) -> bool:
    """Whether a `.pbin` is refused; if so, then on the first and on the second trial alike."""
    refused = refuses(lambda: read_pbin(path), path)
    if not refuses(lambda: pbin.open_pbin(path), path):
        opened = pbin.open_pbin(path)
        assert [refuses(lambda: opened.index, path) for _ in range(2)] == [refused, refused]
    return refused


def refuses_sequences(tokens: Path, mask: Path, damaged: Path, vocab_size: int) -> bool:
    """Whether any way to train on `tokens`, with and without its `mask`, refuses the `damaged` one of them."""
    return any(
        [
            refuses(functools.partial(read_sequences, config, tokens, masked, vocab_size), damaged)
            for config, masked in itertools.product(CONFIGS, ("", str(mask)))
            if damaged == tokens or masked
        ]
    )


CONFIGS = [
    DataConfig(sampling=sampling, document_mask=apart, seq_len=SEQ_LEN)  # type: ignore[arg-type]
    for sampling, apart in itertools.product(("continuous", "documents", "best_fit"), (False, True))
]


def read_sequences(config: DataConfig, tokens: Path, mask: str, vocab_size: int) -> None:
    sequences = open_sequences(config, str(tokens), mask, vocab_size)
    assert sequences.count >= 1 and "\n" not in sequences.facts()
    batch = {name: values.numpy() for name, values in sequences.read(np.arange(sequences.count)).items()}
    inputs, targets = batch["inputs"], batch["targets"]
    assert inputs.shape == targets.shape == (sequences.count, SEQ_LEN)
    assert inputs.min() >= 0 and inputs.max() < vocab_size
    assert ((targets == IGNORED) | (targets >= 0)).all() and targets.max() < vocab_size
    if config.sampling == "continuous":
        assert inputs.ravel().tolist() == pbin.open_pbin(tokens).tokens[: inputs.size].tolist()
    if config.document_mask:
        assert batch["positions"].min() >= 0 and batch["positions"].max() < SEQ_LEN
        assert batch["documents"].min() >= 0 and batch["documents"].max() < SEQ_LEN


def refuses_tools(path: Path, good: Path, damaged: Path, out: Path) -> bool:
    """Whether the tools refuse the `damaged` file, which is `path` or its mask; nothing may be left behind then."""
    tools: list[Callable[[], object]] = [
        lambda: files.merge([path, good], out / "merged.pbin", block=16),
        lambda: files.merge([good, path], out / "merged.pbin"),
        lambda: shuffle([path, good], out / "shuffled.pbin", seed=1, memory=2000),
        lambda: shuffle([good, path], out / "shuffled.pbin", seed=1, chunks=2),
        lambda: describe(path),
    ]
    # These do not read the mask, or may rightly complain of the documents.
    others: list[Callable[[], object]] = [
        lambda: files.split(path, 0.5, out / "train.pbin", out / "val.pbin", block=16),
        lambda: mask_between(path, out / "mask.pbin", BEGIN, END, block=5),
        lambda: describe(path, document=1),
    ]
    refused = []
    for tool in (*tools, *others):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        refused.append(refuses(tool, damaged, *([path] if tool in others else [])))
        if refused[-1]:
            assert os.listdir(out) == []
        written = {file.name: read_pbin(file) for file in out.iterdir()}
        documents = Counter(map(str, itertools.chain.from_iterable(written.values())))
        if any(name.startswith(("merged", "shuffled")) for name in written):
            sources = [path, good]
            sources += [mask for mask in map(files.mask_path, sources) if mask.exists()]
            assert documents == Counter(str(document) for source in sources for document in read_pbin(source))
    shutil.rmtree(out)
    assert len({*refused[:4]}) == 1
    return refused[0]


# --------------------------------------------------------------------------------------------------- sound files


class Layout(NamedTuple):
    """How a `.pbin` was written, by us or by some Modalities."""

    size: int
    header: int = 12
    order: str = "<"
    base: int = 0
    """What the offsets count from, in bytes before the data."""


LAYOUTS = [
    Layout(1), Layout(2), Layout(4), Layout(1, base=12), Layout(2, order=">", base=12),
    Layout(4, order=">", base=12), Layout(4, header=8), Layout(4, header=8, order=">", base=8),
]  # fmt: skip


def pairs_of(lengths: Sequence[int], layout: Layout) -> Pairs:
    ends = itertools.accumulate(layout.size * n for n in lengths)
    return [(layout.base + end - layout.size * n, layout.size * n) for n, end in zip(lengths, ends, strict=True)]


def head_and_data(tokens: Sequence[int], layout: Layout) -> bytes:
    data = np.array(tokens, f"{layout.order}u{layout.size}").tobytes()
    size = struct.pack(f"{layout.order}I", layout.size) if layout.header == 12 else b""
    return struct.pack(f"{layout.order}Q", len(data)) + size + data


def sound_pbin(lengths: Sequence[int], layout: Layout, tokens: Sequence[int] = ()) -> bytes:
    tokens = tokens or [token for n in lengths for token in ([BEGIN, *[3] * (n - 2), END] if n > 2 else [1] * n)]
    return head_and_data(tokens, layout) + pickle.dumps(pairs_of(lengths, layout), protocol=4)


def sound_mask(lengths: Sequence[int]) -> bytes:
    return sound_pbin(lengths, Layout(1), [i % 2 for i in range(sum(lengths))])


def write(path: Path, content: bytes) -> Path:
    """`content` at `path` as a new file: the one before may still be mapped into memory."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


LENGTHS = st.lists(st.integers(0, 12), min_size=2, max_size=10)


# -------------------------------------------------------------------------------------------------------- damage


ACCIDENTS = ["cut", "flip", "flip", "flip", "insert", "delete", "repeat", "overwrite", "move"]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, hot: Sequence[Region] = ()) -> bytes:
    """`whole` after an accident or two, which befall the `hot` regions more often than the others."""
    data = whole
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        regions = [(a, min(b, len(data))) for a, b in (*hot, *hot, (0, len(data))) if a < len(data)]
        if not regions:
            return data
        region = draw(st.sampled_from(regions))
        place = draw(st.integers(region[0], region[1] - 1))
        size = draw(st.sampled_from([1, 1, 2, 4, 8, 12, 40]))
        run = data[place : place + size]
        kind = draw(st.sampled_from(ACCIDENTS))
        if kind == "cut":
            data = data[:place]
        elif kind == "flip":
            flipped = bytearray(data)
            for _ in range(draw(st.integers(1, 8))):
                flipped[place] ^= 1 << draw(st.integers(0, 7))
                place = draw(st.integers(region[0], region[1] - 1))
            data = bytes(flipped)
        elif kind == "insert":
            data = data[:place] + draw(runs(size)) + data[place:]
        elif kind == "delete":
            data = data[:place] + data[place + size :]
        elif kind == "repeat":
            data = data[:place] + run * draw(st.sampled_from([2, 3, 100])) + data[place + size :]
        elif kind == "overwrite":
            data = data[:place] + draw(runs(size)) + data[place + size :]
        else:
            rest = data[:place] + data[place + size :]
            target = draw(st.integers(0, len(rest)))
            data = rest[:target] + run + rest[target:]
    return data


def runs(size: int) -> st.SearchStrategy[bytes]:
    return st.sampled_from([b"\0" * size, b"\xff" * size, b"." * size]) | st.binary(min_size=size, max_size=size)


@st.composite
def wrong_header(draw: st.DrawFn, whole: bytes) -> bytes:
    """A `.pbin` whose header says something else."""
    order = draw(st.sampled_from("<>"))
    length, size = struct.unpack_from("<QI", whole)
    near = st.integers(-13, 13).map(lambda change: (length + change) % 2**64)
    if draw(st.booleans()):
        length = draw(st.sampled_from(EXTREMES) | near)
    if draw(st.booleans()):
        size = draw(st.sampled_from([n for n in EXTREMES if n < 2**32]) | st.integers(0, 9))
    return struct.pack(f"{order}QI", length, size) + whole[12:]


@st.composite
def wrong_pairs(draw: st.DrawFn, pairs: Pairs) -> Pairs:
    """An index in which some entry says something else."""
    pairs = list(pairs)
    for _ in range(draw(st.integers(1, 3))):
        if not pairs:
            return [(draw(st.sampled_from(EXTREMES)), draw(st.sampled_from(EXTREMES)))]
        i = draw(st.integers(0, len(pairs) - 1))
        offset, length = pairs[i]
        kind = draw(st.sampled_from(["number", "number", "shift", "shift", "lose", "twice", "swap", "type", "add"]))
        if kind == "number":
            number = draw(st.sampled_from(EXTREMES) | st.sampled_from(EXTREMES).map(lambda n: -n))
            pairs[i] = draw(st.sampled_from([(number, length), (offset, number), (number, number)]))
        elif kind == "shift" and type(offset) is type(length) is int:
            change = draw(st.sampled_from([-24, -12, -4, -2, -1, 1, 2, 4, 12, 24]))
            pairs[i] = draw(st.sampled_from([(offset + change, length), (offset, length + change)]))
        elif kind == "lose":
            del pairs[i]
        elif kind == "twice":
            pairs.insert(i, pairs[i])
        elif kind == "swap":
            j = draw(st.integers(0, len(pairs) - 1))
            pairs[i], pairs[j] = pairs[j], pairs[i]
        elif kind == "type":
            wrong: Any = draw(st.sampled_from([None, True, 1.5, "1", b"1", (1,), [1], {1: 2}, 2**200, math.nan]))
            pairs[i] = draw(st.sampled_from([(wrong, length), (offset, wrong), (offset, length, wrong), wrong]))
            return pairs
        else:
            pairs.append((draw(st.sampled_from(EXTREMES)), draw(st.sampled_from(EXTREMES))))
    return pairs


@st.composite
def reframed(draw: st.DrawFn, pickled: bytes) -> bytes:
    """The same pickle in many small frames: so the index arrives in as many pieces."""
    body = pickled[11:] if pickled[2:3] == pickle.FRAME else pickled[2:]
    size = draw(st.integers(1, 30))
    frames = (body[i : i + size] for i in range(0, len(body), size))
    return pickled[:2] + b"".join(pickle.FRAME + struct.pack("<Q", len(frame)) + frame for frame in frames)


class Case(NamedTuple):
    """A damaged file, and the lengths of the documents that it had."""

    lengths: list[int]
    content: bytes


@st.composite
def damaged_pbin(draw: st.DrawFn, layouts: Sequence[Layout] = LAYOUTS) -> Case:
    lengths, layout = draw(LENGTHS), draw(st.sampled_from(layouts))
    mask = len(layouts) == 1
    whole = sound_mask(lengths) if mask else sound_pbin(lengths, layout)
    begin = layout.header + layout.size * sum(lengths)
    kind = draw(st.sampled_from(["bytes", "bytes", "header", "pairs", "pairs", "frames"]))
    if kind == "header":
        content = draw(wrong_header(whole))
    elif kind == "pairs":
        pickled = pickle.dumps(draw(wrong_pairs(pairs_of(lengths, layout))), protocol=4)
        content = whole[:begin] + (draw(reframed(pickled)) if draw(st.booleans()) else pickled)
    else:
        if kind == "frames":
            whole = whole[:begin] + draw(reframed(whole[begin:]))
        content = draw(damaged(whole, [(0, 12), (begin, begin + 14), (begin, len(whole))]))
    return Case(lengths, content)


@st.composite
def damaged_idx(draw: st.DrawFn) -> Case:
    lengths = draw(LENGTHS)
    pairs: Pairs = [(sum(lengths[:i]) + i, n) for i, n in enumerate(lengths)]
    kind = draw(st.sampled_from(["bytes", "pairs", "frames"]))
    pickled = pickle.dumps(draw(wrong_pairs(pairs)) if kind == "pairs" else pairs, protocol=4)
    pickled = draw(reframed(pickled)) if kind == "frames" else pickled
    return Case(lengths, pickled if kind == "pairs" else draw(damaged(pickled)))


# ------------------------------------------------------------------------------------------------ hostile pickles


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def exploits(marker: Path) -> dict[str, bytes]:
    """Opcodes that make the folder `marker` when Python's own unpickler meets them, by their family."""
    mkdir, path = b"cos\nmkdir\n", text(str(marker))
    lazy = b"cbuiltins\nbytes\ncbuiltins\nmap\n" + mkdir + b"](" + path + b"e\x86"
    attribute = b"ctypes\nSimpleNamespace\n)\x81}" + text("__setstate__") + mkdir + b"s"
    return {
        "GLOBAL": mkdir + path + b"\x85R",
        "STACK_GLOBAL": text("os") + text("mkdir") + b"\x93" + path + b"\x85R",
        "REDUCE": b"cbuiltins\nmap\n" + mkdir + b"](" + path + b"e\x86R0cbuiltins\nlist\n" + lazy[16:] + b"R\x85R",
        "INST": b"(" + path + b"ios\nmkdir\n",
        "OBJ": b"(" + mkdir + path + b"o",
        "NEWOBJ": lazy + b"\x81\x85\x81",
        "NEWOBJ_EX": lazy + b"}\x92\x85}\x92",
        "BUILD": attribute + b"b" + path + b"b",
        "EXT1": b"\x82" + struct.pack("<B", EXTENSIONS[0][2]) + path + b"\x85R",
        "EXT2": b"\x83" + struct.pack("<H", EXTENSIONS[1][2]) + path + b"\x85R",
        "EXT4": b"\x84" + struct.pack("<i", EXTENSIONS[2][2]) + path + b"\x85R",
        "PERSID": b"P" + str(marker).encode() + b"\n",
        "BINPERSID": path + b"Q",
    }


EXTENSIONS = [("os", "mkdir", 201), ("os", "makedirs", 2010), ("posix", "mkdir", 201_000)]

HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
BOMBS = [
    *(code + struct.pack("<Q", n) for code in (b"\x8d", b"\x8e", b"\x96", b"\x95") for n in HUGE),
    *(code.encode("latin-1") + struct.pack("<I", n) for code in "\x8bXBTrjJ\x84" for n in HUGE[:3]),
    *(code + b"\xff" for code in (b"\x8a", b"\x8c", b"C", b"U", b"q", b"h", b"\x82", b"K")),
    *(code * n for code in (b"(", b"]", b")", b"}", b"2", b"\x85", b"\x86\x94", b"e(", b"a") for n in (9, 1000)),
    b"]" * 1000 + b"a" * 1000,
    b")" + b"2\x86" * 1000,  # twice as large with each
    b")" + b"\x85" * 1000,
    b"L" + b"9" * 5000 + b"L\n",
    b"I" + b"9" * 5000 + b"\n",
    b"F1e999\n",
    b"G" + b"\x7f\xf0" + bytes(6),
    b"K\x86\x94" * 500,
    b"\x8a\x09" + b"\xff" * 9,
    b"\x97\x98",
]


class Trusting(pickle._Unpickler):
    """What a reader must not be: Python's unpickler, persistent ids included."""

    def persistent_load(self, pid: Any) -> Any:
        return os.mkdir(pid)


@pytest.fixture(scope="module")
def extensions() -> Iterator[None]:
    """Names that a pickle may call by their number alone, so that the EXT opcodes would do harm."""
    for entry in EXTENSIONS:
        copyreg.add_extension(*entry)
    yield
    for entry in EXTENSIONS:
        copyreg.remove_extension(*entry)


@pytest.mark.parametrize("family", exploits(Path()))
def test_the_exploits_would_run(family: str, tmp_path: Path, extensions: None) -> None:
    exploit = exploits(tmp_path / "ran")[family]
    try:
        Trusting(io.BytesIO(b"\x80\x04" + exploit + b".")).load()
    except TypeError as error:  # it made the folder, and made nothing of the result
        assert family in ("NEWOBJ", "NEWOBJ_EX", "REDUCE"), error
    assert (tmp_path / "ran").is_dir()


@st.composite
def opcode(draw: st.DrawFn) -> bytes:
    """Any opcode with an argument of its kind, or one that claims more than is there."""
    code = draw(st.sampled_from(pickletools.opcodes))
    some = draw(st.binary(max_size=8))
    if code.arg is None:
        argument = b""
    elif code.arg.n >= 0:
        argument = draw(st.sampled_from([b"\0", b"\1", b"\x7f", b"\xff"])) * code.arg.n
    elif code.arg.n == pickletools.UP_TO_NEWLINE:
        line = draw(st.sampled_from([b"1\n", b"'a'\n", b"os\n"]))
        argument = b"os\nsystem\n" if "pair" in code.arg.name else line
    else:
        width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(code.arg.n, 4)
        claimed = draw(st.sampled_from([len(some), *HUGE])) % 256**width
        argument = claimed.to_bytes(width, "little") + some
    return code.code.encode("latin-1") + argument


@st.composite
def hostile_pickle(draw: st.DrawFn, pairs: Pairs, attacks: Sequence[bytes]) -> bytes:
    """A pickled list of pairs with something else in it, in whatever frames."""
    body = pickle.dumps(pairs, protocol=4)[11:]
    attack = draw(
        st.sampled_from(attacks)
        | st.sampled_from(attacks)
        | st.sampled_from(BOMBS)
        | st.lists(opcode(), min_size=1, max_size=12).map(b"".join)
    )
    places = [place for _, _, place in pickletools.genops(body) if place is not None]
    place = draw(st.sampled_from(places) | st.integers(0, len(body)))
    # In between; instead of the rest; instead of a number; as the whole.
    rest = draw(st.sampled_from([body[place:], b".", body[place + 2 :], b"e.", b"\x86\x94e.", b""]))
    before = draw(st.sampled_from([body[:place], body[:place], body[:place], b"", b"]\x94", b"]\x94("]))
    body = before + attack + rest
    framed = draw(st.sampled_from(["right", "right", "none", "lie", "many", "nested"]))
    head = b"\x80" + draw(st.sampled_from([4, 4, 4, 5, 2, 0, 255])).to_bytes(1, "little")
    if framed == "right":
        return head + b"\x95" + struct.pack("<Q", len(body)) + body
    if framed == "lie":
        wrong = draw(st.sampled_from(EXTREMES) | st.integers(0, len(body)))
        return head + b"\x95" + struct.pack("<Q", wrong) + body
    if framed == "nested":
        inner = b"\x95" + struct.pack("<Q", len(body)) + body
        return head + b"\x95" + struct.pack("<Q", len(inner)) + inner
    return draw(reframed(head + body)) if framed == "many" else head + body


# ------------------------------------------------------------------------------------------------------- accounts

ACCOUNT = Account(
    documents=12,
    packed=9,
    skipped={"empty text": 2, "invalid UTF-8": 1},
    tokens=321,
    lengths={"8-15": 4, "64-127": 5},
    field=".text",
    engine="tokenizers",
    tokenizer=TokenizerFacts(
        path="tokenizer.json", sha256="ab" * 32, vocab_size=50257, eod="<|endoftext|>", special_tokens="text"
    ),
    sources=(
        SourceFacts(name="a.jsonl", bytes=1234, modified_ns=10**18, documents=7),
        SourceFacts(name="häagen/dazs", split="train", shards=3, version="1.0", documents=5),
    ),
    version="0.1",
)
VALUES = [
    "null", "true", "-1", "0", "1", "1.0", "1e2", "1e400", "NaN", "-Infinity", "9" * 400, "9" * 4300, "9" * 5000,
    "-9223372036854775809", "18446744073709551616", '""', '"a\\nb"', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', "[]",
    "{}", "[1, 2]", '{"a": 1}', '{"a\\nb": "c"}', '{"\\ud800": -3}', '{"name": "a"}', '[{"name": 3}]', "[" * 50,
    "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 400 + "]" * 400, '"' + "x" * 5000 + '"',
    "[" + "1," * 5000 + "1]", '"' + "\\n" * 3000 + '"', "'a'", "", "\x00", "1 2", "//",
]  # fmt: skip
KEYS = ["", "documents", "documents ", "a\nb", "\ud800", "x" * 3000, "__class__", "\x1b[2J", "skipped", "name"]
COUNTS = [-1, 1, -12, 2**31, 2**63, 2**64, -(2**63), 10**400, 10**4299]
HERE = "@here@"


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from spots(value[key])


@st.composite
def damaged_account(draw: st.DrawFn) -> bytes:
    values = json.loads(json.dumps(to_dict(ACCOUNT)))
    whole = json.dumps(values, indent=2)
    kind = draw(st.sampled_from(["bytes", "value", "value", "key", "lose", "twice", "counts", "encoding"]))
    if kind == "bytes":
        return draw(damaged(whole.encode()))
    if kind == "encoding":
        encoding = draw(st.sampled_from(["utf-16", "utf-32-be", "utf-8-sig", "latin-1", "cp037", "utf-7"]))
        return json.dumps(values, ensure_ascii=False).encode(encoding)
    if kind == "counts":
        # Changes that still add up, and some that do not.
        for _ in range(draw(st.integers(1, 2))):
            more = draw(st.sampled_from(COUNTS))
            counts = [(values, "documents"), (values["sources"][0], "documents")]
            packed = [(values, "packed"), (values["lengths"], "8-15")]
            counts += draw(st.sampled_from([packed, [(values["skipped"], "empty text")], []]))
            for container, key in counts:
                container[key] += more
        return json.dumps(values).encode()
    container, key = draw(st.sampled_from(list(spots(values))))
    old = json.dumps(container[key])
    container[key] = HERE
    if kind == "lose":
        del container[key]
    if kind == "key" and isinstance(container, dict):
        container[draw(st.sampled_from(KEYS))] = container.pop(key) if draw(st.booleans()) else HERE
    new = draw(st.sampled_from(VALUES)) if kind in ("value", "twice") else old
    if kind == "twice" and isinstance(container, dict):
        first = draw(st.booleans())
        name = json.dumps(key)
        new = f"{new}, {name}: {old}" if first else f"{old}, {name}: {new}"
    whole = json.dumps(values, ensure_ascii=draw(st.booleans()))
    return whole.replace(f'"{HERE}"', new).encode("utf-8", "surrogatepass")


def read_sound_account(path: Path) -> None:
    account = read_account(path)
    counts = [*account.skipped.values(), *account.lengths.values(), *(s.documents for s in account.sources)]
    assert min(account.documents, account.packed, account.tokens, *counts) >= 0
    assert account.documents == account.packed + sum(account.skipped.values())
    assert account.documents == sum(source.documents for source in account.sources)
    assert account.packed == sum(account.lengths.values())
    assert from_dict(Account, json.loads(json.dumps(to_dict(account)))) == account
    assert account.origin().isprintable()


# --------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_files_are_read(layout: Layout, tmp_path: Path) -> None:
    lengths = [3, 0, 12, 1, 9]
    path = write(tmp_path / "a.pbin", sound_pbin(lengths, layout))
    mask = write(files.mask_path(path), sound_mask(lengths))
    good = write(tmp_path / "good.pbin", sound_pbin([2, 5], Layout(2)))
    write(files.mask_path(good), sound_mask([2, 5]))
    assert [len(document) for document in read_pbin(path)] == lengths
    for config in CONFIGS:
        read_sequences(config, path, str(mask), 11)
    for damaged_one in (path, mask):
        assert not refuses_sequences(path, mask, damaged_one, 11)
    assert not refuses_tools(path, good, mask, tmp_path / "out")


@counted("pbin")
def test_damaged_pbin(examples: int, tmp_path: Path) -> None:
    def check(case: Case) -> bool:
        path = write(tmp_path / "a.pbin", case.content)
        mask = write(tmp_path / "m.pbin", sound_mask(case.lengths))
        refused = refuses_pbin(path)
        for vocab_size in (11, 2**32):
            refuses_sequences(path, mask, path, vocab_size)
        return refused

    hunt(examples, damaged_pbin(), check)


@counted("mask")
def test_damaged_mask(examples: int, tmp_path: Path) -> None:
    def check(case: Case) -> bool:
        path = write(tmp_path / "a.pbin", sound_pbin(case.lengths, Layout(2)))
        mask = write(tmp_path / "m.pbin", case.content)
        refuses_pbin(mask)
        if sum(case.lengths) <= SEQ_LEN:  # then the tokens are what is refused
            return refuses_pbin(mask)
        return refuses_sequences(path, mask, mask, 11)

    hunt(examples, damaged_pbin([Layout(1)]), check)


@counted("idx")
def test_damaged_idx(examples: int, tmp_path: Path) -> None:
    def check(case: Case) -> bool:
        jsonl = write(tmp_path / "a.jsonl", b"".join(b"7" * n + b"\n" for n in case.lengths))
        return refuses_idx(write(tmp_path / "a.idx", case.content), jsonl)

    hunt(examples, damaged_idx(), check)


def refuses_idx(path: Path, jsonl: Path) -> bool:
    def slice_lines() -> None:
        lines = jsonl.read_bytes()
        for offset, length in pbin.read_idx(path, jsonl).tolist():
            assert offset >= 0 and len(lines[offset : offset + length]) == length

    return refuses(slice_lines, path)


@counted("pickle")
def test_hostile_pickles_run_no_code(examples: int, tmp_path: Path, extensions: None) -> None:
    marker = tmp_path / "ran"
    attacks = list(exploits(marker).values())
    layout = Layout(2)

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        lengths = draw(LENGTHS)
        return Case(lengths, draw(hostile_pickle(pairs_of(lengths, layout), attacks)))

    def check(case: Case) -> bool:
        tokens = sum(case.lengths)
        path = write(tmp_path / "a.pbin", head_and_data([3] * tokens, layout) + case.content)
        mask = write(tmp_path / "m.pbin", sound_mask(case.lengths))
        jsonl = write(tmp_path / "a.jsonl", b"7" * (2 * tokens))
        refused = refuses_idx(write(tmp_path / "a.idx", case.content), jsonl)
        assert refuses_pbin(path) or not refused
        refuses_sequences(path, mask, path, 11)
        assert not marker.exists()
        return refused

    hunt(examples, cases(), check, spared=0.0)


@counted("account")
def test_damaged_account(examples: int, tmp_path: Path) -> None:
    write_account(ACCOUNT, tmp_path / "sound.json")
    assert read_account(tmp_path / "sound.json") == ACCOUNT

    def check(content: bytes) -> bool:
        path = write(tmp_path / "a.pbin.json", content)
        return refuses(lambda: read_sound_account(path), path)

    hunt(examples, damaged_account(), check)


@counted("tools")
def test_tools_with_damaged_files(examples: int, tmp_path: Path, extensions: None) -> None:
    attacks = list(exploits(tmp_path / "ran").values())
    good = {masked: tmp_path / f"{'masked' if masked else 'plain'}.pbin" for masked in (False, True)}
    for path in good.values():
        write(path, sound_pbin([4, 6, 1], Layout(2)))
    write(files.mask_path(good[True]), sound_mask([4, 6, 1]))

    @st.composite
    def cases(draw: st.DrawFn) -> tuple[str, Case]:
        kind = draw(st.sampled_from(["plain", "masked", "mask", "pickle"]))
        if kind == "pickle":
            lengths = draw(LENGTHS)
            pickled = draw(hostile_pickle(pairs_of(lengths, Layout(2)), attacks))
            return kind, Case(lengths, head_and_data([3] * sum(lengths), Layout(2)) + pickled)
        return kind, draw(damaged_pbin([Layout(1)] if kind == "mask" else LAYOUTS))

    def check(kind_and_case: tuple[str, Case]) -> bool:
        kind, case = kind_and_case
        sound = sound_mask(case.lengths) if kind == "masked" else sound_pbin(case.lengths, Layout(2))
        path = write(tmp_path / "a.pbin", sound if kind == "mask" else case.content)
        mask = files.mask_path(path)
        mask.unlink(missing_ok=True)
        if kind in ("masked", "mask"):
            write(mask, case.content if kind == "mask" else sound)
        refused = refuses_tools(path, good[mask.exists()], mask if kind == "mask" else path, tmp_path / "out")
        assert not (tmp_path / "ran").exists()
        return refused

    hunt(examples, cases(), check, spared=0.0)


LARGE = 1 << 20
INDICES = {
    "pairs without numbers": b"]\x94(" + b"\x86\x94" * (LARGE // 2) + b"e.",
    "half pairs": b"]\x94(" + b"K\x86\x94" * (LARGE // 3) + b"e.",
    "the smallest pairs": b"]\x94(" + b"K\0K\0\x86\x94" * (LARGE // 6) + b"e.",
    "numbers alone": b"]\x94(" + b"K\0" * (LARGE // 2) + b"e.",
    "endless numbers": b"]\x94(" + b"\x8a\xff" * (LARGE // 2) + b"e.",
    "batches without pairs": b"]\x94(" + b"e(" * (LARGE // 2) + b"e.",
    "frames without anything": (b"\x95" + bytes(8)) * (LARGE // 9) + b"]\x94.",
    "frames of a byte": b"]\x94(" + (b"\x95\1" + bytes(7) + b"(") * 10_000 + b"e.",
    "lists in lists": b"]" * (LARGE // 2) + b"a" * (LARGE // 2) + b".",
}


@pytest.mark.parametrize("body", INDICES.values(), ids=INDICES)
def test_a_large_hostile_index_takes_no_memory(body: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pbin", head_and_data([1, 2, 3], Layout(2)) + b"\x80\x04" + body)
    idx, jsonl = write(tmp_path / "a.idx", b"\x80\x04" + body), write(tmp_path / "a.jsonl", b"7\n")
    with bounded(num_bytes=len(body)):
        assert refuses(lambda: pbin.open_pbin(path).index, path)
    with bounded(num_bytes=len(body)):
        refuses(lambda: pbin.read_idx(idx, jsonl), idx)


ACCOUNTS = {
    "lists": "[" + "[]," * (LARGE // 3) + "[]]",
    "lists in lists": "[" * LARGE,
    "reasons": json.dumps(to_dict(ACCOUNT) | {"skipped": {str(i): 0 for i in range(LARGE // 12)}}),
    "sources": json.dumps(to_dict(ACCOUNT) | {"sources": [{"name": ""}] * (LARGE // 14)}),
    "one wide letter": json.dumps(to_dict(ACCOUNT) | {"field": "x" * LARGE + "🙂"}, ensure_ascii=False),
}


@pytest.mark.parametrize("content", ACCOUNTS.values(), ids=ACCOUNTS)
def test_a_large_hostile_account_takes_no_memory(content: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pbin.json", content.encode())
    with bounded(num_bytes=len(content)):
        refuses(lambda: read_sound_account(path), path)
