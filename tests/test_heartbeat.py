"""A rank that hangs or is gone ends the run on all ranks: soon, by name, with stacks to look at."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed
from test_run import has_logged, wait_for
from test_stopping import endless, started
from test_train import ROOT

from modalities import dist, heartbeat, ranks
from modalities.heartbeat import WatchdogConfig, lives
from modalities.recipe import Recipe

__all__ = ["endless"]  # a fixture

TIMEOUT = 2.0


def stacks(run: Path) -> dict[str, str]:
    """What was saved, by rank."""
    return {path.stem.rpartition("-")[2]: path.read_text() for path in (run / "hang").glob("*-rank-*.txt")}


def hang_a_rank(endless: Recipe, hung: int) -> tuple[float, list[str], Recipe]:
    """Stop a rank of two with SIGSTOP: the seconds until both were gone, and what the other printed on stderr."""
    recipe = replace(endless, watchdog=WatchdogConfig(timeout=TIMEOUT))
    with started(recipe, 2) as processes:
        wait_for(lambda: has_logged(recipe.folder, 5))
        time.sleep(2 * heartbeat.TICK)  # until a beat tells of a step
        processes[hung].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        _, problems = processes[1 - hung].communicate(timeout=60)
        wait_for(lambda: not lives(processes[hung].pid), 10)
        seconds = time.monotonic() - began
        assert processes[1 - hung].returncode == ranks.HUNG
        assert processes[hung].wait(10) == -signal.SIGKILL
    return seconds, problems.splitlines(), recipe


def test_a_stopped_rank_ends_the_run_by_name(endless: Recipe) -> None:
    seconds, problems, recipe = hang_a_rank(endless, 1)
    assert seconds < TIMEOUT + 10
    (line,) = problems
    assert line.startswith("rank 0: rank 1 on ") and f"has given no sign of life for {TIMEOUT:g} s, last step " in line
    saved = stacks(recipe.folder)
    assert saved.keys() == {"0"} and "train_step" in saved["0"], "a rank that is stopped writes nothing"


@pytest.mark.slow
def test_the_rank_that_has_the_store_may_be_the_one(endless: Recipe) -> None:
    """Without torchrun, whose agent has it otherwise, the store stops with rank 0."""
    seconds, problems, _ = hang_a_rank(endless, 0)
    assert seconds < TIMEOUT + 10
    (line,) = problems
    assert line.startswith("rank 1: rank 0 on ")
    assert "no sign of life" in line or "is lost, and the store of the run, at localhost:" in line


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_by_the_other_in_a_line(endless: Recipe) -> None:
    with started(endless, 2) as processes:
        wait_for(lambda: has_logged(endless.folder, 5))
        processes[1].kill()
        _, problems = processes[0].communicate(timeout=60)
    assert processes[0].returncode == ranks.HUNG
    (line,) = problems.splitlines()
    assert line.startswith("rank 0 lost its peers (rank 1 on ") and f"pid {processes[1].pid}), last step " in line


def wait_for_the_other(folder: Path) -> None:
    """Rank 1 stays where it is, and rank 0 waits for it in a collective."""
    with (
        dist.setup() as world,
        heartbeat.beating(WatchdogConfig(timeout=6, step_timeout=TIMEOUT), world, folder) as beat,
    ):
        beat(4)
        beat(5)
        if world.rank == 1:
            time.sleep(60)
        torch.distributed.all_reduce(torch.ones(()))


def test_a_collective_that_a_rank_does_not_come_to(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as end:
        tiny.run_ranks(2, wait_for_the_other, tmp_path)
    assert end.value.exit_code == ranks.HUNG and time.monotonic() - began < 60
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rank ")]
    assert lines and all("rank 1 on " in line and f"has done no step for {TIMEOUT:g} s" in line for line in lines)
    assert all("test_heartbeat.py" in line and "last step 5" in line for line in lines)
    assert "wait_for_the_other" in next(iter(stacks(tmp_path).values()))


ALONE = """
import sys, time
from pathlib import Path
import torch
from modalities import heartbeat
from modalities.dist import World
world = World(0, 1, torch.device("cpu"), None)
config = heartbeat.WatchdogConfig(step_timeout=2)
with heartbeat.beating(config, world, Path(sys.argv[1])) as beat:
    time.sleep(4)
    beat(7)
    time.sleep(4)  # the first step, which compiles
    for step in (8, 9, 10):
        beat(step)
        time.sleep(1)
    time.sleep(60)
"""


@pytest.mark.slow
def test_one_process_has_the_limit_for_a_step_alone(tmp_path: Path) -> None:
    args = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == ranks.HUNG
    (line,) = done.stderr.splitlines()
    assert "has done no step for 2 s (it is at <string>:16), last step 10; ending, stacks in " in line


LAST_WORDS = """
import sys, time
from pathlib import Path
import torch
from modalities import heartbeat
from modalities.dist import World
config = heartbeat.WatchdogConfig(step_timeout=1)
with heartbeat.beating(config, World(0, 1, torch.device("cpu"), None), Path(sys.argv[1])) as beat:
    beat(1)
    beat(2)
    time.sleep(60)
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_the_end_comes_whatever_the_disk_does(hangs: bool, tmp_path: Path) -> None:
    """No report can be written; and opening the file for the stacks does not return, as on a disk that hangs."""
    reports, run = tmp_path / "reports", tmp_path / "run"
    for name in ("0.json", "progress.json"):
        (reports / name).mkdir(parents=True)  # which no file can replace
    (run / "hang").mkdir(parents=True)
    for seconds in range(60 if hangs else 0):
        now = time.strftime("%Y%m%d-%H%M%S", time.localtime(time.time() + seconds))
        os.mkfifo(run / "hang" / f"{now}-rank-0.txt")
    args = [sys.executable, "-c", LAST_WORDS, str(run)]
    variables = {**os.environ, ranks.REPORT: str(reports)}
    done = subprocess.run(args, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=50)
    assert done.returncode == ranks.HUNG
    (line,) = done.stderr.splitlines()
    assert line.startswith("rank 0: ") and "has done no step for 1 s" in line
    if not hangs:
        assert "<string>" in stacks(run)["0"]


def leave_apart(folder: Path) -> None:
    """Rank 1 is done long before rank 0, which goes on watching."""
    config = WatchdogConfig(timeout=1, step_timeout=0)
    with dist.setup() as world, heartbeat.beating(config, world, folder) as beat:
        beat(1)
        if world.rank == 0:
            time.sleep(4)
    (folder / f"done.{world.rank}").touch()


@pytest.mark.slow
def test_a_rank_that_is_done_is_not_missed(tmp_path: Path) -> None:
    tiny.run_ranks(2, leave_apart, tmp_path)
    assert len(list(tmp_path.glob("done.*"))) == 2 and not stacks(tmp_path)


def test_whether_a_process_lives() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: not lives(child.pid))  # over, though nobody has asked for its status
    assert child.poll() == 0 and lives(os.getpid())


@pytest.mark.parametrize(
    "make", [lambda: WatchdogConfig(timeout=-1), lambda: WatchdogConfig(step_timeout=float("nan"))]
)
def test_a_wrong_limit_is_refused(make: Callable[[], WatchdogConfig]) -> None:
    with pytest.raises(ValueError, match="watchdog.*must be seconds, or 0 for none"):
        make()
