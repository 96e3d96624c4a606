"""`prep.py` as a user runs it, on the running Python's own library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modalities import pack, pbin

ROOT = Path(__file__).parents[1]
FILES = ["tokenizer.json", *(f"{split}.{ending}" for split in ("train", "val") for ending in ("idx", "jsonl", "pbin"))]


def prep(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "prep.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def complaint(*args: str | Path) -> str:
    """The one line on stderr of a command that fails."""
    done = prep(*args)
    assert done.returncode == 1, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "demo"
    done = prep("demo", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a progress bar was drawn where there is no terminal"
    assert f"{out / 'val.pbin'}: " in done.stdout and " tokens, " in done.stdout
    return out


def test_demo_is_whole(demo: Path) -> None:
    assert sorted(os.listdir(demo)) == sorted(FILES)
    tokenizer = pack.load_tokenizer(demo / "tokenizer.json", "<|endoftext|>")
    assert tokenizer.get_vocab_size() == 8192
    paths = {}
    for split in ("train", "val"):
        content = (demo / f"{split}.jsonl").read_bytes()
        packed = pbin.open_pbin(demo / f"{split}.pbin")
        index = pbin.read_idx(demo / f"{split}.idx", demo / f"{split}.jsonl")
        rows = [json.loads(content[offset : offset + length]) for offset, length in index.tolist()]
        assert len(rows) == packed.num_documents == content.count(b"\n")
        paths[split] = {row["path"] for row in rows}
        for i in range(0, len(rows), 1 if split == "val" else 25):
            *ids, last = packed.document(i).tolist()
            assert last == tokenizer.token_to_id("<|endoftext|>")
            assert tokenizer.decode(ids, skip_special_tokens=False) == rows[i]["text"]
    assert not paths["train"] & paths["val"]
    assert "argparse.py" in paths["train"] | paths["val"]
    assert len(pbin.open_pbin(demo / "train.pbin").tokens) > 1_500_000
    assert len(pbin.open_pbin(demo / "val.pbin").tokens) > 20_000


def test_demo_again_does_nothing_and_continues_where_it_stopped(demo: Path) -> None:
    before = {name: (demo / name).stat().st_mtime_ns for name in FILES}
    again = prep("demo", "--out", demo)
    assert (again.returncode, again.stdout) == (0, f"{demo}: complete, nothing to do\n")
    content = (demo / "val.pbin").read_bytes()
    (demo / "val.pbin").unlink()
    assert f"{demo}: wrote val.pbin\n" in prep("demo", "--out", demo).stdout
    assert (demo / "val.pbin").read_bytes() == content
    after = {name: (demo / name).stat().st_mtime_ns for name in FILES if name != "val.pbin"}
    assert after == {name: time_ns for name, time_ns in before.items() if name != "val.pbin"}


def test_index_and_pack_give_the_same_bytes_as_the_demo(demo: Path, tmp_path: Path) -> None:
    docs = tmp_path / "val.jsonl"
    docs.write_bytes((demo / "val.jsonl").read_bytes())
    assert prep("index", docs).returncode == 0
    assert prep("pack", docs, "--tokenizer", demo / "tokenizer.json").returncode == 0
    for name in ("val.idx", "val.pbin"):
        assert (tmp_path / name).read_bytes() == (demo / name).read_bytes()


def test_pack_many_files_with_a_field_and_skips(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": {"b": ["one", "two"]}}\n\n{"a": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"a": {"b": ["x", "<|endoftext|>"]}}')
    out = tmp_path / "new" / "both.pbin"
    command = ("pack", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--tokenizer", demo / "tokenizer.json")
    assert "name it with --out" in complaint(*command, "--field", ".a.b[1]")
    stopped = complaint(*command, "--field", ".a.b[1]", "--out", out)
    assert f"{tmp_path / 'a.jsonl'}, line 2 (byte 29): blank line" in stopped
    assert not out.exists()
    done = prep(*command, "--field", ".a.b[1]", "--out", out, "--on-error", "skip")
    assert "2 documents" in done.stdout and "skipped 2 of 4: 1 × blank line, 1 × no field .a.b[1]" in done.stdout
    assert sorted(os.listdir(out.parent)) == ["both.pbin"]
    assert [document.tolist().count(0) for document in map(pbin.open_pbin(out).document, range(2))] == [1, 1]


def test_every_mistake_is_one_line(demo: Path, tmp_path: Path) -> None:
    docs, tokenizer, out = demo / "val.jsonl", demo / "tokenizer.json", tmp_path / "x.pbin"
    (tmp_path / "empty.jsonl").touch()
    for expected, args in {
        "none.jsonl is missing": ("index", tmp_path / "none.jsonl"),
        "val.idx exists already": ("index", docs),
        "empty.jsonl holds no document": ("index", tmp_path / "empty.jsonl"),
        "no document to pack": ("pack", tmp_path / "empty.jsonl", "--tokenizer", tokenizer),
        "also.jsonl is missing": ("pack", tmp_path / "also.jsonl", "--tokenizer", tokenizer),
        "val.pbin exists already": ("pack", docs, "--tokenizer", tokenizer),
        "none.json is missing": ("pack", docs, "--tokenizer", tmp_path / "none.json", "--out", out),
        "has no token '</s>'": ("pack", docs, "--tokenizer", tokenizer, "--out", out, "--eod", "</s>"),
        "'text' is no field path": ("pack", docs, "--tokenizer", tokenizer, "--out", out, "--field", "text"),
        "line 1 (byte 0): no field .x": ("pack", docs, "--tokenizer", tokenizer, "--out", out, "--field", ".x"),
        "no input": ("pack", "--tokenizer", tokenizer),
        "no command 'train'": ("train",),
    }.items():
        assert expected in complaint(*args)
    assert os.listdir(tmp_path) == ["empty.jsonl"]


def test_help_waits_for_no_heavy_package() -> None:
    code = "import sys, runpy; sys.argv = ['prep.py', 'index', '--help']\n"
    code += (
        f"try: runpy.run_path({str(ROOT / 'prep.py')!r}, run_name='__main__')\nexcept SystemExit: print(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--on-error" in shown
    assert not {"torch", "numpy", "tokenizers", "orjson", "tqdm"} & set(shown.split())
