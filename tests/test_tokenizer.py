"""A tokenizer ends each document once and leaves nothing out; both engines give the ids of `tokenizers` itself."""

import hashlib
import inspect
import json
import os
import random
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from words import write_disagreeing, write_words

from modalities.tokenizer import (
    EOD,
    Engine,
    Ids,
    SpecialTokens,
    disagreement,
    fastokens_engine,
    read_spec,
    token_id,
    tokenizers_engine,
    train_tokenizer,
)

ENGINES = {"tokenizers": tokenizers_engine, "fastokens": fastokens_engine}
TEXTS = [
    "def f(x):\n    return x\n",
    "ä€😀 naïve\x00\r\n\t",
    "a literal <|endoftext|> in a text",
    "<|endoftext|>",
    "ends with <|endoftext|>",
    " ",
    "long " * 5000,
]
CODE = "".join(map(inspect.getsource, (inspect, json, textwrap)))
# As Llama 3, DeepSeek V3 and GPT-2 cut texts; fastokens knows the first by heart, and GPT-2's only as ByteLevel.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(CODE.splitlines(), 600, path)
    return path


def write_changed(source: Path, path: Path, change: Callable[[Any], object]) -> Path:
    """The tokenizer.json at `source` after `change`, which gets it as a `tokenizers.Tokenizer`."""
    tokenizer = Tokenizer.from_file(str(source))
    change(tokenizer)
    tokenizer.save(str(path))
    return path


def engines(path: Path, special: SpecialTokens = "text", eod: str = EOD) -> list[Engine]:
    spec = read_spec(path, eod)
    return [make(spec, special) for make in ENGINES.values()]


def documents(ids: Ids) -> list[list[int]]:
    assert ids.tokens.dtype in ("<u1", "<u2", "<u4") and ids.lengths.dtype == np.int64
    assert ids.lengths.sum() == len(ids.tokens)
    return [document.tolist() for document in np.split(ids.tokens, np.cumsum(ids.lengths))[:-1]]


# ---------------------------------------------------------------------------------------------------------------- specs


def test_what_a_spec_tells(bpe: Path, tmp_path: Path) -> None:
    spec = read_spec(bpe, EOD)
    assert (spec.path, spec.eod, spec.eod_id, spec.vocab_size) == (bpe, EOD, 0, 600)
    assert spec.sha256 == hashlib.sha256(bpe.read_bytes()).hexdigest()
    gaps = read_spec(write_words(tmp_path / "t.json", {"a": 0, "<eod>": 70_000}), "<eod>")
    assert (gaps.eod_id, gaps.vocab_size) == (70_000, 70_001), "the largest id + 1, not the count"


def test_ids_are_those_of_the_reference_whatever_the_file_states(tmp_path: Path) -> None:
    added = [{"id": id_, "content": token, "special": True} for id_, token in [(100, "<x>"), (50, "<eod>"), (7, "a")]]
    same = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    stated = write_words(tmp_path / "stated.json", {"a": 0, "b": 1}, added_tokens=[token | same for token in added])
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("<unk>", -9.0), ("b", -1.0)], unk_id=1))
    unigram.add_special_tokens(["<x>", "<eod>"])
    unigram.save(str(tmp_path / "unigram.json"))
    for path, size, end in [(stated, 4, 3), (tmp_path / "unigram.json", 5, 4)]:
        spec = read_spec(path, "<eod>")
        assert (spec.vocab_size, spec.eod_id) == (size, end)
        assert Tokenizer.from_file(str(path)).get_vocab()["<eod>"] == end
    for encode in engines(stated, eod="<eod>", special="parse"):
        assert documents(encode(["a b", "<x>"])) == [[0, 1, 3], [2, 3]]


def test_what_only_an_engine_sees_is_told_all_the_same(tmp_path: Path) -> None:
    path = write_words(tmp_path / "t.json", {"a": 0, "<eod>": 1}, model={"type": "none", "vocab": {"<eod>": 0}})
    for make in (tokenizers_engine, fastokens_engine):
        with pytest.raises(ValueError, match=r"t\.json"):
            make(read_spec(path, "<eod>"), "text")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    good = write_words(tmp_path / "good.json", {"a": 0, "<eod>": 1}).read_bytes()
    for content in [b"", b"{}", b"[]", b"null", b"{", b"\xff", b'{"model": {}}', good[:-1], good + b"x", bytes(9)]:
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.json is not a tokenizer\.json: ") as caught:
            read_spec(tmp_path / "t.json", "<eod>")
        assert "\n" not in str(caught.value)
    (tmp_path / "t.json").write_bytes(good.replace(b'"a"', b'"\xff"'))
    with pytest.raises(ValueError, match=r"t\.json is not a tokenizer\.json: "):
        read_spec(tmp_path / "t.json", "<eod>")


