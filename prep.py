"""From raw documents to `.idx` and `.pbin` files: `python prep.py --help`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from modalities import cli

# The rest of the package is imported in the commands, so that `--help` need not wait for numpy and the tokenizers.
OnError = Literal["fail", "skip"]


def index(docs: Path, /, out: Path | None = None, on_error: OnError = "fail") -> None:
    """Index a JSONL file: where each line stands.

    Args:
        docs: The JSONL file: one JSON document a line.
        out: The index to write; by default beside the documents, ending in .idx.
        on_error: At a line that is not JSON: stop there, or leave it out and count it.
    """
    from modalities import corpus

    out, tally = out or docs.with_suffix(".idx"), corpus.Tally(on_error)
    print(tally.report(out, corpus.write_index(docs, out, tally)))


def pack(
    docs: list[Path],
    /,
    tokenizer: Path,
    field: str = ".text",
    out: Path | None = None,
    eod: str = "<|endoftext|>",
    on_error: OnError = "fail",
) -> None:
    """Tokenize JSONL files and pack them into one .pbin.

    Args:
        docs: JSONL files, packed in the order given.
        tokenizer: A tokenizer.json.
        field: Where a document's text stands, as in jq: .text, .a.b, .a[0].
        out: The .pbin to write; by default beside a single input, ending in .pbin.
        eod: The token that ends every document.
        on_error: At a document that cannot be packed: stop there, or leave it out and count it.
    """
    from modalities import corpus
    from modalities.pack import pack_documents

    out, tally = corpus.output_for(docs, out, ".pbin"), corpus.Tally(on_error)
    documents = corpus.read_documents(docs, field, tally)
    print(tally.report(out, *pack_documents(documents, tokenizer, out, eod, tally.reject)))


def demo(out: Path = Path("data/demo")) -> None:
    """Make the demo corpus of Python's own standard library, and its tokenizer; no download.

    Args:
        out: The folder to fill; what is there already is kept.
    """
    from modalities import corpus
    from modalities.pack import train_tokenizer

    train, val, tokenizer = out / "train.jsonl", out / "val.jsonl", out / "tokenizer.json"
    steps: dict[Path, Callable[[], None]] = {train: partial(corpus.write_demo, train, validation=False)}
    steps[val] = partial(corpus.write_demo, val, validation=True)
    steps[tokenizer] = lambda: train_tokenizer(corpus.read_documents([train], ".text", corpus.Tally()), 8192, tokenizer)
    for docs in (train, val):
        steps[docs.with_suffix(".idx")] = partial(index, docs)
        steps[docs.with_suffix(".pbin")] = partial(pack, [docs], tokenizer)
    missing = {path: step for path, step in steps.items() if not path.exists()}
    for step in missing.values():
        step()
    print(f"{out}: {'wrote ' + ', '.join(p.name for p in missing) if missing else 'complete, nothing to do'}")


if __name__ == "__main__":
    about = "From raw documents to .idx and .pbin files."
    cli.run(lambda args: cli.call_subcommand({"index": index, "pack": pack, "demo": demo}, args, "prep.py", about))
