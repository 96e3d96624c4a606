"""Hung and lost ranks: every rank gives signs of life, and a run of which a rank gives none ends on all of them.

A thread of each rank writes its beat into the store of the run, by a connection of its own. The main rank watches the
beats of all, the others the main rank's and its verdict: a few requests a second and rank, all of them short.
"""

import contextlib
import faulthandler
import json
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore

from modalities import dist, ranks
from modalities.dist import World

TICK = 1.0
"""Seconds between two looks at the others."""
GRACE = 5.0
"""Seconds that the main thread has to end by itself, when the store is gone; and that last words may take."""
VERDICT = "verdict"


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run that makes no progress is ended, on all ranks."""

    timeout: float = 60.0
    """Without a sign of life of a rank [s]; 0: none is watched."""
    step_timeout: float = 1800.0
    """Without a step being done, though all ranks live [s]; not before a start's second step; 0: off."""

    def __post_init__(self) -> None:
        for name in ("timeout", "step_timeout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"watchdog.{name} is {getattr(self, name)}, but must be seconds, or 0 for none")


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    namespace: str
    """In which `pid` means something."""
    pid: int
    step: int
    """The last one that it has done; -1: none."""
    where: str
    """The line that its main thread was at."""
    count: int
    left: bool = False
    """It has done its part, and is not watched any more."""

    @property
    def is_here(self) -> bool:
        """Whether `pid` is of this machine."""
        return (self.host, self.namespace) == (socket.gethostname(), namespace())

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def place(self) -> str:
        return f"last step {self.step}" if self.step >= 0 else "before its first step"


class Heartbeat:
    """Called with the number of each step that is done; its thread does the rest."""

    def __init__(self, config: WatchdogConfig, world: World, folder: Path, store: Store | None) -> None:
        self.config, self.world, self.folder, self.store = config, world, folder, store
        self.step, self.steps = -1, 0
        self.advanced = self.written = time.monotonic()
        self.count, self.reported = 0, -1
        self.seen: dict[int, tuple[float, Beat]] = {}
        self.ended = threading.Event()
        self.main = threading.main_thread().ident
        self.answered = time.monotonic()
        self.ending = threading.Lock()
        self.threads = [threading.Thread(target=self.watch, name="watchdog", daemon=True)]
        if store is not None:
            self.threads.append(threading.Thread(target=self.talk, args=(store,), name="heartbeat", daemon=True))

    def __call__(self, step: int) -> None:
        self.steps += step != self.step
        self.step, self.advanced = step, time.monotonic()

    def watch(self) -> None:
        """In a thread that waits for nobody."""
        while not self.ended.wait(TICK):
            self.report_progress()
            if self.world.is_main:
                self.judge_progress()
            if self.store is not None and time.monotonic() - self.answered > self.config.timeout + 2 * TICK:
                self.miss_store()

    def talk(self, store: Store) -> None:
        """In a thread that may wait for the store without end, as when its machine is stopped."""
        while not self.ended.wait(TICK):
            try:
                self.exchange(store)
            except dist.STORE_ERRORS:
                if not self.ended.wait(GRACE):
                    self.miss_store()
            self.answered = time.monotonic()

    def report_progress(self) -> None:
        if self.step != self.reported:
            self.reported = self.step
            ranks.report_progress(self.step)

    def exchange(self, store: Store) -> None:
        """Write this rank's beat when it is due, read those that it watches, and obey a verdict."""
        now = time.monotonic()
        if now - self.written >= self.interval:
            self.write(store)
        if store.check([VERDICT]):
            self.obey(json.loads(store.get(VERDICT)))
        for beat in self.read(store, self.watched):
            last = self.seen.get(beat.rank)
            if last is None or last[1].count != beat.count:
                self.seen[beat.rank] = now, beat
            elif now - last[0] > self.config.timeout and not beat.left:
                self.judge(beat, f"has given no sign of life for {self.config.timeout:g} s", kill=True)

    @property
    def interval(self) -> float:
        """Seconds between two beats of a rank."""
        return max(TICK, self.config.timeout / 6)

    @property
    def watched(self) -> list[int]:
        return list(range(1, self.world.size)) if self.world.is_main else [0]

    def write(self, store: Store, left: bool = False) -> None:
        self.count, self.written = self.count + 1, time.monotonic()
        store.set(f"{self.world.rank}", json.dumps(asdict(self.beat(left))))

    def beat(self, left: bool = False) -> Beat:
        frame = sys._current_frames().get(self.main or 0)
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
        host = socket.gethostname()
        return Beat(self.world.rank, host, namespace(), os.getpid(), self.step, where, self.count, left)

    def read(self, store: Store, watched: Sequence[int]) -> list[Beat]:
        return [Beat(**json.loads(text)) for text in store.multi_get([f"{rank}" for rank in watched])]

    def judge_progress(self) -> None:
        """End the run if no step was done for too long; the culprit is whoever the others wait for."""
        limit = self.config.step_timeout
        stalled = time.monotonic() - self.advanced
        # And until all beats that were read tell of the time since.
        if not limit or self.steps < 2 or stalled < limit + (self.interval + TICK if self.store else 0):
            return
        beats = [self.beat(), *(beat for _, beat in self.seen.values())]
        behind = [beat for beat in beats if beat.step == min(beat.step for beat in beats)]
        # Those who wait do so within torch.
        culprits = [beat for beat in behind if "/torch/" not in beat.where] or behind
        self.judge(culprits[0], f"has done no step for {limit:g} s (it is at {culprits[0].where})", kill=False)

    def judge(self, beat: Beat, why: str, kill: bool) -> None:
        """Let all ranks know who is at fault, and end."""
        verdict = {"beat": asdict(beat), "why": why, "kill": kill}
        if self.store is not None:
            with contextlib.suppress(*dist.STORE_ERRORS):  # then each rank comes to its own verdict
                self.store.set(VERDICT, json.dumps(verdict))
        self.obey(verdict)

    def miss_store(self) -> None:
        """End this rank, whose store is gone. It lies with rank 0, or with the agent of torchrun on its machine."""
        why = f"the store of the run, at {':'.join(map(str, ranks.master()))}, does not answer"
        if 0 in self.seen:
            self.obey({"beat": asdict(self.seen[0][1]), "why": f"is lost, and {why}", "kill": True})
        self.end(f"{why}, {self.beat().place}")

    def obey(self, verdict: dict) -> None:
        beat = Beat(**verdict["beat"])
        if verdict["kill"] and beat.is_here and beat.pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)  # one that is stopped would never end by itself
        self.end(f"{beat.name} {verdict['why']}, {beat.place}")

    def end(self, why: str) -> None:
        """Save the stacks of all threads and end this process, whatever its main thread waits for."""
        # The disk may be what hangs or is full, and nobody may read stderr; the end must come.
        alarm = threading.Timer(GRACE, os._exit, (ranks.HUNG,))
        alarm.daemon = True
        alarm.start()
        self.ending.acquire()  # for good: another thread may have come to an end too
        path = self.folder / "hang" / f"{time.strftime('%Y%m%d-%H%M%S')}-rank-{self.world.rank}.txt"
        line = f"rank {self.world.rank}: {why}; ending, stacks in {path}"
        try:
            ranks.say(line)
            self.report_progress()
            ranks.report_end(ranks.HUNG, line)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError as error:
            ranks.say(f"rank {self.world.rank}: the stacks could not be saved ({error})")
        finally:
            os._exit(ranks.HUNG)

    def name_lost(self) -> str:
        """The ranks of this machine that are gone, in words, as far as can be seen within a second."""
        deadline = time.monotonic() + 1
        while self.store is not None and time.monotonic() < deadline:
            others = [rank for rank in range(self.world.size) if rank != self.world.rank]
            with contextlib.suppress(*dist.STORE_ERRORS):
                lost = [beat for beat in self.read(self.store, others) if beat.is_here and not lives(beat.pid)]
                if lost:
                    return ", ".join(f"{beat.name}, pid {beat.pid}" for beat in lost)
            time.sleep(0.1)
        return "on another machine" if self.store is not None else "unknown"