def test_no_file_and_no_end(bpe: Path, tmp_path: Path) -> None:
    without = write_words(tmp_path / "t.json", {"a": 0})
    for path, eod, what in [
        (tmp_path / "none.json", EOD, f"tokenizer {tmp_path}/none.json is missing; give a tokenizer.json"),
        (tmp_path, EOD, f"tokenizer {tmp_path} is a folder; give a tokenizer.json"),
        (bpe, "</s>", f"{bpe} has no token '</s>' to end documents with; choose one with --eod (it has {EOD})"),
        (without, EOD, f"{without} has no token '{EOD}' to end documents with; choose one with --eod (it has no"),
        (without, "", f"{without} has no token '' to end documents with"),
    ]:
        with pytest.raises(ValueError) as caught:
            read_spec(path, eod)
        assert str(caught.value).startswith(what)


def test_the_id_of_a_token(bpe: Path, tmp_path: Path) -> None:
    assert (token_id(bpe, EOD), token_id(bpe, "!")) == (0, 1)
    with pytest.raises(ValueError, match=r"^.*tokenizer\.json has no token '<pad>'$"):
        token_id(bpe, "<pad>")
    with pytest.raises(ValueError, match=r"none\.json is missing; give a tokenizer\.json$"):
        token_id(tmp_path / "none.json", EOD)


def test_a_tokenizer_without_the_fields_that_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}')
    for encode in engines(tmp_path / "t.json", eod="b"):
        assert documents(encode(["aa", "ab"])) == [[0, 0, 1], [0, 1]]


# ----------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("special", ["text", "parse"])
def test_documents_are_what_tokenizers_gives_and_an_end(bpe: Path, engine: str, special: SpecialTokens) -> None:
    encode = ENGINES[engine](read_spec(bpe, EOD), special)
    plain = Tokenizer.from_file(str(bpe))
    plain.encode_special_tokens = special == "text"
    due = [plain.encode(text).ids for text in TEXTS]
    due = [ids if ids[-1] == 0 else [*ids, 0] for ids in due]
    assert documents(encode(TEXTS)) == due
    assert documents(encode(TEXTS[::-1])) == due[::-1]
    for text, ids in zip(TEXTS, due, strict=True):
        assert documents(encode([text])) == [ids], "a document depends on those beside it"
        inside = ids[:-1].count(0)
        assert inside == (text.startswith("a literal") and special == "parse")
        whole = plain.decode(ids, skip_special_tokens=False)
        assert whole == (text if special == "parse" and text.endswith(EOD) else text + EOD)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_text_no_document(bpe: Path, engine: str) -> None:
    assert documents(ENGINES[engine](read_spec(bpe, EOD), "text")([])) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_text_without_a_token_has_length_0(tmp_path: Path, engine: str) -> None:
    spec = read_spec(write_words(tmp_path / "t.json", {"a": 0, "<eod>": 1}), "<eod>")
    encode = ENGINES[engine](spec, "text")
    assert documents(encode([" ", "a", "zz", " a a", "x"])) == [[], [0, 1], [], [0, 0, 1], []]
    assert documents(encode([" "])) == [[]]
    assert documents(encode(["z", " "])) == [[], []]


def test_ids_may_leave_gaps_that_fastokens_refuses(tmp_path: Path) -> None:
    spec = read_spec(write_words(tmp_path / "t.json", {"a": 5, "<eod>": 9}), "<eod>")
    assert spec.vocab_size == 10
    assert documents(tokenizers_engine(spec, "text")([" ", "a a"])) == [[], [5, 5, 9]]
    with pytest.raises(ValueError, match=r"^fastokens cannot do .*t\.json: model error: unsupported"):
        fastokens_engine(spec, "text")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_end_that_is_a_word_is_not_doubled(tmp_path: Path, engine: str) -> None:
    spec = read_spec(write_words(tmp_path / "t.json", {"a": 0, "b": 1}), "b")
    ids = ENGINES[engine](spec, "text")(["a b", "b a", "b b", "a"])
    assert documents(ids) == [[0, 1], [1, 0, 1], [1, 1], [0, 1]]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("declared", [True, False])
