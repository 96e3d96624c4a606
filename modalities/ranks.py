"""What torchrun tells a process of itself, without torch: the only reader of its environment; and how a process ends.

`modalities.run` is told of a process's end and progress in a folder, for torchrun's own exit status says neither.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

STOPPED = 75
"""Exit status: a signal came and the state is saved; the same command continues. It is EX_TEMPFAIL of sysexits.h."""
HUNG = 76
"""Exit status: a rank does not answer, or is gone."""
CRASHED = 70
"""What is reported of a traceback, of which Python's own exit status is 1. It is EX_SOFTWARE of sysexits.h."""
UNFIT = 77
"""What is reported of a number of ranks that the recipe does not fit; the exit status is 1, as of any mistake."""
PASSING = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
"""What a disk or a network says that may work again; what they say by ConnectionError and TimeoutError does too."""
REPORT = "MODALITIES_REPORT"
"""In the environment: the folder that `modalities.run` reads."""

_met = threading.Event()


class RanksError(ValueError):
    """The recipe cannot be trained by so many ranks: a mistake, unless machines come and go."""


class PassingError(OSError):
    """What a disk or a network says that may work again."""


def status_of(error: Exception) -> int:
    """What is reported of an error that a user is told in one line: 1 for a mistake, which a new start repeats."""
    if isinstance(error, RanksError):
        return UNFIT
    if isinstance(error, PassingError):
        return CRASHED
    if not isinstance(error, OSError) or error.errno == errno.EPIPE:  # nobody reads stdout any more
        return 1
    return CRASHED if isinstance(error, ConnectionError | TimeoutError) or error.errno in PASSING else 1


def error_of(status: int, line: str) -> ValueError | PassingError:
    """The error of that status which says `line`: what another rank is to raise, or one that says more of the cause."""
    return PassingError(line) if status == CRASHED else RanksError(line) if status == UNFIT else ValueError(line)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def master() -> tuple[str, int]:
    """Host and port of the store at which the processes meet."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def is_main() -> bool:
    """Whether this is the process that speaks for all, before and without a process group."""
    return rank() == 0


def has_met() -> bool:
    """Whether this process has met the others, with whom it then agrees on signals; alone, whether it has set up."""
    return _met.is_set()


def meet() -> None:
    """Told by `dist.setup`, once it has."""
    _met.set()


def begin() -> None:
    """What a process that trains does first: where `modalities.run` has started it, it says so and dies with it."""
    if REPORT in os.environ:
        die_with_parent()
        report(f"{local_rank()}.json", {"pid": os.getpid()})


def report_end(status: int, line: str = "") -> None:
    """Leave in `<local rank>.json` the exit status of this process, and in a line why it ends."""
    report(f"{local_rank()}.json", {"pid": os.getpid(), "status": status, "line": line})


def report_progress(step: int) -> None:
    """Leave in `progress.json` the step that is done; one process of each machine does."""
    if local_rank() == 0:
        report("progress.json", {"step": step})


def say(line: str, where: int = 2) -> None:
    """Write a line to stderr (1: stdout), past Python's locks, which others may hold; nobody reads it: no error."""
    with contextlib.suppress(OSError):
        os.write(where, f"{line}\n".encode(errors="backslashreplace"))


def report(name: str, facts: Mapping[str, int | str]) -> None:
    """Write a file of the folder that `modalities.run` reads, whole or not at all; without such a folder nothing."""
    folder = os.environ.get(REPORT)
    if folder is None or not os.path.isdir(folder):
        return
    part = Path(folder, f".{name}.{os.getpid()}")
    # A report is advisory: a folder that is full or gone must neither keep a process from its end nor change that.
    with contextlib.suppress(OSError):
        part.write_text(json.dumps(facts))
        part.replace(Path(folder, name))


def die_with_parent() -> None:
    """Have Linux kill this process when the one that started it ends; elsewhere nothing is done."""
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def adopt_orphans() -> None:
    """Have Linux make this process the parent of descendants whose own parent ends; elsewhere nothing is done."""
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)
