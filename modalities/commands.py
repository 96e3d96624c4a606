"""The commands of `prep.py`: what each takes and says, and which function does it.

The modules that do the work are imported in the commands, so that `--help` need not wait for them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

OnError = Literal["fail", "skip"]


def index(docs: Path, /, out: Path | None = None, on_error: OnError = "fail") -> None:
    """Index a JSONL file: where each line stands.

    Args:
        docs: The JSONL file: one JSON document a line.
        out: The index to write; by default beside the documents, ending in .idx.
        on_error: At a line that is not JSON: stop there, or list it in OUT.skipped.jsonl and go on.
    """
    from modalities import corpus
    from modalities.account import skipped_path

    out = out or docs.with_suffix(".idx")
    with corpus.Tally(on_error, skipped_path(out)) as tally:
        print(tally.report(out, corpus.write_index(docs, out, tally)))


def pack(
    docs: tuple[str, ...],
    /,
    tokenizer: Path,
    dataset: str | None = None,
    split: str = "train",
    column: str | None = None,
    field: str = ".text",
    out: Path | None = None,
    eod: str = "<|endoftext|>",
    on_error: OnError = "fail",
    engine: Literal["auto", "tokenizers", "fastokens"] = "auto",
    special_tokens: Literal["text", "parse"] = "text",
    threads: int = 0,
) -> None:
    """Tokenize documents and pack them into one .pbin; with torchrun, on many processes and machines.

    Args:
        docs: JSONL (plain, .gz, .zst), Parquet and Arrow files, folders of them and globs, packed in the order given.
        tokenizer: A tokenizer.json.
        dataset: Instead of files: a dataset of the Hugging Face hub, or a folder that holds one.
        split: The dataset's split.
        column: The column that holds the text; short for --field '.["column"]'.
        field: Where a document's text stands, as in jq: .text, .a.b, .a[0], or any jq program.
        out: The .pbin to write; by default beside a single input, ending in .pbin.
        eod: The token that ends every document.
        on_error: At a document that cannot be packed: stop there, or list it in OUT.skipped.jsonl and go on.
        engine: fastokens is fast; auto takes it where its ids are those of tokenizers, and checks that all along.
        special_tokens: What a special token is that is spelled out in a text: text, or the token.
        threads: How many tokenize; 0: as many as there are cores.
    """
    from modalities.pack import PackConfig, pack

    field = field_of(field, column)
    sources = find_inputs(docs, dataset, split, field)
    out = out or output_for([source.name for source in sources], ".pbin")
    config = PackConfig(
        tokenizer=tokenizer,
        field=field,
        eod=eod,
        on_error=on_error,
        engine=engine,
        special_tokens=special_tokens,
        threads=threads,
    )
    account = pack(sources, out, config, print)
    if account is not None:
        print(account.report(out))


def field_of(field: str, column: str | None) -> str:
    """`field`, or the path of `column`."""
    if column is not None and field != ".text":
        raise ValueError(f"both --field {field} and --column {column} are given; give one of them")
    return field if column is None else f".[{json.dumps(column)}]"


def find_inputs(docs: tuple[str, ...], dataset: str | None, split: str, field: str) -> list[Any]:
    """The sources that a command's flags name; of a table only the column that `field` begins with."""
    from modalities.fields import parse_field
    from modalities.sources import Table, find_sources

    if docs and dataset:
        raise ValueError("both files and --dataset are given; give one of them")
    keys = parse_field(field)
    column = keys[0] if keys and isinstance(keys[0], str) else None
    return [Table(dataset, split, column)] if dataset else list(find_sources(docs, column))


def output_for(names: list[str], ending: str) -> Path:
    """The path of the only input with another `ending`."""
    if len(names) != 1:
        raise ValueError(f"{len(names)} inputs make one {ending} file; name it with --out")
    path = Path(names[0])
    while path.suffix in (".gz", ".zst", ".jsonl", ".json", ".parquet", ".arrow", ".pbin"):
        path = path.with_suffix("")
    return path.with_name(path.name + ending)