def test_a_literal_end_stays_text_even_if_not_declared_special(tmp_path: Path, engine: str, declared: bool) -> None:
    vocab = {"<": 0, ">": 1, "e": 2, "o": 3, "d": 4, "<eod>": 5}
    spec = read_spec(write_words(tmp_path / "t.json", vocab, declared), "<eod>")
    texts = ["<eod>", "e", "e<eod>o", "e <eod>"]
    assert documents(ENGINES[engine](spec, "text")(texts)) == [
        [0, 2, 3, 4, 1, 5],
        [2, 5],
        [2, 0, 2, 3, 4, 1, 3, 5],
        [2, 0, 2, 3, 4, 1, 5],
    ]
    assert documents(ENGINES[engine](spec, "parse")(texts)) == [[5], [2, 5], [2, 5, 3, 5], [2, 5]]


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_that_are_not_special_are_found_in_either_way(bpe: Path, tmp_path: Path, engine: str) -> None:
    path = write_changed(bpe, tmp_path / "1.json", lambda t: t.add_tokens(["<tab>"]))
    path = write_changed(path, tmp_path / "2.json", lambda t: t.add_special_tokens(["<s>"]))
    spec = read_spec(path, EOD)
    ways: dict[SpecialTokens, list[int]] = {"text": [1, 0], "parse": [1, 1]}
    for special, counts in ways.items():
        (ids,) = documents(ENGINES[engine](spec, special)(["x <tab> <s> y"]))
        assert [ids.count(600), ids.count(601)] == counts


TEMPLATES: list[tuple[Any, list[int], list[int]]] = [
    # A post-processor, and what is put before and after a text (ids of "!" and '"', or of the end).
    (None, [], []),
    (processors.ByteLevel(trim_offsets=True), [], []),
    (processors.TemplateProcessing(single="$A", special_tokens=[]), [], []),
    (processors.TemplateProcessing(single="! $A", special_tokens=[("!", 1)]), [1], []),
    (processors.TemplateProcessing(single="! ! $A", special_tokens=[("!", 1)]), [1, 1], []),
    (processors.TemplateProcessing(single='! $A "', special_tokens=[("!", 1), ('"', 2)]), [1], [2]),
    (processors.TemplateProcessing(single=f"! $A {EOD}", special_tokens=[("!", 1), (EOD, 0)]), [1], []),
    (processors.TemplateProcessing(single=f"{EOD} $A {EOD}", special_tokens=[(EOD, 0)]), [0], []),
    (
        processors.Sequence(
            [processors.ByteLevel(), processors.TemplateProcessing(single="! $A", special_tokens=[("!", 1)])]
        ),
        [1],
        [],
    ),
    (
        processors.Sequence(
            [processors.TemplateProcessing(single="! $A !", special_tokens=[("!", 1)]), processors.ByteLevel()]
        ),
        [1],
        [1],
    ),
    (processors.Sequence([]), [], []),
    (processors.BertProcessing(('"', 2), ("!", 1)), [1], [2]),
    (processors.RobertaProcessing(('"', 2), ("!", 1)), [1], [2]),
]


@pytest.mark.parametrize(("processor", "before", "after"), TEMPLATES)
def test_a_tokenizers_own_post_processor_is_kept(
    bpe: Path, tmp_path: Path, processor: Any, before: list[int], after: list[int]
) -> None:
    plain = Tokenizer.from_file(str(bpe))

    def change(tokenizer: Any) -> None:
        if processor is not None:
            tokenizer.post_processor = processor

    path = write_changed(bpe, tmp_path / "t.json", change)
    due = [[*before, *plain.encode(text).ids, *after, 0] for text in ("x", "two words")]
    encoders = [tokenizers_engine(read_spec(path, EOD), "text")]
    if not isinstance(processor, processors.BertProcessing | processors.RobertaProcessing):
        encoders.append(fastokens_engine(read_spec(path, EOD), "text"))
    for encode in encoders:
        assert documents(encode(["x", "two words"])) == due


def test_truncation_and_padding_are_off(tmp_path: Path) -> None:
    path = write_words(
        tmp_path / "t.json",
        {"a": 0, "<eod>": 1},
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 4},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<eod>",
        },
    )
    for encode in engines(path, eod="<eod>"):
        assert documents(encode(["a", "a a a"])) == [[0, 1], [0, 0, 0, 1]]


