"""What is packed is what `tokenizers` gives, and decodes to the very texts that came in."""

import inspect
import json
import os
import textwrap
from pathlib import Path

import pytest

from modalities import pack, pbin

TEXTS = [
    "def f(x):\n    return x\n",
    "ä€😀 naïve\x00\r\n\t",
    "a literal <|endoftext|> in a text",
    "<|endoftext|>",
    " ",
    "long " * 5000,
]
DOCUMENTS = [(f"line {i}", text) for i, text in enumerate(TEXTS, 1)]


def fail(where: object, reason: str) -> None:
    raise ValueError(f"{where}: {reason}")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    pack.train_tokenizer([(module, inspect.getsource(module)) for module in (inspect, json, textwrap)], 600, path)
    return path


def word_level(path: Path, vocab: dict[str, int], special: bool = True, **changes: object) -> Path:
    """A tokenizer.json that gives each word of `vocab` its id, and nothing for other words."""
    added = {"content": "<eod>", "special": special, "single_word": False, "lstrip": False, "rstrip": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab["<eod>"], "normalized": False, **added}] if "<eod>" in vocab else [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    path.write_text(json.dumps(spec | changes))
    return path


def test_trained_tokenizer_is_exact_and_lossless(bpe: Path) -> None:
    tokenizer = pack.load_tokenizer(bpe, pack.EOD)
    assert tokenizer.get_vocab_size() == 600
    assert sorted(tokenizer.get_vocab().values()) == list(range(600))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in [*TEXTS, "".join(map(chr, range(1, 0x3000)))]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a vocabulary of 9,999 needs more text"):
        pack.train_tokenizer([(1, "abc")], 9999, tmp_path / "tokenizer.json")
    assert os.listdir(tmp_path) == []


def test_documents_decode_to_their_texts(bpe: Path, tmp_path: Path) -> None:
    packed = pack.pack_documents(DOCUMENTS, bpe, tmp_path / "a.pbin", pack.EOD, fail)
    opened = pbin.open_pbin(tmp_path / "a.pbin")
    assert packed == (len(TEXTS), len(opened.tokens)) == (opened.num_documents, len(opened.tokens))
    assert opened.tokens.dtype.itemsize == 2
    tokenizer = pack.load_tokenizer(bpe, pack.EOD)
    for i, text in enumerate(TEXTS):
        *ids, last = opened.document(i).tolist()
        assert ids == tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert last == 0
        assert 0 not in ids, "a literal <|endoftext|> became the end of a document"


def test_batches_do_not_show(bpe: Path, tmp_path: Path) -> None:
    pack.pack_documents(DOCUMENTS, bpe, tmp_path / "one.pbin", pack.EOD, fail)
    pack.pack_documents(DOCUMENTS, bpe, tmp_path / "many.pbin", pack.EOD, fail, batch_characters=30)
    assert (tmp_path / "one.pbin").read_bytes() == (tmp_path / "many.pbin").read_bytes()


def test_the_end_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = word_level(tmp_path / "t.json", {"a": 0, "b": 1})
    packed = pack.pack_documents([(1, "a b"), (2, "b a")], tokenizer, tmp_path / "a.pbin", "b", fail)
    assert packed.documents == 2
    assert pbin.open_pbin(tmp_path / "a.pbin").tokens.tolist() == [0, 1, 1, 0, 1]


def test_token_size_holds_the_largest_id_not_the_count(tmp_path: Path) -> None:
    tokenizer = word_level(tmp_path / "t.json", {"a": 0, "<eod>": 300})
    pack.pack_documents([(1, "a")], tokenizer, tmp_path / "a.pbin", "<eod>", fail)
    opened = pbin.open_pbin(tmp_path / "a.pbin")
    assert (opened.tokens.tolist(), opened.tokens.dtype.itemsize) == ([0, 300], 2)


@pytest.mark.parametrize("special", [True, False])
def test_a_literal_end_stays_text_even_if_not_declared_special(tmp_path: Path, special: bool) -> None:
    vocab = {"<": 0, ">": 1, "e": 2, "o": 3, "d": 4, "<eod>": 5}
    tokenizer = word_level(tmp_path / "t.json", vocab, special)
    pack.pack_documents([(1, "<eod>"), (2, "e")], tokenizer, tmp_path / "a.pbin", "<eod>", fail)
    assert pbin.open_pbin(tmp_path / "a.pbin").tokens.tolist() == [0, 2, 3, 4, 1, 5, 2, 5]


def test_truncation_and_padding_of_the_tokenizer_are_off(tmp_path: Path) -> None:
    tokenizer = word_level(
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
    pack.pack_documents([(1, "a"), (2, "a a a")], tokenizer, tmp_path / "a.pbin", "<eod>", fail)
    assert pbin.open_pbin(tmp_path / "a.pbin").tokens.tolist() == [0, 1, 0, 0, 0, 1]


def test_a_text_without_tokens_is_rejected(tmp_path: Path) -> None:
    tokenizer = word_level(tmp_path / "t.json", {"a": 0, "<eod>": 1})
    rejected = []
    documents = [("line 1", "a"), ("line 2", " "), ("line 3", "a")]
    packed = pack.pack_documents(documents, tokenizer, tmp_path / "a.pbin", "<eod>", lambda *r: rejected.append(r))
    assert packed.documents == 2
    assert rejected == [("line 2", "the tokenizer makes no token of the text")]


def test_nothing_to_pack(bpe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document to pack"):
        pack.pack_documents([], bpe, tmp_path / "a.pbin", pack.EOD, fail)
    assert os.listdir(tmp_path) == []


def test_bad_tokenizers(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    for path, eod, what in [
        (tmp_path / "none.json", pack.EOD, "is missing"),
        (tmp_path, pack.EOD, "is a folder"),
        (tmp_path / "broken.json", pack.EOD, "is not a tokenizer.json"),
        (bpe, "</s>", r"has no token '</s>' .* --eod \(it has <\|endoftext\|>\)"),
    ]:
        with pytest.raises(ValueError, match=what):
            pack.pack_documents(DOCUMENTS, path, tmp_path / "a.pbin", eod, fail)


def test_an_existing_target_is_refused_before_the_tokenizer_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pbin").write_bytes(b"")
    with pytest.raises(ValueError, match="exists already"):
        pack.pack_documents(DOCUMENTS, tmp_path / "none.json", tmp_path / "a.pbin", pack.EOD, fail)
