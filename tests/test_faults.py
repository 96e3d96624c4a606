"""The scoreboard of faults holds: some of each here, and all of them with `make test-all`."""

import subprocess
import sys

import pytest
from test_train import ROOT

QUICK = {
    "processes": ("kills", "stops", "hangs", "rank_counts"),
    "files": ("saves", "retention", "full_disks", "flips", "malice", "changes", "bad_numbers"),
}
ROWS = [row for rows in QUICK.values() for row in rows]


def scoreboard(*args: str) -> list[list[str]]:
    """The rows of the table that the command prints: fault, tried, passed, detail, seconds. It must succeed."""
    done = subprocess.run(
        [sys.executable, "benchmarks/faults.py", *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:] if line.startswith("| ")]


@pytest.mark.parametrize("rows", QUICK.values(), ids=QUICK)
def test_some_of_each_fault(rows: tuple[str, ...]) -> None:
    table = scoreboard("--quick", "--rows", *rows)
    assert len(table) == len(rows)
    assert all(tried == passed and int(tried) > 0 for _, tried, passed, _, _ in table)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_fault(row: str) -> None:
    ((_, tried, passed, _, _),) = scoreboard("--rows", row)
    assert tried == passed and int(tried) > 0


def test_no_row_is_left_out() -> None:
    shown = subprocess.run(
        [sys.executable, "benchmarks/faults.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    listed = shown[shown.index("{") + 1 : shown.index("}")].replace("\n", "").replace(" ", "").split(",")
    assert sorted(listed) == sorted(ROWS)
