"""The account of a packing, `<out>.json`: what came in, what became of it, and with what; read and written.

Documents in = packed + skipped, always. Nothing here packs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from modalities import pbin
from modalities.config import from_dict, printable, to_dict


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    path: str
    sha256: str
    vocab_size: int
    eod: str
    """The token that ends every document."""
    special_tokens: str
    """Whether special tokens spelled out in a text were text, or parsed."""


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """A source, and what tells this version of it from another."""

    name: str
    bytes: int | None = None
    modified_ns: int | None = None
    """Of a file: when it was last written [ns since 1970]."""
    split: str | None = None
    shards: int | None = None
    version: str | None = None
    documents: int = 0


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of every document."""

    documents: int
    """In the sources: packed and skipped ones."""
    packed: int
    skipped: dict[str, int]
    """How many were left out, by reason."""
    tokens: int
    """End-of-document tokens included."""
    lengths: dict[str, int]
    """How many packed documents have so many tokens: "64-127"."""
    field: str
    """Where a document's text stands, as in jq."""
    engine: str
    tokenizer: TokenizerFacts
    sources: tuple[SourceFacts, ...]
    version: str
    """Of this package."""

    def __post_init__(self) -> None:
        by_source = [source.documents for source in self.sources]
        totals = self.documents, self.packed, self.tokens
        for count in (*totals, *self.skipped.values(), *self.lengths.values(), *by_source):
            if not 0 <= count < 2**63:
                raise ValueError(f"a count is {printable(repr(count))}, but counts go from 0 to 2^63 - 1")
        for what, found, due in (
            ("packed + skipped", self.packed + sum(self.skipped.values()), self.documents),
            ("the sum of lengths", sum(self.lengths.values()), self.packed),
            ("the sum over sources", sum(by_source), self.documents),
        ):
            if found != due:
                raise ValueError(f"{what} is {found:,}, where {due:,} documents are due")

    def report(self, out: Path) -> str:
        """The lines to print: what was written, and what was left out."""
        size = out.stat().st_size
        line = f"{out}: {self.packed:,} documents, {self.tokens:,} tokens, {size:,} bytes (with {self.engine})"
        if self.skipped:
            reasons = ", ".join(
                f"{n:,} × {reason}" for reason, n in sorted(self.skipped.items(), key=lambda it: -it[1])
            )
            line += f"; skipped {sum(self.skipped.values()):,} of {self.documents:,}: {reasons}"
        return line

    def origin(self) -> str:
        """Where a packed file came from, in a line."""
        names = ", ".join(printable(source.name) for source in self.sources[:3]) + ", …" * (len(self.sources) > 3)
        field, path, eod = map(printable, (self.field, self.tokenizer.path, self.tokenizer.eod))
        return (
            f"packed from {names} ({field}) with {path}, {eod} at the end of each "
            f"document: {self.documents:,} documents in, {sum(self.skipped.values()):,} skipped"
        )


def account_path(out: Path) -> Path:
    """Where the account of the packing that made `out` lies."""
    return out.with_name(f"{out.name}.json")


def skipped_path(out: Path) -> Path:
    """Where the documents that were left out of `out` are listed."""
    return out.with_name(f"{out.name}.skipped.jsonl")


def write_account(account: Account, path: Path) -> None:
    with pbin.write_beside(path) as file:
        file.write((json.dumps(to_dict(account), indent=2) + "\n").encode())


def read_account(path: Path) -> Account:
    """The account at `path`; `ValueError` if it is broken or does not add up."""
    try:
        return from_dict(Account, json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors too
        raise ValueError(f"{path} is not the account of a packing ({error}); pack again") from None
