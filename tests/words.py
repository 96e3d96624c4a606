"""Tokenizers made by hand, small enough to see what each text becomes."""

import json
from pathlib import Path
from typing import Any


def write_words(path: Path, vocab: dict[str, int], special: bool = True, **changes: Any) -> Path:
    """A tokenizer.json that gives each word of one letter in `vocab` its id, and nothing for other words."""
    added = {"content": "<eod>", "special": special, "single_word": False, "lstrip": False, "rstrip": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab["<eod>"], "normalized": False, **added}] if "<eod>" in vocab else [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    path.write_text(json.dumps(spec | changes))
    return path


def write_disagreeing(path: Path) -> Path:
    """A tokenizer.json, ended by "<eod>", of which fastokens makes other ids where a text holds U+180E.

    To `tokenizers` (Oniguruma) the Mongolian vowel separator is no white space, as Unicode has had it since 6.3; to
    fastokens (PCRE2) it is.
    """
    white = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Removed", "invert": False}
    vocab = {"a": 0, "<unk>": 1, "\u180e": 2, "<eod>": 3}
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": []}
    return write_words(path, vocab, pre_tokenizer=white, model=model)
