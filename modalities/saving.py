"""When a run's state is saved, by whom, and which checkpoints stay.

With `checkpoint.background` a step waits for a copy of the state alone: each rank copies its shards into buffers of its
own in host memory, which stay for the next save (one more copy of the rank's state, for as long as the run lasts), and
a thread with a process group of its own writes them while training goes on.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from modalities import checkpoint, durable
from modalities.checkpoint import CheckpointConfig
from modalities.dist import World
from modalities.step import TrainState

LONGEST = timedelta(hours=6)
"""A rank waits so long for another that still writes; one that is gone shows at once."""


@contextmanager
def saver(
    config: CheckpointConfig,
    run: Path,
    world: World,
    facts: Mapping[str, Any],
    say: Callable[[str], None],
    latest: Path | None = None,
) -> Iterator["Saver"]:
    """What saves the run in the folder `run`; all ranks together. Leaving waits for what is being written.

    `facts`: the `recipe`, as JSON, and what else manifests are to hold. `latest`: the checkpoint that is continued.
    """
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST) if world.size > 1 else None
    if world.is_main:
        durable.sweep(run)
    with ThreadPoolExecutor(1, thread_name_prefix="saving") as thread:
        saves = Saver(config, run, world, facts, say, latest, group, thread)
        yield saves
        saves.wait()


class Saver:
    """Saves a run's state, one save at a time. What it raises it raises on all ranks."""

    def __init__(
        self,
        config: CheckpointConfig,
        run: Path,
        world: World,
        facts: Mapping[str, Any],
        say: Callable[[str], None],
        latest: Path | None,
        group: ProcessGroup | None,
        thread: ThreadPoolExecutor,
    ) -> None:
        self.config, self.run, self.world, self.group, self.thread, self.say = config, run, world, group, thread, say
        self.facts = {name: value for name, value in facts.items() if name != "recipe"}
        self.recipe: dict[str, Any] = facts["recipe"]
        self.latest = latest
        """The newest durable checkpoint; after `wait` the same on all ranks."""
        self.checked = {latest: True} if latest else {}
        self.staged = Staged()
        self.writing: Future[str | None] | None = None
        self.failures = 0
        self.began, self.said = time.monotonic(), False

    def due(self, step: int, last: int) -> bool:
        """Whether the state is saved after `step`: every so many steps, and at the end."""
        return step == last or (self.config.every > 0 and step % self.config.every == 0)

    def overdue(self) -> bool:
        """Whether the main rank wants `save` to be called: the minutes are over, or the save before ends the run.

        Said once, for the ranks agree a step later.
        """
        if self.said:
            return False
        minutes = (time.monotonic() - self.began) / 60
        self.said = 0 < self.config.every_minutes <= minutes or self.has_failed()
        return self.said

    def has_failed(self) -> bool:
        """Whether what was being written is what ends the run."""
        if self.writing is None or not self.writing.done():
            return False
        if self.writing.exception() is not None:
            return True
        return self.writing.result() is not None and self.failures + 1 >= self.config.max_failures

    def save(
        self,
        state: TrainState,
        val: Mapping[str, Tensor | float] | None = None,
        val_ema: Mapping[str, Tensor | float] | None = None,
        now: bool = False,
    ) -> None:
        """Save `state`, once the save before is done; a step that has a checkpoint is left alone.

        `val`: losses by name of the validation set, if they were measured at this step, and `val_ema` those of the
        running mean of the weights, which `keep_best` does not go by. `now`: return when it is durable, or raise
        ValueError. A save that fails otherwise is a warning, until `max_failures` did in a row.
        """
        self.wait()
        self.began, self.said = time.monotonic(), False
        if self.latest == checkpoint.path_of(self.run, state.step):
            return
        losses = {"val": finite(val), "val_ema": finite(val_ema)}
        if self.config.background and not now:
            state = self.staged.take(state)
            self.writing = self.thread.submit(self.write, state, losses, self.staged.parts)
        else:
            self.writing = self.thread.submit(self.write, state, losses, None, now)
            self.wait(now)

    def wait(self, must: bool = False) -> None:
        """Until nothing is being written. A ValueError after too many failures, or with `must` after this one."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        problem = writing.result()
        self.failures = self.failures + 1 if problem else 0
        if problem and (must or self.failures >= self.config.max_failures):
            times = f"{self.failures} times in a row: " if self.failures > 1 else ""
            raise ValueError(f"{times}{problem} Earlier checkpoints are whole, and the same command goes on from them")

    def write(
        self,
        state: TrainState,
        losses: Mapping[str, dict[str, float | None]],
        parts: Mapping[str, Tensor] | None,
        now: bool = False,
    ) -> str | None:
        """Save, in the thread: what went wrong with it, the same on all ranks, or None; it is durable then."""
        facts = {kind: values for kind, values in losses.items() if values} | self.facts
        try:
            self.staged.ready()
            path = checkpoint.save(self.run, state, self.recipe, self.world.is_main, facts, parts, self.group)
        except (ValueError, OSError) as error:
            if self.world.is_main and not now:
                count = f"{self.failures + 1} of {self.config.max_failures} in a row"
                print(f"warning: {error} Training goes on; the next save tries again ({count})", file=sys.stderr)
            return str(error)
        self.latest = path
        if self.world.is_main:
            self.say(f"step {state.step}: saved {path}")
            self.checked[path] = True
            try:
                prune(self.run, self.config, self.checked)
            except OSError as error:
                print(f"warning: older checkpoints cannot be deleted ({error})", file=sys.stderr, flush=True)
        return None


class Staged:
    """A private copy of a rank's part of the state, in host memory.

    Where the state lies on a GPU it is pinned, and torch rounds each tensor up to a power of two of bytes.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}
        self.copied: torch.cuda.Event | None = None

    def take(self, state: TrainState) -> TrainState:
        """Copy the values of `state`; returns it with its small tensors copied too.

        Its tensors are still the live ones, for their shapes; their values are in `parts`, after `ready`.
        """
        kinds = {"guard": state.guard, "noise": state.noise}
        small = {f"{kind}.{name}": value for kind, values in kinds.items() for name, value in values.items()}
        tensors = checkpoint.parts_of(state) | small
        for name, tensor in tensors.items():
            if name not in self.parts:
                self.parts[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
                )
            self.parts[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            # The next step's kernels come after the copies on the device, so nobody has to wait for them here.
            self.copied = torch.cuda.Event()
            self.copied.record()
        guard, noise = ({name: self.parts[f"{kind}.{name}"] for name in values} for kind, values in kinds.items())
        return replace(state, guard=guard, noise=noise)

    def ready(self) -> None:
        """Wait for the copies that the device makes."""
        if self.copied is not None:
            self.copied.synchronize()


def prune(run: Path, config: CheckpointConfig, checked: dict[Path, bool]) -> None:
    """Delete the checkpoints that `keep_last`, `keep_every` and `keep_best` do not keep; never the last valid one.

    One counts as kept if its hashes were right once, when it was written or when it was first met here (`checked`
    remembers), and if the manifest is whole and files and sizes are right today. Where it would be the only one left,
    it is read and hashed anew before the others go. What is damaged does not count, and is not deleted either.
    """
    if not config.keep_last:
        return
    manifests = {path: manifest for path in checkpoint.steps(run) if (manifest := sized(path)) is not None}
    losses = {path: mean for path, manifest in manifests.items() if (mean := mean_loss(manifest)) is not None}

    def valid(path: Path) -> bool:
        if path not in checked:
            checked[path] = is_whole(path)
        return checked[path]

    kept = set(itertools.islice(filter(valid, manifests), config.keep_last))
    kept |= set(itertools.islice(filter(valid, sorted(losses, key=losses.__getitem__)), config.keep_best))
    if config.keep_every:
        kept |= {path for path, manifest in manifests.items() if manifest["step"] % config.keep_every == 0}
    gone = [path for path in manifests if path not in kept and checked.get(path, True)]
    safe = [path for path in kept if checked.get(path)]
    if gone and len(safe) == 1:
        checked[safe[0]] = is_whole(safe[0])
        gone = gone if checked[safe[0]] else []
    for path in gone:
        durable.remove(path)


def sized(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint with the files and sizes that it states; None if it is none."""
    try:
        return durable.read_sizes(path)
    except ValueError:
        return None


def is_whole(path: Path) -> bool:
    """Whether all hashes are right; that they are not is said."""
    try:
        durable.read_manifest(path)
    except ValueError as error:
        print(f"warning: {error}; it does not count as kept", file=sys.stderr, flush=True)
        return False
    return True


def finite(losses: Mapping[str, Tensor | float] | None) -> dict[str, float | None]:
    """Losses as JSON has them, which knows no NaN and no infinity."""
    return {name: float(loss) if math.isfinite(loss) else None for name, loss in (losses or {}).items()}


def mean_loss(manifest: Mapping[str, Any]) -> float | None:
    """The mean over the validation sets [nats per token]; None if it was not measured, or is not finite."""
    losses = list(manifest.get("val", {}).values())
    return None if not losses or None in losses else sum(losses) / len(losses)
