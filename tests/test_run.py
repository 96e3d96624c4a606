"""`modalities.run` keeps a run alive: with scripts that end in every way, and with training that is killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_loop import train_on, weights
from test_train import ROOT

from modalities import checkpoint, durable, loop, ranks, run
from modalities.checkpoint import CheckpointConfig
from modalities.config import to_dict
from modalities.heartbeat import lives
from modalities.log import read_metrics
from modalities.recipe import Recipe, check_ranks

# What a script that is run begins with; it counts its starts in the file `starts`.
SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
from modalities import cli, ranks
starts = Path("starts")
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
start = len(starts.read_text())
def main(argv):
    {body}
cli.run(main)
"""


@contextlib.contextmanager
def running(folder: Path, body: str, *options: str) -> Iterator[subprocess.Popen]:
    """`modalities.run` of a script with this body, which has begun."""
    (folder / "script.py").write_text(SCRIPT.format(body=body))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-m", "modalities.run", "--back-off", "0.01", *options, "script.py"]
    process = subprocess.Popen(args, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (folder / "starts").exists() or process.poll() is not None)
        yield process
    finally:
        process.kill()
        process.wait()


def end(folder: Path, body: str, *options: str) -> tuple[int, int, list[str]]:
    """The exit status of such a run, how often it was started, and the lines on stderr."""
    with running(folder, body, *options) as process:
        _, problems = process.communicate(timeout=60)
    return process.returncode, len((folder / "starts").read_text()), problems.splitlines()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def has_logged(run: Path, lines: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.read_bytes().count(b"\n") >= lines


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from modalities import run; run.main(['--help']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--max-restarts" in shown and shown.endswith("False\n")


@pytest.mark.parametrize(
    ("body", "status", "problem"),
    [
        ("pass", 0, None),
        ("raise ValueError('steps is 0')", 1, "error: steps is 0"),
        ("sys.exit(2)", 2, None),
        ("sys.exit(ranks.STOPPED)", 75, None),
        ("raise KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_an_end_that_a_new_start_would_not_change(body: str, status: int, problem: str | None, tmp_path: Path) -> None:
    assert end(tmp_path, body) == (status, 1, [problem] if problem else [])


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ("raise RuntimeError('out of\\n luck')", 70, "RuntimeError: out of luck"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "a process was killed by SIGKILL"),
        ("os._exit(9)", 9, "it ended with status 9"),
    ],
)
def test_a_crash_without_progress_is_given_up(body: str, status: int, why: str, tmp_path: Path) -> None:
    found, starts, lines = end(tmp_path, body, "--max-restarts", "2")
    ours = [line for line in lines if line.startswith("modalities.run: ")]
    assert (found, starts) == (status, 3)
    assert ours == [
        f"modalities.run: {why}; restart 1 of 2 in 0.01 s",
        f"modalities.run: {why}; restart 2 of 2 in 0.02 s",
        f"modalities.run: {why}; gave up after 2 restart(s) that came no further than the first step",
    ]


def test_progress_begins_the_count_anew(tmp_path: Path) -> None:
    """Six starts come further, each than the one before; after that it is at its limit of one restart."""
    body = "ranks.report_progress(min(start, 6)); os._exit(9)"
    status, starts, lines = end(tmp_path, body, "--max-restarts", "1")
    assert (status, starts) == (9, 7) and lines[-1].endswith(
        "gave up after 1 restart(s) that came no further than step 6"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_not_followed_by_a_start(number: signal.Signals, tmp_path: Path) -> None:
    body = f"""
    signal.signal({int(number)}, lambda *_: (Path("came").touch(), sys.exit(ranks.STOPPED)))
    Path("ready").touch()
    time.sleep(60)"""
    with running(tmp_path, body) as process:
        wait_for(lambda: (tmp_path / "ready").exists())
        process.send_signal(number)
        assert process.wait(10) == 75
    assert (tmp_path / "came").exists() and (tmp_path / "starts").read_text() == "x"


def test_a_signal_while_it_waits_for_a_restart(tmp_path: Path) -> None:
    with running(tmp_path, "os._exit(9)", "--back-off", "60") as process:
        assert process.stderr is not None
        assert "restart 1 of 10 in 60 s" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75


def test_a_second_interrupt_ends_all_at_once(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGINT, lambda *_: Path("came").touch())
    Path("ready").write_text(f"{os.getpid()}")
    while True:
        time.sleep(1)"""
    with running(tmp_path, body) as process:
        wait_for(lambda: (tmp_path / "ready").exists() and (tmp_path / "ready").read_text())
        process.send_signal(signal.SIGINT)
        wait_for(lambda: (tmp_path / "came").exists())
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert not lives(int((tmp_path / "ready").read_text()))


def test_a_process_that_torchrun_ends_in_start_up_is_started_again(tmp_path: Path) -> None:
    """As those are that a killed one has left; nobody told modalities.run to stop."""
    body = """from modalities import stopping
    if start == 1:
        stopping.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)"""
    status, starts, lines = end(tmp_path, body)
    assert (status, starts) == (0, 2)
    assert "stopped by SIGTERM in start-up" in lines[-1] and "restart 1 of 10" in lines[-1]


LAUNCH = """
import sys
from pathlib import Path
from modalities import run
options = run.Options(2, 0.01, (sys.executable, "script.py"), elastic={elastic})
sys.exit(run.Supervisor(options, Path("reports")).keep_alive())
"""


@pytest.mark.parametrize(
    ("elastic", "crash", "status", "starts"),
    [(True, "ranks.report_progress(3)", 0, 3), (False, "ranks.report_progress(3)", 1, 2), (True, "pass", 1, 2)],
)
def test_a_number_of_ranks_that_does_not_fit_is_waited_out_if_one_did(
    elastic: bool, crash: str, status: int, starts: int, tmp_path: Path
) -> None:
    body = f"""
    if start == 1:
        {crash}; os._exit(9)
    if start < 3:
        raise ranks.RanksError("8 is not divisible by 3 rank(s)")"""
    (tmp_path / "script.py").write_text(SCRIPT.format(body=body))
    args = [sys.executable, "-c", LAUNCH.format(elastic=elastic)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(args, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert (done.returncode, len((tmp_path / "starts").read_text())) == (status, starts), done.stderr
    told = "8 is not divisible by 3 rank(s); waiting for the machines that are gone; restart 2 of 2 in 0.02 s"
    assert (told in done.stderr) == (status == 0)


def test_what_depends_on_the_number_of_ranks_is_known_after_all_agreed_on_it(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    with pytest.raises(ranks.RanksError) as batch:
        check_ranks(recipe, 3)
    with pytest.raises(ranks.RanksError) as degrees:
        check_ranks(replace(recipe, parallel=replace(recipe.parallel, shard=2)), 4)
    for mistake in (batch, degrees):
        # What `dist.all_or_none` makes of it on the other ranks.
        again = ranks.error_of(ranks.status_of(mistake.value), str(mistake.value))
        assert (type(again), str(again)) == (ranks.RanksError, str(mistake.value))


def test_a_checkpoint_whose_files_cannot_be_looked_at_is_passed_over(tmp_path: Path) -> None:
    for step, name in ((1, "a"), (2, "a" * 300)):  # a name that the file system refuses to look up
        folder = tmp_path / f"step-{step:08}"
        folder.mkdir()
        files = {"a": durable.write_file(folder / "a", b"weights")}
        durable.write_manifest(folder, {"step": step, "samples": 8 * step}, {name: files["a"]})
    with pytest.raises(ValueError, match="is damaged: a+ cannot be looked at"):
        durable.read_sizes(folder)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"


def test_the_agent_of_torchrun_and_its_workers_outlive_a_signal_to_every_process(tmp_path: Path) -> None:
    body = """
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL, "it has not inherited to ignore it"
    os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(1)
    Path("done").touch()"""
    assert end(tmp_path, body, "--nnodes", "1:1") == (0, 1, [])
    assert (tmp_path / "done").exists()


CHILD = """
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    Path(f"pids.{start}").write_text(f"{os.getpid()} {child.pid}")
"""


def test_nothing_of_a_start_is_left_when_the_next_begins(tmp_path: Path) -> None:
    body = CHILD + "    os._exit(9)"
    status, starts, _ = end(tmp_path, body, "--max-restarts", "1")
    pids = [int(pid) for file in tmp_path.glob("pids.*") for pid in file.read_text().split()]
    assert (status, starts, len(pids)) == (9, 2, 4) and not any(map(lives, pids))


def test_a_supervisor_that_is_killed_takes_its_processes_along(tmp_path: Path) -> None:
    body = 'Path("pid").write_text(f"{os.getpid()}"); time.sleep(60)'
    with running(tmp_path, body) as process:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        pid = int((tmp_path / "pid").read_text())
        assert lives(pid)
        process.kill()
        wait_for(lambda: not lives(pid), 10)


def test_the_command_that_is_made_of_the_options() -> None:
    python = sys.executable
    assert run.parse(["train.py", "--max-restarts", "3"]) == run.Options(
        10, 1.0, (python, "train.py", "--max-restarts", "3")
    )
    agent = (python, "-c", run.AGENT, "--nnodes")
    found = run.parse(["--nproc_per_node", "2", "--max-restarts", "3", "train.py", "--steps", "4"])
    number = (*agent, "1", "--nproc-per-node", "2", "--max-restarts", "0", "--standalone")
    assert found == run.Options(3, 1.0, (*number, "train.py", "--steps", "4"))
    several = run.parse(["--nnodes=1:4", "--nproc-per-node=8", "--rdzv-id", "5", "--back-off=2", "-m", "pkg", "x.py"])
    numbers = (*agent, "1:4", "--nproc-per-node", "8", "--max-restarts", "0", "--rdzv-id", "5")
    assert several == run.Options(10, 2.0, (*numbers, "-m", "pkg", "x.py"), elastic=True)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([], "needs what it is to run"),
        (["--max-restarts", "2"], "needs what it is to run"),
        (["--max-restarts", "many", "train.py"], "argument --max-restarts/--max_restarts: invalid int value: 'many'"),
        (["--back-off", "-1", "train.py"], "--back-off is -1.0, but must not be negative"),
    ],
)
def test_a_wrong_option_is_one_line(args: list[str], problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        run.parse(args)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def write(recipe: Recipe) -> Path:
    path = Path(recipe.log.dir).with_name(f"{recipe.name}.json")
    path.write_text(json.dumps(to_dict(recipe)))
    return path


def workers(recipe: Recipe) -> list[int]:
    """The processes that train the recipe, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            args = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
            # Not the agent, whose arguments are the same but for its program.
            if f"{recipe.name}.json".encode() in b" ".join(args) and run.AGENT.encode() not in args:
                rank = [int(value[5:]) for value in variables if value.startswith(b"RANK=")]
                if b"MODALITIES_REPORT=" in b" ".join(variables):
                    found[rank[0] if rank else 0] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def assert_same_weights_at(a: Path, b: Path, step: int) -> None:
    first, second = weights(a, step), weights(b, step)
    assert len(first) > 10 and all(torch.equal(first[name], second[name]) for name in first)


@contextlib.contextmanager
def kept_alive(recipe: Recipe, *options: str) -> Iterator[subprocess.Popen]:
    args = [sys.executable, "-m", "modalities.run", "--back-off", "0.1", *options, str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    args += ["--recipe", str(write(recipe))]
    process = subprocess.Popen(
        args, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_run_whose_process_is_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, name="killed", steps=40, checkpoint=CheckpointConfig(every=5))
    loop.train(replace(recipe, name="straight"))
    with kept_alive(recipe) as process:
        wait_for(lambda: has_logged(recipe.folder, 12))
        (pid,) = workers(recipe)
        os.kill(pid, signal.SIGKILL)
        shown, problems = process.communicate(timeout=60)
    assert process.returncode == 0, problems
    assert problems == "modalities.run: a process was killed by SIGKILL; restart 1 of 10 in 0.1 s\n"
    assert "continuing" in shown and "killed is trained" in shown
    assert_same_weights_at(recipe.folder.with_name("straight"), recipe.folder, 40)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_of_two_ranks_that_loses_one(killed: int, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, name="killed", steps=300, checkpoint=CheckpointConfig(every=20))
    straight = replace(recipe, name="straight")
    train_on(2, straight)
    with kept_alive(recipe, "--nproc-per-node", "2") as process:
        wait_for(lambda: has_logged(recipe.folder, 30))
        os.kill(workers(recipe)[killed], signal.SIGKILL)
        _, problems = process.communicate(timeout=120)
    assert process.returncode == 0, problems
    lost, restart = problems.splitlines()
    assert lost.startswith(f"rank {1 - killed} lost its peers (rank {killed} on ")
    assert restart == f"modalities.run: {lost}; restart 1 of 10 in 0.1 s"
    assert_same_weights_at(straight.folder, recipe.folder, 300)


@pytest.mark.slow
def test_two_ranks_are_stopped_by_a_signal_to_the_supervisor(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, name="stopped", steps=100_000, checkpoint=CheckpointConfig(every=0))
    with kept_alive(recipe, "--nproc-per-node", "2") as process:
        wait_for(lambda: has_logged(recipe.folder, 5))
        process.send_signal(signal.SIGUSR1)
        shown, problems = process.communicate(timeout=60)
    assert (process.returncode, problems) == (75, "")
    newest = checkpoint.newest(recipe.folder)
    assert f"stopped by SIGUSR1 after step {int(newest.name[5:]) if newest else None}, saved {newest}; " in shown


@pytest.mark.slow
def test_a_machine_that_is_gone_is_done_without(tmp_path: Path) -> None:
    """Two agents stand for two machines. One of them and its workers are killed, and do not come back."""
    recipe = tiny.recipe(tmp_path, name="elastic", steps=1500, checkpoint=CheckpointConfig(every=50))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "7"]
    options += ["--rdzv-conf", "last_call_timeout=4"]
    with kept_alive(recipe, *options) as stays:
        time.sleep(2)  # the first one has the store, at which the machines meet
        with kept_alive(recipe, *options) as goes:
            wait_for(lambda: has_logged(recipe.folder, 60), 120)
            assert len(workers(recipe)) == 2
            goes.kill()  # and what it has started with it
            shown, problems = stays.communicate(timeout=200)
    assert stays.returncode == 0, problems
    assert "2 rank(s) on cpu" in shown and "1 rank(s) on cpu" in shown and "elastic is trained" in shown
    steps = [int(line["step"]) for line in read_metrics(recipe.folder) if "loss" in line]
    samples = [int(line["samples"]) for line in read_metrics(recipe.folder) if "loss" in line]
    assert steps == list(range(1, 1501)) and samples == [8 * step for step in steps], "the same global batches"
