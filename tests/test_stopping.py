"""A run that is told to stop saves its state at most a step later, on all ranks, and the same command continues."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_loop import weights
from test_run import has_logged, wait_for, write
from test_train import ROOT

from modalities import checkpoint, loop, ranks, stopping
from modalities.checkpoint import CheckpointConfig
from modalities.log import read_metrics
from modalities.recipe import Recipe
from modalities.step import EvalConfig

ENDLESS = 100_000
"""Steps of a run that is stopped."""


@pytest.fixture
def endless(tmp_path: Path) -> Recipe:
    """A run without an evaluation or a save on the way."""
    return tiny.recipe(tmp_path, steps=ENDLESS, eval=EvalConfig(every=0), checkpoint=CheckpointConfig(every=0))


def stop_when_logged(run: Path, lines: int, number: int) -> threading.Thread:
    """Send this process the signal once the run has logged so many lines."""
    return stop_when(lambda: has_logged(run, lines), number)


def stop_when(happened: Callable[[], bool], number: int = signal.SIGTERM) -> threading.Thread:
    def send() -> None:
        wait_for(happened)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def steps_of(run: Path, key: str = "loss") -> list[int]:
    return [int(line["step"]) for line in read_metrics(run) if key in line]


def assert_stopped_and_saved(run: Path, status: object) -> int:
    """The step of the checkpoint, which must be the last that was done."""
    newest = checkpoint.newest(run)
    assert status == ranks.STOPPED and newest is not None
    step = int(newest.name[5:])
    assert step == max(steps_of(run)) and step < ENDLESS
    return step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_a_step(number: signal.Signals, endless: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    thread = stop_when_logged(endless.folder, 5, number)
    with pytest.raises(SystemExit) as end:
        loop.train(endless)
    thread.join()
    step = assert_stopped_and_saved(endless.folder, end.value.code)
    path = checkpoint.newest(endless.folder)
    line = f"stopped by {number.name} after step {step}, saved {path}; the same command continues\n"
    assert capsys.readouterr().out.endswith(line)
    assert signal.getsignal(number) is before, "who calls train() has his own effect of signals again"


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(endless: Recipe) -> None:
    short = replace(endless, steps=60)
    loop.train(replace(short, name="straight"))
    thread = stop_when_logged(short.folder, 5, signal.SIGTERM)
    with pytest.raises(SystemExit):
        loop.train(short)
    thread.join()
    assert assert_stopped_and_saved(short.folder, ranks.STOPPED) < 60
    loop.train(short)
    assert steps_of(short.folder) == list(range(1, 61))
    straight, resumed = (weights(run, 60) for run in (short.folder.with_name("straight"), short.folder))
    assert len(straight) > 10 and all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_signal_in_an_evaluation(endless: Recipe) -> None:
    """It ends between two batches and is not logged, the state is saved, and the next start evaluates it."""
    long = tiny.write_tokens(Path(endless.data.val[0]).with_name("long.pbin"), 40_000, seed=1)
    data = replace(endless.data, val=(str(long),))
    recipe = replace(endless, steps=4, data=data, eval=EvalConfig(every=3))

    def evaluates_again() -> bool:
        # Of the first evaluation, and of steps 1 to 3; the last of these is written before the second evaluation.
        logged = has_logged(recipe.folder, 4)
        time.sleep(0.2 * logged)
        return logged

    thread = stop_when(evaluates_again)
    with pytest.raises(SystemExit) as end:
        loop.train(recipe)
    thread.join()
    assert assert_stopped_and_saved(recipe.folder, end.value.code) == 3
    assert steps_of(recipe.folder, "val/long/loss") == [0]
    loop.train(recipe)
    assert steps_of(recipe.folder, "val/long/loss") == [0, 3, 4]


def test_a_signal_while_it_saves(endless: Recipe) -> None:
    """What is being saved is finished, and is not saved again."""
    recipe = replace(endless, checkpoint=CheckpointConfig(every=4))

    thread = stop_when(lambda: any(recipe.folder.glob("step-00000004*")))
    with pytest.raises(SystemExit) as end:
        loop.train(recipe)
    thread.join()
    assert_stopped_and_saved(recipe.folder, end.value.code)
    assert checkpoint.read_manifest(recipe.folder / "step-00000004")["step"] == 4


def test_an_overdue_checkpoint_is_not_forgotten_in_an_evaluation() -> None:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        stop = stopping.Stop(torch.distributed.group.WORLD)
        assert not stop.agree(overdue=True).save, "it is read at the next boundary"
        assert not stop.now() and not stop.now()
        assert stop.agree().save and not stop.agree().save
    finally:
        torch.distributed.destroy_process_group()
    alone = stopping.Stop(None)
    assert alone.agree(overdue=True) == stopping.Agreed(None, True) and not alone.agree().save


def test_nobody_who_runs_in_a_thread_loses_his_signals(endless: Recipe) -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(stopping.listen()))
    thread.start()
    thread.join()
    assert len(found) == 1 and not stopping.noting()


@contextlib.contextmanager
def started(recipe: Recipe, number: int = 1, *flags: str) -> Iterator[list[subprocess.Popen]]:
    """`train.py` of `recipe` in processes of their own, that are ranks of one run."""
    file = write(recipe)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    args = [sys.executable, str(ROOT / "train.py"), "--recipe", str(file), *flags]
    processes: list[subprocess.Popen] = []
    for rank in range(number):
        environment = {**common, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{number}"}
        process = subprocess.Popen(args, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_ranks_stop_at_the_same_step_though_one_was_told(endless: Recipe) -> None:
    with started(endless, 2) as processes:
        wait_for(lambda: has_logged(endless.folder, 5))
        processes[1].send_signal(signal.SIGUSR1)
        (shown, problems), _ = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [ranks.STOPPED] * 2, problems
    step = assert_stopped_and_saved(endless.folder, ranks.STOPPED)
    assert f"stopped by SIGUSR1 after step {step}, saved " in shown and not problems


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def test_a_signal_in_start_up_and_a_second_interrupt(endless: Recipe) -> None:
    """The one before torch is loaded; the other when the step, which is long, is being finished."""
    with started(endless) as (process,):
        wait_for(lambda: catches(process.pid, signal.SIGTERM))
        process.send_signal(signal.SIGTERM)
        shown, problems = process.communicate(timeout=60)
    assert process.returncode == ranks.STOPPED, problems
    assert "stopped by SIGTERM in start-up, with nothing to save; the same command continues\n" in shown
    assert not problems and not list(endless.folder.glob("step-*"))

    with started(endless) as (process,):
        wait_for(lambda: catches(process.pid, signal.SIGTERM))
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None, "torch takes longer to load"
        process.send_signal(signal.SIGINT)
        _, problems = process.communicate(timeout=10)
    assert process.returncode == 130 and problems.splitlines()[-1] == "interrupted"


LISTENS = """
import time
from modalities import ranks, stopping
stopping.listen()
{body}
print("ready", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def listening(folder: Path, body: str = "") -> Iterator[subprocess.Popen]:
    """A process that listens, and cannot leave a report in `folder` nor write to stderr, which nobody reads."""
    (folder / "0.json").mkdir()  # which no file can replace
    args = [sys.executable, "-c", LISTENS.format(body=body)]
    variables = {**os.environ, ranks.REPORT: str(folder)}
    with subprocess.Popen(
        args, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stderr.close()
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_second_interrupt_ends_a_process_whose_last_words_are_lost(tmp_path: Path) -> None:
    with listening(tmp_path) as process:
        for _ in range(2):
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)  # for two that come together are one
        assert process.wait(10) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_has_not_met_the_others_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with listening(tmp_path) as process:
        process.send_signal(number)
        assert process.wait(10) == ranks.STOPPED
        assert process.stdout is not None
        assert process.stdout.read() == f"stopped by {number.name} {stopping.IN_START_UP}; the same command continues\n"


def test_a_rank_that_has_met_the_others_finishes_its_step(tmp_path: Path) -> None:
    with listening(tmp_path, "ranks.meet()") as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)


@pytest.mark.slow
@tiny.needs_compiler
def test_a_signal_while_the_step_is_compiled(endless: Recipe) -> None:
    parallel = replace(endless.parallel, compile="model")
    recipe = replace(endless, parallel=parallel, name="compiled")
    with started(recipe) as (process,):
        wait_for(lambda: (recipe.folder / "metrics.jsonl").exists())
        time.sleep(2)
        assert not has_logged(recipe.folder, 1), "it compiles"
        process.send_signal(signal.SIGTERM)
        shown, problems = process.communicate(timeout=300)
    assert process.returncode == ranks.STOPPED, problems
    assert assert_stopped_and_saved(recipe.folder, ranks.STOPPED) == 1
    assert "stopped by SIGTERM after step 1, saved" in shown
