"""Signals: a run that is told to stop finishes its step, saves and ends, on all ranks at the same step.

A thread notes the signals, so that they count wherever the main thread is; the ranks agree on them at step boundaries.
Torch is imported only where ranks are to agree, so that `listen` can come before it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modalities import ranks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

    from modalities.dist import World

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
IN_START_UP = "in start-up, with nothing to save"
noted: list[int] = []
"""The signals that have come to this process since `listen`."""


@dataclass(frozen=True)
class Agreed:
    """The same on all ranks."""

    signal: int | None
    """The signal that came to some rank."""
    save: bool
    """Whether the main rank finds a checkpoint overdue."""


class Stop:
    """What all ranks have agreed on: `group` is theirs, of gloo; None for one process."""

    def __init__(self, group: "ProcessGroup | None") -> None:
        self.group = group
        self.signal: int | None = None
        self.save = False
        self.asked = self.ask(False)

    def agree(self, overdue: bool = False) -> Agreed:
        """Told by all ranks at a boundary: what they noted up to the boundary before (one process: up to this).

        The sum over ranks that a boundary starts is read at the next, by when it is there: no rank waits, and the
        device goes on. After a signal nothing more is asked.
        """
        self.exchange(overdue)
        save, self.save = self.save, False
        return Agreed(self.signal, save)

    def now(self) -> bool:
        """Whether a signal has been agreed on: for boundaries within a step, as between two batches."""
        self.exchange(False)
        return self.signal is not None

    def exchange(self, overdue: bool) -> None:
        if self.signal is not None:
            return
        before, self.asked = self.asked, self.ask(overdue)
        number, save = arrived(before if self.group is not None else self.asked).tolist()
        # What `now` reads of a checkpoint stays for `agree`.
        self.signal, self.save = number or None, self.save or bool(save)

    def leave(self, step: int, saved: "Path | None") -> None:
        """End the process if a signal was agreed on: the state after `step` steps lies at `saved`."""
        if self.signal is None:
            return
        if ranks.is_main():
            print(stopped(self.signal, f"after step {step}, saved {saved}" if saved else IN_START_UP))
        sys.exit(ranks.STOPPED)

    def ask(self, overdue: bool) -> "tuple[Tensor, Work | None]":
        import torch

        mine = torch.tensor([noted[0] if noted else 0, int(overdue)])
        if self.group is None:
            return mine, None
        maximum = torch.distributed.ReduceOp.MAX
        return mine, torch.distributed.all_reduce(mine, maximum, group=self.group, async_op=True)


def stopped(number: int, when: str) -> str:
    return f"stopped by {signal.Signals(number).name} {when}; the same command continues"


def arrived(asked: "tuple[Tensor, Work | None]") -> "Tensor":
    answer, work = asked
    if work is not None:
        work.wait()
    return answer


@contextlib.contextmanager
def listening(world: "World") -> Iterator[Stop]:
    """Note signals, and agree on those that came before; they have their former effect when the context ends."""
    undo = listen() if not noting() else None
    group = None
    if world.size > 1:
        import torch

        group = torch.distributed.new_group(backend="gloo")  # beside the run's own, whose collectives are the step's
    stop = Stop(group)
    stop.agree()
    try:
        yield stop
        arrived(stop.asked)  # not left to the end of Python, which would not wait for gloo's thread
    finally:
        if undo is not None:
            undo()


def noting() -> bool:
    return signal.getsignal(signal.SIGTERM) is _ignore


def _ignore(number: int, frame: object) -> None:
    """What Python calls in the main thread, when that comes to it; the thread of `listen` has long been told."""


def listen() -> Callable[[], None]:
    """Note SIGTERM, SIGUSR1 and SIGINT from now on, instead of dying of them; a second SIGINT ends the process at once.

    Returns what undoes it. Signals come to the main thread, so in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=_note, args=(read_end,), name="signals", daemon=True).start()
    noted.clear()
    # Written to as the signal comes, though the main thread waits in a collective or compiles.
    wakeup_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _ignore) for number in SIGNALS}
    # A child that is forked, not started anew, would tell of its own signals here.
    os.register_at_fork(after_in_child=_forget)

    def undo() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.close(write_end)  # which ends the thread
        noted.clear()

    return undo


def _forget() -> None:
    if noting():
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def _note(read_end: int) -> None:
    while came := os.read(read_end, 64):
        for number in came:
            if number not in SIGNALS:
                continue
            if number == signal.SIGINT and signal.SIGINT in noted:
                ranks.report_end(130, "interrupted")
                ranks.say("interrupted")
                os._exit(130)
            if number == signal.SIGINT and ranks.is_main():
                ranks.say("the run stops after this step and saves its state; interrupted again: at once")
            if number != signal.SIGINT and not ranks.has_met():
                # The main thread may wait for the others without end, and would not ask.
                line = stopped(number, IN_START_UP)
                # It may be torchrun, ending whom a crash has left: modalities.run, if it was not told, starts again.
                ranks.report_end(ranks.CRASHED, line)
                if ranks.is_main():
                    ranks.say(line, 1)
                os._exit(ranks.STOPPED)
            noted.append(number)
    os.close(read_end)