def lives(pid: int) -> bool:
    """Whether the process is there, and more than an exit status that its parent has not yet asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def namespace() -> str:
    """What process ids are relative to: a container has its own, though it may bear its host's name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@contextlib.contextmanager
def beating(config: WatchdogConfig, world: World, folder: Path) -> Iterator[Heartbeat]:
    """`beat(step)` after each step; ends the process with status HUNG where a rank hangs or is gone.

    Stacks lie in `folder/hang`. One process has nobody to watch but its own steps.
    """
    store: Store | None = None
    if world.size > 1 and config.timeout:
        host, port = ranks.master()
        client = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=max(config.timeout, TICK)))
        # The store may outlive a start, with what that wrote.
        store = PrefixStore(dist.broadcast_from_main(secrets.token_hex(8)), client)
    beat = Heartbeat(config, world, folder, store)
    if store is not None:
        beat.write(store)
        dist.barrier()  # all have written, so that nobody waits who reads
        beat.exchange(store)  # now, for who hangs is named from what was read
    for thread in beat.threads:
        thread.start()
    try:
        yield beat
        if store is not None:
            beat.write(store, left=True)
    except Exception as error:
        if not dist.lost_peers(error):
            raise
        lost = f"rank {world.rank} lost its peers ({beat.name_lost()}), {beat.beat().place}"
        raise dist.PeersLost(f"{lost}: {dist.cause(error)}") from None
    finally:
        beat.ended.set()
        beat.report_progress()
        for thread in beat.threads:
            thread.join(2 * TICK)
