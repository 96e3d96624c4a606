"""`prep.py` as a user runs it, on the running Python's own library."""

import filecmp
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from modalities import pbin

ROOT = Path(__file__).parents[1]
ENDINGS = ("idx", "jsonl", "pbin", "pbin.json")
FILES = ["tokenizer.json", *(f"{split}.{ending}" for split in ("train", "val") for ending in ENDINGS)]


def prep(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "prep.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def complaint(*args: object) -> str:
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
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
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
    (demo / "val.pbin.json").unlink()
    assert f"{demo}: wrote val.pbin\n" in prep("demo", "--out", demo).stdout
    assert (demo / "val.pbin").read_bytes() == content
    after = {name: (demo / name).stat().st_mtime_ns for name in FILES if "val.pbin" not in name}
    assert after == {name: time_ns for name, time_ns in before.items() if "val.pbin" not in name}


def test_index_and_pack_give_the_same_bytes_as_the_demo(demo: Path, tmp_path: Path) -> None:
    docs = tmp_path / "val.jsonl"
    docs.write_bytes((demo / "val.jsonl").read_bytes())
    assert prep("index", docs).returncode == 0
    assert prep("pack", docs, "--tokenizer", demo / "tokenizer.json").returncode == 0
    packed = json.loads((tmp_path / "val.pbin.json").read_text())
    assert packed["documents"] == packed["packed"] == docs.read_bytes().count(b"\n")
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
    assert not any(out.parent.iterdir())
    done = prep(*command, "--field", ".a.b[1]", "--out", out, "--on-error", "skip")
    assert "2 documents" in done.stdout and "skipped 2 of 4: 1 × blank line, 1 × no field .a.b[1]" in done.stdout
    assert sorted(os.listdir(out.parent)) == ["both.pbin", "both.pbin.json", "both.pbin.skipped.jsonl"]
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
        "--field 'text' is no jq program": ("pack", docs, "--tokenizer", tokenizer, "--out", out, "--field", "text"),
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
    assert not {"torch", "numpy", "tokenizers", "orjson", "tqdm", "pyarrow", "datasets"} & set(shown.split())


# ---------------------------------------------------------------------------------------------------------------- scale


def write_many(path: Path, count: int) -> None:
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 20}) + "\n")


def test_a_killed_packing_goes_on_where_it_stopped(demo: Path, tmp_path: Path) -> None:
    docs, parts = tmp_path / "docs.jsonl", tmp_path / "docs.pbin.parts"
    write_many(docs, 250_000)  # 170 MB: three portions
    args = ["pack", str(docs), "--tokenizer", str(demo / "tokenizer.json"), "--engine", "fastokens"]
    process = subprocess.Popen([sys.executable, "prep.py", *args], cwd=ROOT, stdout=subprocess.DEVNULL)
    journal = parts / "0.fastokens.journal"
    while process.poll() is None and (not journal.exists() or not journal.stat().st_size):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "docs.pbin").exists()
    kept = journal.read_text().count("\n")
    assert 1 <= kept <= 2
    done = prep(*args)
    assert f"continuing what lies in {parts}" in done.stdout and "250,000 documents" in done.stdout
    whole = prep("pack", docs, "--tokenizer", demo / "tokenizer.json", "--out", tmp_path / "whole.pbin")
    assert whole.returncode == 0
    assert filecmp.cmp(tmp_path / "docs.pbin", tmp_path / "whole.pbin", shallow=False)
    assert not parts.exists()


