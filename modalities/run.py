"""Keep a run alive: `python -m modalities.run --nproc-per-node 2 train.py --recipe gpt2_60m`.

What crashes, hangs or loses a rank is started anew, all of it, and goes on from its newest checkpoint; a run that is
done, that was told to stop, or that a user's mistake ended is not. Knows nothing of training, and does not load torch.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modalities import cli, ranks

USAGE = """usage: python -m modalities.run [--max-restarts 10] [--back-off 1.0] [options of torchrun] train.py …

Runs `torchrun [options] train.py …` (one process: `python train.py …`), and starts it anew when it crashes or hangs.
  --max-restarts N         restarts in a row that come no further than any before; 0: none
  --back-off S             seconds before a restart, doubled with each of these, a minute at most
  --nproc-per-node N       processes on this machine, one for each GPU
  --nnodes MIN:MAX         machines; the same command runs on each, with --rdzv-backend c10d --rdzv-endpoint HOST:PORT
                           and --rdzv-id ID. One that is gone is waited for, then the others go on without it.
The first signal (SIGTERM, SIGUSR1, SIGINT) is passed on, and the run saves its state; a second SIGINT ends all at once.
Exit status: that of the run. 0 done, 1 a mistake, 2 usage, 75 stopped (the same command continues), 130 interrupted."""
LONGEST_BACK_OFF = 60.0
AGENT = "from modalities import run; run.agent()"


@dataclass(frozen=True)
class Options:
    max_restarts: int
    back_off: float
    """Seconds."""
    launch: tuple[str, ...]
    """What is run."""
    elastic: bool = False
    """Whether machines may come and go."""


@dataclass(frozen=True)
class End:
    """How a start ended."""

    status: int
    crashed: bool
    why: str


def parse(argv: Sequence[str]) -> Options:
    """The options before the script, and the command that they make; a ValueError without a script."""
    at = next((i for i, arg in enumerate(argv) if arg.endswith(".py") or arg in ("-m", "--module")), None)
    if at is None:
        raise ValueError("modalities.run needs what it is to run: python -m modalities.run [options] train.py …")
    parser = argparse.ArgumentParser(prog="modalities.run", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--max-restarts", "--max_restarts", type=int, default=10)
    parser.add_argument("--back-off", type=float, default=1.0)
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", default="1")
    try:
        ours, others = parser.parse_known_args(argv[:at])
    except argparse.ArgumentError as error:
        raise ValueError(f"modalities.run: {error}") from None
    for name in ("max_restarts", "back_off"):
        if not getattr(ours, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(ours, name)}, but must not be negative")
    if (ours.nnodes, ours.nproc_per_node, others) == ("1", "1", []):
        return Options(ours.max_restarts, ours.back_off, (sys.executable, *argv[at:]))
    # One machine's processes meet at a port that is free at each start.
    alone = ours.nnodes in ("1", "1:1") and not any(arg.startswith(("--rdzv", "--master", "--stand")) for arg in others)
    number = ("--nnodes", ours.nnodes, "--nproc-per-node", ours.nproc_per_node, "--max-restarts", "0")
    agent = (sys.executable, "-c", AGENT, *number, *(["--standalone"] if alone else []), *others)
    fewest, _, most = ours.nnodes.partition(":")
    return Options(ours.max_restarts, ours.back_off, (*agent, *argv[at:]), most not in ("", fewest))


def agent() -> None:
    """torchrun without its own words about how a process ended: the process has said, and it is in the report."""
    # A scheduler may send it to every process, and the workers would die with this one. No SIG_IGN: they would inherit.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.disable(logging.ERROR)
    try:
        main(sys.argv[1:])
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as came:
        sys.exit(128 + came.sigval)


class Supervisor:
    """Starts the run as often as it takes. `folder`: where its processes report."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.child: subprocess.Popen | None = None
        self.signals: list[int] = []
        self.passed_on = False
        self.farthest = -1
        """The last step that was done by any start."""

    def keep_alive(self) -> int:
        """Run to an end that a new start would not change; returns the exit status."""
        restarts = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.note)
        while True:
            end = self.start()
            if not end.crashed or self.signals:
                return end.status if not end.crashed else ranks.STOPPED
            step = self.step()
            if step > self.farthest:
                self.farthest, restarts = step, 0
            if restarts >= self.options.max_restarts:
                came = f"step {self.farthest}" if self.farthest >= 0 else "the first step"
                tell(f"{end.why}; gave up after {restarts} restart(s) that came no further than {came}")
                return end.status
            pause = min(self.options.back_off * 2**restarts, LONGEST_BACK_OFF)
            restarts += 1
            tell(f"{end.why}; restart {restarts} of {self.options.max_restarts} in {pause:g} s")
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not self.signals:
                time.sleep(min(0.1, pause))
            if self.signals:
                return ranks.STOPPED

    def start(self) -> End:
        """One start to its end, after which no process of it is left."""
        self.folder.mkdir(mode=0o700, exist_ok=True)  # a cleaner of the temporary folder may have come by
        for file in self.folder.iterdir():
            file.unlink()
        environment = {**os.environ, ranks.REPORT: str(self.folder)}
        self.passed_on = False
        # A group of its own: a Ctrl-C comes to this process alone, and is passed on.
        self.child = subprocess.Popen(
            self.options.launch, env=environment, process_group=0, preexec_fn=ranks.die_with_parent
        )
        try:
            self.pass_on()
            code = self.child.wait()
        finally:
            kill_descendants()
        return self.end(code)

    def note(self, number: int, frame: object) -> None:
        """Take a signal; a second SIGINT ends all at once."""
        if number == signal.SIGINT and signal.SIGINT in self.signals:
            sys.exit(130)
        self.signals.append(number)
        self.pass_on()

    def pass_on(self) -> None:
        """Have the processes stop, once, if a signal came."""
        if not self.signals or self.child is None or self.passed_on:
            return
        self.passed_on = True
        # Not through torchrun, which would give them 30 s to save.
        workers = [report["pid"] for report in self.reports() if "status" not in report]
        for pid in workers or [self.child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self.signals[0] if workers else signal.SIGTERM)

    def reports(self) -> list[dict[str, Any]]:
        """What the processes of this machine have said: "pid", and at their end "status" and "line"."""
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("[0-9]*.json"))]

    def step(self) -> int:
        """The last step that was done on this machine; -1: none."""
        file = self.folder / "progress.json"
        return json.loads(file.read_text())["step"] if file.exists() else -1

    def end(self, code: int) -> End:
        """What the exit status `code` of the child and the reports of its processes amount to."""
        if code == 0:
            return End(0, False, "")
        reports = self.reports()
        ended = {report["status"]: report["line"] for report in reports if "status" in report}
        # A mistake that one process reports makes others lose it: it comes first.
        for status in (ranks.STOPPED, 130, 1, 2):
            if status in ended:
                return End(status, False, ended[status])
        if ranks.UNFIT in ended:
            # It has fitted before: a machine is gone, and may come back.
            lacks = self.options.elastic and self.farthest >= 0
            return End(1, lacks, ended[ranks.UNFIT] + "; waiting for the machines that are gone" * lacks)
        if code == 2 and not reports:  # torchrun's own usage
            return End(2, False, "")
        for status in (ranks.CRASHED, ranks.HUNG):
            if status in ended and ended[status]:
                return End(status, True, ended[status])
        number = -code if code < 0 else code - 128
        killed = number in signal.valid_signals()
        why = f"a process was killed by {signal.Signals(number).name}" if killed else f"it ended with status {code}"
        return End(128 + number if killed else code, True, why)


def tell(line: str) -> None:
    print(f"modalities.run: {line}", file=sys.stderr, flush=True)


def kill_descendants() -> None:
    """Kill what was started from here and lives, wherever it stands in the tree; returns when all are gone.

    One that the kernel does not let go, as in a stuck driver, is left after 30 s.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        # Orphans become children of this process, so all are found in time.
        for pid in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def children() -> list[int]:
    """The processes whose parent is this one (Linux; elsewhere none is found)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            after_name = stat.read_text().rpartition(")")[2].split()
            if int(after_name[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    options = parse(argv)
    ranks.adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="modalities-run-") as folder:
        sys.exit(Supervisor(options, Path(folder)).keep_alive())


if __name__ == "__main__":
    cli.run(main)
