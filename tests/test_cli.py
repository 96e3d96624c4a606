"""Flags, commands and recipes by name; a user's mistake is one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from modalities import cli

ROOT = Path(__file__).parents[1]
BOX = set("│─╭╮╰╯")


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    """How fast."""
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int
    """How long."""
    inner: Inner = Inner()
    pair: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but must be at least 1")


def greet(name: str, times: int = 1, tone: Literal["kind", "rude"] = "kind") -> str:
    """Greet somebody."""
    print(f"out: {name}")
    print(f"err: {name}", file=sys.stderr)
    return f"{name} {times} {tone}"


def fail() -> None:
    """Fail."""
    raise ValueError("this one of its own")


def complaint(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and not BOX & set(message), message
    return message


def test_parse_overrides_a_default() -> None:
    default = Config(steps=3, inner=Inner(rate=0.1))
    assert cli.parse(Config, [], default=default) == default
    args = ["--steps", "4", "--inner.kind", "b", "--pair", "3", "4"]
    assert cli.parse(Config, args, default=default) == Config(steps=4, inner=Inner(rate=0.1, kind="b"), pair=(3, 4))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--steps", "1", "--stepz", "4"], ["--stepz", "did you mean --steps?"]),
        (["--steps", "1", "--inner.rat", "4"], ["--inner.rat", "did you mean --inner.rate?"]),
        (["--steps", "1", "--nothing-like-it", "4"], ["--nothing-like-it"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--steps", "1", "--inner.rate", "fast"], ["--inner.rate", "'fast'"]),
        (["--steps", "1", "--inner.kind", "c"], ["--inner.kind", "'c'", "'a'", "'b'"]),
        (["--steps", "1", "--pair", "1"], ["--pair", "2"]),
        (["--steps", "1", "--pair"], ["--pair"]),
        (["--steps"], ["--steps"]),
        ([], ["--steps"]),
        (["--steps", "1", "stray"], ["stray"]),
        (["--steps", "0"], ["steps is 0, but must be at least 1"]),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(args: list[str], expected: list[str]) -> None:
    message = complaint(cli.parse, Config, args, prog="prog")
    for part in expected:
        assert part in message


def test_a_wrong_flag_of_a_function() -> None:
    assert "did you mean --times?" in complaint(cli.call, greet, ["--name", "x", "--tims", "3"])
    assert "--name" in complaint(cli.call, greet, [])
    assert "--times" in complaint(cli.call, greet, ["--name", "x", "--times", "three"])
    assert "'rude'" in complaint(cli.call, greet, ["--name", "x", "--tone", "loud"])


def test_call_returns_and_swallows_no_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(greet, ["--name", "x", "--times", "3"]) == "x 3 kind"
    assert capsys.readouterr() == ("out: x\n", "err: x\n")


def test_call_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    commands: dict[str, Callable[..., Any]] = {"greet": greet, "fail": fail}
    run = cli.call_subcommand
    assert run(commands, ["greet", "--name", "x"], "prog", "What it does.") == "x 1 kind"
    assert capsys.readouterr() == ("out: x\n", "err: x\n")
    for args in ([], ["--help"], ["-h"]):
        assert run(commands, args, "prog", "What it does.") is None
        shown = capsys.readouterr()
        assert "What it does." in shown.out and "Greet somebody." in shown.out and not shown.err
    assert complaint(run, commands, ["gret"], "prog", "") == "prog has no command 'gret'; it has greet, fail"
    assert complaint(run, commands, ["fail"], "prog", "") == "this one of its own"
    assert "did you mean --tone?" in complaint(run, commands, ["greet", "--name", "x", "--ton", "x"], "prog", "")


def test_help_of_a_command_exits_with_success(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.call_subcommand({"greet": greet}, ["greet", "--help"], "prog", "")
    assert not stopped.value.code
    shown = capsys.readouterr()
    assert "prog greet" in shown.out and "--tone" in shown.out and not shown.err


def run_main(body: str, *args: str, debug: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`cli.run` of a main function with this body, in a process of its own."""
    code = f"import sys\nfrom modalities import cli\ndef main(argv):\n    {body}\ncli.run(main)"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "MODALITIES_DEBUG": debug, **variables},
    )


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise ValueError('this is\\n   wrong')", "error: this is wrong\n"),
        ("open('/no/such/file')", "error: [Errno 2] No such file or directory: '/no/such/file'\n"),
        ("import no_such_package", "error: No module named 'no_such_package'\n"),
    ],
)
def test_a_users_mistake_ends_in_one_line(body: str, line: str) -> None:
    done = run_main(body)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    done = run_main(body, debug="1")
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    done = run_main("assert argv == [], 'ours'", "--flag")
    assert done.returncode == 1 and "Traceback" in done.stderr and "AssertionError: ours" in done.stderr