def demo(out: Path = Path("data/demo")) -> None:
    """Make the demo corpus of Python's own standard library, and its tokenizer; no download.

    Args:
        out: The folder to fill; what is there already is kept.
    """
    from modalities.demo import write_demo

    train, val, tokenizer_json = out / "train.jsonl", out / "val.jsonl", out / "tokenizer.json"
    steps: dict[Path, Callable[[], None]] = {
        train: lambda: write_demo(train, validation=False),
        val: lambda: write_demo(val, validation=True),
        tokenizer_json: lambda: tokenizer((str(train),), vocab_size=8192, out=tokenizer_json),
        train.with_suffix(".idx"): lambda: index(train),
        train.with_suffix(".pbin"): lambda: pack((str(train),), tokenizer_json),
        val.with_suffix(".idx"): lambda: index(val),
        val.with_suffix(".pbin"): lambda: pack((str(val),), tokenizer_json),
    }
    make_missing(out, steps)


def make_missing(out: Path, steps: dict[Path, Callable[[], None]]) -> None:
    """Make the files of `steps` that are not there, in that order."""
    missing = {path: step for path, step in steps.items() if not path.exists()}
    for step in missing.values():
        step()
    print(f"{out}: {'wrote ' + ', '.join(p.name for p in missing) if missing else 'complete, nothing to do'}")


def demo_chat(out: Path = Path("data/demo_chat")) -> None:
    """Make the demo's conversations, with a tokenizer and a template of their own, and pack them; no download.

    Args:
        out: The folder to fill; what is there already is kept.
    """
    from modalities import demo_chat
    from modalities.tokenizer import train_tokenizer

    train, val, tokenizer_json = out / "train.jsonl", out / "val.jsonl", out / "tokenizer.json"
    texts = (text for turns in demo_chat.conversations() for text in turns)
    steps: dict[Path, Callable[[], None]] = {
        train: lambda: demo_chat.write_conversations(train, held_out=False),
        val: lambda: demo_chat.write_conversations(val, held_out=True),
        tokenizer_json: lambda: train_tokenizer(texts, 384, tokenizer_json, demo_chat.SPECIAL),
        out / "chat_template.jinja": lambda: demo_chat.write_template(out / "chat_template.jinja"),
        train.with_suffix(".pbin"): lambda: chat((str(train),), tokenizer_json, eod=demo_chat.END),
        val.with_suffix(".pbin"): lambda: chat((str(val),), tokenizer_json, eod=demo_chat.END),
    }
    make_missing(out, steps)


def tokenizer(
    docs: tuple[str, ...],
    /,
    vocab_size: int,
    out: Path,
    dataset: str | None = None,
    split: str = "train",
    column: str | None = None,
    field: str = ".text",
    special: tuple[str, ...] = ("<|endoftext|>",),
    on_error: OnError = "fail",
) -> None:
    """Train a byte-level BPE tokenizer on documents.

    Args:
        docs: What to train on: as for pack.
        vocab_size: Tokens in all: the special ones, 256 bytes, and what is learnt.
        out: The tokenizer.json to write.
        dataset: Instead of files: a dataset of the Hugging Face hub, or a folder that holds one.
        split: The dataset's split.
        column: The column that holds the text, as for pack.
        field: Where a document's text stands, as in jq.
        special: Special tokens, which no text is split into; they get the first ids.
        on_error: At a document without a text: stop there, or go on without it.
    """
    from modalities import corpus
    from modalities.fields import make_select
    from modalities.tokenizer import train_tokenizer

    field = field_of(field, column)
    with corpus.Tally(on_error) as tally:
        documents = corpus.read_texts(find_inputs(docs, dataset, split, field), make_select(field), field, tally)
        train_tokenizer((text for _, text in documents), vocab_size, out, special)
        print(f"{out}: {vocab_size:,} tokens, trained on {tally.documents:,} documents{tally.left_out()}")