# -------------------------------------------------------------------------------------------------------------- engines


def hostile_texts(number: int, seed: int) -> Iterator[str]:
    """Texts of odd characters, of all of Unicode, and of code with odd characters in it."""
    rng = random.Random(seed)
    odd = [
        *"aZé ßİıſﬁ0٣²½.,!'\"<>|/\\\t\n\r\x00\x0b\x1c\x85\xa0\u2003\u2028\u3000\u200b\u200d\ufeff\ufffd\uffff漢か한👍🏽"
    ]
    odd += ["'s", "'LL", "  ", "\r\n", " \n \n ", EOD, "<|endof", "e\u0301", "1234567", "fooBar", "▁Ġ"]
    odd += [
        "\U0010ffff",
        "\u0301",
        "\u0e33",
        "👨\u200d👩\u200d👧",
        "🇩🇪",
        "\U000e0001",
        "\ue000",
        "\u0378",
        "\U0001fae9",
        "\u1c89",
    ]
    for _ in range(number):
        yield "".join(rng.choices(odd, k=rng.randint(1, 15)))
        points = (rng.choice([rng.randrange(0x3000), rng.randrange(0x110000)]) for _ in range(rng.randint(1, 12)))
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000) or " "
        start = rng.randrange(len(CODE))
        yield CODE[start : start + rng.randrange(1, 40)] + rng.choice(odd) + CODE[start : start + 5]