def test_run_passes_the_arguments_and_ends_quietly() -> None:
    done = run_main("print(argv)", "a", "--b")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['a', '--b']\n", "")
    done = run_main("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("body", "status", "reported", "line"),
    [
        ("pass", 0, 0, ""),
        ("raise ValueError('this is\\n   wrong')", 1, 1, "error: this is wrong"),
        ("sys.exit('this is wrong')", 1, 1, "this is wrong"),
        ("sys.exit(75)", 75, 75, ""),
        ("raise KeyboardInterrupt", 130, 130, "interrupted"),
        ("assert argv, 'ours'", 1, 70, "AssertionError: ours"),
        ("raise OSError(5, 'Input/output error')", 1, 70, "error: [Errno 5] Input/output error"),
        ("raise OSError(116, 'Stale file handle', 'x')", 1, 70, "error: [Errno 116] Stale file handle: 'x'"),
        ("raise OSError(110, 'Connection timed out')", 1, 70, "error: [Errno 110] Connection timed out"),
        ("raise ConnectionResetError('reset')", 1, 70, "error: reset"),
        ("raise OSError(32, 'Broken pipe')", 1, 1, "error: [Errno 32] Broken pipe"),
        ("raise OSError(28, 'No space left on device')", 1, 1, "error: [Errno 28] No space left on device"),
        ("raise cli.ranks.RanksError('8 by 3')", 1, 77, "error: 8 by 3"),
    ],
)
def test_the_end_is_left_for_the_supervisor(body: str, status: int, reported: int, line: str, tmp_path: Path) -> None:
    """Python's own status of a crash is that of a mistake; the report tells them apart."""
    done = run_main(body, MODALITIES_REPORT=str(tmp_path), RANK="5", LOCAL_RANK="3")
    assert done.returncode == status
    (file,) = tmp_path.iterdir()
    told = json.loads(file.read_text())
    assert file.name == "3.json" and (told["status"], told["line"]) == (reported, line) and told["pid"] > 0


@pytest.mark.parametrize(
    ("body", "status", "problem"),
    [("print(1)", 0, ""), ("sys.exit(75)", 75, ""), ("raise ValueError('wrong')", 1, "error: wrong\n")],
)
def test_a_report_that_cannot_be_written_changes_no_end(body: str, status: int, problem: str, tmp_path: Path) -> None:
    (tmp_path / "0.json").mkdir()  # which no file can replace
    done = run_main(body, MODALITIES_REPORT=str(tmp_path), LOCAL_RANK="0")
    assert (done.returncode, done.stderr) == (status, problem)


def test_a_folder_for_reports_that_is_gone_is_no_matter(tmp_path: Path) -> None:
    done = run_main("print(1)", MODALITIES_REPORT=str(tmp_path / "gone"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.find_recipe("demo") == ROOT / "recipes" / "demo.py"
    (tmp_path / "recipes").mkdir()
    for name in ("mine.py", "demo.py"):
        (tmp_path / "recipes" / name).write_text('"""A line of mine.\n\nMore."""\n')
    assert cli.find_recipe("mine").resolve() == tmp_path / "recipes" / "mine.py"
    assert cli.find_recipe("demo").resolve() == tmp_path / "recipes" / "demo.py"
    (tmp_path / "other.json").write_text("{}")
    assert cli.find_recipe("other.json") == Path("other.json")
    assert cli.find_recipe(str(tmp_path / "recipes" / "mine.py")) == tmp_path / "recipes" / "mine.py"
    listed = cli.describe_recipes().splitlines()
    assert [line.split(maxsplit=1)[1] for line in listed if line.split()[0] == "mine"] == ["A line of mine."]
    assert sum(line.split()[0] == "demo" for line in listed) == 1
    assert any(line.split()[0] == "gpt2_60m" and len(line.split()) > 3 for line in listed)


def test_an_unknown_recipe_is_answered_with_what_there_is() -> None:
    assert "did you mean demo?" in complaint(cli.find_recipe, "dmo")
    assert "did you mean gpt2_60m?" in complaint(cli.find_recipe, "gpt2-60m")
    far = complaint(cli.find_recipe, "zzzzzz")
    assert "'zzzzzz'" in far and "demo" in far and "gpt2_60m" in far
    for path in ("no/such.py", "runs/none/recipe.json"):
        assert f"there is no recipe {path}" in complaint(cli.find_recipe, path)