def chat(
    docs: tuple[str, ...],
    /,
    tokenizer: Path,
    template: Path | None = None,
    dataset: str | None = None,
    split: str = "train",
    field: str = ".",
    out: Path | None = None,
    eod: str = "<|endoftext|>",
    on_error: OnError = "fail",
    special_tokens: Literal["refuse", "parse"] = "refuse",
) -> None:
    """Pack conversations through a chat template, with a mask that trains on the assistant's turns only.

    Writes OUT.pbin and OUT.mask.pbin; train with --data.train OUT.pbin --data.masks OUT.mask.pbin.

    Args:
        docs: JSONL and tables as for pack; a document has "messages", a list of {"role": …, "content": …}.
        tokenizer: A tokenizer.json that has the template's special tokens.
        template: A .jinja file or a tokenizer_config.json; by default the template that lies beside the tokenizer.
        dataset: Instead of files: a dataset of the Hugging Face hub, or a folder that holds one.
        split: The dataset's split.
        field: Where the conversation stands, as in jq: an object with "messages", or the list of messages itself.
        out: The .pbin to write; by default beside a single input, ending in .pbin.
        eod: The token that ends every document.
        on_error: At a conversation that cannot be packed: stop there, or list it in OUT.skipped.jsonl and go on.
        special_tokens: What to do where a message spells out a special token: refuse it, or take it as the token.
    """
    from modalities import corpus
    from modalities.account import skipped_path
    from modalities.chat import load_template, pack_chats
    from modalities.fields import make_select

    sources = find_inputs(docs, dataset, split, field)
    out = out or output_for([source.name for source in sources], ".pbin")
    with corpus.Tally(on_error, skipped_path(out)) as tally:
        conversations = corpus.read_values(sources, make_select(field), tally)
        packed = pack_chats(
            conversations, tokenizer, load_template(tokenizer, template), out, eod, tally.reject, special_tokens
        )
        report = tally.report(out, packed.documents, packed.tokens)
        print(f"{report}; {packed.trained:,} tokens ({packed.trained / packed.tokens:.1%}) are trained on")


def mask(docs: Path, /, tokenizer: Path, begin: str, end: str, include_end: bool = False) -> None:
    """Write a loss mask for a .pbin: only what stands between two tokens is trained on.

    Args:
        docs: The .pbin; its mask becomes DOCS.mask.pbin.
        tokenizer: The tokenizer.json that packed it.
        begin: The token after which training begins.
        end: The token before which it ends.
        include_end: Train on the end token too, so that the model learns to stop.
    """
    from modalities.files import mask_path
    from modalities.masks import mask_between
    from modalities.tokenizer import token_id

    print(mask_between(docs, mask_path(docs), token_id(tokenizer, begin), token_id(tokenizer, end), include_end))


def merge(docs: tuple[Path, ...], /, out: Path) -> None:
    """Join .pbin files, and their masks, to one.

    Args:
        docs: The files, whose documents keep their order.
        out: The .pbin to write.
    """
    from modalities.files import merge

    print(merge(docs, out))


def shuffle(docs: tuple[Path, ...], /, out: Path, seed: int = 0, chunks: int = 1, memory: int = 1024) -> None:
    """Bring the documents of .pbin files, and their masks, into a random order.

    Args:
        docs: The files.
        out: The .pbin to write; with chunks, OUT.0000-of-0004.pbin and so on.
        seed: The order depends on it and on the number of documents alone.
        chunks: Cut the order into that many files of equally many documents.
        memory: About what it may take [MiB].
    """
    from modalities.shuffle import shuffle

    print(shuffle(docs, out, seed, chunks, memory << 20))


def split(docs: Path, /, fraction: float, seed: int = 0, train: Path | None = None, val: Path | None = None) -> None:
    """Split a .pbin, and its mask, into training and validation documents, by a hash of each document.

    Args:
        docs: The .pbin.
        fraction: The share of documents for validation.
        seed: Another seed, another split.
        train: The training part; by default beside it, ending in .train.pbin.
        val: The validation part; by default beside it, ending in .val.pbin.
    """
    from modalities.files import split

    train, val = train or docs.with_suffix(".train.pbin"), val or docs.with_suffix(".val.pbin")
    print(split(docs, fraction, train, val, seed))


def inspect(docs: Path, /, document: int | None = None, tokenizer: Path | None = None, png: Path | None = None) -> None:
    """Show what a .pbin holds: documents, tokens, lengths, and any document decoded.

    Args:
        docs: The .pbin.
        document: Show this document, by its number from 0, instead.
        tokenizer: The tokenizer.json that packed it; without one a document is shown as token ids.
        png: Draw the histogram of the lengths there.
    """
    from modalities.account import account_path, read_account
    from modalities.describe import describe

    if document is None and account_path(docs).exists():
        print(read_account(account_path(docs)).origin())
    print(describe(docs, tokenizer, document, png))


COMMANDS: dict[str, Callable[..., None]] = {
    "index": index,
    "pack": pack,
    "chat": chat,
    "mask": mask,
    "merge": merge,
    "shuffle": shuffle,
    "split": split,
    "inspect": inspect,
    "tokenizer": tokenizer,
    "demo": demo,
    "demo-chat": demo_chat,
}
