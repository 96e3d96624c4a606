"""How fast documents become an index and tokens, and with how much memory, against bare engines and Modalities.

    python benchmarks/documents.py index|pack|slow|threads|memory [--megabytes 200] [--tokenizer tokenizer.json]

Every figure is of a process of its own, without its imports; the contestants of a table take turns, and medians are
shown. The corpus is made of the texts that lie on this machine. `--modalities DIR[:DIR]` names where Modalities'
package and what it needs lie, to be measured beside ours.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENDINGS = {
    ".py",
    ".pyi",
    ".md",
    ".rst",
    ".txt",
    ".html",
    ".h",
    ".hpp",
    ".c",
    ".rs",
    ".js",
    ".ts",
    ".css",
    ".xml",
    ".json",
}
TREES = (Path(sys.base_prefix), Path(sys.prefix), Path("/usr/share"), Path("/usr/include"), Path("/usr/lib"))


# --------------------------------------------------------------------------------------------------------------- corpus


def make_corpus(path: Path, num_bytes: int) -> None:
    """JSONL of `num_bytes` from the text files of this machine, in documents of up to 8,000 characters."""
    if path.exists() and abs(path.stat().st_size - num_bytes) < num_bytes / 100:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("wb") as file:
        while written < num_bytes:  # again from the beginning, where the machine has too little
            for text in machine_texts():
                line = json.dumps({"text": text, "source": "this machine"}, ensure_ascii=False).encode() + b"\n"
                written += file.write(line)
                if written >= num_bytes:
                    break


def machine_texts() -> Iterator[str]:
    for tree in TREES:
        for folder, folders, names in os.walk(tree):
            folders.sort()
            for path in (Path(folder, name) for name in sorted(names)):
                if path.suffix in ENDINGS and path.is_file() and not path.is_symlink():
                    try:
                        text = path.read_bytes()[:1_000_000].decode()
                    except (UnicodeDecodeError, OSError):
                        continue
                    # Documents of many lengths, as a corpus has.
                    size = 1000 + sum(path.name.encode()) * 37 % 7000
                    yield from (text[i : i + size] for i in range(0, len(text), size) if text[i : i + size].strip())


# --------------------------------------------------------------------------------------------------------- contestants


def index(docs: Path, out: Path, **_: Any) -> Callable[[], object]:
    import simdjson

    from modalities.corpus import Tally, write_index

    assert simdjson  # imported before the clock starts
    return lambda: write_index(docs, out, Tally())


def look(docs: Path, **_: Any) -> Callable[[], object]:
    """The parser of the index, fed with lines from memory."""
    import simdjson

    lines = docs.open("rb").readlines()
    parse = simdjson.Parser().parse

    def run() -> None:
        for line in lines:
            parse(line)

    return run


def parse(docs: Path, **_: Any) -> Callable[[], object]:
    """The parser of the packing, fed with lines from memory; the texts are thrown away."""
    import orjson

    lines = docs.open("rb").readlines()

    def run() -> None:
        for line in lines:
            orjson.loads(line)["text"]

    return run


def move(docs: Path, out: Path, **_: Any) -> Callable[[], object]:
    """Reading lines, and writing half as many bytes, about what their ids take in 16 bits."""

    def run() -> None:
        ids = bytes(1 << 20)
        with docs.open("rb") as file, out.open("wb") as written:
            while lines := file.readlines(1 << 19):
                left = sum(map(len, lines)) // 2
                while left > 0:
                    left -= written.write(ids[:left])
            os.fsync(written.fileno())

    return run


# What follows runs where `--modalities` leads: its package has the same name as ours.
def index_modalities(docs: Path, out: Path, **_: Any) -> Callable[[], object]:
    make_index = import_module("modalities.dataloader.create_index").IndexGenerator

    return lambda: make_index(docs).create_index(out)


def pack(docs: Path, out: Path, tokenizer: Path, engine: str, threads: int, **_: Any) -> Callable[[], object]:
    import fastokens
    import tokenizers
    import tqdm

    from modalities.encode import PackConfig
    from modalities.pack import pack
    from modalities.sources import find_sources

    assert fastokens and tokenizers and tqdm  # imported before the clock starts
    config = PackConfig(tokenizer=tokenizer, engine=engine, threads=threads)  # type: ignore[arg-type]
    return lambda: pack(find_sources([docs]), out, config, print)


def bare(
    docs: Path,
    tokenizer: Path,
    engine: str,
    threads: int,
    is_loaded: bool = False,
    own_threads: bool = False,
    **_: Any,
) -> Callable[[], object]:
    """The engine fed with texts from memory; what it returns is thrown away.

    It loads within the time, or before, and works in threads of ours, or in as many of its own as it likes.
    """
    from concurrent.futures import ThreadPoolExecutor

    if not own_threads:
        os.environ |= {"FASTOKENS_BPE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import fastokens
    import orjson
    import tokenizers

    texts = [orjson.loads(line)["text"] for line in docs.open("rb")]
    batches = [texts[i : i + 250] for i in range(0, len(texts), 250)]

    def load() -> Callable[..., Any]:
        if engine == "fastokens":
            fast = fastokens.Tokenizer.from_file(str(tokenizer))
            return partial(fast.encode_batch_flat, split_special_tokens=True)
        reference = tokenizers.Tokenizer.from_file(str(tokenizer))
        reference.encode_special_tokens = True
        return reference.encode_batch_fast

    loaded = load() if is_loaded else None

    def run() -> None:
        encode = loaded or load()  # as the packing does
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(encode, batches):
                pass

    return run


def least(docs: Path, out: Path, tokenizer: Path, threads: int, **_: Any) -> Callable[[], object]:
    """The least that a packing can do: lines, their texts, their ids, cast and written; no end, no length, no check."""
    from collections import deque
    from concurrent.futures import ThreadPoolExecutor

    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    import fastokens
    import numpy as np
    import orjson

    def run() -> None:
        engine = fastokens.Tokenizer.from_file(str(tokenizer))

        def encode(lines: list[bytes]) -> np.ndarray:
            ids, _ = engine.encode_batch_flat([orjson.loads(line)["text"] for line in lines], split_special_tokens=True)
            return np.frombuffer(ids, np.uint32).astype(np.uint16)

        waiting: deque[Any] = deque()
        with ThreadPoolExecutor(threads) as pool, docs.open("rb") as file, out.open("wb") as written:
            while lines := file.readlines(1 << 19):
                waiting.append(pool.submit(encode, lines))
                if len(waiting) > 2 * threads:
                    written.write(waiting.popleft().result().data)
            while waiting:
                written.write(waiting.popleft().result().data)
            os.fsync(written.fileno())

    return run


def pack_modalities(docs: Path, out: Path, tokenizer: Path, **_: Any) -> Callable[[], object]:
    make_index = import_module("modalities.dataloader.create_index").IndexGenerator
    make_packer = import_module("modalities.dataloader.create_packed_data").PackedDataGenerator
    wrap = import_module("modalities.tokenization.tokenizer_wrapper").PreTrainedHFTokenizer

    folder = out.with_suffix(".tokenizer")
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    make_index(docs).create_index(out.with_suffix(".idx"))
    generator = make_packer(
        docs,
        tokenizer=wrap(str(folder)),
        eod_token="<|endoftext|>",
        number_of_processes=1,
        jq_pattern=".text",
        processing_batch_size=1000,
        raw_samples_queue_size=300,
        processed_samples_queue_size=300,
        index_path=out.with_suffix(".idx"),
    )
    return lambda: generator.run(out)


def bare_stream(docs: Path, tokenizer: Path, threads: int, **_: Any) -> Callable[[], object]:
    """fastokens fed line by line, so that what its memory does can be told from what ours does."""
    from collections import deque
    from concurrent.futures import ThreadPoolExecutor

    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    import fastokens
    import orjson

    def run() -> None:
        engine = fastokens.Tokenizer.from_file(str(tokenizer))
        waiting: deque[Any] = deque()
        with ThreadPoolExecutor(threads) as pool, docs.open("rb") as file:
            while lines := file.readlines(1 << 20):
                texts = [orjson.loads(line)["text"] for line in lines]
                waiting.append(pool.submit(engine.encode_batch_flat, texts, split_special_tokens=True))
                if len(waiting) > 2 * threads:
                    waiting.popleft().result()

    return run


CONTESTANTS: dict[str, Callable[..., Callable[[], object]]] = {
    f.__name__: f for f in (index, look, parse, move, index_modalities, pack, bare, bare_stream, least, pack_modalities)
}


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    cpu: float
    """All threads and child processes [s]."""
    wall: float
    rss: float
    """The largest of the process [MiB]."""


def contest(name: str, arguments: dict[str, Any]) -> None:
    """In a process of its own: set up, run, print the figures."""
    import resource
    import shutil
    import tempfile
    import time

    def cpu() -> float:
        return sum(
            r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    if cores := arguments.pop("cores", None):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    scratch = Path(tempfile.mkdtemp(dir=arguments["scratch"]))
    paths = {key: Path(arguments[key]) for key in ("docs", "tokenizer")} | {"out": scratch / "out.bin"}
    run = CONTESTANTS[name](**(arguments | paths))
    began, clock = cpu(), time.perf_counter()
    run()
    figures = {"cpu": cpu() - began, "wall": time.perf_counter() - clock}
    figures["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    shutil.rmtree(scratch)
    print(f"\n{json.dumps(figures)}")


def measure(
    contestants: dict[str, tuple[str, dict[str, Any]]], repeats: int, path: str | None
) -> dict[str, list[Figures]]:
    """The figures of each, taken in turns."""
    found: dict[str, list[Figures]] = {label: [] for label in contestants}
    for _ in range(repeats):
        for label, (name, arguments) in contestants.items():
            # As prep.py does, for all.
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
            if "modalities" in name:
                assert path is not None
                environment["PYTHONPATH"] = path
            command = [sys.executable, __file__, "--contest", name, json.dumps(arguments)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
            if done.returncode:
                sys.exit(f"{label} failed: {done.stderr[-2000:]}")
            found[label].append(Figures(**json.loads(done.stdout.splitlines()[-1])))
    return found


def median(figures: list[Figures], key: str) -> float:
    return statistics.median(getattr(figure, key) for figure in figures)


def rates(title: str, found: dict[str, list[Figures]], megabytes: dict[str, float], key: str = "cpu") -> None:
    """A table of MB/s (of CPU time, or of the clock's), and of ratios to the last contestant."""
    unit = {"cpu": "MB/CPU-s", "wall": "MB/s"}[key]
    *_, last = found
    base = megabytes[last] / median(found[last], key)
    print(f"\n| {title} | {unit}, median | least – most | of {last} |\n|---|---|---|---|")
    for label, figures in found.items():
        each = sorted(megabytes[label] / getattr(figure, key) for figure in figures)
        rate = megabytes[label] / median(figures, key)
        print(f"| {label} | {rate:,.1f} | {each[0]:,.1f} – {each[-1]:,.1f} | {rate / base:.2f}× |")


# --------------------------------------------------------------------------------------------------------------- tables


def main(
    table: str,
    /,
    megabytes: int = 200,
    slow_megabytes: int = 10,
    repeats: int = 5,
    tokenizer: Path = Path("data/demo/tokenizer.json"),
    scratch: Path = Path("data/bench"),
    modalities: str | None = None,
) -> None:
    """Print a table.

    Args:
        table: index, pack, slow, threads or memory.
        megabytes: Size of the corpus.
        slow_megabytes: Size of the corpus of the table "slow", where tokenizers and Modalities take part.
        repeats: Runs of each contestant.
        tokenizer: The tokenizer.json to pack with.
        scratch: Where the corpus lies and is packed to.
        modalities: Folders to import Modalities and what it needs from.
    """
    size = slow_megabytes if table == "slow" else 10 * megabytes if table == "memory" else megabytes
    docs = (scratch / f"{size}.jsonl").absolute()
    make_corpus(docs, size * 1_000_000)
    common = {"docs": str(docs), "tokenizer": str(tokenizer.absolute()), "scratch": str(scratch.absolute())}

    def packing(name: str, engine: str, threads: int = 1) -> tuple[str, dict[str, Any]]:
        return name, common | {"engine": engine, "threads": threads}

    contestants: dict[str, tuple[str, dict[str, Any]]] = {}
    if table == "index":
        contestants["prep.py index"] = ("index", common)
        contestants["simdjson alone"] = ("look", common)
        if modalities:
            contestants["Modalities"] = ("index_modalities", common)
    elif table == "pack":
        contestants["prep.py pack, fastokens"] = packing("pack", "fastokens")
        contestants["the least in Python"] = packing("least", "fastokens")
        contestants["orjson alone"] = ("parse", common)
        contestants["lines read, ids written"] = ("move", common)
        name, arguments = packing("bare", "fastokens")
        contestants["fastokens alone, its own threads"] = name, arguments | {"own_threads": True}
        contestants["fastokens alone"] = name, arguments
    elif table == "slow":
        contestants["prep.py pack, fastokens"] = packing("pack", "fastokens")
        contestants["prep.py pack, tokenizers"] = packing("pack", "tokenizers")
        if modalities:
            contestants["Modalities"] = packing("pack_modalities", "tokenizers")
        contestants["tokenizers alone"] = packing("bare", "tokenizers")
    elif table == "threads":
        # By cores and not by threads, for beside those that encode there is one that reads and writes.
        for name, label, more in (
            ("bare", "fastokens alone, loaded before", {"is_loaded": True}),
            ("bare", "fastokens alone", {}),
            ("least", "the least in Python", {}),
            ("pack", "prep.py pack", {}),
        ):
            for cores in (2, 1):
                name_, arguments = packing(name, "fastokens", cores)
                contestants[f"{label}, {cores} core{'s' * (cores > 1)}"] = name_, arguments | more | {"cores": cores}
    elif table == "memory":
        return memory(scratch, megabytes, common, repeats)
    else:
        raise ValueError(f"there is no table {table!r}; there are index, pack, slow, threads, memory")
    found = measure(contestants, repeats, modalities)
    text = docs.stat().st_size / 1e6
    rates(f"{text:,.0f} MB of JSONL", found, dict.fromkeys(found, text), "wall" if table == "threads" else "cpu")


def memory(scratch: Path, megabytes: int, common: dict[str, Any], repeats: int) -> None:
    """The table of peak memory on a corpus and on one ten times as large."""
    small = (scratch / f"{megabytes}.jsonl").absolute()
    make_corpus(small, megabytes * 1_000_000)
    print(f"\n| peak memory [MiB] | {megabytes} MB | {10 * megabytes:,} MB | ratio |\n|---|---|---|---|")
    for label, name in (
        ("prep.py index", "index"),
        ("prep.py pack, fastokens", "pack"),
        ("fastokens alone, fed line by line", "bare_stream"),
    ):
        options = common | {"engine": "fastokens", "threads": 2}
        found = measure({"small": (name, options | {"docs": str(small)}), "large": (name, options)}, repeats, None)
        a, b = median(found["small"], "rss"), median(found["large"], "rss")
        print(f"| {label} | {a:,.0f} | {b:,.0f} | {b / a:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contest"]:
        contest(sys.argv[2], json.loads(sys.argv[3]))
    else:
        sys.path.insert(0, str(ROOT))
        from modalities import cli

        cli.run(lambda args: cli.call(main, args))