def split(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


CHANGES: dict[str, Callable[[Any], object]] = {
    "as trained": lambda t: None,
    "prefix space": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Llama": lambda t: setattr(t, "pre_tokenizer", split(LLAMA)),
    "NFC": lambda t: setattr(t, "normalizer", normalizers.NFC()),
    "lower case": lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
    "digits": lambda t: setattr(
        t,
        "pre_tokenizer",
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ),
    "more tokens": lambda t: (t.add_tokens(["self", "\n\n"]), t.add_special_tokens(["<|end|>", "漢"])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("special", ["text", "parse"])
def test_engines_agree_on_hostile_texts(bpe: Path, tmp_path: Path, change: str, special: SpecialTokens) -> None:
    path = write_changed(bpe, tmp_path / "t.json", CHANGES[change])
    texts = list(hostile_texts(700, seed=len(change)))
    reference, fast = engines(path, special)
    assert disagreement(fast, reference, texts) is None
    assert documents(fast(texts)) == documents(reference(texts))


@pytest.mark.parametrize("special", ["text", "parse"])
def test_the_small_tokenizer_on_which_the_engines_differ(tmp_path: Path, special: SpecialTokens) -> None:
    reference, fast = engines(write_disagreeing(tmp_path / "t.json"), special, "<eod>")
    ordinary = [text for text in hostile_texts(700, seed=1) if "\u180e" not in text]
    assert disagreement(fast, reference, ordinary) is None
    texts = ["a a", "a\u180ea", "\u180e", " \u180e a"]
    assert documents(reference(texts)) == [[0, 0, 3], [0, 2, 0, 3], [2, 3], [2, 0, 3]]
    assert documents(fast(texts)) == [[0, 0, 3], [0, 0, 3], [], [0, 3]]
    assert disagreement(fast, reference, texts) == disagreement(reference, fast, texts) == 1
    assert disagreement(fast, reference, [*ordinary, "\u180e"]) == len(ordinary)
    assert disagreement(fast, fast, texts) is None
    assert disagreement(fast, reference, []) is None


@pytest.mark.parametrize("pattern", [GPT2, DEEPSEEK])
def test_patterns_in_use_on_which_the_engines_differ(bpe: Path, tmp_path: Path, pattern: str) -> None:
    path = write_changed(bpe, tmp_path / "t.json", lambda t: setattr(t, "pre_tokenizer", split(pattern)))
    reference, fast = engines(path)
    ordinary = [text for text in hostile_texts(700, seed=1) if "\u180e" not in text]
    assert disagreement(fast, reference, ordinary) is None
    assert disagreement(fast, reference, [*ordinary, "x  \u180e  y"]) == len(ordinary)


REFUSED: list[tuple[str, Any]] = [
    ("pre_tokenizer", pre_tokenizers.Whitespace()),
    ("pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
    ("pre_tokenizer", pre_tokenizers.Metaspace()),
    ("pre_tokenizer", pre_tokenizers.Punctuation()),
    ("pre_tokenizer", pre_tokenizers.BertPreTokenizer()),
    ("pre_tokenizer", pre_tokenizers.UnicodeScripts()),
    ("pre_tokenizer", pre_tokenizers.CharDelimiterSplit("y")),
    ("pre_tokenizer", pre_tokenizers.FixedLength(3)),
    ("normalizer", normalizers.NFD()),
    ("normalizer", normalizers.NFKC()),
    ("normalizer", normalizers.NFKD()),
    ("normalizer", normalizers.Nmt()),
    ("normalizer", normalizers.Strip()),
    ("normalizer", normalizers.BertNormalizer()),
    ("normalizer", normalizers.ByteLevel()),
    ("post_processor", processors.BertProcessing(("x", 5), ("y", 6))),
    ("post_processor", processors.RobertaProcessing(("x", 5), ("y", 6))),
    ("model", models.WordLevel(vocab={EOD: 0, "x": 1}, unk_token="x")),
    ("model", models.WordPiece(vocab={EOD: 0, "x": 1}, unk_token="x")),
    ("model", models.Unigram([(EOD, 0.0), ("x", -1.0)], 1)),
]


@pytest.mark.parametrize(("part", "step"), REFUSED, ids=lambda it: it if isinstance(it, str) else type(it).__name__)
def test_what_fastokens_cannot_do_is_one_clear_line(bpe: Path, tmp_path: Path, part: str, step: Any) -> None:
    spec = read_spec(write_changed(bpe, tmp_path / "t.json", lambda t: setattr(t, part, step)), EOD)
    what = f"unsupported {part.replace('_', '-')} type: {type(step).__name__}"
    with pytest.raises(ValueError, match=rf"^fastokens cannot do .*t\.json: .*{what}$"):
        fastokens_engine(spec, "text")
    # Which "tokenizers" then does.
    (ids,) = documents(tokenizers_engine(spec, "text")(["xx xx"]))
    assert len(ids) > 1 and ids[-1] == spec.eod_id


# ------------------------------------------------------------------------------------------------------------- training


def test_a_trained_tokenizer_is_exact_and_lossless(bpe: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bpe))
    assert sorted(tokenizer.get_vocab().values()) == list(range(600))
    assert tokenizer.token_to_id(EOD) == 0
    for text in [*TEXTS, "".join(map(chr, range(1, 0x3000)))]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_the_same_again(bpe: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(CODE.splitlines()), 600, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == bpe.read_bytes()


def test_special_tokens_come_first(tmp_path: Path) -> None:
    train_tokenizer(CODE.splitlines(), 300, tmp_path / "t.json", ("<s>", "<|im_start|>", EOD))
    tokenizer = Tokenizer.from_file(str(tmp_path / "t.json"))
    assert [tokenizer.token_to_id(token) for token in ("<s>", "<|im_start|>", EOD)] == [0, 1, 2]
    assert tokenizer.encode("x<|im_start|>y").ids.count(1) == 1
    assert read_spec(tmp_path / "t.json", "<s>").eod_id == 0
    assert read_spec(tmp_path / "t.json", EOD).vocab_size == 300


def test_vocabularies_that_do_not_fit(tmp_path: Path) -> None:
    for size, what in {
        9_999: "a vocabulary of 9,999 needs more text: this makes ",
        257 + 2: "a vocabulary of 259 needs more text: this makes 257",
        256: "a vocabulary of 256 is too small: the bytes and special tokens are 257",
    }.items():
        with pytest.raises(ValueError, match=f"^{what}"):
            train_tokenizer(["abc" if size == 9_999 else "a"], size, tmp_path / "t.json")
    train_tokenizer([], 257, tmp_path / "bytes.json")
    for encode in engines(tmp_path / "bytes.json"):
        assert len(documents(encode(["ä "]))[0]) == 4
    assert os.listdir(tmp_path) == ["bytes.json"]


def test_what_the_texts_raise_comes_through(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "abc"
        raise ValueError("a.jsonl, line 2: blank line")

    with pytest.raises(ValueError, match="^a.jsonl, line 2: blank line$"):
        train_tokenizer(texts(), 300, tmp_path / "t.json")
    assert os.listdir(tmp_path) == []


def test_an_existing_tokenizer_is_kept_and_no_text_read(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("mine")
    texts = iter(["abc"])
    with pytest.raises(ValueError, match="exists already"):
        train_tokenizer(texts, 300, tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text() == "mine" and next(texts) == "abc"
