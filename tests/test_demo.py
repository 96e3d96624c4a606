"""The demo corpus takes every source file of a library once, into one of its two parts."""

import ast
import json
import os
from pathlib import Path

import pytest

from modalities.demo import LIBRARY, VALIDATION_SHARE, write_demo


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_every_source_is_taken_once(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    names = [f"package/module_{i}.py" for i in range(200)]
    left_out = ["test/t.py", "site-packages/x.py", "package/tests/t.py", "package/encodings/cp037.py", "notes.txt"]
    for name in [*names, *left_out, "latin.py", "empty.py"]:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(f"# {name} ä\n".encode("latin-1" if name == "latin.py" else "utf-8"))
    (library / "empty.py").write_bytes(b"")
    found = {}
    for validation in (False, True):
        out = tmp_path / f"{validation}.jsonl"
        write_demo(out, validation, library)
        rows = rows_of(out)
        assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
        assert all(row == {"text": f"# {row['path']} ä\n", "path": row["path"]} for row in rows)
        found[validation] = {row["path"] for row in rows}
    assert not found[True] & found[False]
    assert found[True] | found[False] == set(names)
    assert 1 <= len(found[True]) <= 25


def test_the_part_of_a_file_depends_on_its_name_alone(tmp_path: Path) -> None:
    parts = []
    for folder, others in (("one", ["x.py"]), ("two", [f"y{i}.py" for i in range(50)])):
        for name in ["a.py", "b.py", "argparse.py", "sub/c.py", *others]:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(folder)
        write_demo(tmp_path / f"{folder}.jsonl", False, tmp_path / folder)
        parts.append({row["path"] for row in rows_of(tmp_path / f"{folder}.jsonl")})
    shared = {"a.py", "b.py", "argparse.py", "sub/c.py"}
    assert parts[0] & shared == parts[1] & shared


def test_the_running_pythons_own_library(tmp_path: Path) -> None:
    write_demo(tmp_path / "train.jsonl", validation=False)
    write_demo(tmp_path / "val.jsonl", validation=True)
    train, val = rows_of(tmp_path / "train.jsonl"), rows_of(tmp_path / "val.jsonl")
    assert not {row["path"] for row in train} & {row["path"] for row in val}
    assert 0.5 * VALIDATION_SHARE < len(val) / (len(train) + len(val)) < 2 * VALIDATION_SHARE
    assert {"argparse.py", "json/decoder.py"} <= {row["path"] for row in train + val}
    for row in val:
        assert (LIBRARY / row["path"]).read_bytes() == row["text"].encode()
        ast.parse(row["text"])


def test_a_library_without_sources(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "compiled.pyc").touch()
    with pytest.raises(ValueError, match=r"this Python has no source files in .*lib; run one that brings"):
        write_demo(tmp_path / "a.jsonl", False, tmp_path / "lib")
    assert os.listdir(tmp_path) == ["lib"]


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("x = 1\n")
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        write_demo(tmp_path / "a.jsonl", False, tmp_path / "lib")
    assert (tmp_path / "a.jsonl").read_text() == "mine"