def test_torchrun_packs_on_all_ranks(demo: Path, tmp_path: Path) -> None:
    docs = [tmp_path / "1.jsonl", tmp_path / "2.jsonl.gz", tmp_path / "3.jsonl"]
    for i, path in enumerate(docs):
        write_many(path, 300 + i)
    docs[1].write_bytes(gzip.compress(docs[1].read_bytes()))
    args = ["pack", str(tmp_path / "*.jsonl*"), "--tokenizer", str(demo / "tokenizer.json"), "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "prep.py"]
    command = [*torchrun, *args, str(tmp_path / "two.pbin")]
    two = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("903 documents") == 1
    assert prep(*args, tmp_path / "one.pbin").returncode == 0
    for ending in ("pbin", "pbin.json"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()


# -------------------------------------------------------------------------------------------------- tables, files, chat


def test_tables_and_datasets(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    for i in range(2):
        texts = [f"text {i} {j}" for j in range(50)]
        pyarrow.parquet.write_table(
            pyarrow.table({"content": texts, "id": range(50)}), folder / f"{i}.parquet", row_group_size=20
        )
    lines = "".join(json.dumps({"content": f"text {i} {j}"}) + "\n" for i in range(2) for j in range(50))
    (tmp_path / "same.jsonl").write_text(lines)
    tokenizer = ("--tokenizer", demo / "tokenizer.json", "--column", "content")
    inputs: dict[str, list[object]] = {
        "lines": [tmp_path / "same.jsonl"],
        "folder": [folder],
        "dataset": ["--dataset", folder, "--split", "train"],
    }
    for name, args in inputs.items():
        done = prep("pack", *args, *tokenizer, "--out", tmp_path / f"{name}.pbin")
        assert "100 documents" in done.stdout, done
        assert (tmp_path / f"{name}.pbin").read_bytes() == (tmp_path / "lines.pbin").read_bytes()
    wrong = complaint("pack", folder, *tokenizer[:3], "none", "--out", tmp_path / "x.pbin")
    assert "has no column 'none'; it has content, id" in wrong


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_files_in_hand_and_chats(demo: Path, tmp_path: Path) -> None:
    special = ("--special", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    trained = prep("tokenizer", demo / "val.jsonl", "--vocab-size", 600, "--out", tmp_path / "t.json", *special)
    assert "600 tokens, trained on" in trained.stdout
    (tmp_path / "chatml.jinja").write_text(CHATML)
    turns = ({"role": "user", "content": "What is {0}?"}, {"role": "assistant", "content": "It is {0} indeed."})
    chats = [{"messages": [turn | {"content": turn["content"].format(i)} for turn in turns]} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats) + "{}\n")
    args = ("chat", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "t.json", "--template", tmp_path / "chatml.jinja")
    assert "line 41 (byte" in complaint(*args)
    done = prep(*args, "--on-error", "skip")
    assert "40 documents" in done.stdout and "skipped 1 of 41: 1 × there are no messages" in done.stdout
    tokenizer = Tokenizer.from_file(str(tmp_path / "t.json"))
    tokens, mask = (pbin.open_pbin(tmp_path / name) for name in ("a.pbin", "a.mask.pbin"))
    learnt = tokens.document(7)[mask.document(7) == 1]
    assert tokenizer.decode(learnt.tolist(), skip_special_tokens=False) == "It is 7 indeed.<|im_end|>\n"

    t = ("--tokenizer", tmp_path / "t.json")
    commands: dict[tuple[object, ...], str] = {
        ("merge", tmp_path / "a.pbin", tmp_path / "a.pbin", "--out", tmp_path / "b.pbin"): "80 documents",
        ("shuffle", tmp_path / "b.pbin", "--out", tmp_path / "c.pbin", "--chunks", 2): "40 documents",
        ("split", tmp_path / "a.pbin", "--fraction", 0.25): "documents",
        ("inspect", tmp_path / "a.pbin", *t, "--document", 3): "It is 3 indeed.",
        ("inspect", tmp_path / "a.pbin", *t, "--png", tmp_path / "a.png"): "a.png",
        ("inspect", demo / "val.pbin"): "packed from",
    }
    for command, said in commands.items():
        done = prep(*command)
        assert done.returncode == 0 and said in done.stdout, (command, done)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "a.mask.pbin").rename(tmp_path / "by_template.pbin")
    done = prep("mask", tmp_path / "a.pbin", *t, "--begin", "<|im_start|>", "--end", "<|im_end|>")
    assert "a.mask.pbin: " in done.stdout and "are targets" in done.stdout


def test_a_broken_account_is_one_line(demo: Path, tmp_path: Path) -> None:
    account = (demo / "val.pbin.json").read_text()
    (tmp_path / "a.pbin").write_bytes((demo / "val.pbin").read_bytes())
    for broken in ("", "[]", account[:-30], account.replace('"packed": 3', '"packed": 4'), "[" * 100_000):
        (tmp_path / "a.pbin.json").write_text(broken)
        assert "a.pbin.json is not the account of a packing" in complaint("inspect", tmp_path / "a.pbin")
